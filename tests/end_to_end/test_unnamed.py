"""A source in memory is another one in each process: what one does to it is served to no other. A user's own is one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

import pytest
import zarr
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from doubles import DictStore
from forks import fork, run, wait
from support import TESTS, buf, read, read_through, write
from zcache import CachePool, CacheStore, with_decoded_cache
from zcache._source import identity
from zcache._source.identity import identify
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from zarr.abc.store import Store

LONGEST = 60
GROUP = '{"zarr_format":3,"node_type":"group"}'
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def memory() -> Store:
    return MemoryStore()


def fsspec_memory() -> Store:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url("memory://unnamed")


def own() -> Store:
    return StoreDouble(MemoryStore())


def own_over(where: Path) -> Store:
    """One of a user's own that keeps its values where all processes find them."""
    (where / "source").mkdir()
    return StoreDouble(LocalStore(where / "source"))


def directory(where: Path) -> Any:
    return LocalStore(where / "cache")


def pool(where: Path) -> Any:
    return CachePool(where / "pool", max_size="8 MiB")


def pool_in_memory(_: Path) -> Any:
    return CachePool(max_size="8 MiB")


def another(where: Path) -> Any:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{where}/other", storage_options={"auto_mkdir": True})


@contextlib.contextmanager
def forked(task: Callable[[Any], None]) -> Iterator[Any]:
    """A forked child that does this with its end of a pipe; what is given is the other end."""
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        ours.close()
        task(theirs)

    child = fork(work)
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        assert wait([child]) == [0]


