"""`zcache.open`: which pool, under which bound, and what it says."""

from __future__ import annotations

import asyncio
import doctest
import gc
import importlib
import inspect
import itertools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
import uuid
import warnings
import weakref
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, ZipStore

import zcache
from directories import closed
from forks import fork, wait
from support import (
    TESTS,
    buf,
    check_quiet,
    drained,
    logged,
    read,
    read_through,
    said,
    threads,
    value_sync,
    write,
)
from zcache import (
    CacheOwnershipError,
    CachePool,
    CacheStore,
    NoSuchSourceError,
    OptionTypeError,
    OptionValueError,
)
from zcache._cache_options import parse_options
from zcache._decoded import pipeline as install_module
from zcache._runtime import capacity
from zcache._source.identity import identify
from zcache._types import StoreOptions
from zcache.testing import FakeClock, cache_store_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OPEN = importlib.import_module("zcache._open")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory of the environment; nothing is said or in memory yet."""
    monkeypatch.setenv("ZCACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(OPEN, "_said", set())
    monkeypatch.setattr(OPEN, "MEMORY", uuid.uuid4().hex)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with two values."""
    (tmp_path / "source").mkdir()
    for key in ("k", "l"):
        (tmp_path / "source" / key).write_bytes(f"value of {key}".encode())
    return tmp_path / "source"


def place_of(store: CacheStore) -> str | None:
    """The directory of the pool of a store; None in memory."""
    kept = cache_store_of(store)
    return str(kept.root) if isinstance(kept, LocalStore) else None


