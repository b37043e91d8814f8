"""A forked child shares no lock with its parent: a thread that held it may not exist there."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pkgutil
import threading
from typing import Any

import pytest

import forks
import zcache
from zcache._runtime import fork

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
_KINDS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)


def _locks() -> dict[str, Any]:
    """Those of all modules, by name."""
    names = [one.name for one in pkgutil.walk_packages(zcache.__path__, "zcache.")]
    return {
        f"{module}.{name}": value
        for module in names
        if module != "zcache._core"
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, _KINDS)
    }


def test_each_lock_of_a_module_is_renewed_in_a_forked_child() -> None:
    before = _locks()
    assert "zcache._protocol.single_flight._lock" in before
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        now = _locks()
        theirs.send([name for name, lock in before.items() if now[name] is lock])

    process: Any = context.Process(target=child)
    process.start()
    assert ours.poll(60)
    assert ours.recv() == []
    process.join(60)


class Ending:
    """One that needs a lock as it ends; it is part of a cycle."""

    def __init__(self, lock: list[threading.Lock]) -> None:
        self.lock, self.itself = lock, self

    def __del__(self) -> None:
        with self.lock[0]:
            pass


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_garbage_waits_until_all_callbacks_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end may need a lock that a later one makes anew, and that a thread of the parent held."""
    lock = [threading.Lock()]

    def renew() -> None:
        lock[0] = threading.Lock()

    def make_garbage() -> None:
        Ending(lock)
        kept.extend([] for _ in range(100_000))

    def child() -> None:
        assert gc.isenabled()

    kept: list[object] = []
    monkeypatch.setattr(fork, "_callbacks", [make_garbage, renew])
    with lock[0]:
        assert forks.run(child) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_callback_that_raises_leaves_no_other_out(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Else the locks of all that come later would stay as a thread of the parent had them."""
    ran: list[str] = []

    def fails() -> None:
        raise error("fails")

    def child() -> None:
        assert ran == ["last"]

    monkeypatch.setattr(fork, "_callbacks", [fails, lambda: ran.append("last")])
    assert forks.run(child) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_can_fork_as_well() -> None:
    def child() -> None:
        assert forks.run(lambda: None) == 0

    assert forks.run(child) == 0
