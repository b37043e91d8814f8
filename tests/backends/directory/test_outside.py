"""What links and mounts below a cache directory lead to is neither served, nor counted, nor changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, MemoryStore

from directories import closed, complete, sizes_in
from support import buf, read, until
from zcache import CacheStore
from zcache.testing import StoreDouble, check_invariants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(8)}
ROUNDS = 150


def source() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(value) for key, value in VALUES.items()}))


def open_store(where: Path, behind: StoreDouble, **options: object) -> CacheStore:
    cache = LocalStore(where)
    return CacheStore(behind, cache_store=cache, source_id="source", **options)  # type: ignore[arg-type]


async def check_reads(store: CacheStore, behind: StoreDouble) -> None:
    for key in VALUES:
        assert await read(store, key) == await read(behind.inner, key), key
    assert store.drain_sync()


def looks_like_ours(where: Path, home: Path) -> dict[str, tuple[int, bytes]]:
    """Copy values with all that names their source, but with other bytes; returns what is there."""
    shutil.copytree(where / "a", home)
    for path in home.rglob("*"):
        if path.is_file():
            times = path.stat()
            path.write_bytes(b"?" * 1000)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return contents(home)


def contents(home: Path) -> dict[str, tuple[int, bytes]]:
    found = [path for path in home.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(home)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found
    }


@pytest.fixture(params=["link", "mount"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield request.param
    for path in ("cache/a", "cache/.zcache/ranges"):
        subprocess.run(["umount", "-l", tmp_path / path], capture_output=True, check=False)


def lead(path: Path, home: Path, kind: str) -> None:
    """Have a folder lead to another one."""
    if path.exists():
        shutil.rmtree(path)
    if kind == "link":
        path.symlink_to(home)
        return
    path.mkdir()
    done = subprocess.run(["mount", "--bind", home, path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")


@pytest.mark.parametrize("when", ["at rest", "in use", "without an index"])
async def test_folder_that_leads_outside(tmp_path: Path, kind: str, when: str) -> None:
    where, home, behind = tmp_path / "cache", tmp_path / "home", source()
    # Links are seen at each hit; mounts, which only root can make, by the bytes.
    verify = "never" if kind == "link" else "first"
    store = open_store(where, behind, verify=verify)
    await check_reads(store, behind)
    before = looks_like_ours(where, home)
    if when != "in use":
        del store
    lead(where / "a", home, kind)
    if when == "without an index":
        shutil.rmtree(where / ".zcache/index")
    if when != "in use":
        store = open_store(where, behind, verify=verify)
    for _ in range(2):
        await check_reads(store, behind)
    await store.set("a/c/1", buf(b"new"))
    await store.delete("a/c/2")
    await check_reads(store, behind)
    await store.delete_dir("a")
    await check_reads(store, behind)
    await store.clear_cache()
    assert store.cache_info()["current_size"] == 0
    assert contents(home) == before
    # Others are cached as before.
    await store.set("b", buf(b"b"))
    assert store.drain_sync()
    hits = store.cache_stats()["hits"]
    assert await read(store, "b") == b"b"
    assert store.cache_stats()["hits"] == hits + 1


@pytest.mark.parametrize("index", ["kept", "lost"])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("instead", ["nothing", "link"])
@pytest.mark.parametrize("moved", ["a", "a/c/1"])
async def test_write_while_its_file_is_moved_away_is_read_once_that_is_back(
    tmp_path: Path, moved: str, instead: str, seen: bool, index: str
) -> None:
    where, aside, behind = tmp_path / "cache", tmp_path / "aside", source()
    store = open_store(where, behind, verify="never")
    await check_reads(store, behind)
    (where / moved).rename(aside)
    if instead == "link":
        (where / moved).symlink_to(tmp_path)
    if seen:
        # A hit finds nothing, so the index does not know of the file any more when the key is written.
        await check_reads(store, behind)
    await store.set("a/c/1", buf(b"new" * 100))
    await store.delete("a/c/2")
    assert store.drain_sync()
    put_back(aside, where / moved)
    if index == "lost":
        del store
        await closed(tmp_path)
        shutil.rmtree(where / ".zcache/index")
        store = open_store(where, behind, verify="never")
    for _ in range(3):
        await check_reads(store, behind)
        await complete(store)


def put_back(aside: Path, place: Path) -> None:
    """Move a file or a folder back to where it was, whatever is there now."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(place)


async def test_values_that_others_put_back_are_removed(tmp_path: Path) -> None:
    where, aside, behind = tmp_path / "cache", tmp_path / "aside", source()
    store = open_store(where, behind)
    await check_reads(store, behind)
    shutil.copytree(where / "a", aside)
    await store.invalidate("a")
    put_back(aside, where / "a")
    # Its fill finds a value that the index does not list.
    assert await read(store, "a/c/1") == VALUES["a/c/1"]
    assert store.drain_sync()
    await until(lambda: not sizes_in(where))
    await check_reads(store, behind)
    check_invariants(store)
    assert sizes_in(where) == dict.fromkeys(VALUES, 1000)


async def test_folder_that_is_swapped_for_a_link_at_any_moment(tmp_path: Path) -> None:
    where, home, behind = tmp_path / "cache", tmp_path / "home", source()
    store = open_store(where, behind, verify="never")
    await check_reads(store, behind)
    before = looks_like_ours(where, home)
    link, aside = tmp_path / "link", tmp_path / "aside"
    link.symlink_to(home)
    ends = threading.Event()

    def swap() -> None:
        folder = where / "a"
        while not ends.is_set():
            try:
                folder.rename(aside)
            except OSError:  # It is not there now.
                continue
            try:
                link.rename(folder)
                folder.rename(link)
            except OSError:  # It was made anew meanwhile.
                pass
            try:
                aside.rename(folder)
            except OSError:
                shutil.rmtree(aside)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for number in range(ROUNDS):
            key = f"a/c/{number % 8}"
            await store.set(key, buf(b"%04d" % number * 250))
            await check_reads(store, behind)
            await store.delete(f"a/c/{(number + 4) % 8}")
    finally:
        ends.set()
        swapping.join()
    assert contents(home) == before
