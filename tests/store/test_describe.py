"""What a store says of itself, and what its copies share."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import obstore.store
import pytest
import zarr
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from support import buf, check_quiet, fill, listed, read, read_through, sizes_of
from zcache import CachePool, CacheStore
from zcache.testing import (
    StoreDouble,
    cache_store_of,
    check_invariants_async,
    recency,
    source_of,
    stored_sizes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

STATS = ["hits", "misses", "evictions", "total_requests", "hit_rate"]


async def test_cache_info() -> None:
    store = CacheStore(MemoryStore(), max_age_seconds=60, max_size="1 kB", cache_set_data=False)
    empty = {
        "cache_store_type": "MemoryStore",
        "max_age_seconds": 60,
        "max_size": 1000,
        "current_size": 0,
        "cache_set_data": False,
        "tracked_keys": 0,
        "cached_keys": 0,
    }
    assert store.cache_info() == empty
    await fill(store, a=b"12345", b=b"123")
    assert store.cache_info() == empty
    assert await read(store, "a") == b"12345"
    expected = {**empty, "current_size": 5, "tracked_keys": 1, "cached_keys": 1}
    assert store.cache_info() == expected
    assert await read(store, "b", RangeByteRequest(0, 2)) == b"12"
    assert store.cache_info() == {**empty, "current_size": 7, "tracked_keys": 2, "cached_keys": 2}
    # What is found in the full value is no entry of its own.
    assert await read(store, "a", RangeByteRequest(1, 3)) == b"23"
    assert store.cache_info()["cached_keys"] == 2
    await store.clear_cache()
    assert store.cache_info() == empty


def test_cache_info_names_the_cache_store(tmp_path: Path) -> None:
    assert (
        CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path)).cache_info()["cache_store_type"]
        == "LocalStore"
    )
    counting = CacheStore(MemoryStore(), cache_store=StoreDouble(MemoryStore()))
    assert counting.cache_info()["cache_store_type"] == "StoreDouble"


async def test_cache_stats() -> None:
    store = CacheStore(MemoryStore(), max_size=10)
    stats = store.cache_stats()
    assert list(stats)[:5] == STATS
    assert all(value == 0 for value in stats.values())
    assert isinstance(stats["hit_rate"], float)
    await fill(store, a=b"12345", b=b"12345")
    assert not any(store.cache_stats().values())  # Writes are no requests.
    await read(store, "a")
    await read(store, "a")
    await read(store, "b", RangeByteRequest(0, 2))
    await read(store, "missing")
    stats = store.cache_stats()
    assert [stats[name] for name in STATS] == [3, 1, 0, 4, 0.75]
    await store.set("c", buf(b"12345"))  # pushes out `a`
    await read(store, "a")  # pushes out `b`
    stats = store.cache_stats()
    assert [stats[name] for name in STATS] == [3, 2, 2, 5, 0.6]
    await read(store, "/not a plain key")
    assert store.cache_stats()["bypassed"] == 1
    fractions = {"hit_rate", "decode_seconds"}
    assert {name: type(value) for name, value in stats.items()} == (
        dict.fromkeys(stats.keys() - fractions, int) | dict.fromkeys(fractions, float)
    )


async def test_asking_counts_nothing() -> None:
    store = CacheStore(MemoryStore(), max_size=10)
    await fill(store, a=b"12345")
    before, order = store.cache_stats(), recency(store)
    await store.exists("a")
    await store.getsize("a")
    await listed(store.list())
    repr(store)
    store.cache_info()
    assert store.cache_stats() == before
    assert recency(store) == order


async def test_text() -> None:
    source, cache = MemoryStore(), MemoryStore()
    store = CacheStore(source, cache_store=cache, max_size="1 KiB", max_age_seconds=0.5)
    await fill(store, a=b"12345", b=b"")
    assert repr(store) == (
        f"CacheStore(store={source!r}, cache_store={cache!r}, max_age_seconds=0.5, "
        "max_size=1024, current_size=5, cached_keys=2)"
    )
    assert str(store) == f"cache://{source}"

    class Mine(CacheStore):
        pass

    assert repr(Mine(source)).startswith("Mine(store=")
    assert "max_age_seconds='infinity', max_size=None, " in repr(Mine(source))


def test_text_of_a_store_of_ones_own_is_not_shown() -> None:
    """It may have a secret that nothing tells from other text."""

    class Mine(MemoryStore):
        def __repr__(self) -> str:
            return "Mine(token='hush')"

        __str__ = __repr__

    for source in (Mine(), StoreDouble(Mine())):
        for text in (repr, str):
            shown = text(CacheStore(source))
            assert "Mine" in shown
            assert "hush" not in shown


async def test_equal_stores_have_one_token_of_dask(tmp_path: Path) -> None:
    """Else dask takes one dataset for two, and computes it twice."""
    tokenize = pytest.importorskip("dask.base").tokenize
    path = tmp_path / "data.zarr"
    zarr.create_array(LocalStore(path), shape=4, dtype="i4")

    def opened(**options: Any) -> CacheStore:
        return CacheStore(LocalStore(path), **options)

    token = tokenize(opened())
    pool = CachePool(tmp_path / "pool")
    for store in (opened(cache_store=pool, max_age_seconds=60), opened(decoded_size="1 MiB")):
        assert tokenize(store) == token
        assert tokenize(pickle.loads(pickle.dumps(store))) == token
        zarr.open_array(store, mode="r+")[:] = 1
        assert tokenize(store) == token
    other = CacheStore(LocalStore(tmp_path / "other.zarr"))
    assert tokenize(other) != token
    assert tokenize(opened().with_read_only(True)) == tokenize(opened(read_only=True))


def test_options_of_freshness_are_shown() -> None:
    store = CacheStore(MemoryStore(), revalidate="metadata", stale_if_error=1.5, offline=True)
    text = "max_age_seconds='infinity', revalidate='metadata', stale_if_error=1.5, offline=True, max_size"
    for same in (store, store.with_read_only(True), pickle.loads(pickle.dumps(store))):
        assert (same.revalidate, same.stale_if_error, same.offline) == ("metadata", 1.5, True)
        assert text in repr(same)
        for name in ("revalidate", "stale_if_error", "offline"):
            with pytest.raises(AttributeError):
                setattr(same, name, False)
    plain = CacheStore(MemoryStore(), offline=False)
    assert (plain.revalidate, plain.stale_if_error, plain.offline) == (False, 0, False)
    assert CacheStore(MemoryStore(), stale_if_error="infinity").stale_if_error == "infinity"


def test_stores_over_one_source_are_equal_whatever_their_caches(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source, cache = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "cache")
    options: dict[str, Any] = {"max_size": 100, "max_age_seconds": 60}
    store = CacheStore(source, cache_store=cache, **options)
    assert store == store  # noqa: PLR0124
    for alike in (
        CacheStore(LocalStore(tmp_path / "source"), cache_store=tmp_path / "cache", **options),
        CacheStore(source, cache_store=LocalStore(tmp_path / "other cache"), **options),
        CacheStore(source),
        CacheStore(source, cache_store=cache, **options, cache_set_data=False),
        CacheStore(source, cache_store=cache, **{**options, "max_size": 101}),
        CacheStore(source, offline=True),
        CacheStore(ObjectStore(obstore.store.LocalStore(tmp_path / "source"))),
        CacheStore(LocalStore(tmp_path / "source", read_only=True)).with_read_only(False),
    ):
        assert store == alike
        assert alike == store
    for other in (
        CacheStore(LocalStore(tmp_path / "other source")),
        store.with_read_only(True),
        type("Mine", (CacheStore,), {})(source, cache_store=cache, **options),
        *(source, cache, None, "cache"),
    ):
        assert store != other
        assert other != store
    with pytest.raises(TypeError, match="unhashable"):
        hash(store)


@pytest.mark.skipif(
    not hasattr(zarr.core.array, "_stores_share_data"), reason="this zarr deletes first"
)
def test_overwriting_an_array_with_itself_through_another_cache_is_refused(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    zarr.create_array(source, name="x", shape=4, chunks=4, dtype="i4", fill_value=-1)[:] = range(4)
    array = zarr.open_array(CacheStore(source), path="x")
    for other in (
        CacheStore(LocalStore(tmp_path / "source"), max_age_seconds=5),
        CacheStore(source, cache_store=tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match=r"overlap|same|itself"):
            zarr.from_array(other, data=array, name="x", overwrite=True)
    assert list(zarr.open_array(source, path="x")[:]) == [0, 1, 2, 3]


async def test_equal_whatever_is_cached() -> None:
    source = MemoryStore()
    await fill(source, a=b"1")
    one, other = CacheStore(source), CacheStore(source)
    await read(one, "a")
    assert stored_sizes(one) != stored_sizes(other)
    assert one == other


# ------------------------------------------------------------------------------ copies


async def test_with_read_only() -> None:
    source = MemoryStore()
    store = CacheStore(source, max_size=100, max_age_seconds=60, cache_set_data=False)
    await fill(store, a=b"1", b=b"22")
    reader = store.with_read_only(read_only=True)
    assert type(reader) is CacheStore
    assert (reader.read_only, store.read_only) == (True, False)
    assert not reader._is_open
    assert cache_store_of(reader) is cache_store_of(store)
    assert await read(reader, "a") == b"1"
    assert await read(store, "a") == b"1"
    assert reader.cache_info() == store.cache_info()
    assert reader.cache_stats() == store.cache_stats()
    assert store.cache_stats()["hits"] == store.cache_stats()["misses"] == 1
    # Any way to write is refused, and reaches neither source nor cache.
    before = dict(sizes_of(source)), stored_sizes(store)
    for attempt in (
        reader.set("a", buf(b"9")),
        reader.set_if_not_exists("c", buf(b"9")),
        reader._set_many([("a", buf(b"9"))]),
        reader.delete("a"),
        reader.delete_dir(""),
        reader.clear(),
    ):
        with pytest.raises(ValueError, match="read-only mode and does not support writing"):
            await attempt
    for sync_attempt in (lambda: reader.set_sync("a", buf(b"9")), lambda: reader.delete_sync("a")):
        with pytest.raises(ValueError, match="read-only mode and does not support writing"):
            sync_attempt()
    assert before == (sizes_of(source), stored_sizes(store))
    # What one writes the other sees.
    await store.set("a", buf(b"2"))
    assert await read(reader, "a") == b"2"
    writer = reader.with_read_only(read_only=False)
    await writer.delete("a")
    assert await read(reader, "a") is None
    assert await read(store, "a") is None
    await reader.clear_cache()
    assert store.cache_info()["cached_keys"] == 0
    await check_quiet(writer)


async def test_read_only_source() -> None:
    source = MemoryStore()
    await fill(source, a=b"1")
    store = CacheStore(source.with_read_only(read_only=True))
    assert store.read_only
    assert await read(store, "a") == await read(store, "a") == b"1"
    assert store.cache_stats()["hits"] == 1
    with pytest.raises(ValueError, match="read-only"):
        await store.set("a", buf(b"2"))


async def test_context_manager() -> None:
    source = StoreDouble(MemoryStore())
    with CacheStore(source) as store:
        assert type(store) is CacheStore
        await store.set("a", buf(b"1"))
        assert await read(store, "a") == b"1"
    assert not store._is_open
    assert not source._is_open
    with pytest.raises(KeyError, match="from the block"), store:
        raise KeyError("from the block")
    assert await read(store, "a") == b"1"


async def test_open_opens_the_source(tmp_path: Path) -> None:
    store = await CacheStore.open(LocalStore(tmp_path / "source"))
    assert store._is_open
    assert source_of(store)._is_open
    missing = LocalStore(tmp_path / "missing", read_only=True)
    lazy = CacheStore(missing)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await lazy._ensure_open()
        assert not lazy._is_open
    (tmp_path / "missing").mkdir()
    await lazy._ensure_open()
    assert lazy._is_open
    with pytest.raises(ValueError, match="already open"):
        await lazy._open()


# --------------------------------------------------------------------------- clear_cache


async def test_clear_cache_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    caches: list[Store] = [
        MemoryStore(),
        LocalStore(tmp_path / "cache"),
        StoreDouble(MemoryStore()),
    ]
    for cache in caches:
        source = MemoryStore()
        store = CacheStore(source, cache_store=cache)
        await fill(store, **{"a/b": b"1", "a/c": b"22", "d": b"333"})
        assert await read(store, "d", RangeByteRequest(0, 1)) == b"3"
        await cache.set("a/foreign", buf(b"4444"))
        await store.clear_cache()
        assert await read(cache, "a/foreign") == b"4444"
        assert sizes_of(source) == {"a/b": 1, "a/c": 2, "d": 3}
        assert store.cache_info()["current_size"] == store.cache_info()["cached_keys"] == 0
        await check_invariants_async(store, held={})
        await store.clear_cache()
        assert await read(store, "a/b") == b"1"
        await store.clear()
        assert await read(cache, "a/foreign") == b"4444"


# -------------------------------------------------------------------------------- pickle


async def test_pickle_is_small_and_equal(tmp_path: Path) -> None:
    source = LocalStore(tmp_path / "source")
    for cache in (MemoryStore(), LocalStore(tmp_path / "cache")):
        store = CacheStore(
            source, cache_store=cache, max_size="1 MB", max_age_seconds=60, cache_set_data=False
        )
        await store.set("a", buf(bytes(100_000)))
        before = len(pickle.dumps(store))
        await read_through(store, "a")
        data = pickle.dumps(store)
        assert len(data) == before
        assert len(data) - len(pickle.dumps(source)) < 768
        copied = pickle.loads(data)
        assert copied == store
        assert copied.max_size == 1_000_000
        assert copied.max_age_seconds == 60
        assert copied.cache_set_data is False
        # In the process where the original lives, it is one cache.
        assert copied.cache_info() == store.cache_info()
        assert await read(copied, "a", RangeByteRequest(0, 2)) == bytes(2)
        assert store.cache_stats()["hits"] == 1
        assert copied.cache_stats() == store.cache_stats()
        reader = pickle.loads(pickle.dumps(store.with_read_only(read_only=True)))
        assert reader.read_only
        assert copy.copy(store) == copy.deepcopy(store) == store
        await check_quiet(copied)


ELSEWHERE = """
import asyncio, pickle, sys
from zarr.core.buffer import default_buffer_prototype
store = pickle.loads(sys.stdin.buffer.read())
for _ in range(2):
    value = asyncio.run(store.get("a", default_buffer_prototype()))
print(value.to_bytes(), store.cache_info()["current_size"], store.cache_stats()["misses"])
"""


async def test_pickle_to_another_process(tmp_path: Path) -> None:
    store = CacheStore(LocalStore(tmp_path), max_size=100)
    await fill(store, a=b"12345", b=b"12345")
    done = subprocess.run(  # noqa: ASYNC221
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps(store),
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == b""
    # A cache in memory arrives empty, hence one miss and one value.
    assert done.stdout.decode().split() == ["b'12345'", "5", "1"]
