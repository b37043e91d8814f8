"""Fills of a cache in memory, which are one call into the core: what is left when that fails midway."""

from __future__ import annotations

import asyncio
from collections import UserDict

import numpy as np
import pytest
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from support import PROTOTYPE, count_turns, read_through
from zcache import CacheStore
from zcache._core import Index
from zcache._protocol import drain as protocol_drain
from zcache._runtime.buffers import freeze, snapshot, to_cpu_buffer
from zcache.testing import check_invariants, entries

SIZE = 10


class Stubborn(str):
    """A name that a dict cannot be asked about while memory is short."""

    __slots__ = ()
    short = False

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        if Stubborn.short:
            raise MemoryError
        return str.__eq__(self, other)


@pytest.fixture(autouse=True)
def _enough_memory():
    yield
    Stubborn.short = False


def fill(index: Index, values: dict, key: str, data: bytes = b"1" * SIZE) -> bool | None:
    ticket = index.join(key, None, object(), 1.0, False)
    assert type(ticket) is int
    try:
        return index.fill_memory(values, key, None, data, object(), ticket, 1.0, 1.0)
    finally:
        index.complete_flight(key, ticket)


def test_fill_memory_value_cannot_be_put_stays_counted():
    index = Index(max_size=2 * SIZE, flat_namespace=True)
    values = {Stubborn("a"): b"of another program"}
    Stubborn.short = True
    assert fill(index, values, "a") is None
    Stubborn.short = False
    # It is unknown whether the bytes are there, so they count until a delete says that they are not.
    assert (len(index), index.current_size, index.in_flight) == (0, SIZE, (0, 0))
    index.validate()
    assert fill(index, values, "a") is False
    assert (len(index), index.current_size) == (1, SIZE)
    index.validate()


def test_fill_memory_victim_cannot_be_removed_stays_counted():
    index = Index(max_size=SIZE, flat_namespace=True)
    values = {}
    assert fill(index, values, Stubborn("a")) is False
    Stubborn.short = True
    assert fill(index, values, "b") is None
    Stubborn.short = False
    assert list(values) == ["a"]
    assert (len(index), index.current_size, index.in_flight) == (0, SIZE, (0, 0))
    index.validate()
    assert fill(index, values, "b") is False
    assert list(values) == ["b"]
    assert (len(index), index.current_size) == (1, SIZE)
    index.validate()


def test_fill_memory_flight_joined_is_told():
    index = Index(flat_namespace=True)
    leader, follower = object(), object()
    ticket = index.join("a", None, leader, 1.0, False)
    assert index.join("a", None, follower, 1.0, False) == (None, leader)
    assert index.fill_memory({}, "a", None, b"1", b"1", ticket, 1.0, 1.0) is True
    ticket = index.join("b", None, leader, 1.0, False)
    assert index.fill_memory({}, "b", None, b"1", b"1", ticket, 1.0, 1.0) is False
    assert index.in_flight == (0, 0)


def test_join_key_never_cached_opens_no_flight():
    index = Index(flat_namespace=True)
    for key in ("", "/a", "a/../b", ".zcache/x", "\ud800"):
        assert index.join(key, None, object(), 1.0, False) is False
    assert index.in_flight == (0, 0)


def test_fill_memory_value_too_large_leaves_the_flight_open():
    index = Index(max_size=SIZE, flat_namespace=True)
    ticket = index.join("a", None, object(), 1.0, False)
    values = {}
    assert (
        index.fill_memory(values, "a", None, b"1" * (SIZE + 1), object(), ticket, 1.0, 1.0) is None
    )
    assert (values, index.in_flight) == ({}, (1, 0))


def test_fill_out_of_memory_the_read_succeeds():
    async def run() -> None:
        source = MemoryStore({"a": cpu.Buffer.from_bytes(b"new")})
        held = {}
        store = CacheStore(source, cache_store=MemoryStore(held))
        held[Stubborn("a")] = None
        Stubborn.short = True
        value = await store.get("a", PROTOTYPE)
        assert value is not None
        assert value.to_bytes() == b"new"
        Stubborn.short = False
        again = await store.get("a", PROTOTYPE)
        assert again is not None
        assert again.to_bytes() == b"new"
        assert store.cache_info()["current_size"] == 3

    asyncio.run(run())