def told(end: Any) -> Any:
    assert end.poll(LONGEST)
    return end.recv()


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("place", [directory, pool, pool_in_memory, another])
@pytest.mark.parametrize("kind", [memory, fsspec_memory, own])
def test_forked_child_has_a_source_of_its_own(
    kind: Callable[[], Store], place: Callable[[Path], Any], tmp_path: Path
) -> None:
    source = kind()
    store = CacheStore(source, cache_store=place(tmp_path))
    for key in ("a", "b"):
        asyncio.run(write(store, key, b"both"))
    name = store._cache.source_id.name

    def child(end: Any) -> None:
        asyncio.run(write(store, "a", b"mine"))
        end.send(store._cache.source_id.name)
        told(end)
        for key, value in (("a", b"mine"), ("b", b"both")):
            for _ in range(2):
                assert asyncio.run(read_through(store, key)) == value
        end.send(None)

    with forked(child) as end:
        assert told(end) != name
        for _ in range(2):
            assert asyncio.run(read_through(store, "a")) == b"both"
        asyncio.run(write(store, "b", b"ours"))
        end.send(None)
        told(end)
        for _ in range(2):
            assert asyncio.run(read_through(store, "a")) == b"both"
            assert asyncio.run(read_through(store, "b")) == b"ours"
    assert store.is_cached("a")
    assert store.is_cached("b")
    assert store._cache.source_id.name == name


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_garbage_leaves_no_source_in_a_forked_child_the_name_of_its_parents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be collected at any step, so that a source ends while others are named anew."""
    first, garbage, last = (MemoryStore() for _ in range(3))
    before = [identify(one).name for one in (first, garbage, last)]
    garbage.itself = garbage  # type: ignore[attr-defined]
    del garbage
    new_name = identity._new_name

    def new_name_and_garbage() -> str:
        if gc.isenabled():
            gc.collect()
        return new_name()

    monkeypatch.setattr(identity, "_new_name", new_name_and_garbage)

    def child() -> None:
        assert identify(first).name not in before
        assert identify(last).name not in before

    assert run(child) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("place", [pool, pool_in_memory, directory])
@pytest.mark.parametrize("kind", [memory, fsspec_memory, own])
def test_forked_child_has_one_source_for_all_its_stores(
    kind: Callable[[], Store], place: Callable[[Path], Any], tmp_path: Path
) -> None:
    source, cache = kind(), place(tmp_path)
    store = CacheStore(source, cache_store=cache)
    asyncio.run(write(store, "a", b"1"))
    by_parent = pickle.dumps(store)

    def child(_: Any) -> None:
        stores = [store, CacheStore(source, cache_store=cache), pickle.loads(pickle.dumps(store))]
        for n, writing in enumerate(stores):
            value = b"%d" % n
            asyncio.run(write(writing, "a", value))
            assert [asyncio.run(read_through(one, "a")) for one in stores] == [value] * 3
        assert len({one._cache.source_id for one in stores}) == 1
        if kind is not fsspec_memory:
            # What its parent has pickled has values of its own.
            assert asyncio.run(read(pickle.loads(by_parent), "a")) == b"1"

    with forked(child):
        pass
    assert asyncio.run(read(store, "a")) == b"1"


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_is_warm_in_a_pool_by_its_own_reads_and_noted(tmp_path: Path) -> None:
    cache = pool(tmp_path)
    store = CacheStore(MemoryStore({"a": buf(b"1")}), cache_store=cache)
    named = CacheStore(LocalStore(tmp_path / "x"), cache_store=cache, source_id="x")
    asyncio.run(write(named, "n", b"named"))
    assert asyncio.run(read_through(store, "a")) == b"1"

    def child(end: Any) -> None:
        before = store.cache_stats()["hits"]
        for _ in range(3):
            assert asyncio.run(read_through(store, "a")) == b"1"
        assert store.cache_stats()["hits"] == before + 2
        # One with a name is the same in both.
        assert named.is_cached("n")
        end.send(store._cache.source_id.name)
        told(end)

    with forked(child) as end:
        theirs = told(end)
        found = {info.name: info.entries for info in cache.sources()}
        assert found == {store._cache.source_id.name: 1, theirs: 1, "x": 1}
        end.send(None)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_says_once_that_its_parent_uses_the_directory(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = CacheStore(MemoryStore({"a": buf(b"1")}), cache_store=directory(tmp_path))
    asyncio.run(read_through(store, "a"))

    def child(_: Any) -> None:
        for _ in range(3):
            assert asyncio.run(read_through(store, "a")) == b"1"
        assert store.cache_info()["cached_keys"] == 0

    capfd.readouterr()
    handler = logging.StreamHandler()
    logging.getLogger("zcache").addHandler(handler)
    try:
        with forked(child):
            pass
    finally:
        logging.getLogger("zcache").removeHandler(handler)
    lines = [line for line in capfd.readouterr().err.splitlines() if "in use" in line]
    assert len(lines) == 1
    assert "source_id=" in lines[0]
    assert store.is_cached("a")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", [memory, own])
def test_arrays_with_decoded_chunks_over_one_source_see_each_other_in_a_forked_child(
    kind: Callable[[], Store],
) -> None:
    source = kind()
    plain = zarr.create_array(source, shape=4, chunks=2, dtype="i4")
    plain[:] = 1
    before = with_decoded_cache(plain, "1MB")
    assert list(before[:]) == [1] * 4
    other = None

    async def child_reads() -> None:
        nonlocal other
        other = with_decoded_cache(plain._async_array, "1MB")
        mine = before._async_array
        assert list(await mine.getitem(slice(None))) == [1] * 4
        await other.setitem(slice(None), 2)
        assert list(await mine.getitem(slice(None))) == [2] * 4
        await mine.setitem(slice(None), 3)
        assert list(await other.getitem(slice(None))) == [3] * 4

    with forked(lambda _: asyncio.run(child_reads())):
        pass
    assert list(before[:]) == [1] * 4


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("place", [directory, pool])
def test_forked_child_shares_what_is_cached_of_a_users_own(
    place: Callable[[Path], Any], tmp_path: Path
) -> None:
    store = CacheStore(own_over(tmp_path), cache_store=place(tmp_path))
    for key in ("a", "b"):
        asyncio.run(write(store, key, b"both"))
    name = store._cache.source_id.name

    def child(end: Any) -> None:
        assert store._cache.source_id.name == name
        for key in ("a", "b"):
            assert asyncio.run(read_through(store, key)) == b"both"
        assert store.cache_stats()["misses"] == 0
        copied = pickle.loads(pickle.dumps(store))
        asyncio.run(write(copied, "a", b"mine"))
        end.send(None)
        told(end)
        assert asyncio.run(read_through(store, "b")) == b"ours"

    with forked(child) as end:
        told(end)
        assert asyncio.run(read_through(store, "a")) == b"mine"
        asyncio.run(write(store, "b", b"ours"))
        end.send(None)


# ------------------------------------------------------------------------------- pickled


WORKER = """
import asyncio, pickle, sys
from support import read_through, write
from zcache import CacheStore
stores = []
for line in sys.stdin:
    step, *more = line.split()
    if step == "load":
        store = pickle.loads(bytes.fromhex(more[0]))
        stores.append(store)
        print(store._cache.source_id.name, flush=True)
    elif step == "hits":
        print(store.cache_stats()["hits"], flush=True)
    elif step == "dump":
        print(pickle.dumps(store).hex(), flush=True)
    elif step == "set":
        asyncio.run(write(store, more[0], more[1].encode()))
        print(flush=True)
    else:
        value = asyncio.run(read_through(store, more[0]))
        print("" if value is None else value.decode(), flush=True)
