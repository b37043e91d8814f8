"""What the constructor takes and refuses, and what a store says about itself."""

from __future__ import annotations

import asyncio
import inspect
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ZipStore
from zarr.testing.store import LatencyStore

import zcache
from directories import closed
from pools import STORES
from support import buf, check_quiet, read
from zcache import CachePool, CacheStore
from zcache._core import DEFAULT_MINIMISED, DEFAULT_POLICY, MINIMISED, POLICIES
from zcache._types import Minimised, Policy
from zcache.exceptions import OptionTypeError, OptionValueError
from zcache.testing import StoreDouble, cache_store_of, stored_sizes

if TYPE_CHECKING:
    from zarr.abc.store import Store

SIZES: list[tuple[object, int | None]] = [
    (None, None),
    (0, 0),
    (1, 1),
    (256 * 1024 * 1024, 268435456),
    (2**64 - 1, 2**64 - 1),
    (np.int64(5), 5),
    (np.uint8(5), 5),
    ("0", 0),
    ("17", 17),
    ("17 B", 17),
    ("256MB", 256_000_000),
    ("256mb", 256_000_000),
    ("1 kB", 1000),
    ("1 KiB", 1024),
    ("2 GiB", 2 * 1024**3),
    ("2gib", 2 * 1024**3),
    ("1.5 GiB", 3 * 1024**3 // 2),
    ("0.1TB", 10**11),
    ("3 TiB", 3 * 1024**4),
    ("1 PB", 10**15),
    ("16383 PiB", 16383 * 1024**5),
    ("  8 MiB  ", 8 * 1024**2),
]
NO_SIZES: list[tuple[object, type[Exception]]] = [
    (-1, OptionValueError),
    (1.5, OptionTypeError),
    (np.int64(-1), OptionValueError),
    (2**64, OptionValueError),
    ("16384 PiB", OptionValueError),
    ("-1", OptionValueError),
    ("-5MB", OptionValueError),
    ("", OptionValueError),
    ("MB", OptionValueError),
    ("lots", OptionValueError),
    ("infinity", OptionValueError),
    ("nan", OptionValueError),
    ("5 apples", OptionValueError),
    ("5 MB/s", OptionValueError),
    ("1e9", OptionValueError),
    ("1_000", OptionValueError),
    ("0x10", OptionValueError),
    ("1" * 5000, OptionValueError),
    ("0.5", OptionValueError),
    ("0.5 B", OptionValueError),
    ("\u0663 MB", OptionValueError),
    (True, OptionTypeError),
    (False, OptionTypeError),
    (np.True_, OptionTypeError),
    (float("nan"), OptionTypeError),
    (float("inf"), OptionTypeError),
    (Decimal(5), OptionTypeError),
    (Fraction(5), OptionTypeError),
    (b"5MB", OptionTypeError),
    ([5], OptionTypeError),
    (5j, OptionTypeError),
    (np.timedelta64(5, "s"), OptionTypeError),
]
AGES: list[tuple[object, object]] = [
    ("infinity", "infinity"),
    (None, "infinity"),
    (float("inf"), "infinity"),
    (0, 0),
    (0.0, 0.0),
    (3600, 3600),
    (0.25, 0.25),
    (1e-9, 1e-9),
    (1e300, 1e300),
    (np.int64(60), 60.0),
    (np.float32(0.5), 0.5),
    (Fraction(1, 2), 0.5),
]
NO_AGES: list[tuple[object, type[Exception]]] = [
    (-1, OptionValueError),
    (-0.001, OptionValueError),
    (float("-inf"), OptionValueError),
    (float("nan"), OptionValueError),
    (np.float64("nan"), OptionValueError),
    (10**400, OptionValueError),
    ("forever", OptionValueError),
    ("Infinity", OptionValueError),
    ("60", OptionValueError),
    ("", OptionValueError),
    (True, OptionTypeError),
    (np.False_, OptionTypeError),
    (b"infinity", OptionTypeError),
    ([60], OptionTypeError),
    (5j, OptionTypeError),
    (np.timedelta64(5, "s"), OptionTypeError),
]


@pytest.fixture
def replaced() -> type[CacheStore]:
    """The class that this one replaces, as long as zarr has it."""
    module = pytest.importorskip(
        "zarr.experimental.cache_store", reason="this zarr has no longer what zcache replaces"
    )
    replaced: type[CacheStore] = module.CacheStore
    return replaced


def shown(value: object) -> str:
    return repr(value)[:40]


@pytest.mark.parametrize(("given", "size"), SIZES, ids=shown)
def test_max_size_with_a_meaning_is_taken(given: Any, size: int | None) -> None:
    store = CacheStore(MemoryStore(), max_size=given)
    assert store.max_size == store.cache_info()["max_size"] == size
    assert type(store.max_size) in (int, type(None))


@pytest.mark.parametrize(("given", "error"), NO_SIZES, ids=shown)
def test_max_size_without_a_meaning_raises(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), max_size=given)
    assert_helpful(
        caught.value, f"invalid max_size: {given!r}. Give", "bytes", '"2 GiB"', "None for no bound"
    )


