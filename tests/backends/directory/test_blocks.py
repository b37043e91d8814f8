"""A cache directory takes no more of its disk than `max_size`: blocks and folders count."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from directories import closed, usage
from support import buf, read, until
from zcache import CacheStore
from zcache._backends.directory import backend
from zcache._backends.directory.bound import Bound
from zcache._backends.directory.files import remove_value
from zcache._backends.directory.folders import counted
from zcache._core import Index, write_tombstone
from zcache.testing import (
    check_invariants_async,
    hold_index_lock,
    set_block_size,
    stored_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOUND = 400_000


@pytest.fixture(autouse=True)
def block_size() -> Iterator[None]:
    """Here blocks count, as everywhere outside the tests."""
    before = set_block_size(None)
    yield
    set_block_size(before)


def open_store(where: Path, source: MemoryStore, **options: object) -> CacheStore:
    options = {"source_id": "source", "max_size": BOUND, **options}
    return CacheStore(source, cache_store=LocalStore(where), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a/c/{}", "a/c/{}/0/0", "{}" + "x" * 100])
@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000])
async def test_disk_usage_never_exceeds_the_bound(tmp_path: Path, name: str, size: int) -> None:
    source = MemoryStore({name.format(n): buf(bytes(size)) for n in range(200)})
    store = open_store(tmp_path, source)
    highest = 0
    for number, key in enumerate(source._store_dict):
        await read(store, key)
        if number % 10 == 0:
            highest = max(highest, usage(tmp_path))
    assert store.drain_sync()
    await check_invariants_async(store)
    assert max(highest, usage(tmp_path)) <= BOUND
    assert store.cache_info()["current_size"] <= BOUND
    assert len(stored_sizes(store)) > 15


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 25])
@pytest.mark.parametrize("name", ["a/c/{}/0/0", "a/{}/0", "a/c/{}"])
async def test_one_value_makes_room_for_another_with_folders_of_their_own(
    tmp_path: Path, name: str, blocks: int
) -> None:
    """The folders that go with a value make room as well, so that no second one has to go."""
    size = blocks * 4096 - 100
    count = 40
    source = MemoryStore({name.format(n): buf(bytes(size)) for n in range(2 * count)})
    store = open_store(tmp_path, source, max_size=count * (blocks + 1) * 4096)
    evicted = 0
    for key in source._store_dict:
        await read(store, key)
        assert store.drain_sync()
        before, evicted = evicted, store.cache_stats()["evictions"]
        assert evicted - before <= 1
        assert usage(tmp_path) <= store.cache_info()["current_size"] <= store.max_size
    assert evicted > 0
    assert store.cache_stats()["refusals"] == 0


async def test_current_size_is_what_the_disk_holds(tmp_path: Path) -> None:
    source = MemoryStore({f"a/c/{n}/0": buf(b"x" * 3000 * n) for n in range(1, 20)})
    store = open_store(tmp_path, source, max_size=10_000_000)
    for key in source._store_dict:
        await read(store, key)
        await read(store, key, RangeByteRequest(2, 4))
        assert store.drain_sync()
        assert store.cache_info()["current_size"] == usage(tmp_path)
    await store.delete_dir("a/c/3")
    assert store.cache_info()["current_size"] == usage(tmp_path)
    del store
    await closed(tmp_path, ".")
    for path in (tmp_path / ".zcache/index").iterdir():
        path.unlink()
    store = open_store(tmp_path, source, max_size=10_000_000)
    assert store.cache_info()["current_size"] == usage(tmp_path)
    await store.clear_cache()
    assert store.cache_info()["current_size"] == usage(tmp_path)


async def test_folder_that_grows_counts(tmp_path: Path) -> None:
    """A folder of many names takes many blocks, and keeps them as long as it is there."""
    source = MemoryStore({f"a/{'n' * 100}{n}": buf(b"") for n in range(300)})
    store = open_store(tmp_path, source, max_size=5_000_000)
    for key in source._store_dict:
        await read(store, key)
    assert store.drain_sync()
    folder = (tmp_path / "a").stat().st_blocks * 512
    assert usage(tmp_path) <= store.cache_info()["current_size"]
    await store.clear_cache()
    assert store.cache_info()["current_size"] == usage(tmp_path)
    if folder > 4096:
        assert store.cache_info()["current_size"] < folder + 30_000


async def test_smaller_bound_is_enforced_without_fills(tmp_path: Path) -> None:
    source = MemoryStore({f"a/c/{n}": buf(bytes(1000)) for n in range(80)})
    store = open_store(tmp_path, source)
    for key in source._store_dict:
        await read(store, key)
    assert store.drain_sync()
    del store
    store = open_store(tmp_path, source, max_size=BOUND // 2)
    await until(lambda: usage(tmp_path) <= BOUND // 2)
    assert len(stored_sizes(store)) > 10
    other = open_store(tmp_path, source, max_size=BOUND // 4)
    await until(lambda: usage(tmp_path) <= BOUND // 4)
    # What has been deleted leaves the books after it has left the disk.
    await until(lambda: other.cache_info()["current_size"] <= BOUND // 4)
    await check_invariants_async(other)


_WRITER = """
import asyncio, sys
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore
from zcache import CacheStore
root, bound, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
source = MemoryStore({f"t/c/{(n * seed) % 211}/0": cpu.Buffer.from_bytes(bytes(n * 7 % 9000)) for n in range(600)})
store = CacheStore(source, cache_store=LocalStore(root), source_id="s", max_size=bound)
async def main():
    for key in source._store_dict:
        await store.get(key, default_buffer_prototype())
