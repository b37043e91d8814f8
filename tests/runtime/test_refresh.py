"""What is brought up to date for all who ask: nothing is lost, and a finalizer waits for no one."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from forks import fork, wait
from support import buf
from zcache import CachePool, CacheStore
from zcache._index.handle import IndexHandle
from zcache._runtime.refresh import Refresh

if TYPE_CHECKING:
    from pathlib import Path


def test_who_does_not_wait_leaves_it_to_who_is_at_work() -> None:
    refresh, order = Refresh(), []
    is_at_work, may_go_on = threading.Event(), threading.Event()

    def work() -> None:
        order.append(threading.current_thread().name)
        is_at_work.set()
        assert may_go_on.wait(60)

    first = threading.Thread(target=lambda: refresh.run(work, waits=True), name="first")
    first.start()
    assert is_at_work.wait(60)
    for _ in range(3):
        refresh.run(work, waits=False)
    may_go_on.set()
    first.join()
    # Once for all that have asked meanwhile.
    assert order == ["first"] * 2


def test_who_waits_has_it_done_and_who_asks_inside_has_it_done_again() -> None:
    refresh, asked, done = Refresh(), [3], []

    def work() -> None:
        seen = asked[0]
        if seen:
            asked[0] -= 1
            refresh.run(work, waits=bool(seen % 2))
        done.append(asked[0])

    refresh.run(work, waits=True)
    assert done[-1] == 0


def test_what_raises_is_at_work_no_more() -> None:
    refresh, done = Refresh(), []
    with pytest.raises(ZeroDivisionError):
        refresh.run(lambda: 1 // 0, waits=True)
    threading.Thread(target=lambda: refresh.run(lambda: done.append(1), waits=False)).start()
    refresh.run(lambda: done.append(2), waits=True)
    assert 2 in done


def test_forked_child_waits_for_no_thread_of_its_parent() -> None:
    refresh = Refresh()
    is_at_work, may_go_on = threading.Event(), threading.Event()

    def work() -> None:
        is_at_work.set()
        may_go_on.wait(60)

    thread = threading.Thread(target=lambda: refresh.run(work, waits=True))
    thread.start()
    assert is_at_work.wait(60)
    assert wait([fork(lambda: refresh.run(lambda: None, waits=True))]) == [0]
    may_go_on.set()
    thread.join()


def test_garbage_that_is_collected_inside_a_lock_waits_for_no_one_who_changes_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = MemoryStore({"a": buf(b"1")}), CachePool(tmp_path)
    store = CacheStore(source, cache_store=cache, source_id="1")
    # As one that has come from another process: it is kept for a while, and counts as a user until it is dropped.
    copy = CacheStore.__new__(CacheStore)
    copy.__setstate__({**store.__getstate__(), "token": "of another process"})
    garbage: list[Any] = [copy]
    garbage.append(garbage)
    del garbage, copy
    is_inside, is_asked = threading.Event(), threading.Event()
    watch, change = IndexHandle.watch, IndexHandle.change_limits

    def watch_slowly(self: IndexHandle, watcher: Any) -> None:
        with self.lock:
            is_inside.set()
            assert is_asked.wait(60)
            # It may come at each object that is made.
            gc.collect()
            watch(self, watcher)

    def change_later(self: IndexHandle, limits: Any) -> None:
        if threading.current_thread().name == "second":
            is_asked.set()
        change(self, limits)

    monkeypatch.setattr(IndexHandle, "watch", watch_slowly)
    monkeypatch.setattr(IndexHandle, "change_limits", change_later)
    first = threading.Thread(
        target=lambda: CacheStore(source, cache_store=cache, source_id="2"), daemon=True
    )
    first.start()
    assert is_inside.wait(60)
    second = threading.Thread(target=CachePool, args=(tmp_path,), name="second", daemon=True)
    second.start()
    for thread in (first, second):
        thread.join(60)
        assert not thread.is_alive()
