"""`invalidate`, `is_cached` and `cached_keys`: what is cached, looked at and forgotten by hand."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from pools import STORES, one_of
from support import PROTOTYPE, buf, check_quiet, count_turns, drained, fill, read, read_through
from zcache import CacheStore
from zcache.exceptions import IndexLockTimeout, OptionTypeError, SyncNotSupportedError
from zcache.testing import FakeClock, StoreDouble, entries, hold_index_lock, missing_keys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def source() -> StoreDouble:
    return StoreDouble(MemoryStore())


cache = one_of(STORES)


async def filled(source: Store, cache: Store, **options: Any) -> CacheStore:
    """A store over some keys that are cached, and one of which ranges are."""
    for key in ("g/a", "g/b/c", "ga", "z/c/1/2", "z/c/12/3"):
        await source.set(key, buf(key.encode()))
    await source.set("r", buf(b"0123456789"))
    store = CacheStore(source, cache_store=cache, source_id="s", **options)
    await read(store, "absent")
    await drained(store)
    for key in ("g/a", "g/b/c", "ga", "z/c/1/2", "z/c/12/3"):
        await read_through(store, key)
    for request in (RangeByteRequest(0, 2), RangeByteRequest(4, 6), SuffixByteRequest(1)):
        await read_through(store, "r", request)
    await read_through(store, "g/absent")
    return store


@pytest.mark.parametrize(
    ("prefix", "count", "left"),
    [
        ("", 8, []),
        ("g", 2, ["ga", "r", "z/c/1/2", "z/c/12/3"]),
        ("g/", 2, ["ga", "r", "z/c/1/2", "z/c/12/3"]),
        ("g/a", 1, ["g/b/c", "ga", "r", "z/c/1/2", "z/c/12/3"]),
        ("r", 3, ["g/a", "g/b/c", "ga", "z/c/1/2", "z/c/12/3"]),
        ("z/c/1", 1, ["g/a", "g/b/c", "ga", "r", "z/c/12/3"]),
        ("\udcff", 0, ["g/a", "g/b/c", "ga", "r", "z/c/1/2", "z/c/12/3"]),
        ("none", 0, ["g/a", "g/b/c", "ga", "r", "z/c/1/2", "z/c/12/3"]),
        (".zcache", 0, ["g/a", "g/b/c", "ga", "r", "z/c/1/2", "z/c/12/3"]),
    ],
)
@pytest.mark.parametrize("sync", [False, True])
async def test_invalidate_forgets_what_is_below_a_prefix_and_counts_it(
    source: StoreDouble, cache: Store, prefix: str, count: int, left: list[str], sync: bool
) -> None:
    store = await filled(source, cache)
    if sync and isinstance(cache, StoreDouble) and not hasattr(MemoryStore, "get_sync"):
        with pytest.raises(SyncNotSupportedError, match="invalidate_sync"):
            store.invalidate_sync(prefix)
        return
    if sync:
        assert await asyncio.to_thread(store.invalidate_sync, prefix) == count
    else:
        assert await store.invalidate(prefix) == count
    assert sorted(store.cached_keys()) == left
    # The source is as it was, and is read again.
    source.take()
    assert await read(store, "g/a") == b"g/a"
    assert source.take() == ({} if "g/a" in left else {"get": 1})
    assert ("g/absent" in missing_keys(store)) == (prefix not in ("", "g", "g/"))
    await check_quiet(store)


async def test_invalidate_through_another_process_or_store_is_seen_at_once(
    source: StoreDouble, tmp_path: Path
) -> None:
    store = await filled(source, LocalStore(tmp_path / "cache"))
    other = CacheStore(source, cache_store=tmp_path / "cache", source_id="s")
    assert await other.invalidate("g") == 2
    assert not store.is_cached("g/a")
    await source.set("g/a", buf(b"new"))
    assert await read(store, "g/a") == b"new"


async def test_fill_begun_before_an_invalidation_is_not_kept(
    source: StoreDouble, cache: Store
) -> None:
    store = await filled(source, cache)
    await store.invalidate()
    gate = source.block("get", key="g/a", after=True)
    reader = asyncio.ensure_future(read(store, "g/a"))
    await gate.entered_async()
    await store.invalidate("g/a")
    await source.inner.set("g/a", buf(b"new"))
    gate.release()
    assert await reader == b"g/a"
    await drained(store)
    assert not store.is_cached("g/a")
    assert await read(store, "g/a") == b"new"


async def test_invalidate_works_on_a_read_only_store(source: StoreDouble, cache: Store) -> None:
    store = (await filled(source, cache)).with_read_only(True)
    assert await store.invalidate("g/a") == 1
    assert not store.is_cached("g/a")


async def test_is_cached_tells_what_a_read_would_find(
    source: StoreDouble, cache: Store, clock: FakeClock
) -> None:
    store = await filled(source, cache, clock=clock, max_age_seconds={"g/**": 10})
    source.take()
    part = RangeByteRequest(0, 2)
    for key, request, expected in [
        ("g/a", None, True),
        ("g/a", part, True),
        ("g/a", RangeByteRequest(5, 2), False),
        ("r", None, False),
        ("r", part, True),
        ("r", RangeByteRequest(0, 1), True),
        ("r", SuffixByteRequest(1), True),
        ("r", OffsetByteRequest(2), False),
        ("absent", None, False),
        ("never asked for", None, False),
        ("../g/a", None, False),
        ("", None, False),
    ]:
        before = store.cache_stats()
        assert store.is_cached(key, request) is expected, (key, request)
        assert store.cache_stats() == before
    clock.advance(10)
    assert not store.is_cached("g/a")
    assert store.is_cached("ga")
    assert sorted(store.cached_keys()) == ["ga", "r", "z/c/1/2", "z/c/12/3"]
    assert source.take() == {}


async def test_is_cached_of_a_value_on_its_way_is_false(source: StoreDouble) -> None:
    cache = StoreDouble(MemoryStore())
    store = await filled(source, cache)
    await source.set("new", buf(b"1"))
    gate = cache.block("set")
    await read(store, "new")
    assert not store.is_cached("new")
    gate.release()
    await drained(store)
    assert store.is_cached("new")


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("", ["g/a", "g/b/c", "ga", "r", "z/c/1/2", "z/c/12/3"]),
        ("g", ["g/a", "g/b/c"]),
        ("g/", ["g/a", "g/b/c"]),
        ("z/c/1", ["z/c/1/2"]),
        ("r", ["r"]),
        ("none", []),
        ("\udcff", []),
    ],
)
async def test_cached_keys_are_those_below_a_prefix(
    source: StoreDouble, cache: Store, prefix: str, found: list[str]
) -> None:
    store = await filled(source, cache)
    assert sorted(store.cached_keys(prefix)) == found
    assert sorted([key async for key in store.cached_keys(prefix)]) == found
    # A key of which the whole value and ranges are cached comes once.
    await read_through(store, "r")
    assert sorted(store.cached_keys("r")) == ["r"]


async def test_cached_keys_of_many_come_once_whatever_changes_meanwhile(
    source: StoreDouble,
) -> None:
    store = CacheStore(source)
    await fill(store, **{f"k{number}": b"1" for number in range(6000)})
    keys = store.cached_keys()
    seen = list(itertools.islice(keys, 100))
    # Some go, and others come.
    for number in range(0, 6000, 3):
        await store.delete(f"k{number}")
        await store.set(f"new{number}", buf(b"2"))
    seen += keys
    stayed = {f"k{number}" for number in range(6000) if number % 3}
    assert stayed <= set(seen)
    counts = [seen.count(key) for key in sorted(stayed)[:50]]
    assert counts == [1] * 50
    assert len({key for key in seen if key in stayed}) == len(
        [key for key in seen if key in stayed]
    )
    assert not list(keys)
    await store.clear()
    assert list(store.cached_keys()) == []


async def test_cached_keys_of_few_below_a_prefix_take_one_step_however_many_there_are(
    source: StoreDouble,
) -> None:
    store = CacheStore(source)
    names = [f"k{number}" for number in range(6000)]
    await fill(store, **dict.fromkeys([*names, "few/a", "few/b/c", "n/c/1/2", "n/c/12"], b"1"))
    index = store._cache.backend.index
    for prefix, found in [
        ("few", ["few/a", "few/b/c"]),
        ("few/a", ["few/a"]),
        ("n/c/1", ["n/c/1/2"]),
        ("none", []),
    ]:
        keys, cursor = index.next_keys(prefix, 0.0, None)
        assert (sorted(keys), cursor) == (found, None)
    # Of many it takes as many as that needs.
    keys, cursor = index.next_keys("", 0.0, None)
    assert cursor is not None
    assert sorted(store.cached_keys()) == sorted([*names, "few/a", "few/b/c", "n/c/1/2", "n/c/12"])


async def test_cached_keys_of_many_leave_turns_to_other_tasks(
    source: StoreDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CacheStore(source)
    await fill(store, **dict.fromkeys([f"k{number}" for number in range(6000)], b"1"))
    # Each turn is long enough at once, whatever the machine.
    monkeypatch.setattr("zcache._runtime.turns.BUDGET", -1.0)
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    keys = [key async for key in store.cached_keys()]
    watcher.cancel()
    assert len(keys) == 6000
    assert len(turns) > 3


@pytest.mark.slow
async def test_control_where_the_lock_is_held_says_so(
    source: StoreDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await filled(source, LocalStore(tmp_path / "cache"))

    with hold_index_lock(tmp_path / "cache"):
        with pytest.raises(IndexLockTimeout):
            store.is_cached("g/a")
        with pytest.raises(IndexLockTimeout):
            list(store.cached_keys())
        with pytest.raises(IndexLockTimeout):
            await store.invalidate()
    await asyncio.sleep(0)
    assert await store.get("g/a", PROTOTYPE) is not None
    assert entries(store)


@pytest.mark.parametrize("prefix", [None, 1, b"a"])
async def test_prefix_that_is_no_text_raises(prefix: Any) -> None:
    store = CacheStore(MemoryStore())
    with pytest.raises(OptionTypeError, match=f"invalid prefix: {prefix!r}. Give a key"):
        await store.invalidate(prefix)
    with pytest.raises(OptionTypeError, match="invalid prefix"):
        store.invalidate_sync(prefix)
    with pytest.raises(OptionTypeError, match="invalid prefix"):
        store.cached_keys(prefix)
    for listing in (store.list_prefix, store.list_dir):
        with pytest.raises(OptionTypeError, match="invalid prefix"):
            listing(prefix)
    with pytest.raises(OptionTypeError, match="invalid prefix"):
        await store.is_empty(prefix)
    with pytest.raises(OptionTypeError, match="invalid prefix"):
        await store.getsize_prefix(prefix)


@pytest.mark.parametrize("key", [None, 1, b"a"])
@pytest.mark.parametrize("ages", [{}, {"max_age_seconds": 60}, {"max_age_seconds": {"a": 60}}])
@pytest.mark.parametrize("kind", ["memory", "directory"])
async def test_key_that_is_no_text_raises(
    key: Any, ages: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    store = CacheStore(
        MemoryStore(), cache_store=tmp_path / "cache" if kind == "directory" else None, **ages
    )
    # The first one finds an index that is not open yet.
    for _ in range(2):
        with pytest.raises(OptionTypeError, match=f"invalid key: {key!r}. Give text"):
            await store.get(key, PROTOTYPE)
        await store.get("b", PROTOTYPE)
    part = RangeByteRequest(0, 1)
    calls: list[Any] = [
        lambda: store.get(key, PROTOTYPE, part),
        lambda: store.get(key, PROTOTYPE, RangeByteRequest(3, 2)),
        lambda: store.exists(key),
        lambda: store.getsize(key),
        lambda: store.get_partial_values(PROTOTYPE, [(key, part)]),
        lambda: store.set(key, buf(b"1")),
        lambda: store.delete(key),
    ]
    if hasattr(store, "get_sync"):
        calls += [partial(asyncio.to_thread, store.get_sync, key)]
    if hasattr(Store, "get_ranges"):
        calls += [lambda: anext(store.get_ranges(key, [part], prototype=PROTOTYPE))]
    for call in calls:
        with pytest.raises(OptionTypeError, match="invalid key"):
            await call()
    with pytest.raises(OptionTypeError, match="invalid key"):
        store.is_cached(key)