def test_cache_store_over_another_mapping_caches_and_evicts():
    async def run() -> None:
        values = {"a": b"12", "b": b"345"}
        source = MemoryStore({k: cpu.Buffer.from_bytes(v) for k, v in values.items()})
        held: UserDict = UserDict()
        store = CacheStore(source, cache_store=MemoryStore(held), max_size=4)
        for key in ("a", "b", "b", "a"):
            assert await read_through(store, key) == values[key]
        assert list(held) == ["a"]
        assert store.cache_stats()["evictions"] == 2
        assert store.cache_info()["current_size"] == 2

    asyncio.run(run())


WHOLE = np.frombuffer(bytes(range(200)), "B")
SHAPES = {
    "whole": WHOLE,
    "view of all": WHOLE[:],
    "view of a view": WHOLE[:150][:],
    "beginning": WHOLE[:100],
    "end": WHOLE[100:],
    "every other": WHOLE[::2],
    "backwards": WHOLE[::-1],
    "one byte often": np.broadcast_to(WHOLE[:1], 200),
    "empty": WHOLE[:0],
    "empty, of nothing": np.frombuffer(b"", "B"),
    "writable": np.arange(200, dtype="B"),
    "writable, of others": np.frombuffer(bytearray(range(200)), "B"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [cpu.Buffer, type("Derived", (cpu.Buffer,), {})])
def test_freeze_any_buffer_cannot_be_changed_later(name: str, kind: type[cpu.Buffer]):
    """Whatever the memory of a value: the cache holds these bytes, and none can change them."""
    array = SHAPES[name].copy() if name == "writable" else SHAPES[name]
    expected = array.tobytes()
    value = kind(array)
    data, own = freeze(value)
    own = to_cpu_buffer(data) if own is None else own
    assert data == snapshot(value) == expected == own.to_bytes()
    assert type(own.as_numpy_array()) is np.ndarray
    with pytest.raises(ValueError, match="WRITEABLE"):
        own.as_numpy_array().flags.writeable = True
    if array.flags.writeable:
        array[:] = 7
    assert data == own.to_bytes() == expected


@pytest.mark.parametrize("change", ["shape", "strides"])
@pytest.mark.filterwarnings("ignore:Setting the:DeprecationWarning")
async def test_get_array_reshaped_by_a_reader_changes_no_other(change: str):
    """Its bytes cannot be changed, but how an array shows them can."""
    value = b"0123456789abcdef"
    source = MemoryStore({"k": to_cpu_buffer(value)})
    store = CacheStore(source)
    for _ in range(4):  # The one who fills, the first hit, and hits on the spot.
        array = (await store.get("k", PROTOTYPE)).as_numpy_array()
        setattr(array, change, (4, 4) if change == "shape" else (0,))
        assert (await store.get("k", PROTOTYPE)).to_bytes() == value
        part = await store.get("k", PROTOTYPE, RangeByteRequest(1, 3))
        assert part.to_bytes() == b"12"
    assert store.cache_stats()["damaged"] == 0
    assert source._store_dict["k"].to_bytes() == value


async def test_get_adopted_value_is_read_only():
    own = np.frombuffer(bytearray(b"0123456789"), "B")
    cache = MemoryStore({"k": cpu.Buffer(own)})
    store = CacheStore(MemoryStore(), cache_store=cache, adopt=True)
    for _ in range(3):
        assert not (await store.get("k", PROTOTYPE)).as_numpy_array().flags.writeable
    own[:] = 0
    assert (await store.get("k", PROTOTYPE)).to_bytes() == b"0123456789"


async def test_fill_evicts_thousands_keeps_the_bound():
    """More than one step names at most."""
    store = CacheStore(MemoryStore(), max_size=5000, verify="never")
    for number in range(2500):
        await store.set(f"a/c/{number}", to_cpu_buffer(b"12"))
    await store.set("b", to_cpu_buffer(bytes(4999)))
    assert [entry.key for entry in entries(store)] == ["b"]
    assert store.cache_info()["current_size"] == 4999
    check_invariants(store)


@pytest.mark.parametrize("how", ["delete_dir", "clear", "clear_cache"])
async def test_delete_of_thousands_lets_other_tasks_run(how: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol_drain, "TURN", 0.0)
    store = CacheStore(MemoryStore())
    for number in range(8000):
        await store.set(f"a/c/{number}", to_cpu_buffer(b"1"))
    turns: list[None] = []
    watcher = asyncio.ensure_future(count_turns(turns))
    await asyncio.sleep(0)
    turns.clear()
    await (store.delete_dir("a") if how == "delete_dir" else getattr(store, how)())
    seen = len(turns)
    watcher.cancel()
    assert seen >= 7  # A step names a thousand at most.
    assert store.cache_info()["current_size"] == 0