"""


class Worker:
    """Another process, which has unpickled a store."""

    def __init__(self, store: CacheStore | str, stderr: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.name = self.load(store)

    def load(self, store: CacheStore | str) -> str:
        return self("load", store if isinstance(store, str) else pickle.dumps(store).hex())

    def __call__(self, *step: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(step) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        _, self.said = self._process.communicate(timeout=LONGEST)


@pytest.mark.parametrize("place", [directory, pool])
def test_copies_in_other_processes_are_other_sources(
    place: Callable[[Path], Any], tmp_path: Path
) -> None:
    store = CacheStore(MemoryStore({"a": buf(b"both")}), cache_store=place(tmp_path))
    asyncio.run(read_through(store, "a"))
    with Worker(store) as one, Worker(store) as other:
        names = {one.name, other.name, store._cache.source_id.name}
        assert len(names) == 3
        one("set", "a", "one")
        asyncio.run(write(store, "b", b"mine"))
        for _ in range(2):
            assert one("get", "a") == "one"
            assert other("get", "a") == "both"
            assert asyncio.run(read_through(store, "a")) == b"both"
            assert one("get", "b") == other("get", "b") == ""


@pytest.mark.parametrize("place", [directory, pool])
def test_copies_in_other_processes_share_what_is_cached_of_a_users_own(
    place: Callable[[Path], Any], tmp_path: Path
) -> None:
    store = CacheStore(own_over(tmp_path), cache_store=place(tmp_path))
    asyncio.run(write(store, "a", b"both"))
    with Worker(store) as one, Worker(store) as other:
        assert one.name == other.name == store._cache.source_id.name
        assert one("get", "a") == other("get", "a") == "both"
        assert one("hits") == other("hits") == "1"
        one("set", "a", "one")
        assert other("get", "a") == "one"
        assert asyncio.run(read_through(store, "a")) == b"one"


def test_copy_of_a_users_own_finds_what_its_process_has_left_in_a_pool(tmp_path: Path) -> None:
    store = CacheStore(own_over(tmp_path), cache_store=pool(tmp_path))
    asyncio.run(write(store, "a", b"1"))
    packed = pickle.dumps(store).hex()
    del store
    gc.collect()
    for _ in range(2):
        with Worker(packed) as one:
            assert one("get", "a") == "1"
            assert one("hits") == "1"


@pytest.mark.parametrize("place", [directory, another])
def test_copy_caches_nothing_where_its_place_is_in_use_for_another_source(
    place: Callable[[Path], Any], tmp_path: Path
) -> None:
    source, cache = MemoryStore({"a": buf(b"1")}), place(tmp_path)
    stores = [CacheStore(source, cache_store=cache, max_size=size) for size in (1000, 2000)]
    with Worker(stores[0], stderr=subprocess.PIPE) as one:
        for _ in range(3):
            assert one.load(stores[1])
            assert one("get", "a") == "1"
        one("set", "a", "2")
        assert one("get", "a") == "2"
    lines = {line for line in one.said.splitlines() if "holds the cache of another" in line}
    assert len(lines) == 1
    assert "source_id=" in lines.pop()


@pytest.mark.parametrize(
    ("kind", "place", "options"),
    [
        (memory, pool_in_memory, {}),
        (memory, pool_in_memory, {"source_id": "given"}),
        (memory, pool, {}),
        (own, directory, {}),
        (fsspec_memory, pool, {}),
    ],
)
def test_what_a_worker_wrote_comes_back_with_its_copy(
    kind: Callable[[], Store],
    place: Callable[[Path], Any],
    options: dict[str, str],
    tmp_path: Path,
) -> None:
    """As with a plain store: it is in the copy, and not in the original."""
    store = CacheStore(kind(), cache_store=place(tmp_path), **options)
    for key in ("a", "b"):
        asyncio.run(write(store, key, b"here"))
    with Worker(store) as one:
        one("set", "a", "there")
        back = pickle.loads(bytes.fromhex(one("dump")))
        again = pickle.loads(bytes.fromhex(one("dump")))
    comes = kind is not fsspec_memory
    for _ in range(2):
        assert asyncio.run(read_through(back, "a")) == (b"there" if comes else b"here")
        assert asyncio.run(read_through(back, "b")) == b"here"
        assert asyncio.run(read_through(store, "a")) == b"here"
    asyncio.run(write(back, "b", b"back"))
    assert asyncio.run(read_through(store, "b")) == (b"here" if comes else b"back")
    assert asyncio.run(read_through(again, "b")) == (b"here" if comes else b"back")


@pytest.mark.parametrize("kind", ["memory", "directory", "pool"])
def test_what_a_worker_wrote_to_a_users_own_comes_back_with_its_copy(
    kind: str, tmp_path: Path
) -> None:
    place: Any = MemoryStore() if kind == "memory" else tmp_path
    store = CacheStore(DictStore(), cache_store=CachePool(place) if kind == "pool" else place)
    for key in ("a", "b"):
        asyncio.run(write(store, key, b"here"))
    with Worker(store) as one:
        one("set", "a", "there")
        back = pickle.loads(bytes.fromhex(one("dump")))
    assert asyncio.run(read_through(back, "a")) == b"there"
    asyncio.run(write(back, "b", b"back"))
    if kind == "memory":
        assert asyncio.run(read_through(store, "a")) == b"here"
    assert asyncio.run(read_through(store, "b")) == b"here"


def test_what_workers_wrote_to_sessions_of_icechunk_can_be_merged(tmp_path: Path) -> None:
    icechunk = pytest.importorskip("icechunk")
    storage = icechunk.local_filesystem_storage(str(tmp_path / "repository"))
    repository = icechunk.Repository.create(storage)
    session = repository.writable_session("main")
    zarr.create_group(session.store)
    session.commit("first")
    session = repository.writable_session("main")
    store = CacheStore(session.fork().store)
    with Worker(store) as one:
        # Each is a session of its own, in one process as well.
        one("set", "a/zarr.json", GROUP)
        back = [one("dump")]
        one.load(store)
        assert one("get", "a/zarr.json") == ""
        one("set", "b/zarr.json", GROUP)
        back.append(one("dump"))
    session.merge(*(pickle.loads(bytes.fromhex(each))._store.session for each in back))
    for key in ("a/zarr.json", "b/zarr.json"):
        assert asyncio.run(session.store.exists(key))


def test_copies_of_memory_that_come_one_by_one_are_as_they_were_sent() -> None:
    """Those of one pickle are one."""
    store = CacheStore(memory())
    asyncio.run(write(store, "a", b"sent"))
    packed = pickle.dumps([store, store.with_read_only(True)])
    del store
    gc.collect()
    first, view = pickle.loads(packed)
    others = pickle.loads(packed)
    asyncio.run(write(first, "a", b"mine"))
    assert asyncio.run(read_through(view, "a")) == b"mine"
    assert asyncio.run(read_through(pickle.loads(pickle.dumps(first)), "a")) == b"mine"
    for other in (*others, *pickle.loads(packed)):
        assert asyncio.run(read_through(other, "a")) == b"sent"


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_has_equal_copies_of_what_has_no_name() -> None:
    pytest.importorskip("aiohttp")
    store = CacheStore(FsspecStore.from_url("https://node/a?set=1"))

    def child(_: Any) -> None:
        copied = pickle.loads(pickle.dumps(store))
        assert copied == store
        assert store == copied

    with forked(child):
        pass


def test_copies_in_other_processes_have_the_name_that_was_given(tmp_path: Path) -> None:
    store = CacheStore(
        MemoryStore({"a": buf(b"both")}), cache_store=pool(tmp_path), source_id="given"
    )
    with Worker(store) as one:
        assert one.name == "given"
        assert one("get", "a") == "both"
    assert store.is_cached("a")


def test_copy_that_knows_more_ends_what_is_cached_of_an_older_one(tmp_path: Path) -> None:
    """A change is not heard of where the source has another name; but who sends a copy means the values of now."""
    source = LocalStore(tmp_path / "source")
    asyncio.run(source.set("a", buf(b"old")))
    store = CacheStore(StoreDouble(source), cache_store=pool(tmp_path))
    with Worker(store) as one:
        assert one("get", "a") == one("get", "a") == "old"
        asyncio.run(write(store, "a", b"new"))
        one.load(store)
        assert one("get", "a") == "new"
