"""Where a pool is: what is no place for one, one place by several paths, and volumes that are only read."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore, MemoryStore

import zcache
from directories import closed, complete
from pools import KEYS, NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours, source_of
from support import buf, check_quiet, read, read_through, said, write
from zcache import CachePool, CacheStore, CacheUnreachableError, OptionTypeError, OptionValueError
from zcache.testing import set_block_size, shares_index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096


@contextlib.contextmanager
def mounted_again(path: Path, where: Path, *, read_only: bool = False) -> Iterator[Path]:
    """A directory in another place as well."""
    where.mkdir(exist_ok=True)
    steps: list[list[Any]] = [["--bind", path, where]]
    if read_only:
        steps.append(["-o", "remount,ro,bind", where])
    for arguments in steps:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "-l", where], capture_output=True, check=False)
            pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


# ------------------------------------------------------------------------- no place for one


@pytest.mark.parametrize("below", ["", "/sub", "/sub/sub"])
def test_path_of_a_file_is_refused(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    path = f"{file}{below}"
    for name, make in {
        "path": lambda: CachePool(path),
        "cache_store": lambda: CacheStore(MemoryStore(), cache_store=path),
        "cache": lambda: zcache.open("memory://", cache=path),
    }.items():
        with pytest.raises(
            OptionValueError, match=f"invalid {name}: .*is a file. Give the path"
        ) as e:
            make()
        assert path in str(e.value)
    assert file.read_text() == "mine"


def test_pool_that_cannot_be_used_says_so_where_it_is_asked_to_do_something(
    tmp_path: Path,
) -> None:
    pool = CachePool("/proc/zcache")
    for act in (lambda: pool.forget("s"), lambda: pool.export("s", MemoryStore())):
        with pytest.raises(CacheUnreachableError, match="/proc/zcache cannot be used"):
            act()
    pool = pool_with_neighbours(tmp_path)
    pool._pool.handle.abandon(OSError("gone for a moment"))
    for act in (lambda: pool.forget(NEIGHBOURS[0]), lambda: pool.export("s", MemoryStore())):
        with pytest.raises(CacheUnreachableError, match="cannot be used"):
            act()


@pytest.mark.parametrize("act", ["forget", "export"])
def test_pool_that_cannot_be_used_says_why(tmp_path: Path, act: str) -> None:
    pool = pool_with_neighbours(tmp_path)
    arguments = (MemoryStore(),) if act == "export" else ()
    for error, advises in (
        (OSError(errno.EMFILE, "Too many open files"), False),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (ValueError("no index"), False),
    ):
        pool._pool.handle.abandon(error)
        with pytest.raises(CacheUnreachableError, match="cannot be used") as caught:
            getattr(pool, act)(NEIGHBOURS[0], *arguments)
        assert repr(error) in str(caught.value)
        assert ("Open it as a user who may" in str(caught.value)) is advises


@pytest.mark.parametrize("path", ["", "s3://user:secret@bucket/pool", "a\0b"])
def test_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(
        OptionValueError, match=r"invalid path: .* Give the path of a local"
    ) as error:
        CachePool(path)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("path", [5, b"/pool", MemoryStore()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(OptionTypeError, match="invalid path: "):
        CachePool(path)


# ------------------------------------------------------------------- one by several paths


def test_export_into_the_source_by_another_mount_is_refused(tmp_path: Path) -> None:
    pool, path = CachePool(tmp_path / "pool"), tmp_path / "data/source"
    path.mkdir(parents=True)
    store = CacheStore(LocalStore(path), cache_store=pool)
    (name,) = [info.name for info in pool.sources()]
    with mounted_again(tmp_path / "data", tmp_path / "mounted") as mounted:
        for below in ("source", "source/a/b", ""):
            with pytest.raises(OptionValueError, match=r"is the source .* itself"):
                pool.export(name, LocalStore(mounted / below))
        assert pool.export(name, LocalStore(mounted / "other")) == 0
        # The same rule holds for what is deleted from.
        with pytest.raises(OptionValueError, match="is the source itself"):
            CacheStore(store._store, cache_store=LocalStore(mounted / "source/cache"))


async def check_one(first: CachePool, second: CachePool) -> None:
    """Assert that both are one pool, and that its sources share everything."""
    assert first == second
    assert hash(first) == hash(second)
    source = source_of(k=b"1")
    stores = [CacheStore(source, cache_store=pool, source_id="s") for pool in (first, second)]
    assert shares_index(*stores)
    await write(stores[0], "k", b"2")
    assert await read(stores[1], "k") == b"2"
    assert source.take()["get"] == 0
    assert second.cache_info() == first.cache_info()
    await check_quiet(stores[1])


@pytest.mark.parametrize("how", ["link", "relative", "dots", "slashes", "mount"])
async def test_directory_by_another_path_is_the_same_pool(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pool"
    first = CachePool(path, max_size="1 MiB")
    with contextlib.ExitStack() as stack:
        other: Any = f"{tmp_path}//pool/."
        if how == "link":
            other = tmp_path / "link"
            other.symlink_to(path)
        elif how == "relative":
            monkeypatch.chdir(tmp_path)
            other = "pool"
        elif how == "dots":
            (tmp_path / "else").mkdir()
            other = tmp_path / "else" / ".." / "pool"
        elif how == "mount":
            other = stack.enter_context(mounted_again(path, tmp_path / "mounted"))
        second = CachePool(other, max_size="1 GiB")
        assert second.cache_info()["max_size"] == 2**20
        await check_one(first, second)


def test_pool_is_the_same_though_one_that_is_only_read_was_opened_by_another_path(
    tmp_path: Path,
) -> None:
    CachePool(tmp_path / "pool")
    with mounted_again(tmp_path / "pool", tmp_path / "mounted") as other:
        reads = CachePool(other, read_only=True)
        pool = CachePool(tmp_path / "pool")
        assert pool != reads
        del reads
        gc.collect()
        assert CachePool(tmp_path / "pool") == pool


async def test_pool_stays_the_same_when_its_process_goes_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    pool = CachePool("pool")
    assert pool.path == str(tmp_path / "one/pool")
    text = pickle.dumps(pool)
    monkeypatch.chdir(tmp_path / "two")
    copy = pickle.loads(text)
    assert copy == pickle.loads(pickle.dumps(pool)) == pool
    await check_one(pool, copy)
    assert list((tmp_path / "two").iterdir()) == []


async def test_pool_stays_the_same_when_its_link_leads_elsewhere(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    pool = CachePool(link)
    link.unlink()
    link.symlink_to(tmp_path / "two")
    await check_one(pool, CachePool(tmp_path / "one"))
    assert list((tmp_path / "two").iterdir()) == []
    other = CachePool(link)
    assert other != pool
    await check_one(other, CachePool(tmp_path / "two"))


async def test_pool_that_was_renamed_is_warm_in_its_new_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has it open goes on in its old place, with another pool that is empty at first."""
    pool = pool_with_neighbours(tmp_path / "pool")
    store = neighbour(pool, NEIGHBOURS[0])
    (tmp_path / "pool").rename(tmp_path / "renamed")
    again = CachePool(tmp_path / "renamed")
    assert again != pool
    for name in NEIGHBOURS:
        source = source_of()
        renamed = CacheStore(source, cache_store=again, source_id=name)
        await check_neighbour(renamed, name)
        assert source.take() == {}
        await check_quiet(renamed)
    await check_neighbour(store, NEIGHBOURS[0])
    await write(store, "k", b"new")
    assert await read_through(store, "k") == b"new"
    await complete(store)
    await check_quiet(store)
    await check_one(CachePool(tmp_path / "pool"), pool)
    await check_one(CachePool(tmp_path / "renamed"), again)
    # That a process leaves it is no reason to rebuild its index.
    assert not [record for record in said(caplog) if "was rebuilt" in record]