@pytest.mark.parametrize(("given", "age"), AGES, ids=shown)
def test_max_age_with_a_meaning_is_taken(given: Any, age: object) -> None:
    store = CacheStore(MemoryStore(), max_age_seconds=given)
    assert store.max_age_seconds == store.cache_info()["max_age_seconds"] == age
    assert type(store.max_age_seconds) in (int, float, str)


@pytest.mark.parametrize(("given", "error"), NO_AGES, ids=shown)
def test_max_age_without_a_meaning_raises(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), max_age_seconds=given)
    assert_helpful(
        caught.value,
        f"invalid max_age_seconds: {given!r}. Give",
        "seconds",
        '"infinity"',
        "None for entries",
    )


@pytest.mark.parametrize("given", [None, 0, 1, "yes", np.True_])
@pytest.mark.parametrize("option", ["cache_set_data", "adopt", "read_only"])
def test_flag_that_is_no_bool_raises(option: str, given: Any) -> None:
    if option == "read_only" and given is None:
        assert CacheStore(MemoryStore(), read_only=None).read_only is False
        return
    with pytest.raises(OptionTypeError) as caught:
        CacheStore(MemoryStore(), **{option: given})
    allowed = "True, False, or None for the mode of the source"
    allowed = allowed if option == "read_only" else "True or False"
    assert_helpful(caught.value, f"invalid {option}: {given!r}. Give {allowed}.")


@pytest.mark.parametrize("given", [None, 0, 1, "no", np.True_])
def test_cache_set_data_is_checked_where_it_is_set_as_well(given: Any) -> None:
    store = CacheStore(MemoryStore())
    for one in (store, store.with_read_only(), type("Own", (CacheStore,), {})(MemoryStore())):
        with pytest.raises(OptionTypeError) as caught:
            one.cache_set_data = given
        assert_helpful(caught.value, f"invalid cache_set_data: {given!r}. Give True or False.")
        assert one.cache_set_data is True
    store.cache_set_data = False
    assert store.with_read_only().cache_set_data is False


@pytest.mark.parametrize(
    ("option", "given", "error", "allowed"),
    [
        ("verify", "sometimes", OptionValueError, '"first", "always" or "never"'),
        ("verify", None, OptionTypeError, '"first", "always" or "never"'),
        ("verify", True, OptionTypeError, '"first", "always" or "never"'),
        ("verify", [], OptionTypeError, '"first", "always" or "never"'),
        ("verify", np.array(["first", "a"]), OptionTypeError, '"first", "always" or "never"'),
        ("source_id", "", OptionValueError, "text that names the source"),
        ("source_id", 5, OptionTypeError, "text that names the source"),
        ("source_id", "unnamed:5", OptionValueError, "text that names the source"),
        ("max_pending_size", "101%", OptionValueError, 'a share such as "25%"'),
        ("min_free_space", -1, OptionValueError, "bytes"),
        ("min_free_space", "some", OptionValueError, '"2 GiB"'),
        ("min_free_space", 1.5, OptionTypeError, "bytes"),
        ("min_free_space", True, OptionTypeError, "bytes"),
    ],
)
def test_option_without_a_meaning_raises(
    option: str, given: Any, error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), **{option: given})
    assert_helpful(caught.value, f"invalid {option}: {given!r}. Give", allowed)


