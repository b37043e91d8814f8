"""How much of a value is read from a cache store, and where long work on it is done."""

from __future__ import annotations

import gc
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest
from zarr.core.buffer import cpu
from zarr.storage import LocalStore, MemoryStore

from doubles import DictStore, SyncDictStore
from support import PROTOTYPE, buf, check_quiet, drained_sync, read, read_through, value_sync
from zcache import CacheStore
from zcache._backends.directory import page_cache
from zcache._backends.store import filler
from zcache._core import crc32c
from zcache._protocol import hits as protocol
from zcache._runtime import io
from zcache._runtime.coroutines import NoAnswerError
from zcache._runtime.threads import NoThreadError
from zcache.testing import FakeClock, record_steps, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest

VALUE = bytes(range(256)) * 4
REQUESTS = [None, RangeByteRequest(7, 300), OffsetByteRequest(7)]


def expected(request: ByteRequest | None) -> bytes:
    if isinstance(request, RangeByteRequest):
        return VALUE[request.start : request.end]
    return VALUE if request is None else VALUE[request.offset :]


class Counting(SyncDictStore):
    """Notes how many bytes each read gives."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def do_get(self, *args: Any) -> Any:
        found = super().do_get(*args)
        self.given.append(0 if found is None else len(found))
        return found


@pytest.mark.parametrize("request_", REQUESTS, ids=["whole", "range", "to the end"])
async def test_hit_is_one_step_of_the_index(request_: ByteRequest | None) -> None:
    store = CacheStore(MemoryStore({"a/c/0": buf(VALUE)}), cache_store=DictStore())
    for _ in range(2):
        await read_through(store, "a/c/0")
    with record_steps(store) as steps:
        assert await read(store, "a/c/0", request_) == expected(request_)
    assert [step.name for step in steps] == ["lookup"]


async def test_value_filled_anew_while_it_is_read_is_not_dropped() -> None:
    class Evicting(DictStore):
        """Another value of the same length takes the place of one that is read, and nothing is found."""

        during: Any = None

        async def get(self, *args: Any, **kwargs: Any) -> Any:
            during, self.during = self.during, None
            if during is None:
                return await super().get(*args, **kwargs)
            await during()
            return None

    cache, clock = Evicting(), FakeClock()
    store = CacheStore(MemoryStore({"a/c/0": buf(VALUE)}), cache_store=cache, clock=clock)
    for _ in range(2):
        await read_through(store, "a/c/0")

    async def fill_anew() -> None:
        clock.advance(1.0)
        await store.set("a/c/0", buf(VALUE[::-1]))
        assert await store.drain()

    cache.during = fill_anew
    assert await read(store, "a/c/0") == VALUE[::-1]
    assert store.cache_stats()["damaged"] == 0
    assert set(stored_sizes(store)) == {"a/c/0"}


@pytest.mark.parametrize("request_", REQUESTS, ids=["whole", "range", "to the end"])
@pytest.mark.parametrize("verify", ["first", "never"])
async def test_value_that_has_grown_is_not_read_to_its_end(
    request_: ByteRequest | None, verify: str
) -> None:
    cache = Counting()
    store = CacheStore(MemoryStore({"k": buf(VALUE)}), cache_store=cache, verify=verify)
    assert await read_through(store, "k") == VALUE
    cache.values["k"] = VALUE * 1000
    cache.given.clear()
    assert await read(store, "k", request_) == expected(request_)
    assert cache.given
    assert max(cache.given) <= len(VALUE) + 1
    whole = verify == "first" or not isinstance(request_, RangeByteRequest)
    assert store.cache_stats()["damaged"] == whole
    if whole:  # Else no one has looked at more than the range.
        await check_quiet(store)


def test_value_that_has_grown_is_not_read_to_its_end_without_a_loop() -> None:
    cache = Counting()
    store = CacheStore(SyncDictStore({"k": VALUE}), cache_store=cache)
    if not store._supports_sync_io:
        pytest.skip("zarr before 3.4 reads only from event loops")
    assert value_sync(store) == VALUE
    drained_sync(store)
    cache.values["k"] = VALUE * 1000
    cache.given.clear()
    assert value_sync(store) == VALUE
    assert cache.given
    assert max(cache.given) <= len(VALUE) + 1


@pytest.mark.parametrize("value", [VALUE, b"x", b""])
async def test_value_as_it_was_is_read(value: bytes) -> None:
    """Also one that ends before the byte that would be too much."""
    source = DictStore({"k": value})
    store = CacheStore(source, cache_store=Counting())
    for _ in range(3):
        assert await read_through(store, "k") == value
    assert source.counts["get"] == 1
    assert store.cache_stats()["damaged"] == 0


@pytest.mark.parametrize("kind", ["directory", "store"])
@pytest.mark.parametrize("asked", [None, RangeByteRequest(1, 4 * 2**20)])
async def test_large_value_is_verified_out_of_the_way_of_the_loop(
    tmp_path: Path, kind: str, asked: RangeByteRequest | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = bytes(page_cache.LARGEST + 1)
    source = MemoryStore({"k": buf(value)})
    where: list[threading.Thread] = []

    def noted(data: bytes) -> int:
        where.append(threading.current_thread())
        return crc32c(data)

    monkeypatch.setattr(filler, "crc32c", noted)
    cache: Any = LocalStore(tmp_path / "cache") if kind == "directory" else DictStore()
    store = CacheStore(source, cache_store=cache, source_id="s", verify="always")
    assert await read_through(store, "k") == value
    del store
    gc.collect()
    assert len(where) == (kind == "store")
    monkeypatch.setattr(protocol, "crc32c", noted)
    store = CacheStore(source, cache_store=cache, source_id="s", verify="always")
    await read_through(store, "k")
    where.clear()
    found = await read(store, "k", asked)
    assert found == (value if asked is None else value[1 : 4 * 2**20])
    assert len(where) == 1
    assert threading.current_thread() not in where


async def test_large_value_that_others_can_write_to_is_copied_out_of_the_way_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = io.ASIDE
    copied: list[threading.Thread] = []

    class Shared(cpu.Buffer):
        def to_bytes(self) -> bytes:
            copied.append(threading.current_thread())
            return super().to_bytes()

    class Writable(DictStore):
        def do_get(self, key: str, *args: Any) -> Any:
            found = super().do_get(key, *args)
            return found and Shared(np.frombuffer(found.to_bytes(), "u1").copy())

    store = CacheStore(MemoryStore({"k": buf(bytes(size))}), cache_store=Writable())
    for _ in range(2):
        assert await read_through(store, "k") == bytes(size)
    assert store.cache_stats()["hits"] == 1
    assert copied
    assert threading.current_thread() not in copied


@pytest.mark.parametrize("error", [NoThreadError("none"), NoAnswerError(1.0)])
async def test_large_value_no_thread_is_free_is_verified_here(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads may wait for a file system that never answers."""

    async def refuse(work: Any, on_detached_result: Any, limit: float | None, _: Any) -> Any:
        assert limit is not None
        raise error

    monkeypatch.setattr(io, "in_thread", refuse)
    value = bytes(io.ASIDE)
    source = DictStore({"k": value})
    store = CacheStore(source, cache_store=DictStore())
    for _ in range(3):
        assert await read_through(store, "k") == value
    assert source.counts["get"] == 1
    assert await store.get("k", PROTOTYPE) is not None
    await check_quiet(store)


async def test_aside_what_it_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        await io.IO(MemoryStore()).aside(io.ASIDE, partial(divmod, 1, 0))
