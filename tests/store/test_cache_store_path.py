"""`cache_store` as a path, and sizes as floats."""

from __future__ import annotations

import asyncio
import math
import os
import pwd
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

import zcache
from zcache import CachePool, CacheStore, OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class OwnPath:
    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


@pytest.mark.parametrize("kind", [str, lambda path: path, lambda path: OwnPath(str(path))])
async def test_a_path_is_a_local_store_on_it(tmp_path: Path, kind: Callable[[Any], Any]) -> None:
    source = MemoryStore({"k": cpu.Buffer.from_bytes(b"value")})
    store = CacheStore(source, cache_store=kind(tmp_path), source_id="s")
    await store.get("k", default_buffer_prototype())
    assert await store.drain()
    assert (tmp_path / "k").read_bytes() == b"value"
    same = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="s")
    assert same == store
    assert same.cache_info()["cached_keys"] == 1


def test_a_path_may_begin_with_the_home_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = MemoryStore({"k": cpu.Buffer.from_bytes(b"value")})
    store = CacheStore(source, cache_store="~/cache", source_id="s")
    pool = CachePool("~/pool")
    asyncio.run(store.get("k", default_buffer_prototype()))
    assert store.drain_sync()
    assert (tmp_path / "cache/k").read_bytes() == b"value"
    assert pool.path == str(tmp_path / "pool")
    (tmp_path / "file").touch()
    with pytest.raises(OptionValueError, match=f"'~/file/x', for '{tmp_path}/file' is a file"):
        CachePool("~/file/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "file", "pool"]


def _open_in(path: str) -> CacheStore:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ZCACHE_DIR", path)
        return zcache.open(MemoryStore())


@pytest.mark.parametrize(
    ("named", "option"),
    [
        (CachePool, "path"),
        (lambda path: CacheStore(MemoryStore(), cache_store=path), "cache_store"),
        (lambda path: zcache.open(MemoryStore(), cache=path), "cache"),
        (lambda path: zcache.open(path, cache="memory", read_only=False), "url"),
        (lambda path: zcache.open(f"file://{path}", cache="memory", read_only=False), "url"),
        (_open_in, "$ZCACHE_DIR"),
        (lambda path: CacheStore(MemoryStore()).record(path), "path"),
        (zcache.replay, "path"),
    ],
)
def test_a_home_that_is_not_known_is_refused(
    named: Callable[[str], object], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("~nouser/x", "~nouser"):
        with pytest.raises(OptionValueError) as caught:
            named(path)
        assert str(caught.value) == (
            f"invalid {option}: {path!r}, but there is no user 'nouser'. Give the path in full, or './{path}' for what is "
            "called so."
        )
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(OptionValueError) as caught:
        named("~/x")
    assert f"invalid {option}: '~/x', but your home is not known: set HOME. " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_home_of_another_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.getpwuid(os.getuid())
    home = pwd.struct_passwd((*entry[:5], str(tmp_path / "home"), *entry[6:]))
    monkeypatch.setattr("pwd.getpwnam", {"other": home}.__getitem__)
    monkeypatch.chdir(tmp_path)
    assert CachePool("~other/x").path == str(tmp_path / "home/x")
    assert CachePool("./~nouser/x").path == str(tmp_path / "~nouser/x")
    assert (tmp_path / "~nouser/x").is_dir()


@pytest.mark.parametrize("path", ["", "s3://user:secret@bucket/cache", "file:///tmp/cache"])
def test_what_is_no_local_path_is_refused(path: str) -> None:
    with pytest.raises(OptionValueError, match="path of a local directory") as caught:
        CacheStore(MemoryStore(), cache_store=path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("size", [1e9, np.float64(1e9), np.float32(1e9), 1_000_000_000])
@pytest.mark.parametrize("name", ["max_size", "min_free_space", "max_pending_size"])
def test_a_whole_number_may_be_a_float(name: str, size: Any) -> None:
    options: dict[str, Any] = {name: size}
    store = CacheStore(MemoryStore(), **options)
    if name == "max_size":
        assert store.max_size == 1_000_000_000
        assert type(store.max_size) is int


@pytest.mark.parametrize("size", [1.5, math.nan, math.inf, -math.inf])
def test_other_floats_are_no_sizes(size: float) -> None:
    with pytest.raises(OptionTypeError, match="max_size"):
        CacheStore(MemoryStore(), max_size=size)


@pytest.mark.parametrize("size", [-1.0, 2.0**64])
def test_floats_out_of_range_are_no_sizes(size: float) -> None:
    with pytest.raises(OptionValueError, match="max_size"):
        CacheStore(MemoryStore(), max_size=size)


@pytest.mark.parametrize("free", [2**64 - 1, 2**64 - 4096, 2**63])
async def test_more_free_space_than_there_can_be_caches_nothing(tmp_path: Path, free: int) -> None:
    source = MemoryStore({"k": cpu.Buffer.from_bytes(b"value")})
    store = CacheStore(source, cache_store=tmp_path, source_id="s", min_free_space=free)
    value = await store.get("k", default_buffer_prototype())
    assert value is not None
    await store.set("l", cpu.Buffer.from_bytes(b"other"))
    assert await store.drain()
    assert store.cache_info()["current_size"] == 0
    assert store.cache_stats()["cache_failures"] == 0