@pytest.mark.parametrize("given", [None, "5", -1, float("nan"), True, [5]], ids=shown)
async def test_timeout_without_a_meaning_raises(given: Any) -> None:
    store = CacheStore(MemoryStore(), cache_store=StoreDouble(MemoryStore()))
    gate = StoreDouble(MemoryStore()).block("get")
    advice = "Give seconds as a number from 0 on"
    kind = OptionValueError if repr(given) in ("'5'", "-1", "nan") else OptionTypeError
    for call in (store.drain_sync, gate.wait_entered):
        with pytest.raises(kind) as caught:
            call(timeout=given)
        assert_helpful(caught.value, f"invalid timeout: {given!r}. {advice}")
    for wait in (store.drain, gate.entered_async):
        with pytest.raises(kind) as caught:
            await wait(timeout=given)
        assert_helpful(caught.value, f"invalid timeout: {given!r}. {advice}")


@pytest.mark.parametrize("given", [0, 1e300, float("inf"), "infinity", np.float32(5)], ids=shown)
@pytest.mark.parametrize("kind", STORES)
async def test_timeout_may_be_any_number_of_seconds(given: Any, kind: str, tmp_path: Path) -> None:
    cache = STORES[kind](tmp_path)
    store = CacheStore(MemoryStore({"k": buf(b"1")}), cache_store=cache, source_id="s")
    await read(store, "k")
    assert await store.drain(given) or given == 0
    assert await asyncio.to_thread(store.drain_sync, given) or given == 0


@pytest.mark.parametrize("given", [None, {}, MemoryStore])
def test_store_that_is_none_raises(given: Any) -> None:
    with pytest.raises(OptionTypeError) as caught:
        CacheStore(given)
    # Its type only: an object of the user's own may hold a secret.
    assert_helpful(
        caught.value, f"invalid store: {type(given).__name__}. Give a zarr.abc.store.Store"
    )


def test_url_or_path_instead_of_a_store_is_named_without_its_secrets() -> None:
    for given, shown in {
        "s3://me:hush@bucket/key?sig=hush": "s3://bucket/key",
        "zip://a::s3://me:hush@bucket/key": "zip://a::s3://bucket/key",
        Path("/data/era5.zarr"): "/data/era5.zarr",
    }.items():
        with pytest.raises(OptionTypeError) as caught:
            CacheStore(given)  # type: ignore[arg-type]
        assert_helpful(caught.value, f"invalid store: '{shown}'", "to zcache.open")
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("given", [{}, 5, MemoryStore])
def test_cache_store_that_is_none_raises(given: Any) -> None:
    with pytest.raises(OptionTypeError) as caught:
        CacheStore(MemoryStore(), cache_store=given)
    # Its type only: a text or an object of the user's own may hold a secret.
    assert_helpful(
        caught.value, f"invalid cache_store: {type(given).__name__}. Give a zarr.abc.store.Store"
    )


def test_message_tells_what_none_means() -> None:
    for options, none in (
        ({"max_age_seconds": -1}, '"infinity" or None for entries that never expire'),
        ({"metadata_max_age_seconds": True}, "None for max_age_seconds."),
        ({"missing_max_age_seconds": "x"}, "None for the default."),
        ({"max_size": -1}, "None for no bound."),
        ({"min_free_space": -1}, "None for the default."),
        ({"decoded_size": -1}, "None for no decoded chunks."),
        ({"offline": 3}, "True, False, or None for what ZCACHE_OFFLINE says."),
    ):
        with pytest.raises((OptionTypeError, OptionValueError)) as caught:
            CacheStore(MemoryStore(), **options)  # type: ignore[arg-type]
        assert_helpful(caught.value, none)
    with pytest.raises(OptionValueError) as caught:
        zcache.open("memory://", cache="memory", max_size=-1)
    assert_helpful(caught.value, "None for the bound that the pool has, else 20%.")
    for options in ({"metadata_max_age_seconds": None}, {"missing_max_age_seconds": None}):
        store = CacheStore(MemoryStore(), max_age_seconds=60, **options)  # type: ignore[arg-type]
        assert (store.metadata_max_age_seconds, store.missing_max_age_seconds) == (None, 300)


