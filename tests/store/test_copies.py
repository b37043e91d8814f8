"""Copies that travel, and processes that fork: configuration goes along, contents stay."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, WrapperStore

from doubles import DictStore, GatedStore, SyncDictStore
from forks import fork, wait
from support import buf, check_quiet_sync, drained, read, read_through, said
from zcache import CacheStore
from zcache.store import _OWN
from zcache.testing import in_flight, stored_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

TESTS = Path(__file__).parents[1]
VALUES = {f"{n}": bytes([n]) * (n + 10) for n in range(30)}
SCRIPTS = {
    "travel": """
import asyncio, pickle, sys
from support import read_through
store = pickle.loads(sys.stdin.buffer.read())
print(store.cache_info()["cached_keys"])
print(type(store._cache_store._store).__name__)
async def use():
    for _ in range(2):
        assert await read_through(store, "1") == bytes([1]) * 11
asyncio.run(use())
print(store.cache_stats()["hits"])
""",
    "arrive": """
import asyncio, pickle, sys
from support import check_quiet, read_through
packed = sys.stdin.buffer.read()
stores = [pickle.loads(packed) for _ in range(5)]
print(stores[0].cache_info()["cached_keys"])
async def use():
    for store in stores:
        for n in range(12):
            assert await read_through(store, f"{n}") == bytes([n]) * (n + 10)
        await store.set("p/a", store_value)
        await store.delete_dir("p")
        assert not await store.exists("p/a")
        await check_quiet(store)
from support import buf
store_value = buf(b"new")
asyncio.run(use())
assert all(store == stores[0] for store in stores)
assert all(store.cache_stats() == stores[0].cache_stats() for store in stores)
print(stores[0].max_size, stores[0].max_age_seconds, stores[0].cache_set_data, stores[0].read_only)
print(stores[0].cache_stats()["hits"] > 0)
""",
}


def run(script: str, packed: bytes) -> list[str]:
    """What a script prints in a process of its own that reads `packed`."""
    paths = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPTS[script]],
        env={**os.environ, "PYTHONPATH": paths},
        input=packed,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "source")
    for key, value in VALUES.items():
        store.set_sync(key, buf(value))
    return store


@pytest.fixture(params=["memory", "directory"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "cache")


async def test_a_copy_is_small_and_travels_empty(source: LocalStore) -> None:
    store = CacheStore(source, max_size=10**6, max_age_seconds=60)
    empty = len(pickle.dumps(store))
    for key in VALUES:
        await read_through(store, key)
    packed = pickle.dumps(store)
    assert store.cache_info()["current_size"] > 500
    assert len(packed) == empty
    assert len(packed) - len(pickle.dumps(source)) < 700


class Values(DictStore):
    """A source of the user's own that keeps its values in memory, as its copies do."""


