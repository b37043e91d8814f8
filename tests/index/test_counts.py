"""What several threads change at a time: no count is lost, and no bound."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, MemoryStore

from races import NoticedLock, meet
from zcache import CacheStore
from zcache._advice import recording
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("option", ["max_pending_size", "min_free_space"])
def test_the_strictest_bound_of_two_stores_that_are_made_at_once_is_in_force(
    option: str, tmp_path: Path
) -> None:
    is_pending = option == "max_pending_size"
    strict, lax = (1 << 20, 5 << 20) if is_pending else (4096, 1)
    for step in itertools.count():
        lock = NoticedLock()
        source = MemoryStore()
        cache: Any = StoreDouble(MemoryStore()) if is_pending else LocalStore(tmp_path / f"{step}")
        kept: list[CacheStore] = []

        def make(size: int, source: Any = source, cache: Any = cache, kept: Any = kept) -> None:
            kept.append(CacheStore(source, cache_store=cache, source_id="s", **{option: size}))

        make(lax)
        refresh: Any = kept[0]._cache.shared._limits
        refresh._lock = lock
        inside = ("_take_limits",)
        if not meet(lambda: make(lax), lambda: make(strict), lock, at=step, inside=inside):
            break
        shared = kept[0]._cache.shared
        assert getattr(shared.fills if is_pending else shared.place.filler, option) == strict
    assert step


def test_a_policy_and_a_bound_that_come_at_once_are_both_in_force() -> None:
    inside = ("_take_limits", "change_limits")
    for step in itertools.count():
        store = CacheStore(MemoryStore(), cache_store=MemoryStore(), max_size=10)
        shared = store._cache.shared
        handle, lock = shared.handle, NoticedLock()
        handle.limits_lock = lock
        store._cache._member.limits["max_size"] = 5

        def note(note: Callable[[dict[str, str]], None] = handle.note_policy) -> None:
            note({"eviction": "none"})

        if not meet(shared._set_limits, note, lock, at=step, inside=inside):
            break
        assert handle.limits["max_size"] == 5
        assert handle.limits["eviction"] == "none"
    assert step


def test_requests_that_two_readers_leave_out_count_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST", 0)
    store = CacheStore(MemoryStore(), cache_store=MemoryStore())
    with store.record(tmp_path / "requests") as made:
        writer: Any = made._writer

        def put() -> None:
            writer.looked_up("k", None, 1, served=True)

        for step in itertools.count():
            writer._counting, writer.left_out = NoticedLock(), 0
            if not meet(put, put, writer._counting, at=step, inside=("looked_up",)):
                break
            assert writer.left_out == 2
        assert step