async def test_key_or_range_that_is_none_raises() -> None:
    store = CacheStore(MemoryStore({"k": buf(b"12345")}))
    await read(store, "k")
    for key in (None, 5, b"k"):
        given: Any = key
        for act in (
            lambda given=given: store.set(given, buf(b"1")),
            lambda given=given: store.delete(given),
            lambda given=given: store.delete_dir(given),
        ):
            with pytest.raises(OptionTypeError) as caught:
                await act()
            assert_helpful(caught.value, f"invalid key: {given!r}. Give text")
        with pytest.raises(OptionTypeError, match="invalid key"):
            store.is_cached(given)
        with pytest.raises(OptionTypeError, match="invalid prefix"):
            await store.getsize_prefix(given)
    for part in (5, (0, 4), slice(0, 4)):
        with pytest.raises(OptionTypeError) as caught:
            store.is_cached("k", part)  # type: ignore[arg-type]
        assert_helpful(caught.value, f"invalid byte_range: {part!r}. Give one of zarr.abc.store")
    with pytest.raises(OptionTypeError, match="invalid read_only: 'no'"):
        store.with_read_only("no")  # type: ignore[arg-type]
    assert await read(store, "k") == b"12345"
    assert store.is_cached("k", RangeByteRequest(0, 2))


def assert_helpful(error: Exception, *parts: str) -> None:
    """The text names the value and what is allowed, and does not hide behind another error."""
    for part in parts:
        assert part in str(error)
    assert error.__suppress_context__ or error.__context__ is None


# ------------------------------------------------------- cache stores that cannot be one


class NoDeletes(MemoryStore):
    supports_deletes = False


class NoWrites(MemoryStore):
    supports_writes = False


def refused(source: Store, cache: Store, *parts: str) -> None:
    with pytest.raises(OptionValueError, match="invalid cache_store: ") as caught:
        CacheStore(source, cache_store=cache)
    assert_helpful(caught.value, type(cache).__name__, *parts)


def test_cache_store_without_deletes_is_refused(tmp_path: Path) -> None:
    refused(MemoryStore(), NoDeletes(), "does not support deletes", "MemoryStore or LocalStore")
    refused(MemoryStore(), ZipStore(tmp_path / "cache.zip", mode="w"), "does not support deletes")


def test_mock_of_a_store_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache: Any = MagicMock()
    cache.supports_deletes = False
    refused(MemoryStore(), cache, "does not support deletes")
    with pytest.raises(OptionTypeError, match="invalid cache_store: "):
        CacheStore(MemoryStore(), cache_store=cast("Any", MagicMock()))
    assert not list(tmp_path.iterdir())


def test_cache_store_without_writes_is_refused() -> None:
    refused(MemoryStore(), NoWrites(), "does not support writes")
    refused(
        MemoryStore(), MemoryStore(read_only=True), "does not support writes", "read_only=False"
    )
    refused(MemoryStore(), LatencyStore(NoWrites()), "does not support writes")


def test_cache_store_that_is_the_source_is_refused() -> None:
    store = MemoryStore()
    refused(store, store, "is the source itself", "another store")
    refused(store, MemoryStore(store._store_dict), "is the source itself")
    refused(store.with_read_only(read_only=True), store, "is the source itself")
    refused(LatencyStore(store), store, "is the source itself")
    refused(store, StoreDouble(LatencyStore(store)), "is the source itself")


def test_cache_store_that_is_the_source_of_the_replaced_class_is_refused(
    replaced: type[CacheStore],
) -> None:
    store = MemoryStore()
    refused(replaced(store, cache_store=MemoryStore()), store, "is the source itself")


def test_cache_store_that_is_the_source_of_another_cache_is_refused() -> None:
    source = MemoryStore()
    inner = CacheStore(source)
    refused(inner, source, "is the source itself")
    refused(StoreDouble(inner), source, "is the source itself")
    refused(source, inner, "is the source itself")