@pytest.mark.parametrize("make", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
async def test_a_copy_of_a_source_of_ones_own_reads_the_original(make: Callable) -> None:
    source = Values({"k": b"v1"})
    store = CacheStore(source)
    assert await read(store, "k") == b"v1"
    other = make(store)
    await other.set("k", buf(b"v2"))
    assert await read(store, "k") == await read(other, "k") == await read(source, "k") == b"v2"


async def test_copies_of_a_source_of_ones_own_elsewhere_read_their_own() -> None:
    """In a worker it is unknown which of them is newer."""
    store = CacheStore(Values({"k": b"v1"}))
    first = pickle.dumps(store)
    await store.set("other", buf(b"v2"))
    second = pickle.dumps(store)
    del store
    gc.collect()
    one, two = pickle.loads(first), pickle.loads(second)
    assert await read(one, "k") == b"v1"
    assert await read(two, "other") == b"v2"


class Labelled(CacheStore):
    """A subclass with an attribute of its own."""

    def __init__(self, *args: Any, label: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label = label


async def test_a_copy_that_was_pickled_before_it_said_where_it_was_made_is_read(
    source: LocalStore,
) -> None:
    state = CacheStore(source, cache_store=MemoryStore()).__getstate__()
    del state["first"]
    copy = CacheStore.__new__(CacheStore)
    copy.__setstate__(state)
    for key, value in VALUES.items():
        assert await read(copy, key) == value


def test_copies_of_a_subclass_have_its_attributes(source: LocalStore) -> None:
    store = Labelled(source, label="mine")
    for other in (
        copy.copy(store),
        copy.deepcopy(store),
        pickle.loads(pickle.dumps(store)),
        store.with_read_only(True),
    ):
        assert type(other) is Labelled
        assert other.label == "mine"
        assert other.cache_stats() == store.cache_stats()
    assert store.with_read_only(True).read_only


async def test_a_memory_behind_wrappers_travels_empty(source: LocalStore) -> None:
    inner = MemoryStore()
    store = CacheStore(source, cache_store=WrapperStore(LoggingStore(inner, log_level="ERROR")))
    for key in VALUES:
        await read_through(store, key)
    packed = pickle.dumps(store)
    assert len(packed) - len(pickle.dumps(source)) < 1100
    assert len(inner._store_dict) == len(VALUES)
    assert pickle.loads(packed) == copy.copy(store) == store
    assert pickle.loads(packed).cache_info()["cached_keys"] == len(VALUES)
    done = run("travel", packed)
    assert done == ["0", "LoggingStore", "1"]


async def test_copies_in_one_process_are_one_cache(source: LocalStore, cache: Store) -> None:
    store = CacheStore(source, cache_store=cache, max_size=10**6, max_age_seconds=60)
    await read_through(store, "1")
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(3)]
    copies += [pickle.loads(pickle.dumps(copies[0])), copy.copy(store)]
    for other in copies:
        assert other == store
        assert other.cache_info() == store.cache_info()
        assert other.cache_stats() == store.cache_stats()
        assert (other.max_size, other.max_age_seconds) == (10**6, 60)
    await copies[0].set("1", buf(b"changed"))
    for other in (store, *copies):
        assert await read(other, "1") == b"changed"
    assert store.cache_stats()["hits"] == len(copies) + 1
    # They outlive the original.
    await drained(store)
    info = store.cache_info()
    del store
    assert copies[0].cache_info() == info
    assert pickle.loads(pickle.dumps(copies[1])).cache_info() == info


async def test_views_and_settings_travel(source: LocalStore) -> None:
    store = CacheStore(source, cache_set_data=False, max_size=None)
    view = store.with_read_only(read_only=True)
    again = pickle.loads(pickle.dumps(view))
    assert again == view
    assert again.read_only
    assert not again.cache_set_data
    assert again.cache_info() == store.cache_info()
    assert await read(again, "1") == VALUES["1"]


def test_attributes_of_a_store_itself_go_to_no_copy_as_those_of_a_subclass() -> None:
    store = CacheStore(MemoryStore())
    for each in (store, store.with_read_only(True), pickle.loads(pickle.dumps(store))):
        assert vars(each).keys() == _OWN


def test_a_hundred_tasks_are_one_cache(source: LocalStore, cache: Store) -> None:
    """As dask does it: each task unpacks its own copy, in one of the threads of a worker."""
    store = CacheStore(source, cache_store=cache, max_size=10**6)
    packed = pickle.dumps(store)
    del store

    def task(_: int) -> CacheStore:
        mine: CacheStore = pickle.loads(packed)
        for key, value in VALUES.items():
            assert asyncio.run(read(mine, key)) == value
        return mine

    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(task, range(100)))
    assert all(each.cache_stats() == copies[0].cache_stats() for each in copies)
    stats = copies[0].cache_stats()
    assert copies[0].cache_info()["current_size"] == sum(map(len, VALUES.values()))
    assert stats["total_requests"] >= 100 * len(VALUES)
    # A task that wanted a key while it was read waited for that.
    assert stats["misses"] < 10 * len(VALUES)


class Counted(DictStore):
    """All copies of this count together."""

    reads = 0

    async def before(self, operation: str, key: str) -> None:
        Counted.reads += 1
        await asyncio.sleep(0.001)


def test_copies_that_meet_read_each_key_once() -> None:
    packed = pickle.dumps(CacheStore(Counted(VALUES)))
    with ThreadPoolExecutor(8) as pool:
        copies: list[CacheStore] = list(pool.map(lambda _: pickle.loads(packed), range(100)))
        found = list(pool.map(lambda store: asyncio.run(read(store, "7")), copies))
    assert found == [VALUES["7"]] * 100
    assert Counted.reads == 1


class Together(DictStore):
    """Arrives in four threads at one instant."""

    barrier = threading.Barrier(4)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        self.barrier.wait(60)