def said_of_bounds(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has said about bounds."""
    messages = said(caplog)
    return [message for message in messages if "may grow" in message]


def run(script: str, *arguments: str | Path, **environ: str) -> str:
    """Run a script in a process of its own; what it has printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{script}"]
        + [str(one) for one in arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=100,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------------------- reading


def test_array_is_read_through_the_cache(tmp_path: Path) -> None:
    data = np.arange(40).reshape(4, 10)
    zarr.create_array(tmp_path / "x.zarr", data=data, chunks=(2, 5))
    for _ in range(2):
        store = zcache.open(tmp_path / "x.zarr")
        assert isinstance(store, CacheStore)
        assert (zarr.open_array(store, mode="r")[:] == data).all()
        assert store.drain_sync()
    # All that was read twice.
    assert store.cache_stats()["misses"] == 0


@pytest.mark.slow
def test_dataset_is_read_by_xarray(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    values = np.arange(12.0).reshape(3, 4)
    dataset = xarray.Dataset({"t2m": (("time", "x"), values)})
    dataset.to_zarr(tmp_path / "era5.zarr")
    for url in (tmp_path / "era5.zarr", f"file://{tmp_path}/era5.zarr"):
        opened = xarray.open_zarr(zcache.open(url))
        assert (opened["t2m"].values == values).all()


async def test_zip_file_is_read_and_never_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("k", b"value")
    before = (tmp_path / "a.zip").read_bytes()
    store = zcache.open(tmp_path / "a.zip")
    assert store.read_only
    assert await read_through(store, "k") == b"value"
    assert store.is_cached("k")
    with pytest.raises(ValueError, match="read-only"):
        await store.set("k", buf(b"other"))
    store.close()
    assert (tmp_path / "a.zip").read_bytes() == before


async def test_what_is_written_is_in_the_source(source: Path) -> None:
    store = zcache.open(source)
    assert not store.read_only
    assert await read_through(store, "k") == b"value of k"
    await write(store, "k", b"new")
    assert (source / "k").read_bytes() == b"new"
    assert await read(store, "k") == b"new"
    only = zcache.open(source, read_only=True)
    assert only.read_only
    assert await read(only, "k") == b"new"
    with pytest.raises(ValueError, match="read-only"):
        await only.set("k", buf(b"other"))
    await check_quiet(store)


def test_source_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NoSuchSourceError, match="new"):
        zcache.open(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        zcache.open(tmp_path / "new", read_only=True)
    assert list(tmp_path.iterdir()) == []


async def test_new_store_is_made_for_who_asks_for_it(tmp_path: Path) -> None:
    store = zcache.open(tmp_path / "new", read_only=False)
    await write(store, "k", b"value")
    assert (tmp_path / "new/k").read_bytes() == b"value"


async def test_store_may_be_the_source(source: Path) -> None:
    store = zcache.open(LocalStore(source, read_only=True))
    assert store.read_only
    assert await read_through(store, "k") == b"value of k"
    again = zcache.open(source)
    assert await read(again, "k") == b"value of k"
    assert again.cache_stats()["hits"] == 1


async def test_url_in_memory_is_read_through_the_cache() -> None:
    pytest.importorskip("fsspec")
    store = zcache.open("memory://test_open", cache="memory")
    await write(store, "k", b"value")
    assert await read(zcache.open("memory://test_open", cache="memory"), "k") == b"value"
    other = zcache.open("memory://test_open_other", cache="memory")
    assert await read(other, "k") is None


def test_offline_source_need_not_be_there(source: Path) -> None:
    assert asyncio.run(read_through(zcache.open(source), "k")) == b"value of k"
    source.rename(source.parent / "moved")
    store = zcache.open(source, offline=True)
    assert asyncio.run(read(store, "k")) == b"value of k"
    assert not source.exists()


async def test_options_are_those_of_a_cache_store(source: Path) -> None:
    clock = FakeClock()
    store = zcache.open(
        source, max_age_seconds=10, clock=clock, cache_missing=False, verify="always"
    )
    assert (store.max_age_seconds, store.cache_missing) == (10, False)
    assert await read_through(store, "k") == b"value of k"
    assert await read(store, "k") == b"value of k"
    assert store.cache_stats()["hits"] == 1
    clock.advance(11)
    (source / "k").write_bytes(b"new")
    assert await read(store, "k") == b"new"
    named = zcache.open(MemoryStore({"k": buf(b"named")}), source_id="mine")
    assert await read_through(named, "k") == b"named"
    again = zcache.open(MemoryStore(), source_id="mine")
    assert await read(again, "k") == b"named"


# ----------------------------------------------------------------------------- which pool


def test_directory_is_that_of_the_environment(source: Path, cache: Path) -> None:
    assert place_of(zcache.open(source)) == str(cache)
    assert (cache / ".zcache" / "stamp.json").exists()
    assert cache.stat().st_mode & 0o777 == 0o700


def test_directory_of_the_environment_may_be_below_home_or_empty(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ZCACHE_DIR", "~/of-zcache")
    assert place_of(zcache.open(source)) == str(tmp_path / "home/of-zcache")
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("ZCACHE_DIR")
        else:
            monkeypatch.setenv("ZCACHE_DIR", value)
        assert place_of(zcache.open(source)) == platformdirs.user_cache_dir("zcache")
        assert place_of(zcache.open(source)) == str(tmp_path / "xdg/zcache")


@pytest.mark.parametrize("leaves_it", [False, True])
def test_home_that_is_not_known_is_named_with_the_ways_out(
    source: Path, leaves_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    platformdirs = pytest.importorskip("platformdirs")
    for name in ("HOME", "ZCACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    if leaves_it:
        # As other versions do.
        monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    with pytest.raises(
        OptionValueError, match=r"home is not known, .* cache=, or set \$ZCACHE_DIR to one, or HOME"
    ):
        zcache.open(source)


def test_directory_of_the_environment_that_is_none_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZCACHE_DIR", "s3://me:hush@bucket/cache")
    with pytest.raises(OptionValueError, match=r"invalid \$ZCACHE_DIR: 's3://bucket/cache'. Give"):
        zcache.open(source)
    monkeypatch.setenv("ZCACHE_DIR", str(source / "k"))
    with pytest.raises(OptionValueError, match=r"invalid \$ZCACHE_DIR: .* is a file"):
        zcache.open(source)


def test_cache_may_be_a_path_or_a_pool_or_in_memory(
    source: Path, tmp_path: Path, cache: Path
) -> None:
    assert place_of(zcache.open(source, cache=str(tmp_path / "p/q"))) == str(tmp_path / "p/q")
    assert place_of(zcache.open(source, cache=tmp_path / "r")) == str(tmp_path / "r")
    pool = CachePool(tmp_path / "s", max_size=10**6)
    store = zcache.open(source, cache=pool)
    assert place_of(store) == str(tmp_path / "s")
    assert store.max_size == 10**6
    assert place_of(zcache.open(source, cache="memory")) is None
    assert not cache.exists()


async def test_pool_is_the_same_for_the_same_path(
    source: Path, tmp_path: Path, cache: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "k").write_bytes(b"other")
    (tmp_path / "link").symlink_to(cache, target_is_directory=True)
    one = zcache.open(source)
    two = zcache.open(other, cache=tmp_path / "link")
    assert await read_through(one, "k") == b"value of k"
    assert await read_through(two, "k") == b"other"
    pool = CachePool(cache)
    assert {info.name: info.entries for info in pool.sources()} == {
        identify(LocalStore(source)).name: 1,
        identify(LocalStore(other)).name: 1,
    }
    assert one.cache_info()["current_size"] == two.cache_info()["current_size"]


async def test_values_in_memory_are_shared_and_go_with_the_last_store(source: Path) -> None:
    one = zcache.open(source, cache="memory")
    await read_through(one, "k")
    two = zcache.open(source, cache="memory")
    assert await read(two, "k") == b"value of k"
    assert two.cache_stats()["hits"] == 1
    # A pool of its own is another one.
    assert not zcache.open(source, cache=CachePool()).is_cached("k")
    pool = weakref.ref(one._cache_store.pool)
    del one, two
    while pool() is not None:
        gc.collect()
        await asyncio.sleep(0.001)
    three = zcache.open(source, cache="memory", max_size=10**6)
    assert not three.is_cached("k")
    assert three.max_size == 10**6


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        (
            5,
            OptionTypeError,
            'invalid cache: 5. Give the path of a directory, a CachePool, "memory"',
        ),
        (b"path", OptionTypeError, "invalid cache: bytes. Give the path"),
        (MemoryStore(), OptionTypeError, "invalid cache: MemoryStore. Give .*zcache.CacheStore"),
        (True, OptionTypeError, "invalid cache: True. Give"),
        ("", OptionValueError, "invalid cache: ''. Give the path"),
        ("s3://me:hush@bucket/a", OptionValueError, "invalid cache: 's3://bucket/a'. Give"),
        ("a\0b", OptionValueError, r"invalid cache: 'a\\x00b'. Give"),
    ],
    ids=range(7),
)
def test_cache_that_is_none_is_refused(
    source: Path, cache: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as it:
        zcache.open(source, cache=cache)
    assert "hush" not in str(it.value)


def test_cache_that_is_a_file_or_holds_other_things_is_refused(source: Path) -> None:
    with pytest.raises(OptionValueError, match=r"invalid cache: .*source/k' is a file"):
        zcache.open(source, cache=source / "k")
    with pytest.raises(OptionValueError, match="is the source itself, or one of them"):
        zcache.open(source, cache=source)
    with pytest.raises(OptionValueError, match="is the source itself, or one of them"):
        zcache.open(source, cache=source / "in")
    assert sorted(path.name for path in source.iterdir()) == ["k", "l"]
    with pytest.raises(CacheOwnershipError, match="is not empty"):
        zcache.open(MemoryStore(), cache=source)
    CacheStore(MemoryStore(), cache_store=source.parent / "files", source_id="x")
    with pytest.raises(CacheOwnershipError, match=r"zcache.CacheStore\(source, cache_store=path\)"):
        zcache.open(source, cache=source.parent / "files")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("max_sise", "Give 'max_size'"),
        ("maxage_seconds", "Give 'max_age_seconds'"),
        ("bogus", "Give one of cache, max_size, .*max_age_seconds, .*verify"),
        ("cache_store", "Give cache="),
        ("store", "Give it as the first argument"),
        ("mode", r"Give it to zarr or xarray; or, .*CachePool\(path, mode=...\)"),
    ],
)
def test_option_that_is_unknown_is_named(source: Path, cache: Path, name: str, advice: str) -> None:
    with pytest.raises(OptionTypeError, match=f"unknown option of zcache.open: '{name}'. {advice}"):
        zcache.open(source, **{name: "r"})
    assert not cache.exists()


def test_option_without_a_meaning_is_refused_before_anything_is_made(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for options, message in (
        ({"max_size": -1}, "invalid max_size: -1"),
        ({"max_size": "20 %%"}, "invalid max_size: '20 %%'"),
        ({"max_size": True}, "invalid max_size: True"),
        ({"read_only": "yes"}, "invalid read_only: 'yes'"),
        ({"adopt": 1}, "invalid adopt: 1"),
        ({"offline": "no"}, "invalid offline: 'no'"),
        ({"verify": "sometimes"}, "invalid verify: 'sometimes'"),
        ({"eviction": "no policy"}, "invalid eviction: 'no policy'"),
        ({"minimise": 1}, "invalid minimise: 1"),
        ({"revalidate": None}, "invalid revalidate: None"),
        ({"decoded_size": "lots"}, "invalid decoded_size: 'lots'"),
        ({"min_free_space": -1}, "invalid min_free_space: -1"),
        ({"max_pending_size": -1}, "invalid max_pending_size: -1"),
        ({"max_age_seconds": {"": 1}}, "invalid pattern in max_age_seconds: ''"),
        ({"metadata_max_age_seconds": "x"}, "invalid metadata_max_age_seconds: 'x'"),
        ({"missing_max_age_seconds": "x"}, "invalid missing_max_age_seconds: 'x'"),
        ({"stale_if_error": None}, "invalid stale_if_error: None"),
        ({"source_id": ""}, "invalid source_id: ''"),
        ({"clock": 3}, "invalid clock: 3"),
        ({"cache_set_data": 1}, "invalid cache_set_data: 1"),
        ({"cache_missing": 1}, "invalid cache_missing: 1"),
        ({"sampling": 1}, "invalid sampling: 1"),
        ({"storage_options": {"key": "hush"}}, "invalid storage_options: 'key'"),
    ):
        with pytest.raises((OptionTypeError, OptionValueError), match=message) as it:
            zcache.open(source, **options)  # type: ignore[arg-type]
        assert "hush" not in str(it.value)
    assert not cache.exists()
    assert said_of_bounds(caplog) == []


def test_every_option_is_checked_before_anything_is_made() -> None:
    own = {"store", "cache_store", "max_size"}
    given = dict.fromkeys(set(inspect.signature(CacheStore).parameters) - own, object())
    for name, value in given.items():
        with pytest.raises(OptionTypeError, match=f"invalid {name}"):
            parse_options(lambda: 1, **{name: value})


def test_options_have_the_types_that_the_store_has() -> None:
    own = {"store", "cache_store", "max_size"}
    theirs = inspect.signature(CacheStore).parameters
    assert {name: kind.__forward_arg__ for name, kind in StoreOptions.__annotations__.items()} == {
        name: theirs[name].annotation for name in theirs if name not in own
    }


# --------------------------------------------------------------------------------- bounds


def test_bound_is_a_fifth_of_the_volume_by_default_and_said_once(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = capacity.volume(source) * 20 // 100
    stores = [zcache.open(source) for _ in range(3)]
    stores.append(zcache.open(MemoryStore(), cache=cache))
    for store in stores:
        assert store.max_size == pytest.approx(expected, abs=1)
        assert store.cache_info()["max_size"] == store.max_size
    assert CachePool(cache).cache_info()["max_size"] == store.max_size
    (line,) = said_of_bounds(caplog)
    assert line == (
        f"the cache in {cache} may grow to {store.max_size:,} bytes, 20 % of its volume: pass "
        "max_size= for another bound"
    )
    zcache.open(source, cache=cache.parent / "other")
    assert len(said_of_bounds(caplog)) == 2


def test_bound_in_memory_is_a_fifth_of_what_the_process_may_use(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(OPEN, "memory", lambda: 10**9)
    store = zcache.open(source, cache="memory")
    assert store.max_size == 2 * 10**8
    zcache.open(source, cache="memory")
    (line,) = said_of_bounds(caplog)
    assert line == (
        "the cache in memory may grow to 200,000,000 bytes, 20 % of the memory that this process may use: "
        "pass max_size= for another bound"
    )


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_bound_that_is_given_is_in_force_and_not_said(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    place: Any = cache if where == "directory" else "memory"
    store = zcache.open(source, cache=place, max_size="256MB")
    assert store.max_size == 256 * 10**6
    assert zcache.open(source, cache=place).max_size == 256 * 10**6
    assert zcache.open(source, cache=place, max_size=256 * 10**6).max_size == 256 * 10**6
    assert said_of_bounds(caplog) == []
    for other in ("1GB", 5, "1 %"):
        with pytest.raises(
            OptionValueError, match=f"invalid max_size: {other!r}.*=256000000. Leave"
        ):
            zcache.open(source, cache=place, max_size=other)
    assert store.max_size == zcache.open(source, cache=place).max_size == 256 * 10**6


def test_bound_of_a_pool_is_that_of_the_pool(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert zcache.open(source, cache=CachePool()).max_size is None
    pool = CachePool(max_size="1MB")
    assert zcache.open(source, cache=pool).max_size == 10**6
    assert zcache.open(source, cache=pool, max_size=10**6).max_size == 10**6
    for other in (10**5, 10**7):
        with pytest.raises(OptionValueError, match=rf"{other}, .*max_size=1000000.*CachePool\("):
            zcache.open(source, cache=pool, max_size=other)
    assert pool.cache_info()["max_size"] == 10**6
    assert said_of_bounds(caplog) == []


async def test_bound_may_be_another_once_the_pool_is_closed(source: Path, tmp_path: Path) -> None:
    zcache.open(source, max_size=10**6)
    await closed(tmp_path)
    assert zcache.open(source, max_size=10**7).max_size == 10**7


async def test_bound_may_be_another_though_values_are_still_being_written(source: Path) -> None:
    (source / "large").write_bytes(bytes(2**23))
    for size in range(10**7, 10**7 + 10):
        store = zcache.open(source, max_size=size)
        assert store.max_size == size
        await store.invalidate("")
        assert await read(store, "large") == bytes(2**23)
        del store


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_size": 10**7}, "is in use"), ({"verify": "sometimes"}, "verify")],
)
@pytest.mark.parametrize("is_given", [False, True])
async def test_error_that_is_kept_keeps_no_pool_in_use(
    source: Path, cache: Path, options: dict[str, Any], message: str, is_given: bool
) -> None:
    store = zcache.open(source, max_size=10**6)
    # As `sys.last_exc` does in a notebook.
    with pytest.raises(OptionValueError, match=message) as kept:
        zcache.open(source, cache=CachePool(cache, max_size=10**6) if is_given else None, **options)
    del store
    assert zcache.open(source, max_size=10**7).max_size == 10**7
    del kept


def test_error_that_the_caller_handles_keeps_what_it_had(source: Path) -> None:
    def fail() -> None:
        mine = "of the caller"
        raise KeyError(mine)

    def use() -> None:
        try:
            fail()
        except KeyError:
            zcache.open(source, read_only="yes")

    with pytest.raises(OptionTypeError) as caught:
        use()
    handled = caught.value.__context__
    assert isinstance(handled, KeyError)
    assert handled.__traceback__ is not None
    assert handled.__traceback__.tb_next is not None
    # Of `use`, and of what it has called.
    assert handled.__traceback__.tb_next.tb_frame.f_locals == {"mine": "of the caller"}


def test_stores_that_were_opened_alike_are_equal(source: Path, tmp_path: Path) -> None:
    zarr.create_array(source / "array", shape=4, dtype="i4", fill_value=1)
    stores = [zcache.open(source, max_size=10**6) for _ in range(2)]
    assert stores[0] == stores[1]
    arrays = [zarr.open_array(store, path="array", mode="r") for store in stores]
    assert arrays[0] == arrays[1]
    (tmp_path / "other").mkdir()
    assert zcache.open(source, cache=CachePool(tmp_path / "second")) == stores[0]
    assert zcache.open(tmp_path / "other") != stores[0]


def test_bound_of_a_pool_that_had_none_is_set(source: Path, cache: Path) -> None:
    pool = CachePool(cache)
    store = zcache.open(source, max_size=10**6)
    assert store.max_size == 10**6
    assert pool.cache_info()["max_size"] == 10**6


async def test_bound_holds_for_all_sources_together(tmp_path: Path, cache: Path) -> None:
    stores = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for number in range(20):
            (tmp_path / name / str(number)).write_bytes(os.urandom(20_000))
        stores.append(zcache.open(tmp_path / name, max_size="600kB"))
    for number in range(20):
        for store in stores:
            value = await read_through(store, str(number))
            assert value is not None
            assert len(value) == 20_000
    info = CachePool(cache).cache_info()
    assert 0 < info["current_size"] <= info["max_size"] == 600_000


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_policy_is_that_of_the_pool_unless_another_is_asked_for(
    source: Path, cache: Path, where: str
) -> None:
    place: Any = cache if where == "directory" else "memory"
    first = zcache.open(source, cache=place, eviction="adaptive", minimise="bytes")
    # A warning would be an error here.
    second = zcache.open(MemoryStore(), cache=place)
    assert (second.eviction, second.minimise) == (first.eviction, first.minimise)
    assert second.eviction == "adaptive"
    with pytest.warns(UserWarning, match="is in use with eviction='adaptive'"):
        zcache.open(source, cache=place, eviction="lru")


HOLD = """
import zcache
from zarr.storage import MemoryStore
store = zcache.open(MemoryStore(), cache=sys.argv[1], eviction=sys.argv[2])
print(store.eviction, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after", "removed"])
def test_policy_is_that_of_another_process_unless_another_is_asked_for(
    source: Path, cache: Path, moment: str
) -> None:
    pool = None if moment == "before" else CachePool(cache)
    if moment == "removed":
        before = zcache.open(source, cache=cache, eviction="none")
        shutil.rmtree(cache)
    script = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{HOLD}"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(cache), "adaptive"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "adaptive\n"
        # A warning would be an error here.
        assert zcache.open(source, cache=cache).eviction == "adaptive"
        with pytest.warns(UserWarning, match="is in use with eviction='adaptive'"):
            zcache.open(source, cache=cache, eviction="lru")
        assert other.stdin is not None
        other.stdin.close()
    if moment == "removed":
        del before
    del pool


# ----------------------------------------------------- processes, threads and event loops


WARM = """
import asyncio, zcache
from support import read_through
store = zcache.open(sys.argv[1])
assert asyncio.run(read_through(store, "k")) == b"value of k"
print(store.cache_stats()["hits"], store.max_size)
"""


@pytest.mark.slow
def test_second_process_is_warm(source: Path) -> None:
    first, second = run(WARM, source), run(WARM, source)
    assert first.split()[0] == "0"
    assert second.split() == ["1", first.split()[1]]
    with zipfile.ZipFile(source.parent / "a.zip", "w") as file:
        file.write(source / "k", "k")
    assert [run(WARM, source.parent / "a.zip").split()[0] for _ in range(2)] == ["0", "1"]


@pytest.mark.slow
def test_nothing_is_said_of_a_process_that_gets_a_store_sent(source: Path) -> None:
    store = zcache.open(source, max_size=10**6)
    script = """
import asyncio, pickle
from support import read_through
store = pickle.loads(bytes.fromhex(sys.argv[1]))
assert asyncio.run(read_through(store, "k")) == b"value of k"
import zcache
print(store.max_size, zcache.open(sys.argv[2]).max_size)
"""
    # Its pool is open with that bound.
    assert run(script, pickle.dumps(store).hex(), source) == "1000000 1000000"
    again = pickle.loads(pickle.dumps(store))
    assert again == store


async def test_open_within_a_running_event_loop(source: Path) -> None:
    store = zcache.open(source)
    assert await read_through(store, "k") == b"value of k"
    assert await read(zcache.open(source), "k") == b"value of k"


def test_open_within_the_event_loop_of_zarr(source: Path) -> None:
    async def use() -> bytes | None:
        return await read_through(zcache.open(source, cache="memory"), "k")

    assert sync(use()) == b"value of k"


def test_open_without_an_event_loop(source: Path) -> None:
    if not hasattr(LocalStore, "get_sync"):
        pytest.skip("this zarr has no synchronous methods")
    assert value_sync(zcache.open(source)) == b"value of k"


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_threads_that_open_at_once_share_one_pool(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    ready = threading.Barrier(16)

    def use() -> CacheStore:
        ready.wait()
        store = zcache.open(source, cache=cache if where == "directory" else "memory")
        assert asyncio.run(read(store, "k")) == b"value of k"
        return store

    with threads(*[use] * 16) as stores:
        pass
    asyncio.run(drained(stores[0]))
    assert all(store.is_cached("k") for store in stores)
    assert len({store.max_size for store in stores}) == 1
    assert len(said_of_bounds(caplog)) == 1


def test_threads_that_open_an_archive_at_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("k", b"value")
    store = zcache.open(tmp_path / "a.zip")
    assert isinstance(store._store, ZipStore)
    ready = threading.Barrier(8)

    def use() -> bytes | None:
        ready.wait()
        return asyncio.run(read(store, "k"))

    with threads(*[use] * 8) as values:
        pass
    assert values == [b"value"] * 8


def test_threads_that_want_different_bounds_get_one(source: Path) -> None:
    ready = threading.Barrier(8)

    def use(number: int) -> CacheStore | OptionValueError:
        ready.wait()
        try:
            return zcache.open(source, max_size=10**6 + number)
        except OptionValueError as error:
            return error

    with threads(*[lambda number=number: use(number) for number in range(8)]) as found:
        pass
    stores = [one for one in found if isinstance(one, CacheStore)]
    assert len(stores) == 1
    for error in found:
        if isinstance(error, OptionValueError):
            assert f"max_size={stores[0].max_size}" in str(error)


def open_with_other_policies(path: Path) -> list[CachePool]:
    """Two pools, the second of which is told that it is of the first one's policy."""
    return [CachePool(path, eviction="lru"), CachePool(path, eviction="none")]


OPENINGS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: zcache.open("memory://one", cache=path),
    "open in memory": lambda path: zcache.open(path.parent / "source", cache="memory"),
    "pool": open_with_other_policies,
    "pool that is read": lambda path: CachePool(path, read_only=True),
    "pool that cannot be made": lambda path: CachePool(f"/proc/{path.name}"),
    "directory": lambda path: CacheStore(MemoryStore(), cache_store=path),
    "directory that cannot be made": lambda path: CacheStore(
        MemoryStore(), cache_store=f"/proc/x{path.name}"
    ),
    "decoded": lambda _: zcache.with_decoded_cache(array_in_memory(), 1000),
    "decoded by token": lambda _: pickle.loads(
        pickle.dumps(zcache.with_decoded_cache(array_in_memory(), 1000).store)
    ),
}


def array_in_memory() -> Any:
    return zarr.create_array(MemoryStore(), shape=4, dtype="i4")


@pytest.mark.parametrize("opening", OPENINGS)
def test_code_of_others_that_waits_for_another_opening_is_not_waited_for(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    opening: str,
) -> None:
    me, count, told = threading.get_ident(), itertools.count(), []

    def open_others() -> None:
        for each, make in OPENINGS.items():
            make(tmp_path / f"{each} {next(count)}")

    def wait_for_others(*_: object, **__: object) -> bool:
        if threading.get_ident() == me:
            # No thread of a pool, which the end of the process would wait for.
            thread = threading.Thread(target=open_others, daemon=True)
            thread.start()
            thread.join(60)
            told.append(not thread.is_alive())
        return True

    # Whatever logs or warns calls what its user has put there.
    logger = logging.getLogger("zcache")
    # Unlike its attribute, this is forgotten by what the loggers remember.
    caplog.set_level(logging.DEBUG, "zcache")
    monkeypatch.setattr(logger, "filters", [wait_for_others])
    monkeypatch.setattr(install_module, "zarr_array", types.SimpleNamespace())
    monkeypatch.setattr(warnings, "showwarning", wait_for_others)
    warnings.simplefilter("always")
    opened = OPENINGS[opening](tmp_path / "cache")
    assert told
    assert all(told)
    del opened


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_child_that_was_forked_opens_too(source: Path, cache: Path, where: str) -> None:
    place: Any = cache if where == "directory" else "memory"
    store = zcache.open(source, cache=place)

    def child() -> None:
        found = zcache.open(source, cache=place)
        assert asyncio.run(read_through(found, "k")) == b"value of k"
        assert found.max_size == store.max_size

    # Another thread of the parent may be about to open one.
    with OPEN._lock:
        number = fork(child)
    assert wait([number]) == [0]
    assert asyncio.run(read_through(store, "k")) == b"value of k"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_pool_of_another_user_is_refused_with_ways_out_that_lead_out(
    source: Path, cache: Path
) -> None:
    zcache.open(source, cache=cache)
    gc.collect()
    os.chown(cache, 54321, os.getegid())
    ways_out = {
        "CachePool(path, mode=0o770)": lambda: CachePool(cache, mode=0o770),
        "CachePool(path, read_only=True)": lambda: CachePool(cache, read_only=True),
        "zcache.open(..., adopt=True)": lambda: zcache.open(source, cache=cache, adopt=True),
    }
    for wrong in (lambda: zcache.open(source, cache=cache), lambda: CachePool(cache)):
        with pytest.raises(CacheOwnershipError, match="another user's") as refused:
            wrong()
        assert all(way in str(refused.value) for way in ways_out)
    for way in ways_out.values():
        found = way()
        if isinstance(found, CachePool):
            found = zcache.open(source, cache=found, max_size=found.max_size)
        assert asyncio.run(read(found, "k")) == b"value of k"


def test_directory_that_cannot_be_made_is_said_and_the_source_serves(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "zcache")
    store = zcache.open(source, cache="/proc/zcache", max_size=10**6)
    assert asyncio.run(read_through(store, "k")) == b"value of k"
    assert any("/proc/zcache" in record.getMessage() for record in logged(caplog))


@pytest.mark.parametrize("cache", ["loop/pool", "x" * 300, "a/" * 2500])
@pytest.mark.parametrize("max_size", [None, "10 %", 10**6])
def test_directory_that_cannot_be_reached_is_said_and_the_source_serves(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: str, max_size: Any
) -> None:
    caplog.set_level(logging.WARNING, "zcache")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / cache
    stores = [
        zcache.open(source, cache=path, max_size=max_size),
        CacheStore(LocalStore(source), cache_store=path, max_size=max_size),
        CacheStore(LocalStore(source), cache_store=CachePool(path, max_size=max_size)),
    ]
    for store in stores:
        assert asyncio.run(read_through(store, "k")) == b"value of k"
        assert not store.is_cached("k")
    assert any(str(path) in record.getMessage() for record in logged(caplog))
    assert not (tmp_path / "a").exists()


def test_docstring_runs() -> None:
    pytest.importorskip("fsspec")
    tested = doctest.testmod(OPEN, exclude_empty=True)
    assert tested.attempted > 0
    assert tested.failed == 0


def test_option_cut_short_is_told_by_its_whole_name(source: Path) -> None:
    with pytest.raises(OptionTypeError, match=r"'max_age'. Give 'max_age_seconds'"):
        zcache.open(source, cache="memory", max_age=3)


def test_place_that_cannot_be_used_is_told_as_it_was_given(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionValueError, match=f"invalid cache: '{source}' is the source itself"):
        zcache.open(source, cache=source)
    monkeypatch.setenv("ZCACHE_DIR", str(source / "pool"))
    with pytest.raises(OptionValueError, match=rf"invalid \$ZCACHE_DIR: '{source}/pool' is the"):
        zcache.open(source)


def test_default_bound_is_said_of_a_pool_that_takes_values_only(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing can be made there, by no user.
    monkeypatch.setenv("ZCACHE_DIR", "/proc/zcache")
    store = zcache.open(source)
    assert "cannot be used (" in caplog.text
    assert "give another place" in caplog.text
    assert not said_of_bounds(caplog)
    del store
