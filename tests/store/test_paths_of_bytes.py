"""Paths that are not UTF-8, which Python has as text with lone surrogates, are paths like others."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import shutil
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, ZipStore

import zcache
from support import buf, read, until
from zcache import CachePool, CacheStore, OptionValueError
from zcache._core import is_absent, open_cached, read_resident
from zcache.testing import check_invariants, entries

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

VALUE = b"0123456789"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / os.fsdecode(b"na\xefve")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes no such names")
    return folder


def opened(kind: str, folder: Path) -> CacheStore:
    (folder / "source/c").mkdir(parents=True, exist_ok=True)
    for n in range(3):
        (folder / f"source/c/{n}").write_bytes(VALUE)
    cache: Path | CachePool = folder / "cache"
    if kind == "pool":
        cache = CachePool(cache, max_size=10**6)
    return CacheStore(LocalStore(folder / "source"), cache_store=cache, max_size=10**6)


async def filled(store: CacheStore) -> int:
    """Read all that there is; how many of it were hits."""
    before = store.cache_stats()["hits"]
    for n in range(3):
        assert await read(store, f"c/{n}") == VALUE
    assert await store.drain()
    check_invariants(store)
    return store.cache_stats()["hits"] - before


@pytest.mark.parametrize("kind", ["directory", "pool"])
async def test_values_below_such_a_path_are_cached_and_dropped(kind: str, folder: Path) -> None:
    store = opened(kind, folder)
    assert await filled(store) == 0
    assert await filled(store) == 3
    await store.set("c/0", buf(VALUE[::-1]))
    assert await read(store, "c/0") == VALUE[::-1]
    await store.delete("c/1")
    assert await read(store, "c/1") is None
    assert await store.drain()
    assert await store.invalidate("c/2") == 1
    assert not store.is_cached("c/2")
    assert await read(store, "c/2") == VALUE
    assert await store.drain()
    check_invariants(store)
    await store.clear_cache()
    assert entries(store) == []
    await store.delete_dir("c")
    assert await read(store, "c/0") is None
    assert store.cache_stats()["cache_failures"] == 0


def tell_hits(kind: str, folder: Path, told: Connection) -> None:
    told.send(asyncio.run(filled(opened(kind, folder))))


def hits_elsewhere(kind: str, folder: Path) -> int:
    """How many hits another process has."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=tell_hits, args=(kind, folder, there))
    process.start()
    assert here.poll(60)
    hits: int = here.recv()
    process.join()
    return hits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "pool"])
async def test_cache_below_such_a_path_outlives_process_and_index(kind: str, folder: Path) -> None:
    store = opened(kind, folder)
    await filled(store)
    assert await filled(pickle.loads(pickle.dumps(store))) == 3
    store.close()
    for is_lost in (False, True):
        if is_lost:
            shutil.rmtree(folder / "cache/.zcache/index")
        assert await asyncio.to_thread(hits_elsewhere, kind, folder) == 3


@pytest.mark.parametrize("kind", ["directory", "pool"])
async def test_texts_with_such_a_path_can_be_written_everywhere(
    kind: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A terminal and a log file of UTF-8 take no lone surrogates."""
    store = opened(kind, folder)
    await filled(store)
    with pytest.raises(OptionValueError) as caught:
        CacheStore(LocalStore(folder), cache_store=folder / "cache")
    texts = [repr(store), str(store), str(caught.value)]
    if kind == "pool":
        pool = CachePool(folder / "cache")
        texts += [repr(pool), *(repr(source) for source in pool.sources())]
    full = CacheStore(
        store._store, cache_store=folder / "full", source_id="s", min_free_space=2**63
    )
    await filled(full)
    # By a thread that no one waits for.
    await until(lambda: "takes nothing in" in caplog.text)
    for text in (*texts, *caplog.messages):
        assert "na\\udcefve" in text
        assert text.encode()


async def test_pool_below_such_a_path_is_exported(folder: Path) -> None:
    await filled(opened("pool", folder))
    pool = CachePool(folder / "cache")
    assert pool.path == str(folder / "cache")
    (source,) = pool.sources()
    assert source.name == f"file://{folder}/source"
    await asyncio.to_thread(pool.export, source.name, LocalStore(folder / "copy"))
    assert (folder / "copy/c/0").read_bytes() == VALUE
    await asyncio.to_thread(pool.forget, source.name)
    assert pool.sources() == []


async def test_such_paths_can_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened("pool", folder)
    monkeypatch.setenv("ZCACHE_DIR", str(folder / "of-zcache"))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    source = folder / "source"
    assert await filled(zcache.open(source)) == 0
    for url in (str(source), f"file://{source}", "~/source", "source"):
        assert await filled(zcache.open(url)) == 3
    archive = shutil.make_archive(str(folder / "archive"), "zip", source)
    pool = CachePool("~/pool")
    store = zcache.open(archive, cache=pool)
    assert isinstance(store._store, ZipStore)
    assert await filled(store) == 0
    assert pool.path == str(folder / "pool")


async def test_requests_are_recorded_below_such_a_path(folder: Path) -> None:
    store = opened("directory", folder)
    path = folder / "requests.csv.gz"
    for name in (path, os.fsencode(folder / "more.csv.gz")):
        with store.record(name):
            for _ in range(50):
                await filled(store)
        assert zcache.replay(name, sizes=["1MB"]).requests == 150


def test_path_that_no_system_has_is_refused(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/\ud800", f"{tmp_path}/\ud800/x"):
        for refused in (
            lambda path=path: CachePool(path),
            lambda path=path: CacheStore(LocalStore(tmp_path), cache_store=path),
            lambda path=path: zcache.open(path, cache="memory"),
        ):
            with pytest.raises(OptionValueError, match=r"invalid .*ud800"):
                refused()
    assert list(tmp_path.iterdir()) == []


def test_core_takes_paths_as_the_system_has_them(folder: Path) -> None:
    path = folder / "k"
    path.write_bytes(VALUE)
    assert not is_absent(str(folder), "k")
    assert is_absent(str(folder), "other") in (True, False)
    os.close(open_cached(str(path)))
    into = bytearray(len(VALUE))
    if read_resident(str(path), into, len(VALUE), 0, len(VALUE)) is not None:
        assert into == VALUE
