"""Folders of a cache directory: they go with their last value, and none stays in the way of one."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import PurePath
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from directories import closed
from support import buf, read
from zcache import CachePool, CacheStore
from zcache._backends.directory.files import remove_empty_folders
from zcache._backends.directory.temporary import remove_unfinished_folders
from zcache._core import write_tombstone
from zcache.testing import FakeClock, StoreDouble, check_invariants_async, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def folders(where: Path) -> set[str]:
    """Folders of values in a cache directory."""
    found = {str(path.relative_to(where)) for path in where.rglob("*") if path.is_dir()}
    own = {".zcache", ".zcache/index", ".zcache/tmp", ".zcache/dropped"}
    return found - own


def open_store(where: Path, source: MemoryStore | StoreDouble, **options: object) -> CacheStore:
    options = {"source_id": "source", **options}
    return CacheStore(source, cache_store=LocalStore(where), **options)  # type: ignore[arg-type]


async def filled(store: CacheStore, key: str) -> None:
    await read(store, key)
    assert store.drain_sync()


async def test_eviction_last_value_takes_its_folders(tmp_path: Path) -> None:
    source = MemoryStore({f"t/c/{n}/0/0": buf(bytes(5000)) for n in range(30)})
    store = open_store(tmp_path, source, max_size=100_000)
    for n in range(30):
        await filled(store, f"t/c/{n}/0/0")
    kept = stored_sizes(store)
    expected = set()
    for name in kept:
        expected.update(str(above) for above in list(PurePath(name).parents)[:-1])
    assert 0 < len(kept) < 30
    assert folders(tmp_path) == expected


@pytest.mark.parametrize("how", ["clear", "write", "delete_dir", "delete"])
async def test_no_value_left_no_folder_left(tmp_path: Path, how: str) -> None:
    source = MemoryStore({"t/c/0/0": buf(bytes(100)), "t/c/0/1": buf(bytes(100))})
    store = open_store(tmp_path, source, max_size=100_000, cache_set_data=False)
    await filled(store, "t/c/0/0")
    await read(store, "t/c/0/1", RangeByteRequest(2, 4))
    assert store.drain_sync()
    assert ".zcache/ranges/t/c/0" in folders(tmp_path)
    if how == "clear":
        await store.clear_cache()
    elif how == "delete_dir":
        await store.delete_dir("t")
    else:
        for key in ("t/c/0/0", "t/c/0/1"):
            await (store.delete(key) if how == "delete" else store.set(key, buf(b"new")))
    assert folders(tmp_path) == set()
    await check_invariants_async(store)


async def test_empty_folder_in_the_way_is_replaced(tmp_path: Path) -> None:
    source = MemoryStore({"lat/c/0": buf(b"value")})
    store = open_store(tmp_path, source, max_size=100_000)
    (tmp_path / "lat/c/0/1/2").mkdir(parents=True)
    await filled(store, "lat/c/0")
    assert (tmp_path / "lat/c/0").read_bytes() == b"value"
    await check_invariants_async(store)


@pytest.mark.parametrize("how", ["delete_dir", "clear", "delete", "write", "rebuild"])
async def test_folders_of_others_are_neither_counted_nor_removed(tmp_path: Path, how: str) -> None:
    source = MemoryStore({"a/c/0": buf(b"value")})
    store = open_store(tmp_path, source, max_size=1_000_000)
    await filled(store, "a/c/0")
    size = store.cache_info()["current_size"]
    for name in {f"{above}theirs/{n}" for above in ("", "a/") for n in range(40)}:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("theirs")
    before = folders(tmp_path)
    if how == "delete_dir":
        (tmp_path / "empty").mkdir()
        before = folders(tmp_path)
        for prefix in ("b", "theirs", "a/theirs/1", "with"):
            await store.delete_dir(prefix)
    elif how == "clear":
        await store.clear_cache()
        await filled(store, "a/c/0")
    elif how == "delete":
        await store.delete("theirs/1/chunk")
    elif how == "write":
        await store.set("a/c/0", buf(b"again"))
        assert store.drain_sync()
    else:
        del store
        await closed(tmp_path, ".")
        for path in (tmp_path / ".zcache/index").iterdir():
            path.unlink()
        store = open_store(tmp_path, source, max_size=1_000_000)
    assert folders(tmp_path) == before
    assert store.cache_info()["current_size"] == size
    assert stored_sizes(store) == {"a/c/0": 5}


async def test_overwritten_with_fewer_dimensions_is_cached_again(tmp_path: Path) -> None:
    source = MemoryStore({"lat/c/0/0": buf(b"two")})
    store = open_store(tmp_path, source, max_size=100_000)
    await filled(store, "lat/c/0/0")
    await store.delete_dir("lat")
    await store.set("lat/c/0", buf(b"one"))
    assert store.drain_sync()
    assert stored_sizes(store) == {"lat/c/0": 3}
    await store.delete_dir("lat")
    await store.set("lat/c/0/0", buf(b"two"))
    assert store.drain_sync()
    assert stored_sizes(store) == {"lat/c/0/0": 3}


# What was cached of an array or a group, and a key that no file system can hold beside it.
REPLACED = [
    (["lat/c/0/0", "lat/c/0/1"], "lat/c/0"),
    (["lat/c/0"], "lat/c/0/1"),
    (["lat/c/0"], "lat/c/0/1/2/3"),
    (["a/b/zarr.json", "a/b/c/0"], "a"),
    (["a"], "a/zarr.json"),
]


@pytest.mark.parametrize("is_opened_again", [False, True])
@pytest.mark.parametrize(("old", "new"), REPLACED)
async def test_overwritten_by_others_is_cached_again_where_the_old_values_are_outdated(
    old: list[str],
    new: str,
    is_opened_again: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner, clock = MemoryStore({key: buf(b"old") for key in old}), FakeClock()
    source = StoreDouble(inner)
    store = open_store(tmp_path, source, max_age_seconds=60, clock=clock)
    for key in old:
        await filled(store, key)
    inner._store_dict.clear()
    inner._store_dict[new] = buf(b"new")
    for _ in range(2):
        await filled(store, new)
    assert set(stored_sizes(store)) == set(old), "what is fresh stays"
    refused = [r.getMessage() for r in caplog.records if "cannot hold both" in r.getMessage()]
    assert len(refused) == 1
    assert repr(new) in refused[0]
    if is_opened_again:
        del store
        await closed(tmp_path, ".")
        store = open_store(tmp_path, source, max_age_seconds=60, clock=clock)
    clock.advance(61)
    await filled(store, new)
    assert stored_sizes(store) == {new: 3}
    before = source.calls["get"]
    assert await read(store, new) == b"new"
    assert source.calls["get"] == before
    assert store.cache_stats()["cache_failures"] == 0
    await check_invariants_async(store)


@pytest.mark.parametrize(("old", "new"), REPLACED)
async def test_source_that_holds_both_keeps_the_fresh_value_cached(
    old: list[str], new: str, tmp_path: Path
) -> None:
    source = MemoryStore({key: buf(b"value") for key in (*old, new)})
    clock = FakeClock()
    store = open_store(tmp_path, source, max_age_seconds=60, clock=clock)
    for key in (*old, new) * 3:
        clock.advance(1)
        assert await read(store, key) == b"value"
        assert store.drain_sync()
        assert new not in stored_sizes(store)
    assert set(stored_sizes(store)) == set(old)
    await check_invariants_async(store)


@pytest.mark.parametrize(("old", "new"), REPLACED)
async def test_age_of_a_key_says_nothing_about_values_in_its_way(
    old: list[str], new: str, tmp_path: Path
) -> None:
    source = MemoryStore({key: buf(b"value") for key in (*old, new)})
    clock = FakeClock()
    ages = {new: 1, "**": "infinity"}
    store = open_store(tmp_path, source, max_age_seconds=ages, clock=clock)
    for key in old:
        await filled(store, key)
    clock.advance(1000)
    await filled(store, new)
    assert set(stored_sizes(store)) == set(old)
    await check_invariants_async(store)


@pytest.mark.parametrize(("old", "new"), REPLACED)
async def test_pool_holds_both(old: list[str], new: str, tmp_path: Path) -> None:
    source = MemoryStore({key: buf(b"value") for key in (*old, new)})
    pool = CachePool(tmp_path, max_size="1MB")
    with CacheStore(source, cache_store=pool, source_id="source") as store:
        for key in (*old, new):
            await filled(store, key)
        assert all(store.is_cached(key) for key in (*old, new))


async def test_outdated_values_in_the_way_go_and_a_file_of_others_stays(tmp_path: Path) -> None:
    inner, clock = MemoryStore({"lat/c/0/0": buf(b"old")}), FakeClock()
    store = open_store(tmp_path, inner, max_age_seconds=60, clock=clock)
    await filled(store, "lat/c/0/0")
    (tmp_path / "lat/c/0/theirs").write_text("theirs")
    inner._store_dict["lat/c/0"] = buf(b"new")
    clock.advance(61)
    await filled(store, "lat/c/0")
    assert stored_sizes(store) == {}
    assert (tmp_path / "lat/c/0/theirs").read_text() == "theirs"
    await check_invariants_async(store)


async def test_folder_with_foreign_file_stays_and_disturbs_no_other_key(tmp_path: Path) -> None:
    values = {f"b/c/{n}": buf(bytes(100)) for n in range(20)}
    source = StoreDouble(MemoryStore({"lat/c/0": buf(b"value"), **values}))
    store = open_store(tmp_path, source, max_size=1_000_000)
    (tmp_path / "lat/c/0").mkdir(parents=True)
    (tmp_path / "lat/c/0/theirs").write_text("theirs")
    for _ in range(100):
        assert await read(store, "lat/c/0") == b"value"
    for key in values:
        await filled(store, key)
    assert set(stored_sizes(store)) == set(values)
    assert store.cache_stats()["cache_skips"] == 0
    assert (tmp_path / "lat/c/0/theirs").read_text() == "theirs"


async def test_keys_that_cannot_be_stored_evict_nothing_again(tmp_path: Path) -> None:
    """An array with a name too long for the file system closes the cache to no other array."""
    long = {f"{'n' * 300}/c/{n}": buf(bytes(1000)) for n in range(60)}
    values = {f"b/c/{n}": buf(bytes(1000)) for n in range(10)}
    source = StoreDouble(MemoryStore({**long, **values}))
    store = open_store(tmp_path, source, max_size=200_000)
    for key in long:
        await filled(store, key)
    for key in values:
        await filled(store, key)
    before = store.cache_stats()
    for _ in range(100):
        await read(store, next(iter(long)))
    assert store.drain_sync()
    assert store.cache_stats()["evictions"] == before["evictions"]
    assert set(stored_sizes(store)) == set(values)


async def test_rebuild_removes_empty_folders_and_leaves_those_of_the_system(tmp_path: Path) -> None:
    source = MemoryStore({"a/c/0": buf(b"value")})
    store = open_store(tmp_path, source)
    await filled(store, "a/c/0")
    del store
    await closed(tmp_path, ".")
    for name in ("t/c/1/0", "lost+found", ".Trash-0"):
        (tmp_path / name).mkdir(parents=True)
    for path in (tmp_path / ".zcache/index").iterdir():
        path.unlink()
    store = open_store(tmp_path, source)
    assert folders(tmp_path) == {"a", "a/c", "lost+found", ".Trash-0"}
    assert stored_sizes(store) == {"a/c/0": 5}


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A volume that takes few files."""
    image, where = tmp_path / "image", tmp_path / "volume"
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    for command in (
        ["mkfs.ext4", "-q", "-N", "128", "-O", "^has_journal", "-m", "0", image],
        ["mount", "-o", "loop", image, where],
    ):
        try:
            done = subprocess.run([*map(str, command)], capture_output=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        if done.returncode:
            pytest.skip(f"no such volume here: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


async def test_volume_out_of_inodes_evicts(few_inodes: Path) -> None:
    source = StoreDouble(MemoryStore({f"a/c/{n}/0": buf(bytes([n])) for n in range(200)}))
    store = open_store(few_inodes / "cache", source, min_free_space=0)
    for n in range(200):
        assert await read(store, f"a/c/{n}/0") == bytes([n])
        assert store.drain_sync()
    assert store.cache_stats()["evictions"] > 50
    before = source.calls["get"]
    assert await read(store, "a/c/199/0") == bytes([199])
    assert source.calls["get"] == before
    await check_invariants_async(store)
    await store.clear_cache()
    await filled(store, "a/c/1/0")
    assert stored_sizes(store) == {"a/c/1/0": 1}


async def test_volume_without_inodes_takes_nothing_and_serves(few_inodes: Path) -> None:
    source = StoreDouble(MemoryStore({f"a/c/{n}/0": buf(bytes([n])) for n in range(10)}))
    store = open_store(few_inodes / "cache", source, min_free_space=0)
    await filled(store, "a/c/1/0")
    taken = []
    with contextlib.suppress(OSError):
        for n in range(1000):
            path = few_inodes / str(n)
            path.touch()
            taken.append(path)
    for n in range(10):
        assert await read(store, f"a/c/{n}/0") == bytes([n])
        assert store.drain_sync()
    for path in taken:
        path.unlink()
    for n in range(10):
        await filled(store, f"a/c/{n}/0")
    assert len(stored_sizes(store)) == 10
    await check_invariants_async(store)


@pytest.fixture
def appended_to(tmp_path: Path) -> Iterator[Path]:
    """A folder for a cache, on a volume where a folder can be one that only takes names."""
    root = tmp_path / "cache"
    root.mkdir()
    if not takes_names_only(root, True):
        pytest.skip("this user may not set that mark, or the file system knows none")
    takes_names_only(root, False)
    yield root
    takes_names_only(root, False)


def takes_names_only(root: Path, says_so: bool) -> bool:
    """Have no name in a folder and those in it be changed or removed, or end that."""
    found = [root, *(path for path in root.rglob("*") if path.is_dir())]
    command = ["chattr", "+a" if says_so else "-a", *map(str, found)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unfinished(root: Path) -> list[Path]:
    return list(root.rglob(".zcache-*"))


async def test_folder_that_can_neither_be_finished_nor_removed_is_followed_by_no_other(
    appended_to: Path,
) -> None:
    source = MemoryStore({f"a/{n}/0": buf(bytes(3000)) for n in range(20)})
    store = open_store(appended_to, source, max_size="100kB", min_free_space=0)
    await filled(store, "a/0/0")
    takes_names_only(appended_to, True)
    for _ in range(3):
        for n in range(20):
            await read(store, f"a/{n}/0")
        assert store.drain_sync()
        with contextlib.suppress(OSError):
            write_tombstone(str(appended_to), "a/0/0")
        assert len(unfinished(appended_to)) == 1
    takes_names_only(appended_to, False)
    store.close()
    del store
    await closed(appended_to.parent)
    with open_store(appended_to, source, max_size="100kB", min_free_space=0):
        assert unfinished(appended_to) == []


def test_unfinished_folder_of_others_goes_if_it_is_empty(tmp_path: Path) -> None:
    left, full = (f".zcache/.zcache-{n:016x}" for n in (1, 2))
    for name in (left, f"{full}/theirs", ".zcache/.zcache-mine", ".zcache-0123456789abcdef"):
        (tmp_path / name).mkdir(parents=True)
    remove_unfinished_folders(str(tmp_path))
    assert not (tmp_path / left).exists()
    assert (tmp_path / full / "theirs").is_dir()
    assert (tmp_path / ".zcache/.zcache-mine").is_dir()
    # What is in the directory itself goes with the other empty folders, at a rebuild.
    assert (tmp_path / ".zcache-0123456789abcdef").is_dir()
    remove_empty_folders(str(tmp_path))
    assert not (tmp_path / ".zcache-0123456789abcdef").exists()
    assert (tmp_path / full / "theirs").is_dir()
