"""What the tests of coherence share: stores over a dict that can be watched, held up and broken."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

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
        _stores.add(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        _stores.add(self)

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
            # The value changes in one step: a process may be forked between any two.
            old = self.values.get(key, b"")
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value
            self.total += len(value or b"") - len(old)
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
        below = prefix.rstrip("/") + "/" if prefix else ""

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


_stores: weakref.WeakSet[DictStore] = weakref.WeakSet()


def _after_fork() -> None:
    # A thread that stayed with the parent may hold a lock.
    for store in list(_stores):
        store._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class SyncDictStore(DictStore):
    """The same, with the synchronous surface as well, which has two such places of its own."""

    def before_now(self, operation: str, key: str) -> None:
        """Called before a synchronous operation has its effect."""

    def after_now(self, operation: str, key: str) -> None:
        """Called after it."""

    def _do_now(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        with self._lock:
            self.counts[operation] += 1
        self.before_now(operation, key)
        result = effect()
        self.after_now(operation, key)
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
    """Holds operations up until it is told to release them, from whichever loop or thread they come.

    Attributes
    ----------
    shut, late : dict of str to float
        How many of the next operations are held up before and after they have their effect.
    arrived : threading.Semaphore
        Released by each operation that is held up.
    """

    def __init__(self, values: dict[str, bytes] | None = None, **options: Any) -> None:
        super().__init__(values, **options)
        self.shut: dict[str, float] = {}
        self.late: dict[str, float] = {}
        self.arrived = threading.Semaphore(0)
        self._released = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a gate cannot travel")

    def release(self) -> None:
        """Let everyone through, for ever."""
        self._released.set()

    def _stops(self, gates: dict[str, float], operation: str) -> bool:
        with self._lock:
            left = gates.get(operation, 0)
            gates[operation] = left - 1
        if left > 0 and not self._released.is_set():
            self.arrived.release()
            return True
        return False

    async def before(self, operation: str, key: str) -> None:
        if self._stops(self.shut, operation):
            await until(self._released.is_set)

    async def after(self, operation: str, key: str, result: object) -> None:
        if self._stops(self.late, operation):
            await until(self._released.is_set)

    def before_now(self, operation: str, key: str) -> None:
        if self._stops(self.shut, operation):
            assert self._released.wait(60)

    def after_now(self, operation: str, key: str) -> None:
        if self._stops(self.late, operation):
            assert self._released.wait(60)


class FaultyStore(SyncDictStore):
    """Raises before or after the effect of an operation, as `plan` says.

    Attributes
    ----------
    plan : callable
        From the operation, its key and "before" or "after" to what is raised then, or None.
    faults : int
        How often it raised.
    """

    def __init__(self, values: dict[str, bytes] | None = None, **options: Any) -> None:
        super().__init__(values, **options)
        self.plan: Callable[[str, str, str], BaseException | None] = lambda *_: None
        self.faults = 0

    def _strike(self, operation: str, key: str, when: str) -> None:
        if (error := self.plan(operation, key, when)) is not None:
            with self._lock:
                self.faults += 1
            raise error

    async def before(self, operation: str, key: str) -> None:
        self._strike(operation, key, "before")

    async def after(self, operation: str, key: str, result: object) -> None:
        self._strike(operation, key, "after")

    def before_now(self, operation: str, key: str) -> None:
        self._strike(operation, key, "before")

    def after_now(self, operation: str, key: str) -> None:
        self._strike(operation, key, "after")


async def reached(store: GatedStore, times: int = 1) -> None:
    """Wait until a gate was reached so often."""
    for _ in range(times):
        await until(lambda: store.arrived.acquire(blocking=False))


async def until(holds: Callable[[], object]) -> None:
    """Wait for what threads and other event loops bring about, too."""
    while not holds():  # noqa: ASYNC110 - events belong to one loop, or block it
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def threads(*works: Callable[[], object]) -> Iterator[list[Any]]:
    """Run each in a thread of its own; the results are there at the end."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        results: list[Any] = []
        yield results
        results += [future.result(60) for future in futures]


def value_sync(store: CacheStore, key: str = "k") -> bytes | None:
    """What `get_sync` gives, as bytes."""
    value = store.get_sync(key)
    return None if value is None else value.to_bytes()


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


def ask(store: CacheStore, question: Callable[[Index], Any]) -> Any:
    """What the books say, where other processes may hold their lock."""
    return store._engine.ask(question)


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
    "FaultyStore",
    "GatedStore",
    "SecondBuffer",
    "SyncDictStore",
    "ask",
    "buf",
    "check_settled",
    "cut",
    "index_of",
    "reached",
    "read",
    "settled",
    "threads",
    "until",
    "value_sync",
]