def test_cache_store_that_holds_the_cache_of_the_source_is_refused(tmp_path: Path) -> None:
    """The two would wait for each other, or not know of each other's values."""
    for cache in (MemoryStore(), LatencyStore(MemoryStore()), LocalStore(tmp_path)):
        inner = CacheStore(MemoryStore(), cache_store=cache)
        refused(inner, cache, "holds the cache of the source", "another store")
        refused(StoreDouble(inner), cache, "holds the cache of the source")
        CacheStore(inner, cache_store=MemoryStore())


def test_cache_store_in_the_directory_of_the_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    source = LocalStore(root)
    for other in (
        *(str(root), f"{root}/", tmp_path / "link", "data", "./link/../data"),
        f"{root}/../data",
        os.path.relpath(root),
    ):
        refused(source, LocalStore(other), "is the source itself")
        refused(LatencyStore(source), LatencyStore(LocalStore(other)), "is the source itself")
    missing = LocalStore(tmp_path / "missing")
    refused(missing, LocalStore(tmp_path / "missing"), "is the source itself")
    CacheStore(source, cache_store=LocalStore(tmp_path / "data2"))


def test_cache_store_inside_or_around_the_source_is_refused(tmp_path: Path) -> None:
    """Or around it: each would list, overwrite or clear values of the other."""
    (tmp_path / "data").mkdir()
    inside, outside = LocalStore(tmp_path / "data"), LocalStore(tmp_path)
    refused(outside, inside, "inside")
    refused(inside, outside, "inside")


def test_directory_with_an_option_that_raises_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"value")
    with pytest.raises(OptionValueError, match="max_size"):
        CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path), max_size="much")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


# ------------------------------------------------------------------------- signature