@pytest.mark.parametrize("kind", ["memory", "directory", "another"])
def test_copies_that_arrive_at_once_are_one_cache(kind: str, tmp_path: Path) -> None:
    """No two of them are other sources than the first one that meets them."""
    kinds: dict[str, Callable[[], Any]] = {
        "memory": MemoryStore,
        "directory": lambda: LocalStore(tmp_path),
        "another": lambda: WrapperStore(WrapperStore(LocalStore(tmp_path))),
    }
    store = CacheStore(Together(VALUES), cache_store=kinds[kind]())
    packed = pickle.dumps(store)
    del store
    gc.collect()
    for _ in range(5):
        with ThreadPoolExecutor(4) as pool:
            copies = list(pool.map(lambda _: pickle.loads(packed), range(4)))
        assert len({id(one._cache) for one in copies}) == 1
        assert copies[0]._cache.shared.handle.usable
        del copies
        gc.collect()


@pytest.mark.slow
def test_copies_in_other_processes_have_the_options_and_no_contents(
    source: LocalStore, cache: Store
) -> None:
    """Unless they share a directory."""
    store = CacheStore(source, cache_store=cache, max_size=300, max_age_seconds=60)
    asyncio.run(read_through(store, "1"))
    packed = pickle.dumps(store)
    for _ in range(2):
        held, options, has_hits = run("arrive", packed)
        assert options == "300 60 True False"
        assert has_hits == "True"
        assert (int(held) == 0) is isinstance(cache, MemoryStore)
    if isinstance(cache, MemoryStore):
        assert store.cache_info()["cached_keys"] == 1
    assert asyncio.run(read_through(store, "1")) == VALUES["1"]


# ---------------------------------------------------------------------------------- forks

LONGEST = 60
MAX_SIZE = 300


def work(store: CacheStore, source: SyncDictStore) -> None:
    """Use every kind of operation at once, on both surfaces, and compare with the source."""

    async def use(prefix: str) -> None:
        for key in list(VALUES)[:12]:
            assert await read(store, key) == source.values[key], key
        await store.set(f"{prefix}/a", buf(b"new"))
        assert await read(store, f"{prefix}/a") == b"new"
        await asyncio.gather(*(read(store, key) for key in VALUES))
        await store.delete(f"{prefix}/a")
        assert await read(store, f"{prefix}/a") is None
        await store.delete_dir(prefix)

    def use_sync() -> None:
        for key in list(VALUES)[:12]:
            value = store.get_sync(key)
            assert value is not None
            assert value.to_bytes() == VALUES[key]

    asyncio.run(use(f"p{os.getpid()}"))
    others = [threading.Thread(target=use_sync) for _ in range(2)]
    for thread in others:
        thread.start()
    use_sync()
    for thread in others:
        thread.join()
    assert store.drain_sync()
    assert store.cache_info()["current_size"] <= MAX_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "directory", "another"])
