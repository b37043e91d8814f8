"""What the constructor takes and refuses, and what a store says about itself."""

from __future__ import annotations

import inspect
import os
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ZipStore
from zarr.testing.store import LatencyStore

from support import CountingStore, buf, check_books, held, read
from zcache import CacheStore

if TYPE_CHECKING:
    from pathlib import Path

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
    (-1, ValueError),
    (np.int64(-1), ValueError),
    (2**64, ValueError),
    ("16384 PiB", ValueError),
    ("-1", ValueError),
    ("-5MB", ValueError),
    ("", ValueError),
    ("MB", ValueError),
    ("lots", ValueError),
    ("infinity", ValueError),
    ("nan", ValueError),
    ("5 apples", ValueError),
    ("5 MB/s", ValueError),
    ("1e9", ValueError),
    ("1_000", ValueError),
    ("0x10", ValueError),
    ("1" * 5000, ValueError),
    ("0.5", ValueError),
    ("0.5 B", ValueError),
    ("\u0663 MB", ValueError),
    (True, TypeError),
    (False, TypeError),
    (np.True_, TypeError),
    (1.0, TypeError),
    (1.5e9, TypeError),
    (np.float64(5), TypeError),
    (float("nan"), TypeError),
    (float("inf"), TypeError),
    (Decimal(5), TypeError),
    (Fraction(5), TypeError),
    (b"5MB", TypeError),
    ([5], TypeError),
    (5j, TypeError),
    (np.timedelta64(5, "s"), TypeError),
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
    (-1, ValueError),
    (-0.001, ValueError),
    (float("-inf"), ValueError),
    (float("nan"), ValueError),
    (np.float64("nan"), ValueError),
    (10**400, ValueError),
    ("forever", ValueError),
    ("Infinity", ValueError),
    ("60", ValueError),
    ("", ValueError),
    (True, TypeError),
    (np.False_, TypeError),
    (b"infinity", TypeError),
    ([60], TypeError),
    (5j, TypeError),
    (np.timedelta64(5, "s"), TypeError),
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
def test_max_size(given: Any, size: int | None) -> None:
    store = CacheStore(MemoryStore(), max_size=given)
    assert store.max_size == store.cache_info()["max_size"] == size
    assert type(store.max_size) in (int, type(None))


@pytest.mark.parametrize(("given", "error"), NO_SIZES, ids=shown)
def test_no_max_size(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), max_size=given)
    assert_helpful(caught.value, f"max_size={given!r}", "bytes", '"2 GiB"', "None for no bound")


@pytest.mark.parametrize(("given", "age"), AGES, ids=shown)
def test_max_age(given: Any, age: object) -> None:
    store = CacheStore(MemoryStore(), max_age_seconds=given)
    assert store.max_age_seconds == store.cache_info()["max_age_seconds"] == age
    assert type(store.max_age_seconds) in (int, float, str)


@pytest.mark.parametrize(("given", "error"), NO_AGES, ids=shown)
def test_no_max_age(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), max_age_seconds=given)
    assert_helpful(
        caught.value, f"max_age_seconds={given!r}", "seconds", '"infinity"', "None for entries"
    )


@pytest.mark.parametrize("given", [None, 0, 1, "yes", np.True_])
@pytest.mark.parametrize("option", ["cache_set_data", "adopt", "read_only"])
def test_no_flag(option: str, given: Any) -> None:
    if option == "read_only" and given is None:
        assert CacheStore(MemoryStore(), read_only=None).read_only is False
        return
    with pytest.raises(TypeError) as caught:
        CacheStore(MemoryStore(), **{option: given})
    assert_helpful(caught.value, f"{option}={given!r}", "True or False")


@pytest.mark.parametrize(
    ("option", "given", "error", "allowed"),
    [
        ("verify", "sometimes", ValueError, '"first", "always" or "never"'),
        ("verify", None, ValueError, '"first", "always" or "never"'),
        ("verify", True, ValueError, '"first", "always" or "never"'),
        ("source_id", "", ValueError, "text that names the source"),
        ("source_id", 5, TypeError, "text that names the source"),
        ("min_free_space", -1, ValueError, "bytes"),
        ("min_free_space", "some", ValueError, '"2 GiB"'),
        ("min_free_space", 1.5, TypeError, "bytes"),
        ("min_free_space", True, TypeError, "bytes"),
    ],
)
def test_no_option(option: str, given: Any, error: type[Exception], allowed: str) -> None:
    with pytest.raises(error) as caught:
        CacheStore(MemoryStore(), **{option: given})
    assert_helpful(caught.value, f"{option}={given!r}", allowed)


@pytest.mark.parametrize("given", [None, "s3://bucket", {}, MemoryStore])
def test_no_store(given: Any) -> None:
    with pytest.raises(TypeError) as caught:
        CacheStore(given)
    assert_helpful(caught.value, f"store={given!r}", "zarr.abc.store.Store")


