"""What is zcache's in a cache directory stays zcache's: after touches, copies, purges and lost parts."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, MemoryStore

from support import buf, logged, read
from zcache import CacheOwnershipError, CacheStore
from zcache._core import crc32c
from zcache.testing import StoreDouble, check_invariants_async, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(20)}


def source() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(value) for key, value in VALUES.items()}))


def open_store(where: Path, behind: StoreDouble, **options: object) -> CacheStore:
    options = {"source_id": "source", **options}
    return CacheStore(behind, cache_store=LocalStore(where), **options)  # type: ignore[arg-type]


async def warmed(where: Path) -> None:
    store = open_store(where, source())
    for key in VALUES:
        await read(store, key)
    assert store.drain_sync()
    assert stored_sizes(store).keys() == VALUES.keys()


async def reads(store: CacheStore, behind: StoreDouble) -> int:
    """How many reads reach the source while all values are read, rightly."""
    before = behind.calls["get"]
    for key, value in VALUES.items():
        assert await read(store, key) == value
    assert store.drain_sync()
    return behind.calls["get"] - before


def files_of_values(where: Path) -> list[Path]:
    found = [path for path in where.rglob("*") if path.is_file()]
    return [path for path in found if ".zcache" not in path.parts]


def touch_all(where: Path) -> None:
    for path in files_of_values(where):
        path.touch()


def drop_notes(where: Path) -> None:
    """Lose the extended attributes, as most copies do."""
    for path in files_of_values(where):
        if "user.zcache" in os.listxattr(path):
            os.removexattr(path, "user.zcache")


def lose_index(where: Path) -> None:
    shutil.rmtree(where / ".zcache/index")


def boot_again(where: Path) -> None:
    """Have the index be of an earlier boot of the machine, or of another machine."""
    path = where / ".zcache/index/head"
    head = bytearray(path.read_bytes())
    check = int.from_bytes(head[12:16], "little")
    end = next(end for end in range(128, 4096) if crc32c(bytes(head[16:end])) == check)
    head[88:128] = bytes(40)
    head[12:16] = crc32c(bytes(head[16:end])).to_bytes(4, "little")
    path.write_bytes(head)


@pytest.mark.parametrize("lose", [None, lose_index, boot_again])
async def test_touched_values_are_served_and_evicted(
    tmp_path: Path, lose: Callable[[Path], None] | None
) -> None:
    await warmed(tmp_path)
    touch_all(tmp_path)
    if lose is not None:
        lose(tmp_path)
    behind = source()
    store = open_store(tmp_path, behind)
    assert await reads(store, behind) == 0
    await check_invariants_async(store)
    await store.clear_cache()
    assert files_of_values(tmp_path) == []
    assert store.cache_info()["current_size"] == 0


async def test_touched_in_use_are_evicted(tmp_path: Path) -> None:
    behind = source()
    store = open_store(tmp_path, behind)
    await reads(store, behind)
    touch_all(tmp_path)
    drop_notes(tmp_path)
    await store.clear_cache()
    assert files_of_values(tmp_path) == []
    assert store.cache_info()["current_size"] == 0
    await reads(store, behind)
    touch_all(tmp_path)
    drop_notes(tmp_path)
    for key in VALUES:
        await store.set(key, buf(b"new"))
    assert store.drain_sync()
    assert set(stored_sizes(store).values()) == {3}


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("cp", "cp -r {0} {1}"),
        ("tar", "mkdir {1} && tar -C {0} -cf - . | tar -C {1} -xf -"),
        ("rsync", "rsync -r {0}/ {1}"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_copies_stay_ours(tmp_path: Path, tool: str, command: str, elsewhere: bool) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"there is no {tool} here")
    original, copy = tmp_path / "original", tmp_path / "copy"
    await warmed(original)
    subprocess.run(command.format(original, copy), shell=True, check=True)  # noqa: ASYNC221
    if elsewhere:
        boot_again(copy)
    behind = source()
    store = open_store(copy, behind)
    assert await reads(store, behind) == 0
    await store.clear_cache()
    assert files_of_values(copy) == []
    assert len(files_of_values(original)) == len(VALUES)


async def test_damaged_copy_is_not_taken_in(tmp_path: Path) -> None:
    """A file counts as ours by the index only if it has the bytes that the index knows."""
    await warmed(tmp_path)
    drop_notes(tmp_path)
    (tmp_path / "a/c/3").write_bytes(b"?" * 1000)
    touch_all(tmp_path)
    boot_again(tmp_path)
    behind = source()
    store = open_store(tmp_path, behind)
    assert await reads(store, behind) == 1
    assert (tmp_path / "a/c/3").read_bytes() == b"?" * 1000
    await store.clear_cache()
    assert files_of_values(tmp_path) == [tmp_path / "a/c/3"]


async def test_delete_that_leaves_a_foreign_file_has_failed(tmp_path: Path) -> None:
    behind = source()
    store = open_store(tmp_path, behind)
    await reads(store, behind)
    path = tmp_path / "a/c/3"
    path.unlink()
    path.write_bytes(b"theirs")
    await store.clear_cache()
    assert path.read_bytes() == b"theirs"
    assert store.cache_info()["current_size"] > 0
    assert await read(store, "a/c/3") == VALUES["a/c/3"]


async def test_nothing_helps_says_so_once_and_adopt_cures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await warmed(tmp_path)
    drop_notes(tmp_path)
    touch_all(tmp_path)
    lose_index(tmp_path)
    behind = source()
    with caplog.at_level(logging.WARNING, "zcache"):
        store = open_store(tmp_path, behind)
        assert await reads(store, behind) == len(VALUES)
        assert await reads(store, behind) == len(VALUES)
    (said,) = [r.message for r in logged(caplog) if "adopt=True" in r.message]
    assert f"{len(VALUES)} files" in said
    assert len(files_of_values(tmp_path)) == len(VALUES)
    del store
    store = open_store(tmp_path, behind, adopt=True)
    assert await reads(store, behind) == 0
    await store.clear_cache()
    assert files_of_values(tmp_path) == []


# ------------------------------------------------------------------- lost parts

PARTS = [
    "stamp.json",
    "index/stamp.json",
    "index/head",
    "index/lock",
    "index/owner",
    "index",
    "tmp",
    "ranges",
    "stamp.json index/stamp.json",
    "stamp.json index",
    "stamp.json tmp",
    "",
]


def lose_parts(where: Path, parts: str) -> None:
    for part in parts.split() or [""]:
        path = where / ".zcache" / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("parts", PARTS)
async def test_lost_parts_at_rest_cost_nothing(tmp_path: Path, parts: str) -> None:
    await warmed(tmp_path)
    lose_parts(tmp_path, parts)
    behind = source()
    store = open_store(tmp_path, behind)
    if "user.zcache" in os.listxattr(tmp_path / "a/c/1"):
        assert await reads(store, behind) == 0
    await reads(store, behind)
    assert await reads(store, behind) == 0
    await check_invariants_async(store)


@pytest.mark.parametrize("parts", ["stamp.json", "stamp.json index/stamp.json", "tmp", "ranges"])
async def test_lost_parts_in_use_come_back(tmp_path: Path, parts: str) -> None:
    behind = source()
    store = open_store(tmp_path, behind)
    await reads(store, behind)
    lose_parts(tmp_path, parts)
    store._cache.shared.place.recovery._last_reclaim = 0  # As if a second had passed.
    await store._store.set("b", buf(b"new"))
    assert await read(store, "b") == b"new"
    assert store.drain_sync()
    for part in parts.split():
        assert (tmp_path / ".zcache" / part).exists() or part == "ranges"
    other = source()
    del store
    assert await reads(open_store(tmp_path, other), other) == 0


async def test_lost_stamp_never_leaves_values_to_another_source(tmp_path: Path) -> None:
    await warmed(tmp_path)
    lose_parts(tmp_path, "")
    behind = StoreDouble(MemoryStore({key: buf(b"other") for key in VALUES}))
    store = open_store(tmp_path, behind, source_id="another")
    for key in VALUES:
        assert await read(store, key) == b"other"
    assert store.drain_sync()
    assert set(stored_sizes(store).values()) == {5}


async def test_lost_stamp_other_source_in_the_copy_is_refused(tmp_path: Path) -> None:
    await warmed(tmp_path)
    lose_parts(tmp_path, "stamp.json")
    with pytest.raises(CacheOwnershipError, match="not of another"):
        open_store(tmp_path, source(), source_id="another")
    assert len(files_of_values(tmp_path)) == len(VALUES)


async def test_lost_stamp_foreign_files_stay(tmp_path: Path) -> None:
    await warmed(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    lose_parts(tmp_path, "stamp.json index/stamp.json")
    behind = source()
    store = open_store(tmp_path, behind)
    await reads(store, behind)
    await store.clear_cache()
    assert files_of_values(tmp_path) == [tmp_path / "notes.txt"]


async def test_folder_of_other_files_is_refused_whatever_signature(tmp_path: Path) -> None:
    """A copy of one of our values among a user's files does not make them a cache."""
    await warmed(tmp_path / "cache")
    (tmp_path / "data").mkdir()
    shutil.copy2(tmp_path / "cache/a/c/1", tmp_path / "data/one")
    (tmp_path / "data/two").write_text("mine")
    with pytest.raises(CacheOwnershipError, match="not empty"):
        open_store(tmp_path / "data", source())
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"one", "two"}


@pytest.mark.parametrize(
    "name",
    ["lost+found/", ".DS_Store", ".nfs0001", ".Trash-1000/", ".snapshot/", "Thumbs.db", "._x"],
)
async def test_what_systems_leave_is_empty_enough(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
        (path / "kept").write_text("theirs")
    else:
        path.write_text("theirs")
    behind = source()
    store = open_store(tmp_path, behind)
    await reads(store, behind)
    assert await reads(store, behind) == 0
    await store.clear_cache()
    assert path.exists()


async def test_adopt_signs_nothing_of_another_source(tmp_path: Path) -> None:
    await warmed(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheOwnershipError, match="not of another"):
        open_store(tmp_path, source(), source_id="another", adopt=True)
    await open_store(tmp_path, source()).clear_cache()
    assert files_of_values(tmp_path) == [tmp_path / "notes.txt"]
