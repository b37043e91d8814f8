"""What the tests of coherence share: stores over a dict that can be watched, held up and broken."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, cpu

from support import PROTOTYPE, buf, read
from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from zcache._core import Index


class DictStore(Store):
    """Values in a dict; each operation passes `before` and `after`, where subclasses step in.

    Attributes
    ----------
    values : dict
        What it holds.
    total, peak : int
        Bytes that it holds, and the most that it ever held, at any instant.
    counts : Counter
        Calls by operation.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True
    supports_partial_writes = False

    def __init__(self, values: dict[str, bytes] | None = None, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.values = dict(values or {})
        self.total = self.peak = sum(map(len, self.values.values()))
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # The two places where subclasses step in.

    async def before(self, operation: str, key: str) -> None:
        """Called before an operation has its effect."""

    async def after(self, operation: str, key: str, result: object) -> None:
        """Called after it had its effect, before its caller hears of it."""

    # The effects; each is one step, even for threads.

    def do_get(self, key: str, prototype: BufferPrototype, request: ByteRequest | None) -> Any:
        value = self.values.get(key)
        return None if value is None else prototype.buffer.from_bytes(cut(value, request))

    def do_set(self, key: str, value: bytes | None) -> None:
        with self._lock:
            old = self.values.pop(key, b"")
            self.total -= len(old)
            if value is not None:
                self.values[key] = value
                self.total += len(value)
                self.peak = max(self.peak, self.total)

    async def _do(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        with self._lock:
            self.counts[operation] += 1
        await self.before(operation, key)
        result = effect()
        await self.after(operation, key, result)
        return result

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        prototype = prototype or PROTOTYPE
        found: Buffer | None = await self._do(
            "get", key, lambda: self.do_get(key, prototype, byte_range)
        )
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, request) for key, request in key_ranges]

    async def exists(self, key: str) -> bool:
        found: bool = await self._do("exists", key, lambda: key in self.values)
        return found

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.to_bytes()
        await self._do("set", key, lambda: self.do_set(key, data))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.to_bytes()

        def effect() -> None:
            if key not in self.values:
                self.do_set(key, data)

        await self._do("set_if_not_exists", key, effect)

    async def delete(self, key: str) -> None:
        self._check_writable()
        await self._do("delete", key, lambda: self.do_set(key, None))

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        below = prefix.rstrip("/") + "/"

        def effect() -> None:
            for key in [key for key in list(self.values) if key.startswith(below)]:
                self.do_set(key, None)

        await self._do("delete_dir", prefix, effect)

    async def clear(self) -> None:
        self._check_writable()

        def effect() -> None:
            for key in list(self.values):
                self.do_set(key, None)

        await self._do("clear", "", effect)

    async def list(self) -> AsyncIterator[str]:
        for key in list(self.values):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in list(self.values):
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = prefix.rstrip("/") + "/" if prefix else ""
        for name in {key.removeprefix(below).split("/")[0] for key in self.values}:
            if any(key.startswith(below + name) for key in list(self.values)):
                yield name


class SyncDictStore(DictStore):
    """The same, with the synchronous surface as well, which passes `now` twice."""

    def now(self, operation: str, key: str) -> None:
        """Called before and after the effect of a synchronous operation."""

    def _do_now(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        with self._lock:
            self.counts[operation] += 1
        self.now(operation, key)
        result = effect()
        self.now(operation, key)
        return result

    def get_sync(
        self,
        key: str,
        *,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        prototype = prototype or PROTOTYPE
        found: Buffer | None = self._do_now(
            "get", key, lambda: self.do_get(key, prototype, byte_range)
        )
        return found

    def set_sync(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.to_bytes()
        self._do_now("set", key, lambda: self.do_set(key, data))

    def delete_sync(self, key: str) -> None:
        self._check_writable()
        self._do_now("delete", key, lambda: self.do_set(key, None))


class GatedStore(SyncDictStore):
    """Holds operations up until a gate is opened, from whichever loop or thread they come.

    Attributes
    ----------
    shut : set of str
        Operations that are held up, before they have their effect.
    arrived : threading.Semaphore
        Released by each operation that reaches a shut gate.
    """

    def __init__(self, values: dict[str, bytes] | None = None, **options: Any) -> None:
        super().__init__(values, **options)
        self.shut: set[str] = set()
        self.arrived = threading.Semaphore(0)
        self._open = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a gate cannot travel")

    def open(self) -> None:
        """Let everyone through, for ever."""
        self.shut = set()
        self._open.set()

    async def before(self, operation: str, key: str) -> None:
        if operation in self.shut:
            self.arrived.release()
            while not self._open.is_set():
                await asyncio.sleep(0.001)

    def now(self, operation: str, key: str) -> None:
        if operation in self.shut:
            self.arrived.release()
            assert self._open.wait(60)


async def reached(store: GatedStore, times: int = 1) -> None:
    """Wait until a gate was reached so often."""
    for _ in range(times):
        while not store.arrived.acquire(blocking=False):
            await asyncio.sleep(0.001)


class SecondBuffer(cpu.Buffer):
    """Another class of CPU buffer, as a library of its own might bring."""


SECOND = BufferPrototype(buffer=SecondBuffer, nd_buffer=cpu.NDBuffer)


def cut(value: bytes, request: ByteRequest | None) -> bytes:
    """What a request selects, as Python slices."""
    if isinstance(request, RangeByteRequest):
        return value[request.start : request.end]
    if isinstance(request, OffsetByteRequest):
        return value[request.offset :]
    if isinstance(request, SuffixByteRequest):
        return value[max(0, len(value) - request.suffix) :]
    return value


def index_of(store: CacheStore) -> Index:
    """The books."""
    return store._engine.index


async def settled(store: CacheStore) -> None:
    """Wait until nothing is in flight, cancelled writes that go on by themselves included, and
    try once more to delete what could not be deleted.
    """
    for _ in range(20_000):
        states = {state for *_, state in index_of(store).entries()}
        if index_of(store).in_flight == (0, 0) and not states & {"writing", "dropping"}:
            break
        await asyncio.sleep(0.001)
    else:
        raise AssertionError(f"never settles: {index_of(store).entries()}")
    engine = store._engine
    await engine.drop(store._io, index_of(store).orphans(2**31))


async def check_settled(store: CacheStore, source: DictStore, cache: DictStore) -> None:
    """Assert that, once all is quiet, the books equal what the cache store holds, and that every
    key reads as the source has it.
    """
    await settled(store)
    index = index_of(store)
    index.validate()
    assert index.in_flight == (0, 0)
    names = {key: size for key, span, size, _ in index.entries() if span is None}
    assert {key: len(value) for key, value in cache.values.items() if ".zcache" not in key} == names
    assert cache.total == index.current_size, (cache.values, index.entries())
    assert cache.total == sum(map(len, cache.values.values()))
    if store.max_size is not None:
        assert cache.peak <= store.max_size
    for key in {*source.values, *cache.values} - {key for key in cache.values if ".zcache" in key}:
        assert await read(store, key) == source.values.get(key), key


__all__ = [
    "PROTOTYPE",
    "SECOND",
    "CacheStore",
    "DictStore",
    "GatedStore",
    "SecondBuffer",
    "SyncDictStore",
    "buf",
    "check_settled",
    "cut",
    "index_of",
    "read",
    "reached",
    "settled",
]