# ---------------------------------------------------------------------------- bytes and blocks


@pytest.mark.parametrize("blocks", [True, False])
async def test_cache_info_of_a_pool_that_is_only_read_is_that_of_its_writer(
    tmp_path: Path, blocks: bool
) -> None:
    if blocks:
        set_block_size(None)
    pool = pool_with_neighbours(tmp_path / "pool", max_size="10 MiB")
    reads = CachePool(tmp_path / "pool", max_size="10 MiB", read_only=True)
    info = reads.cache_info()
    assert info == pool.cache_info()
    assert info["entries"] == len(NEIGHBOURS) * len(KEYS)
    assert info["value_size"] == sum(len(f"{name}: {key}") for name in NEIGHBOURS for key in KEYS)
    assert info["current_size"] >= info["entries"] * PAGE or not blocks


def test_cache_info_of_a_pool_in_memory_tells_bytes_twice() -> None:
    info = pool_with_neighbours().cache_info()
    assert info["current_size"] == info["value_size"] > 0


# -------------------------------------------------------------------------- read-only volumes


async def test_pool_on_a_read_only_volume_is_served_and_says_what_to_do(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    size = pool.cache_info()["current_size"]
    del pool
    await closed(tmp_path, "pool")
    with mounted_again(tmp_path / "pool", tmp_path / "pool", read_only=True):
        pool = CachePool(tmp_path / "pool")
        assert pool.cache_info()["current_size"] == size
        source = source_of(more=b"more")
        store = CacheStore(source, cache_store=pool, source_id=NEIGHBOURS[0])
        await check_neighbour(store, NEIGHBOURS[0])
        assert source.take() == {}
        for _ in range(3):
            assert await read_through(store, "more") == b"more"
        for change in (store.set("k", buf(b"new")), store.delete("k"), store.delete_dir("foo")):
            with pytest.raises(
                CacheUnreachableError, match=r"read-only.*Write to the source itself"
            ):
                await change
        with pytest.raises(CacheUnreachableError, match="Open it where it can be written to"):
            pool.forget(NEIGHBOURS[0])
        # What it does not hold may change.
        await write(store, "more", b"new")
        assert await read(store, "more") == b"new"
        assert store.cache_stats()["cache_failures"] == 0
        assert {info.name for info in pool.sources()} == set(NEIGHBOURS)
        del pool, store


# ---------------------------------------------------------------------------- default bound

BOUND = """
import logging, sys
import zcache
logging.basicConfig(format="%(message)s", stream=sys.stdout)
url, cache = sys.argv[1:]
stores = [zcache.open(url, cache=cache) for _ in range(3)]
print(stores[0].max_size)
"""


def test_default_bound_is_the_same_for_all_processes_however_full_the_volume_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a share of the whole volume, not of what is free, and is said once by each process."""
    volume = tmp_path / "volume"
    volume.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "small", str(volume)]
    if (done := subprocess.run(mount, capture_output=True, check=False)).returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        (tmp_path / "source").mkdir()
        source = str(tmp_path / "source")
        with caplog.at_level(logging.WARNING, "zcache"):
            store = zcache.open(source, cache=volume / "pool")
        assert store.max_size == 4 * 2**20
        assert caplog.text.count("20 % of its volume: pass max_size=") == 1
        (volume / "other").write_bytes(bytes(12 * 2**20))
        done = subprocess.run(
            [sys.executable, "-c", BOUND, source, str(volume / "pool")],
            capture_output=True,
            check=True,
            timeout=100,
        )
        lines = done.stdout.decode().splitlines()
        assert lines[-1] == str(4 * 2**20)
        assert sum("20 % of its volume" in line for line in lines) == 1
        assert zcache.open(LocalStore(source), cache=volume / "pool").max_size == store.max_size
        del store
        asyncio.run(closed(volume, "pool"))
    finally:
        subprocess.run(["umount", "-l", volume], check=True)


async def test_path_with_a_link_and_dots_is_the_one_that_the_system_means(tmp_path: Path) -> None:
    (tmp_path / "scratch/me").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/link").symlink_to(tmp_path / "scratch/me")
    path = f"{tmp_path}/home/link/../pool"
    for pool in (CachePool(path), CachePool(tmp_path / "scratch/pool")):
        store = CacheStore(MemoryStore({"k": buf(b"v")}), cache_store=pool, source_id="x")
        assert await read(store, "k") == b"v"
        assert await store.drain()
    assert [info.entries for info in pool.sources()] == [1]
    assert zcache.open(LocalStore(tmp_path / "source"), cache=path).cache_info()["cached_keys"] == 1
    assert CachePool(path) == pool
    assert not (tmp_path / "home/pool").exists()