def test_signature_begins_with_the_one_of_the_replaced_class(replaced: type[CacheStore]) -> None:
    mine = inspect.signature(CacheStore).parameters
    theirs = inspect.signature(replaced).parameters
    assert list(theirs) == list(mine)[: len(theirs)]
    assert [p.kind for p in theirs.values()] == [mine[name].kind for name in theirs]
    assert {name: mine[name].default for name in list(theirs)[1:]} == {
        "cache_store": None,
        "max_age_seconds": "infinity",
        "max_size": None,
        "cache_set_data": True,
    }
    for name in list(mine)[len(theirs) :]:
        assert mine[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert mine[name].default is not inspect.Parameter.empty
    with pytest.raises(TypeError):
        CacheStore()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        CacheStore(MemoryStore(), MemoryStore())  # type: ignore[misc]


@pytest.mark.parametrize("which", ["zcache", "replaced"])
def test_call_of_the_replaced_class_does_the_same(
    which: str, request: pytest.FixtureRequest
) -> None:
    """Each way to call the class that is replaced does the same here."""
    cls = CacheStore if which == "zcache" else request.getfixturevalue("replaced")
    source, cache = MemoryStore(), MemoryStore()
    options: dict[str, Any] = {
        "max_age_seconds": 60,
        "max_size": 1024,
        "cache_set_data": False,
    }
    for store in (
        cls(source, cache_store=cache, **options),
        cls(store=source, cache_store=cache, **options),
    ):
        assert store.cache_info() == {
            "cache_store_type": "MemoryStore",
            "current_size": 0,
            "tracked_keys": 0,
            "cached_keys": 0,
            **options,
        }
        assert list(store.cache_stats())[:5] == [
            *("hits", "misses", "evictions", "total_requests", "hit_rate"),
        ]
        for name, value in options.items():
            assert getattr(store, name) == value


async def test_cache_store_by_default_is_a_new_memory_store() -> None:
    source = MemoryStore()
    one, other = CacheStore(source), CacheStore(source)
    assert type(cache_store_of(one)) is MemoryStore
    assert cache_store_of(one) is not cache_store_of(other)
    await one.set("key", buf(b"value"))
    assert stored_sizes(one) == {"key": 5}
    assert stored_sizes(other) == {}
    assert await read(other, "key") == b"value"
    await check_quiet(one)
    await check_quiet(other)


@pytest.mark.parametrize(
    "kinds", ["fsspec fsspec", "local fsspec", "fsspec local", "fsspec inside", "read-only fsspec"]
)
def test_cache_store_that_is_the_source_by_another_library_is_refused(
    tmp_path: Path, kinds: str
) -> None:
    """To evict from it would delete what it holds."""
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/data"
    make = {
        "fsspec": lambda: FsspecStore.from_url(url),
        "read-only": lambda: FsspecStore.from_url(url, read_only=True),
        "inside": lambda: FsspecStore.from_url(f"{url}/cache"),
        "local": lambda: LocalStore(tmp_path / "data"),
    }
    source, cache = (make[kind]() for kind in kinds.split())
    with pytest.raises(OptionValueError, match=r"is the source itself, or one of them is inside"):
        CacheStore(source, cache_store=cache)


# -------------------------------------------------------------------------------- shares


def test_share_of_a_directory_is_one_of_its_whole_volume(tmp_path: Path) -> None:
    volume = os.statvfs(tmp_path)
    whole = volume.f_blocks * volume.f_frsize
    cache = LocalStore(tmp_path / "not" / "yet" / "there")
    store = CacheStore(MemoryStore(), cache_store=cache, max_size="25%", min_free_space="12.5 %")
    assert store.max_size == store.cache_info()["max_size"] == int(whole * 0.25)
    assert store.min_free_space == int(whole * 0.125)
    copy = store.with_read_only(True)
    assert (copy.max_size, copy.min_free_space) == (store.max_size, store.min_free_space)


@pytest.mark.parametrize("kind", ["memory", "directory", "pool"])
def test_cache_info_tells_the_bound_in_force(kind: str, tmp_path: Path) -> None:
    source = MemoryStore()
    place: Any = {
        "memory": MemoryStore(),
        "directory": tmp_path / "cache",
        "pool": CachePool(tmp_path / "pool", max_size=10**6),
    }[kind]
    stores = [
        CacheStore(source, cache_store=place, source_id="one", max_size=size)
        for size in (None, 9 * 10**6, 10**6)
    ]
    assert [store.max_size for store in stores] == [None, 9 * 10**6, 10**6]
    for store in stores:
        assert store.cache_info()["max_size"] == 10**6
        assert "max_size=1000000" in repr(store)


def test_share_in_memory_is_one_of_what_the_process_may_use() -> None:
    store = CacheStore(MemoryStore(), max_size="50%")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < store.cache_info()["max_size"] <= physical // 2
    assert CacheStore(MemoryStore(), max_size="100%").max_size is not None
    assert CacheStore(MemoryStore(), max_size="0%").max_size == 0


@pytest.mark.parametrize("given", ["-1%", "101%", "%", "1e1%", "25 percent", "25%%"])
def test_share_without_a_meaning_raises(given: str) -> None:
    for name in ("max_size", "min_free_space", "max_pending_size"):
        options: Any = {name: given}
        with pytest.raises(OptionValueError) as caught:
            CacheStore(MemoryStore(), **options)
        assert_helpful(caught.value, f"invalid {name}: {given!r}. Give", '"25%"')


def test_share_of_what_has_no_size_raises() -> None:
    cache = FsspecStore.from_url("memory://zcache-shares")
    with pytest.raises(OptionValueError) as caught:
        CacheStore(MemoryStore(), cache_store=cache, max_size="25%")
    assert_helpful(caught.value, "invalid max_size: '25%'", "no local directory", "Give bytes")
    # Of what waits in memory it is one of that.
    assert CacheStore(MemoryStore(), cache_store=cache, max_pending_size="25%").max_size is None


# ------------------------------------------------------- what errors keep


class Refusing(MemoryStore):
    """A source of a user's own class that fails while it is being opened."""

    def with_read_only(self, read_only: bool = False) -> Any:
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"verify": "sometimes"}, OptionValueError),
        ({"decoded_size": "much"}, OptionValueError),
        ({"read_only": True}, RuntimeError),
        # A warning that is an error comes once the pool is open for the source.
        ({"eviction": "lru"}, UserWarning),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