def test_forked_children_of_a_busy_process_read_and_write(kind: str, tmp_path: Path) -> None:
    # In a process of its own: to fork that of the tests, which has all of their memory, takes long.
    run = [sys.executable, "-W", "ignore:This process:DeprecationWarning", __file__]
    done = subprocess.run(
        [*run, kind, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        timeout=LONGEST * 10,
        check=False,
    )
    if "no synchronous" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr[-8000:]


def fork_while_busy(kind: str, where: str) -> None:
    """Read and write in forked children of a process that has threads doing the same."""
    source = SyncDictStore(VALUES)
    kinds: dict[str, Callable[[], Store]] = {
        "memory": MemoryStore,
        "directory": lambda: LocalStore(where),
        "another": SyncDictStore,
    }
    store = CacheStore(source, cache_store=kinds[kind](), max_size=MAX_SIZE)
    if not store._supports_sync_io:
        print("zarr before 3.4 has no synchronous local store")
        return
    stop = threading.Event()
    errors: list[BaseException] = []

    async def several(number: int) -> None:
        await asyncio.gather(*(read(store, key) for key in VALUES))
        await store.set(f"l{number}", buf(b"y" * 30))
        await store.delete_dir(f"l{number}")

    def busy(number: int) -> None:
        try:
            while not stop.is_set():
                if number % 2:
                    asyncio.run(several(number))
                else:
                    for key in VALUES:
                        store.get_sync(key)
                    store.set_sync(f"t{number}", buf(b"x" * 20))
                    store.delete_sync(f"t{number}")
        except BaseException as error:  # noqa: BLE001 - the main thread tells
            errors.append(error)

    others = [threading.Thread(target=busy, args=(number,)) for number in range(6)]
    for thread in others:
        thread.start()
    codes: list[int] = []
    try:
        for _ in range(8):
            time.sleep(0.002)
            codes += wait([fork(lambda: work(store, source)) for _ in range(10)])
    finally:
        stop.set()
        for thread in others:
            thread.join()
    work(store, source)
    assert not errors
    assert not any(codes)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_goes_on_with_a_cache_in_memory_and_no_flights() -> None:
    source = GatedStore({"k": b"value", "slow": b"slow"})
    store = CacheStore(source, cache_store=MemoryStore(), max_size=100)
    assert asyncio.run(read(store, "k")) == b"value"
    source.shut["get"] = 1
    thread = threading.Thread(target=store.get_sync, args=("slow",))
    thread.start()
    assert source.arrived.acquire(timeout=LONGEST)
    assert in_flight(store) == (1, 0)

    def check() -> None:
        assert in_flight(store) == (0, 0)
        assert asyncio.run(read(store, "k")) == b"value"
        assert source.counts["get"] == 2, "the value was not inherited"
        # The thread that read this stayed with the parent; no reader here waits for it.
        assert asyncio.run(read(store, "slow")) == b"slow"
        assert source.counts["get"] == 3
        check_quiet_sync(store)
        assert store.cache_info()["current_size"] == 9

    assert wait([fork(check)]) == [0]
    source.release()
    thread.join()
    assert asyncio.run(read(store, "slow")) == b"slow"
    check_quiet_sync(store)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_a_forked_child_that_ends_inherited_coroutines_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What they had begun is their parent's: the write of a source, and that of a cache store."""
    source, cache = GatedStore({"k": b"old"}), GatedStore()
    writing = CacheStore(source)
    filling = CacheStore(SyncDictStore({"k": b"old"}), cache_store=cache)
    source.shut["set"] = cache.shut["set"] = 1
    task = asyncio.ensure_future(writing.set("k", buf(b"new")))
    assert await read(filling, "k") == b"old"
    while source.counts["set"] + cache.counts["set"] < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    everything = asyncio.all_tasks() - {asyncio.current_task()}
    logged = len(caplog.records)

    def end() -> None:
        for one in everything:
            one.cancel()
        for one in everything:
            coroutine: Any = one.get_coro()
            coroutine.close()
        assert len(said(caplog)) == logged

    assert wait([fork(end)]) == [0]
    source.release()
    cache.release()
    await task
    for store, value in ((writing, b"new"), (filling, b"old")):
        assert await store.drain()
        assert await read(store, "k") == value
        assert store.cache_info()["cached_keys"] == 1
        assert stored_sizes(store) == {"k": 3}


@pytest.mark.parametrize("kind", ["local", "wrapped", "fsspec"])
def test_copy_that_meets_its_like_asks_for_no_path(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = LocalStore(tmp_path)
    if kind == "wrapped":
        source = WrapperStore(source)
    elif kind == "fsspec":
        pytest.importorskip("fsspec")
        source = FsspecStore.from_url(f"file://{tmp_path}")
    store = CacheStore(source)
    packed = pickle.dumps(store)
    counts = {"stat": 0, "lstat": 0, "readlink": 0, "getcwd": 0}

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return wrapped

    for name in counts:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    copied = pickle.loads(packed)
    monkeypatch.undo()
    assert set(counts.values()) == {0}
    assert copied._cache is store._cache


def test_the_sync_surface_is_there_when_both_stores_have_it() -> None:
    plain, sync = DictStore(), SyncDictStore()
    assert CacheStore(sync, cache_store=SyncDictStore())._supports_sync_io
    assert not CacheStore(plain, cache_store=SyncDictStore())._supports_sync_io
    assert not CacheStore(sync, cache_store=DictStore())._supports_sync_io
    for store in (CacheStore(plain), CacheStore(sync, cache_store=DictStore())):
        with pytest.raises(TypeError, match="synchronous"):
            store.get_sync("k")
        with pytest.raises(TypeError, match="synchronous"):
            store.set_sync("k", buf(b""))
        with pytest.raises(TypeError, match="synchronous"):
            store.delete_sync("k")


if __name__ == "__main__":
    fork_while_busy(*sys.argv[1:])
