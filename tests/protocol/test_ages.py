"""Ages by the kind of key, each store its own."""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from pools import BESIDE_OTHERS, one_of
from support import PROTOTYPE, buf, check_quiet, drained, fill, read, read_through
from zcache import CachePool, CacheStore
from zcache.exceptions import OptionTypeError, OptionValueError
from zcache.testing import StoreDouble, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest, Store

    from zcache.testing import FakeClock

KEYS = {
    "zarr.json": b"r",
    "a/zarr.json": b"a",
    "a/.zarray": b"2",
    "a/c/0": b"c",
    "forecast/zarr.json": b"f",
    "forecast/c/0/1": b"1",
}


cache = one_of(BESIDE_OTHERS)


@pytest.fixture
def source(tmp_path: Path) -> StoreDouble:
    return StoreDouble(LocalStore(tmp_path / "source"))


async def asked_again(store: CacheStore, source: StoreDouble) -> list[str]:
    """Keys that the source is asked for when all are read."""
    asked = []
    for key, value in KEYS.items():
        source.take()
        assert await read(store, key) == value
        if source.take():
            asked.append(key)
    await drained(store)
    return asked


@pytest.mark.parametrize("part", [None, RangeByteRequest(0, 3)])
@pytest.mark.parametrize("age", [0, 5, "infinity"])
@pytest.mark.parametrize("compares", [False, True])
async def test_read_under_way_is_joined_only_while_it_is_young_enough(
    source: StoreDouble,
    cache: Store | CachePool,
    clock: FakeClock,
    age: Any,
    compares: bool,
    part: ByteRequest | None,
) -> None:
    """Else one that the source never answers would hold up all who ask for the key, and then give them what was."""
    await source.inner.set("a", buf(b"old"))
    store = CacheStore(
        source,
        cache_store=cache,
        max_age_seconds=age,
        clock=clock,
        source_id="source",
        revalidate=compares,
    )
    if compares:
        await read_through(store, "a", part)
        clock.advance(1000)
    source.take()
    # It has answered, and the answer is on its way.
    gate = source.block("validator" if compares and age != "infinity" else "get", after=True)
    first = [asyncio.create_task(read(store, "a", part)) for _ in range(2)]
    if compares and age == "infinity":
        assert await asyncio.gather(*first) == [b"old", b"old"]
        return
    await gate.entered_async()
    clock.advance(0.5)
    first.append(asyncio.create_task(read(store, "a", part)))
    await asyncio.sleep(0)
    await source.inner.set("a", buf(b"new"))
    clock.advance(5)
    late = [asyncio.create_task(read(store, "a", part)) for _ in range(3)]
    parts = [asyncio.create_task(store.get_partial_values(PROTOTYPE, [("a", part)]))]
    if age != "infinity":
        await gate.entered_async(2)
    source.heal()
    expected = b"old" if age == "infinity" else b"new"
    assert await asyncio.gather(*late) == [expected] * 3
    for (value,) in await asyncio.gather(*parts):
        assert value is not None
        assert value.to_bytes() == expected
    found = await asyncio.gather(*first)
    if not compares:
        # Those who were in time have what they had asked for.
        assert found == [b"old"] * 3
        assert source.take()["get"] == (1 if age == "infinity" else 2)
    assert await read_through(store, "a", part) == expected
    await check_quiet(store)


