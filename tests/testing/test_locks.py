"""Holding the lock of an index, as a process that was stopped does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from zcache import CachePool, CacheStore, IndexLockTimeout, OptionTypeError, OptionValueError
from zcache.testing import hold_index_lock

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("is_pool", [False, True])
def test_lock_is_held_until_it_is_released(tmp_path: Path, is_pool: bool) -> None:
    cache = CachePool(tmp_path) if is_pool else tmp_path
    store = CacheStore(MemoryStore(), cache_store=cache, source_id="s")
    with hold_index_lock(tmp_path) as lock:
        with pytest.raises(IndexLockTimeout):
            store.cache_info()
        with pytest.raises(IndexLockTimeout, match=tmp_path.name):
            hold_index_lock(str(tmp_path))
        assert lock.release()
        store.cache_info()


@pytest.mark.parametrize("made", [True, False])
def test_directory_without_an_index_is_named(tmp_path: Path, made: bool) -> None:
    """The error was one of the system, without a path."""
    path = tmp_path if made else tmp_path / "none"
    with pytest.raises(OptionValueError) as error:
        hold_index_lock(path)
    assert f"invalid directory: {os.fspath(path)!r} has no index. Give" in str(error.value)


@pytest.mark.parametrize("bad", [None, 5, b"a", ""])
def test_what_is_no_path_is_named(bad: Any) -> None:
    kind = OptionValueError if bad == "" else OptionTypeError
    with pytest.raises(kind, match=f"invalid directory: {bad!r}. Give the path"):
        hold_index_lock(bad)
