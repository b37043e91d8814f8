"""A forked child shares no lock with its parent: a thread that held it may not exist there."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import threading
from typing import TYPE_CHECKING, Any

import zcache
from zcache._runtime import fork

if TYPE_CHECKING:
    import pytest

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


def test_a_callback_that_raises_leaves_no_other_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the locks of all that come later would stay as a thread of the parent had them."""
    ran: list[str] = []

    def fails() -> None:
        raise RuntimeError("fails")

    monkeypatch.setattr(fork, "_callbacks", [fails, lambda: ran.append("last")])
    number = os.fork()
    if not number:
        os._exit(0 if ran == ["last"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