async def test_read_that_took_too_long_for_others_is_cached_all_the_same(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    """Else a slow source that is read all the time would never be cached, for stores of any age."""
    await source.inner.set("a", buf(b"old"))
    brief, endless = (
        CacheStore(source, cache_store=cache, max_age_seconds=age, clock=clock, source_id="source")
        for age in (1, "infinity")
    )
    gates = []
    reads = []
    for number in range(3):
        gates.append(source.block("get", times=1, after=True))
        reads.append(asyncio.create_task(read(brief, "a")))
        await gates[-1].entered_async()
        await source.inner.set("a", buf(b"%d" % number))
        clock.advance(2)
    # The last one comes first: what was read before it does not take its place.
    for at, value in ((0, b"old"), (2, b"1"), (1, b"0")):
        gates[at].release()
        assert await reads[at] == value
        await drained(brief)
        assert await read(endless, "a") == (b"old" if at == 0 else b"1")
    assert endless.cache_stats()["hits"] == 3
    await check_quiet(brief)


async def test_ages_by_pattern_the_first_that_matches_holds(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    ages = {"**/zarr.json": 60, "forecast/**": 3600.5, "a/c/*": "infinity", "a/**": 5}
    store = CacheStore(
        source, cache_store=cache, max_age_seconds=ages, clock=clock, source_id="source"
    )
    assert store.max_age_seconds == store.cache_info()["max_age_seconds"] == ages
    await fill(store, **KEYS)
    assert await asked_again(store, source) == []
    clock.advance(5)
    assert await asked_again(store, source) == ["a/.zarray"]
    clock.advance(56)
    documents = ["zarr.json", "a/zarr.json", "a/.zarray", "forecast/zarr.json"]
    assert await asked_again(store, source) == documents
    clock.advance(3540)
    assert await asked_again(store, source) == [*documents, "forecast/c/0/1"]
    await check_quiet(store)


@pytest.mark.parametrize(
    ("given", "seconds", "expected"),
    [
        ("infinity", 60, ["zarr.json", "a/zarr.json", "a/.zarray", "forecast/zarr.json"]),
        (30, 60, ["a/c/0", "forecast/c/0/1"]),
        (30, "infinity", ["a/c/0", "forecast/c/0/1"]),
        # Whatever the patterns say of them.
        ({"**": 30}, 60, ["a/c/0", "forecast/c/0/1"]),
        (
            {"forecast/**": 1000},
            30,
            ["zarr.json", "a/zarr.json", "a/.zarray", "forecast/zarr.json"],
        ),
    ],
)
async def test_metadata_age_holds_for_all_metadata_documents_and_nothing_else(
    source: StoreDouble,
    cache: Store | CachePool,
    clock: FakeClock,
    given: Any,
    seconds: Any,
    expected: list[str],
) -> None:
    store = CacheStore(
        source,
        cache_store=cache,
        max_age_seconds=given,
        metadata_max_age_seconds=seconds,
        clock=clock,
        source_id="source",
    )
    await fill(store, **KEYS)
    clock.advance(60 if given == "infinity" else 31)
    assert await asked_again(store, source) == expected


async def test_age_of_a_pattern_holds_for_ranges_sizes_and_batches(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = CacheStore(
        source,
        cache_store=cache,
        max_age_seconds={"*/old": 10},
        cache_set_data=False,
        clock=clock,
        source_id="source",
    )
    part = RangeByteRequest(1, 3)
    await fill(store, **{"a/old": b"12345", "a/other": b"67890"})
    for key in ("a/old", "a/other"):
        assert await read_through(store, key, part) is not None
    clock.advance(10)
    source.take()
    assert await read_through(store, "a/other", part) == b"78"
    assert source.take() == {}
    assert await read_through(store, "a/old", part) == b"23"
    assert source.take() == {"get": 1}
    assert await read_through(store, "a/old") == b"12345"
    clock.advance(10)
    source.take()
    assert await store.getsize("a/old") == 5
    assert await store.exists("a/old")
    assert source.take() == {"getsize": 1, "exists": 1}
    if hasattr(store, "get_ranges_sync"):
        groups = store.get_ranges("a/old", [part, None], prototype=PROTOTYPE)
        assert len([item async for group in groups for item in group]) == 2
        assert sum(source.take().values()) == 1
        await drained(store)
        clock.advance(9)
        groups = store.get_ranges("a/old", [part, None], prototype=PROTOTYPE)
        assert len([item async for group in groups for item in group]) == 2
        assert source.take() == {}
    await check_quiet(store)


async def test_ages_of_several_stores_are_each_its_own(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    def opened(**options: Any) -> CacheStore:
        return CacheStore(source, cache_store=cache, clock=clock, source_id="source", **options)

    strict, metadata, lenient = (
        opened(max_age_seconds=10),
        opened(metadata_max_age_seconds=30),
        opened(),
    )
    await fill(strict, **KEYS)
    clock.advance(10)
    assert await asked_again(lenient, source) == []
    assert await asked_again(metadata, source) == []
    assert await asked_again(strict, source) == list(KEYS)
    clock.advance(30)
    assert await asked_again(lenient, source) == []
    # What one has read anew is as young for the others.
    assert "a/zarr.json" in await asked_again(metadata, source)
    assert await asked_again(strict, source) == ["a/c/0", "forecast/c/0/1"]
    await check_quiet(strict)


async def test_age_of_a_store_that_is_gone_lets_others_evict_as_before(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    """What is too old for all stores goes first, not what is too old for one of them."""
    options: Any = {"cache_store": cache, "max_size": 30, "clock": clock, "source_id": "source"}
    strict = CacheStore(source, max_age_seconds=10, **options)
    lenient = CacheStore(source, **options)
    await fill(strict, old=bytes(10), other=bytes(10), third=bytes(10))
    clock.advance(11)
    assert await read_through(lenient, "old") == bytes(10)
    await fill(lenient, new=bytes(10))
    assert sorted(stored_sizes(lenient)) == ["new", "old", "third"]
    assert lenient.cache_stats()["expirations"] == 0
    await check_quiet(lenient)


async def test_ages_travel_with_copies(source: StoreDouble, clock: FakeClock) -> None:
    cache = MemoryStore()
    inner = source.inner
    ages: dict[str, Any] = {"**/zarr.json": 60, "b/**": None}
    store = CacheStore(inner, cache_store=cache, max_age_seconds=ages, metadata_max_age_seconds=2)
    copy = pickle.loads(pickle.dumps(store))
    for other in (copy, store.with_read_only(True)):
        assert other.max_age_seconds == {"**/zarr.json": 60, "b/**": "infinity"}
        assert other.metadata_max_age_seconds == 2
    assert copy == store
    assert "metadata_max_age_seconds=2" in repr(store)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"a": -1}, OptionValueError, ["max_age_seconds of 'a': -1", "number from 0 on"]),
        ({"a": float("nan")}, OptionValueError, ["max_age_seconds of 'a': nan"]),
        ({"a": True}, OptionTypeError, ["max_age_seconds of 'a': True"]),
        ({"a": {"b": 1}}, OptionTypeError, ["max_age_seconds of 'a': {'b': 1}"]),
        ({"": 5}, OptionValueError, ["pattern in max_age_seconds: ''", "**/zarr.json"]),
        ({"/a": 5}, OptionValueError, ["pattern in max_age_seconds: '/a'"]),
        ({"a/": 5}, OptionValueError, ["pattern in max_age_seconds: 'a/'"]),
        ({"a/../b": 5}, OptionValueError, ["pattern in max_age_seconds: 'a/../b'"]),
        ({"\udcff": 5}, OptionValueError, ["pattern in max_age_seconds: '\\udcff'"]),
        ({b"a": 5}, OptionTypeError, ["pattern in max_age_seconds: b'a'"]),
        ({1: 5}, OptionTypeError, ["pattern in max_age_seconds: 1"]),
        ([("a", 5)], OptionTypeError, ["max_age_seconds: [('a', 5)]", '{"**/zarr.json": 60}']),
    ],
)
def test_ages_without_a_meaning_raise(given: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), max_age_seconds=given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("given", [-1, float("nan"), True, "soon", {"a": 1}])
def test_metadata_age_without_a_meaning_raises(given: Any) -> None:
    with pytest.raises((OptionValueError, OptionTypeError)) as caught:
        CacheStore(MemoryStore(), metadata_max_age_seconds=given)
    assert f"invalid metadata_max_age_seconds: {given!r}. Give seconds" in str(caught.value)