async def test_error_that_is_kept_keeps_no_pool_in_use(
    tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    # As `sys.last_exc` does in a notebook.
    with pytest.raises(error) as kept:
        CacheStore(
            Refusing(),
            cache_store=CachePool(tmp_path / "cache", max_size=10**6, eviction="adaptive"),
            source_id="source",
            **options,
        )
    await closed(tmp_path)
    del kept


@pytest.mark.filterwarnings("error")
def test_error_of_a_pool_that_is_kept_keeps_no_bound_in_force(tmp_path: Path) -> None:
    pool = CachePool(tmp_path, max_size=10**6, eviction="none")
    with pytest.raises(UserWarning, match="is in use with") as kept:
        CachePool(tmp_path, max_size=10**5, eviction="adaptive")
    assert pool.cache_info()["max_size"] == 10**6
    del kept


# ---------------------------------------- attributes of the replaced class


def data_of(replaced: type[CacheStore]) -> tuple[Any, dict[str, Any]]:
    """A store of the replaced class, and its public attributes that are no methods."""
    store = replaced(MemoryStore(), cache_store=MemoryStore(), max_age_seconds=60, max_size=10**6)
    names = {*dir(store), *inspect.get_annotations(replaced)}
    found = {name: getattr(store, name) for name in names if not name.startswith("_")}
    return store, {name: value for name, value in found.items() if not callable(value)}


def test_attributes_of_the_replaced_class_mean_the_same(replaced: type[CacheStore]) -> None:
    ours = CacheStore(MemoryStore(), cache_store=MemoryStore(), max_age_seconds=60, max_size=10**6)
    _, data = data_of(replaced)
    assert {"max_age_seconds", "max_size", "cache_set_data"} <= set(data)
    assert {name: getattr(ours, name) for name in data} == data


def test_attribute_of_the_replaced_class_is_set_or_says_what_to_do(
    replaced: type[CacheStore],
) -> None:
    theirs, data = data_of(replaced)
    ours = CacheStore(MemoryStore(), cache_store=MemoryStore(), max_age_seconds=60, max_size=10**6)
    set_ones = set()
    for name, value in data.items():
        other = not value if isinstance(value, bool) else 7
        try:
            setattr(theirs, name, other)
        except AttributeError:
            continue
        try:
            setattr(ours, name, other)
        except AttributeError as error:
            assert_helpful(
                error, f"{name} cannot be set", f"CacheStore(store, cache_store=..., {name}=7)"
            )
            assert getattr(ours, name) == value
        else:
            assert getattr(ours, name) == other
            set_ones.add(name)
    assert set_ones == {"cache_set_data"}
    with pytest.raises(AttributeError, match=r"read_only.*with_read_only\(True\)"):
        ours.read_only = True  # type: ignore[misc]


README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("literal", "names", "default", "places"),
    [
        (
            Policy,
            POLICIES,
            DEFAULT_POLICY,
            [
                CacheStore.__doc__,
                CachePool.__doc__,
                CacheStore.advise.__doc__,
                zcache.replay.__doc__,
            ],
        ),
        (Minimised, MINIMISED, DEFAULT_MINIMISED, [CacheStore.__doc__, CachePool.__doc__]),
    ],
    ids=["eviction", "minimise"],
)
def test_each_policy_has_its_literal_and_is_named_wherever_they_are_listed(
    literal: Any, names: tuple[str, ...], default: str, places: list[str]
) -> None:
    assert get_args(literal) == names
    assert default in names
    for text in (*places, README.read_text(encoding="utf-8")):
        assert [name for name in names if f'"{name}"' not in text] == []


@pytest.mark.parametrize(
    "name", ["verify", "clock", "source_id", "decoded_size", "adopt", "offline"]
)
def test_option_that_is_set_says_what_to_do(name: str) -> None:
    store = CacheStore(MemoryStore(), cache_store=MemoryStore())
    with pytest.raises(AttributeError, match=rf"{name} cannot be set.*{name}=1"):
        setattr(store, name, 1)


def test_subclass_may_have_attributes_with_names_of_options() -> None:
    class Mine(CacheStore):
        @property
        def offline(self) -> bool:
            return False

        @offline.setter
        def offline(self, value: bool) -> None:
            raise AttributeError("mine")

    store = Mine(MemoryStore(), cache_store=MemoryStore())
    store.verify = "what I like"  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"^mine$"):
        store.offline = True  # type: ignore[misc]
    with pytest.raises(AttributeError, match="max_size cannot be set"):
        store.max_size = 1  # type: ignore[misc]