asyncio.run(main())
store.drain_sync()
"""


@pytest.mark.slow
async def test_several_processes_keep_the_bound(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path), str(BOUND)]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in (3, 5)]  # noqa: ASYNC220
    highest = 0
    while any(process.poll() is None for process in processes):
        highest = max(highest, usage(tmp_path))
        await asyncio.sleep(0.01)
    assert [process.wait() for process in processes] == [0, 0]
    assert 0 < max(highest, usage(tmp_path)) <= BOUND


async def test_write_of_what_is_not_cached_leaves_empty_folders_of_others(tmp_path: Path) -> None:
    source = MemoryStore({"a/c/0": buf(b"value")})
    store = open_store(tmp_path, source, cache_set_data=False)
    await read(store, "a/c/0")
    assert store.drain_sync()
    (tmp_path / "theirs/empty").mkdir(parents=True)
    before = store.cache_info()["current_size"]
    await store.set("theirs/empty/k", buf(b"new"))
    await store.delete("theirs/k")
    assert (tmp_path / "theirs/empty").is_dir()
    assert store.cache_info()["current_size"] == before


async def test_folder_of_tombstones_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemoryStore({"a/c/0": buf(b"value")})
    store = open_store(tmp_path, source, cache_set_data=False)
    await read(store, "a/c/0")
    assert store.drain_sync()
    before = store.cache_info()["current_size"]

    def refuse(_: str, names: list[str], *__: object) -> list[OSError]:
        return [OSError(errno.EIO, "refused") for _ in names]

    monkeypatch.setattr(backend, "remove_victims", refuse)
    monkeypatch.setattr(backend, "is_absent", lambda *_: True)
    await store.set("a/c/0", buf(b"new"))
    folder = (tmp_path / ".zcache/dropped").lstat().st_blocks * 512
    assert store.cache_info()["current_size"] == before + folder


def test_bound_tells_of_folders_that_have_grown_before_it_frees_victims(tmp_path: Path) -> None:
    """A victim without a file leaves a mark, which takes the room of the victim."""
    told: list[object] = []

    class Handle:
        """The index of a directory with one victim, of which the file is gone."""

        def call_blocking(self, step: Callable[..., object], *_: object) -> object:
            answers = {Index.evict: [(1, "a/1")], Index.expected: [None]}
            return answers.get(step, (4096, True))

        @property
        def index(self) -> Handle:
            return self

        def folder_sum(self) -> int:
            return 1

        def call_later(self, _: object, step: Callable[..., object], *args: object) -> None:
            told.append((step, *args))

    def remove(names: list[str], known: list[None]) -> list[None]:
        write_tombstone(str(tmp_path), names[0])
        return known

    evicted, _ = Bound(Handle(), lambda: 1.0, remove, lambda: None).evict_excess()  # type: ignore[arg-type]
    assert evicted
    grown = sum(
        os.lstat(tmp_path / name).st_blocks * 512 for name in (".zcache", ".zcache/dropped")
    )
    expected = [(Index.confirm_deletes, [1], [])]
    assert told == ([(Index.count_folders_since, 1, grown), *expected] if grown else expected)


@pytest.mark.parametrize("how", ["ends", "fails", "before", "lock is taken"])
async def test_folders_removed_by_name_count_for_who_removes_them(tmp_path: Path, how: str) -> None:
    store = open_store(tmp_path, MemoryStore({"a/c/0": buf(bytes(100))}))
    await read(store, "a/c/0")
    assert store.drain_sync()
    handle = store._cache.shared.handle
    size = store.cache_info()["current_size"]

    def remove() -> None:
        remove_value(str(tmp_path), "a/c/0")
        assert not (tmp_path / "a").exists()

    if how == "before":
        # It is not of what is done then.
        remove()
        with counted(handle):
            pass
    elif how == "lock is taken":
        with hold_index_lock(tmp_path), counted(handle):
            remove()
        # From which sum it was removed is not known.
    else:
        with contextlib.suppress(ZeroDivisionError), counted(handle):
            remove()
            if how == "fails":
                raise ZeroDivisionError
    is_counted = how in ("ends", "fails")
    assert (store.cache_info()["current_size"] < size) is is_counted
