"""Absences: what the source does not have is not asked for again, and is seen as soon as it is there."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import sys
from typing import TYPE_CHECKING, Any

import pytest
import zarr
import zarr.storage
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore, ObjectStore, ZipStore

from pools import POOLS, STORES, one_of
from support import (
    PROTOTYPE,
    TESTS,
    buf,
    check_quiet,
    drained,
    drained_sync,
    fill,
    read,
    read_through,
)
from zcache import CachePool, CacheStore
from zcache.testing import FakeClock, StoreDouble, check_index, entries, missing_keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

DOCUMENTS = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
NODES = ("zarr.json", ".zarray", ".zgroup")
has_ranges = pytest.mark.skipif(
    not hasattr(Store, "get_ranges"), reason="zarr before 3.3 has no get_ranges"
)
has_sync = pytest.mark.skipif(
    not hasattr(Store, "get_ranges_sync"), reason="zarr before 3.4 has no get_ranges_sync"
)


@pytest.fixture
def source() -> StoreDouble:
    return StoreDouble(MemoryStore())


cache = one_of({**STORES, **POOLS})


@pytest.fixture
def store(source: StoreDouble, cache: Store | CachePool, clock: FakeClock) -> CacheStore:
    return CacheStore(source, cache_store=cache, clock=clock, source_id="s")


async def raised(work: Callable[[], Awaitable[Any]]) -> BaseException:
    """What is raised."""
    try:
        await work()
    except BaseException as error:  # noqa: BLE001 - groups among them
        return error
    raise AssertionError("nothing was raised")


def shown(error: BaseException) -> Any:
    """Types and arguments of an error."""
    inner = [shown(one) for one in getattr(error, "exceptions", ())]
    return type(error), error.args[:1] if inner else error.args, inner


async def remember(store: CacheStore, key: str, request: Any = None) -> None:
    """Have a key remembered as missing."""
    # A cache store that has to be listed takes nothing in before that.
    await store.get("other", PROTOTYPE)
    await drained(store)
    assert await read(store, key, request) is None
    source = store._store
    assert isinstance(source, StoreDouble)
    source.take()


@pytest.mark.parametrize("request_", [None, RangeByteRequest(0, 5), OffsetByteRequest(3)])
async def test_missing_key_is_asked_for_once(
    store: CacheStore, source: StoreDouble, request_: Any
) -> None:
    await remember(store, "a/c/0/0", request_)
    for again in (None, RangeByteRequest(0, 1), OffsetByteRequest(1), SuffixByteRequest(2)):
        assert await read(store, "a/c/0/0", again) is None
    assert await store.get_partial_values(PROTOTYPE, [("a/c/0/0", None)] * 2) == [None, None]
    assert not await store.exists("a/c/0/0")
    assert shown(await raised(lambda: store.getsize("a/c/0/0"))) == (
        FileNotFoundError,
        ("a/c/0/0",),
        [],
    )
    assert source.take() == {}
    stats = store.cache_stats()
    assert stats["negative_hits"] == 6
    assert stats["missing_keys"] == 2
    assert stats["hits"] == 0
    assert stats["total_requests"] == stats["misses"] == 2
    info = store.cache_info()
    assert len(info) == 7
    assert entries(store) == []
    await check_quiet(store)


@has_sync
def test_get_sync_of_a_missing_key_asks_once(source: StoreDouble) -> None:
    store = CacheStore(source)
    assert store.get_sync("a") is None
    assert store.get_sync("a") is None
    assert store.get_sync("a", byte_range=RangeByteRequest(0, 2)) is None
    assert source.take() == {"get": 1}
    assert store.cache_stats()["negative_hits"] == 2


@has_ranges
@pytest.mark.parametrize("asked", [[None], [RangeByteRequest(0, 1), RangeByteRequest(5, 9)]])
async def test_get_ranges_of_a_missing_key_raises_as_the_source(
    store: CacheStore, source: StoreDouble, asked: list[Any]
) -> None:
    async def ask(one: Any) -> None:
        async for _ in one.get_ranges("a", asked, prototype=PROTOTYPE):
            pass

    expected = shown(await raised(lambda: ask(source)))
    await remember(store, "b")
    assert shown(await raised(lambda: ask(store))) == expected
    source.take()
    # The error has told, and so it does without the source.
    assert shown(await raised(lambda: ask(store))) == expected
    assert await read(store, "a") is None
    assert source.take() == {}
    await check_quiet(store)


@has_sync
def test_get_ranges_sync_of_a_missing_key_raises_as_the_source(source: StoreDouble) -> None:
    store = CacheStore(source)
    asked = [RangeByteRequest(0, 1), None]
    outcomes = []
    for one in (source, store, store):
        with pytest.raises(BaseExceptionGroup) as caught:
            one.get_ranges_sync("a", asked, prototype=PROTOTYPE)
        outcomes.append(shown(caught.value))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert source.take() == {"get_ranges": 2}


async def test_getsize_of_a_local_store_is_the_one_of_the_source(tmp_path: Path) -> None:
    bare = LocalStore(tmp_path / "source")
    await bare.set("folder/file", buf(b"123"))
    store = CacheStore(bare)
    for key in ("missing", "folder/missing", "folder/file/below"):
        assert await read(store, key) is None
        outcome = [shown(await raised(lambda: one.getsize(key))) for one in (bare, store)]  # noqa: B023
        assert outcome[0] == outcome[1]
    assert await read(store, "folder") is None
    assert await store.getsize("folder") == await bare.getsize("folder")


async def test_missing_key_among_many_is_told_as_the_source_does(tmp_path: Path) -> None:
    files = pytest.importorskip("obstore.store")
    (tmp_path / "source").mkdir()
    for bare in (
        LocalStore(tmp_path / "source"),
        ObjectStore(files.LocalStore(prefix=str(tmp_path / "source"))),
        ObjectStore(files.MemoryStore()),
    ):
        await bare.set("a", buf(b"123"))
        store = CacheStore(bare)
        many = [("a", None), ("missing", None)]
        kinds = []
        for one in (bare, store, store):
            kinds.append(type(await raised(lambda: one.get_partial_values(PROTOTYPE, many))))  # noqa: B023
            # Known as missing from now on.
            assert await read(one, "missing") is None
        assert kinds[1:] == kinds[:1] * 2


class _Same(MemoryStore):
    pass


class _StrictInMany(MemoryStore):
    async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
        found = await super().get_partial_values(prototype, key_ranges)
        if None in found:
            raise KeyError("missing")
        return found


class _LenientInOne(ZipStore):
    def _get(self, *args: Any, **kwargs: Any) -> Any:
        if (found := super()._get(*args, **kwargs)) is None:
            raise KeyError("missing")
        return found

    async def get(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(KeyError):
            return await super().get(*args, **kwargs)


def _changed() -> MemoryStore:
    """A store with a method of its own."""
    store = MemoryStore()
    vars(store)["get_partial_values"] = _StrictInMany().get_partial_values
    return store


@pytest.mark.parametrize("kind", [_StrictInMany, _LenientInOne, _changed])
async def test_missing_key_among_many_is_told_as_a_subclass_does(kind: Any, tmp_path: Path) -> None:
    is_file = kind is _LenientInOne
    source = await kind.open(tmp_path / "a.zip", mode="w") if is_file else kind()
    store = CacheStore(source, cache_store=MemoryStore(), source_id="s")
    assert await store.get("a", PROTOTYPE) is None
    with pytest.raises(KeyError, match="missing"):
        await store.get_partial_values(PROTOTYPE, [("a", None)])


@pytest.mark.parametrize(
    "kind", [MemoryStore, getattr(zarr.storage, "ManagedMemoryStore", MemoryStore), _Same]
)
async def test_missing_key_among_many_is_not_asked_for_again_of_a_store_in_memory(
    kind: type[MemoryStore],
) -> None:
    source = kind()
    store = CacheStore(source, cache_store=MemoryStore(), source_id="s")
    assert await store.get("a", PROTOTYPE) is None
    # Not through the cache.
    await source.set("a", buf(b"1"))
    assert await store.get_partial_values(PROTOTYPE, [("a", None)]) == [None]


async def test_age_of_an_absence_is_its_own_and_never_more_than_a_value_has(
    source: StoreDouble, clock: FakeClock
) -> None:
    options: dict[str, Any] = {"clock": clock, "source_id": "s"}
    for given, age in [
        ({}, 300),
        ({"missing_max_age_seconds": 10}, 10),
        ({"missing_max_age_seconds": 0.5}, 0.5),
        ({"missing_max_age_seconds": 10, "max_age_seconds": 4}, 4),
        ({"max_age_seconds": {"a": 3, "**": 500}}, 3),
        ({"missing_max_age_seconds": "infinity", "max_age_seconds": 20}, 20),
    ]:
        store = CacheStore(source, **given, **options)
        await read(store, "a")
        source.take()
        clock.advance(age - 0.25)
        await read(store, "a")
        assert source.take() == {}, given
        clock.advance(0.25)
        await read(store, "a")
        assert source.take() == {"get": 1}, given
    forever = CacheStore(source, missing_max_age_seconds="infinity", **options)
    await read(forever, "a")
    source.take()
    clock.advance(1e9)
    await read(forever, "a")
    assert source.take() == {}


async def test_cache_missing_off_asks_each_time(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    options: dict[str, Any] = {"cache_store": cache, "clock": clock, "source_id": "s"}
    on, off = CacheStore(source, **options), CacheStore(source, cache_missing=False, **options)
    await remember(on, "a")
    for _ in range(2):
        assert await read(off, "a") is None
    assert source.take() == {"get": 2}
    assert off.cache_stats()["negative_hits"] == 0
    assert not off.cache_missing
    assert (on.cache_missing, on.missing_max_age_seconds) == (True, 300)
    copy = pickle.loads(pickle.dumps(off))
    assert not copy.cache_missing


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.set("g/a", buf(b"1")),
        lambda s: s.set_if_not_exists("g/a", buf(b"1")),
        lambda s: s.delete("g/a"),
        lambda s: s.delete_dir("g"),
        lambda s: s.delete_dir(""),
        lambda s: s.clear(),
        lambda s: s.clear_cache(),
        lambda s: s.invalidate(),
        lambda s: s.invalidate("g"),
        lambda s: s.invalidate("g/"),
        lambda s: s.invalidate("g/a"),
        lambda s: s._set_many([("g/a", buf(b"1"))]),
    ],
)
@pytest.mark.parametrize("by_another", [False, True])
async def test_every_change_ends_an_absence_before_it_returns(
    store: CacheStore, source: StoreDouble, cache: Store | CachePool, change: Any, by_another: bool
) -> None:
    await remember(store, "g/a")
    writer = CacheStore(source, cache_store=cache, source_id="s") if by_another else store
    await change(writer)
    assert "g/a" not in missing_keys(store)
    await source.inner.set("g/a", buf(b"2"))
    assert await read(store, "g/a") in (b"1", b"2")
    assert await store.exists("g/a")
    await check_quiet(store)


@pytest.mark.parametrize(
    ("prefix", "ended"),
    [
        ("x/c/1", ["x/c/1/0/0", "x/c/1/2/0"]),
        ("x/c/1/2", ["x/c/1/2/0"]),
        ("x/c/1/2/0", ["x/c/1/2/0"]),
        ("x", ["x/c/1/0/0", "x/c/1/2/0", "x/c/12/0/0", "x/zarr.json"]),
        ("x/c/12/0/0/0", []),
    ],
)
async def test_prefix_inside_coordinates_ends_what_is_below_it_and_nothing_else(
    source: StoreDouble, prefix: str, ended: list[str]
) -> None:
    store = CacheStore(source)
    keys = ["x/c/1/0/0", "x/c/1/2/0", "x/c/12/0/0", "x/zarr.json", "xy/c/1/0/0"]
    for key in keys:
        await read(store, key)
    await store.delete_dir(prefix)
    assert sorted(missing_keys(store)) == sorted(set(keys) - set(ended))
    check_index(store)


async def test_read_that_began_before_a_write_leaves_no_absence(
    store: CacheStore, source: StoreDouble
) -> None:
    await remember(store, "warm")
    for change in (
        lambda: store.set("a", buf(b"1")),
        lambda: store.delete_dir("a"),
        lambda: store.invalidate("a"),
    ):
        with_none = source.block("get", key="a", after=True)
        reader = asyncio.ensure_future(read(store, "a"))
        await with_none.entered_async()
        await change()
        with_none.release()
        assert await reader is None
        source.heal()
        assert "a" not in missing_keys(store)
        await store.delete("a")
    await check_quiet(store)


async def test_absence_learned_by_an_old_read_gives_way_to_a_value(
    store: CacheStore, source: StoreDouble
) -> None:
    await remember(store, "a", RangeByteRequest(0, 2))
    # Another process writes, and a read that was on its way brings it.
    await source.inner.set("a", buf(b"123"))
    assert await store.getsize_prefix("") == 3
    assert [key async for key in store.list()] == ["a"]
    assert await read(store, "a") is None
    await store.invalidate("a")
    assert await read_through(store, "a") == b"123"
    assert "a" not in missing_keys(store)
    assert await read(store, "a", RangeByteRequest(1, 3)) == b"23"


async def test_value_that_is_gone_is_dropped_and_remembered_as_missing(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = CacheStore(source, cache_store=cache, max_age_seconds=10, clock=clock, source_id="s")
    await fill(store, a=b"123")
    await source.inner.delete("a")
    clock.advance(10)
    assert await read_through(store, "a") is None
    source.take()
    assert await read(store, "a") is None
    assert source.take() == {}
    assert not entries(store)
    await check_quiet(store)


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("other", DOCUMENTS)
@pytest.mark.parametrize("node", ["", "g/", "g/h/"])
async def test_missing_document_counts_beside_one_that_makes_its_node_real(
    source: StoreDouble, node: str, document: str, other: str
) -> None:
    if document == other:
        return
    store = CacheStore(source)
    missing = node + document
    await source.inner.set(node + other, buf(b"{}"))
    await source.inner.set("elsewhere/zarr.json", buf(b"{}"))
    await read(store, "elsewhere/zarr.json")
    await read(store, missing)
    await read(store, missing)
    assert source.take() == {"get": 3}, "who waits for a node sees it at once"
    await read(store, node + other)
    await read(store, missing)
    source.take()
    await read(store, missing)
    assert source.take() == ({} if other in NODES else {"get": 1})


async def appears(source: StoreDouble, node: str, *names: str) -> None:
    """Another writer makes a node."""
    for name in names:
        await source.inner.set(node + name, buf(name.encode()))


async def seen(store: CacheStore, node: str, *names: str) -> list[bytes | None]:
    return [await read(store, node + name) for name in names]


@pytest.mark.parametrize("node", ["", "g/"])
@pytest.mark.parametrize("first", NODES)
async def test_who_waits_for_a_node_sees_all_its_documents(
    store: CacheStore, source: StoreDouble, node: str, first: str
) -> None:
    names = (first, ".zattrs", ".zmetadata")
    for _ in range(2):
        assert await seen(store, node, *names) == [None] * len(names)
    await appears(source, node, *names)
    assert await seen(store, node, *names) == [name.encode() for name in names]
    await check_quiet(store)


async def test_node_that_is_made_anew_is_seen_with_all_its_documents(
    cache: Store | CachePool, clock: FakeClock
) -> None:
    source = StoreDouble(
        LocalStore(cache.root.parent / "s") if isinstance(cache, LocalStore) else MemoryStore()
    )
    store = CacheStore(
        source,
        cache_store=cache,
        clock=clock,
        source_id="s",
        max_age_seconds={"**/.zarray": 10},
        revalidate=True,
    )
    await appears(source, "", ".zarray")
    assert await seen(store, "", ".zarray", ".zattrs") == [b".zarray", None]
    await drained(store)
    # What is compared, and is the same, may be that of another node.
    await appears(source, "", ".zattrs")
    clock.advance(10)
    assert await seen(store, "", ".zarray", ".zattrs") == [b".zarray", b".zattrs"]
    await source.inner.delete(".zarray")
    await source.inner.delete(".zattrs")
    await store.invalidate(".zattrs")
    clock.advance(10)
    assert await seen(store, "", ".zarray", ".zattrs") == [None, None]
    await appears(source, "", ".zarray", ".zattrs")
    assert await seen(store, "", ".zarray", ".zattrs") == [b".zarray", b".zattrs"]


async def test_document_written_through_the_cache_ends_what_was_missing_beside_it(
    store: CacheStore, source: StoreDouble
) -> None:
    assert await seen(store, "", ".zarray", ".zattrs") == [None, None]
    await appears(source, "", ".zattrs")
    await store.set(".zarray", buf(b"{}"))
    await drained(store)
    assert await seen(store, "", ".zarray", ".zattrs") == [b"{}", b".zattrs"]


async def test_documents_that_are_asked_for_together_are_remembered_as_missing(
    store: CacheStore, source: StoreDouble
) -> None:
    names = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
    await appears(source, "", "zarr.json")
    await read(store, "elsewhere")
    for _ in range(2):
        await asyncio.gather(*(read(store, name) for name in names))
        await drained(store)
    source.take()
    assert await seen(store, "", *names) == [b"zarr.json", None, None, None]
    assert source.take() == {}


async def test_missing_document_counts_while_the_other_one_is_fresh(
    source: StoreDouble, clock: FakeClock
) -> None:
    await source.inner.set("zarr.json", buf(b"{}"))
    store = CacheStore(source, clock=clock, max_age_seconds={"zarr.json": 60})
    await read(store, "zarr.json")
    clock.advance(30)
    await read(store, ".zarray")
    source.take()
    await read(store, ".zarray")
    assert source.take() == {}
    clock.advance(30)
    await read(store, ".zarray")
    assert source.take() == {"get": 1}
    # And a document that is gone makes nothing real any more.
    await read(store, "zarr.json")
    await store.delete("zarr.json")
    source.take()
    await read(store, ".zarray")
    assert source.take() == {"get": 1}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_warm_opening_asks_the_source_nothing(
    source: StoreDouble, zarr_format: Any, consolidated: bool, told: bool
) -> None:
    inner = source.inner
    group = zarr.create_group(inner, zarr_format=zarr_format)
    for parent in (group, group.create_group("sub")):
        array = parent.create_array("x", shape=(4,), chunks=(2,), dtype="i4", fill_value=0)
        array[:2] = 1
    if consolidated:
        zarr.consolidate_metadata(inner, zarr_format=zarr_format)
    options = {"zarr_format": zarr_format} if told else {}
    store = CacheStore(source)

    def open_all() -> None:
        zarr.open(store, mode="r", **options)
        for path in ("x", "sub/x"):
            zarr.open(store, path=path, mode="r", **options)
            array = zarr.open_array(store, path=path, mode="r", **options)
            assert array[:].tolist() == [1, 1, 0, 0]
        group = zarr.open_group(store, mode="r", **options)
        assert group["sub"]["x"][3] == 0
        if consolidated:
            zarr.open_consolidated(store, **options)

    open_all()
    drained_sync(store)
    source.take()
    open_all()
    assert source.take() == {}


async def test_absences_are_shared_and_outlive_their_store(
    tmp_path: Path, source: StoreDouble
) -> None:
    options: dict[str, Any] = {"cache_store": tmp_path / "cache", "source_id": "s"}
    store = CacheStore(source, **options)
    await remember(store, "a")
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[2]); import support\n"
        "from zarr.storage import MemoryStore; from zcache import CacheStore\n"
        "from zarr.core.buffer import default_buffer_prototype\n"
        "from zcache.testing import StoreDouble\n"
        "source = StoreDouble(MemoryStore())\n"
        "store = CacheStore(source, cache_store=sys.argv[1], source_id='s')\n"
        "async def main():\n"
        "    assert await store.get('a', default_buffer_prototype()) is None\n"
        "    print(dict(source.calls), store.cache_stats()['missing_keys'])\n"
        "    await store.invalidate('a')\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(tmp_path / "cache"), str(TESTS)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert out.decode().split() == ["{}", "2"]
    # It has ended it for all.
    await read(store, "a")
    assert source.take() == {"get": 1}
    del store
    again = CacheStore(source, **options)
    await read(again, "a")
    assert source.take() == {}


async def test_absences_are_bounded_and_push_out_no_value(source: StoreDouble) -> None:
    store = CacheStore(source, max_size=10_000)
    await fill(store, a=b"123")
    for number in range(3000):
        await read(store, f"x/c/{number}/0")
    assert store.cache_stats()["missing_keys"] == 1024
    assert missing_keys(store) == [f"x/c/{number}/0" for number in range(3000 - 1024, 3000)]
    source.take()
    assert await read(store, "a") == b"123"
    # The least recently used goes first.
    await read(store, f"x/c/{3000 - 1024}/0")
    await read(store, "one more")
    await read(store, f"x/c/{3000 - 1024}/0")
    assert source.take() == {"get": 1}
    assert store.cache_info()["current_size"] == 3
    assert store.cache_stats()["evictions"] == 0
    await check_quiet(store)


async def test_nothing_is_remembered_where_nothing_is_cached(source: StoreDouble) -> None:
    store = CacheStore(source, max_size=0)
    for _ in range(2):
        await read(store, "a")
    assert source.take() == {"get": 2}
    assert missing_keys(store) == []


async def test_many_readers_of_a_missing_key_ask_once(
    store: CacheStore, source: StoreDouble
) -> None:
    await remember(store, "warm")
    found = await asyncio.gather(*(read(store, "a") for _ in range(200)))
    assert found == [None] * 200
    assert source.take() == {"get": 1}


async def test_source_that_raises_leaves_no_absence(store: CacheStore, source: StoreDouble) -> None:
    await remember(store, "warm")
    for error in (OSError("away"), FileNotFoundError("a")):
        source.fail("get", error, times=1)
        with pytest.raises(type(error)):
            await read(store, "a")
        assert missing_keys(store) == ["other", "warm"]
    await source.inner.set("a", buf(b"1"))
    assert await read(store, "a") == b"1"


async def test_options_name_what_is_wrong(source: StoreDouble) -> None:
    for value in (-1, float("nan"), "ever"):
        with pytest.raises(ValueError, match="missing_max_age_seconds"):
            CacheStore(source, missing_max_age_seconds=value)
    with pytest.raises(TypeError, match="missing_max_age_seconds"):
        CacheStore(source, missing_max_age_seconds=True)
    with pytest.raises(TypeError, match="cache_missing"):
        CacheStore(source, cache_missing=1)  # type: ignore[arg-type]


async def test_absence_past_its_age_is_served_in_place_of_an_error_of_the_source(
    source: StoreDouble, cache: Store | CachePool, clock: FakeClock
) -> None:
    store = CacheStore(
        source,
        cache_store=cache,
        clock=clock,
        source_id="s",
        stale_if_error=100,
        max_age_seconds=50,
    )
    await remember(store, "a")
    source.fail("*", OSError("away"))
    clock.advance(149)
    assert await read(store, "a") is None
    assert not await store.exists("a")
    with pytest.raises(FileNotFoundError):
        await store.getsize("a")
    assert await store.get_partial_values(PROTOTYPE, [("a", None)]) == [None]
    assert store.cache_stats()["stale_hits"] == 4
    assert store.cache_stats()["negative_hits"] == 2
    clock.advance(1)
    for work in (lambda: read(store, "a"), lambda: store.exists("a"), lambda: store.getsize("a")):
        with pytest.raises(OSError, match="away"):
            await work()
    source.heal()
    await source.inner.set("a", buf(b"1"))
    assert await read(store, "a") == b"1"


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_dataset_opens_again_offline_whatever_the_age_of_what_is_missing(
    source: StoreDouble, tmp_path: Path, clock: FakeClock, zarr_format: Any
) -> None:
    array = zarr.create_array(
        source.inner, shape=(4,), chunks=(2,), dtype="i4", fill_value=0, zarr_format=zarr_format
    )
    array[:2] = 1
    options: dict[str, Any] = {"cache_store": tmp_path, "source_id": "s", "clock": clock}
    store = CacheStore(source, **options)
    assert zarr.open(store, mode="r")[:].tolist() == [1, 1, 0, 0]
    drained_sync(store)
    clock.advance(1e6)
    source.take()
    offline = CacheStore(source, offline=True, **options)
    assert zarr.open(offline, mode="r")[:].tolist() == [1, 1, 0, 0]
    assert source.take() == {}