@pytest.mark.parametrize("given", ["/tmp/cache", {}, 5, MemoryStore])
def test_no_cache_store(given: Any) -> None:
    with pytest.raises(TypeError) as caught:
        CacheStore(MemoryStore(), cache_store=given)
    assert_helpful(caught.value, f"cache_store={given!r}", "zarr.abc.store.Store")


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
    with pytest.raises(ValueError, match="cache_store=") as caught:
        CacheStore(source, cache_store=cache)
    assert_helpful(caught.value, repr(cache), *parts)


def test_cache_store_cannot_delete(tmp_path: Path) -> None:
    refused(MemoryStore(), NoDeletes(), "does not support deletes", "MemoryStore or LocalStore")
    refused(MemoryStore(), ZipStore(tmp_path / "cache.zip", mode="w"), "does not support deletes")


def test_cache_store_cannot_write(tmp_path: Path) -> None:
    refused(MemoryStore(), NoWrites(), "does not support writes")
    refused(
        MemoryStore(), MemoryStore(read_only=True), "does not support writes", "read_only=False"
    )
    refused(MemoryStore(), LocalStore(tmp_path, read_only=True), "does not support writes")
    refused(MemoryStore(), LatencyStore(NoWrites()), "does not support writes")


def test_cache_store_is_the_source() -> None:
    store = MemoryStore()
    refused(store, store, "is the source itself", "another store")
    refused(store, MemoryStore(store._store_dict), "is the source itself")
    refused(store.with_read_only(read_only=True), store, "is the source itself")
    refused(LatencyStore(store), store, "is the source itself")
    refused(store, CountingStore(LatencyStore(store)), "is the source itself")


def test_cache_store_is_the_source_behind_the_class_that_is_replaced(
    replaced: type[CacheStore],
) -> None:
    store = MemoryStore()
    refused(replaced(store, cache_store=MemoryStore()), store, "is the source itself")


def test_cache_store_is_the_source_behind_another_cache() -> None:
    source = MemoryStore()
    inner = CacheStore(source)
    refused(inner, source, "is the source itself")
    refused(CountingStore(inner), source, "is the source itself")
    refused(source, inner, "is the source itself")


def test_cache_store_is_where_the_source_has_its_cache() -> None:
    """The two would wait for each other, or not know of each other's values."""
    for cache in (MemoryStore(), LatencyStore(MemoryStore())):
        inner = CacheStore(MemoryStore(), cache_store=cache)
        refused(inner, cache, "holds the cache of the source", "another store")
        refused(CountingStore(inner), cache, "holds the cache of the source")
        CacheStore(inner, cache_store=MemoryStore())


async def test_a_directory_twice(tmp_path: Path) -> None:
    """Those who share one know of each other."""
    source, cache = CountingStore(MemoryStore()), LocalStore(tmp_path)
    store = CacheStore(CacheStore(source, cache_store=cache), cache_store=cache)
    for value in (b"1", b"22"):
        await store.set("a", buf(value))
        for _ in range(2):
            assert await read(store, "a") == value
    assert source.take()["get"] <= 2  # One for each value.


def test_cache_store_is_the_directory_of_the_source(
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


def test_cache_store_lies_in_the_directory_of_the_source(tmp_path: Path) -> None:
    """Or around it: each would list, overwrite or clear values of the other."""
    (tmp_path / "data").mkdir()
    inside, outside = LocalStore(tmp_path / "data"), LocalStore(tmp_path)
    refused(outside, inside, "inside")
    refused(inside, outside, "inside")


def test_nothing_happens_to_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"value")
    with pytest.raises(ValueError, match="max_size"):
        CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path), max_size="much")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


# ------------------------------------------------------------------------- signature


def test_signature(replaced: type[CacheStore]) -> None:
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
def test_call_sites(which: str, request: pytest.FixtureRequest) -> None:
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
        assert store._store is source
        assert store._cache is cache
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


async def test_default_cache_is_new_and_in_memory() -> None:
    source = MemoryStore()
    one, other = CacheStore(source), CacheStore(source)
    assert type(one._cache) is MemoryStore
    assert one._cache is not other._cache
    await one.set("key", buf(b"value"))
    assert held(one._cache) == {"key": 5}
    assert held(other._cache) == {}
    assert await read(other, "key") == b"value"
    check_books(one)
    check_books(other)


@pytest.mark.parametrize(
    "kinds", ["fsspec fsspec", "local fsspec", "fsspec local", "fsspec inside", "read-only fsspec"]
)
def test_cache_store_is_the_source_by_another_library(tmp_path: Path, kinds: str) -> None:
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
    with pytest.raises(ValueError, match=r"is the source itself, or one of them is inside"):
        CacheStore(source, cache_store=cache)
