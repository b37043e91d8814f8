"""The doubles of stores that the tests use, beside `zcache.testing.StoreDouble`."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, UserDict
from typing import TYPE_CHECKING, Any

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype

from support import PROTOTYPE, cut, until
from zcache._runtime.registry import Registry
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable


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

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of all that it holds; not an operation."""
        return {key: len(value) for key, value in list(self.values.items())}

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

    def do_validate(self, key: str) -> str:
        """What changes with the bytes of a key."""
        value = self.values.get(key)
        if value is None:
            raise FileNotFoundError(key)
        return hashlib.sha256(value).hexdigest()

    async def validator(self, key: str) -> str | None:
        """For `revalidate`; one operation more."""
        found: str = await self._do("validator", key, lambda: self.do_validate(key))
        return found

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

    async def getsize(self, key: str) -> int:
        def effect() -> int:
            if key not in self.values:
                raise FileNotFoundError(key)
            return len(self.values[key])

        size: int = await self._do("getsize", key, effect)
        return size

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


_stores: Registry[DictStore] = Registry()


def _after_fork() -> None:
    # A thread that stayed with the parent may hold a lock.
    for store in _stores.snapshot():
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

    def validator_sync(self, key: str) -> str | None:
        """As `validator`."""
        found: str = self._do_now("validator", key, lambda: self.do_validate(key))
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
        """Let all through, for ever."""
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


_watching = threading.Lock()


class WatchedStore(StoreDouble):
    """Follows the size of what the store behind it holds at each instant.

    Attributes
    ----------
    held : dict
        Bytes by key.
    peak : int
        Most bytes ever held. While a value is written, the one that it replaces counts as well.
    written : list of str
        Keys, in the order in which they were written.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.held: dict[str, int] = {}
        self.peak = 0
        self.written: list[str] = []

    def _note_write(self, key: str, value: Buffer) -> None:
        with _watching:
            self.written.append(key)
            self.peak = max(self.peak, sum(self.held.values()) + len(value))
            self.held[key] = len(value)

    def _note_delete(self, key: str) -> None:
        with _watching:
            self.held.pop(key, None)

    async def set(self, key: str, value: Buffer) -> None:
        self._note_write(key, value)
        await super().set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        self._note_write(key, value)
        super().set_sync(key, value)

    async def delete(self, key: str) -> None:
        await super().delete(key)
        self._note_delete(key)

    def delete_sync(self, key: str) -> None:
        super().delete_sync(key)
        self._note_delete(key)


class WatchedDict(UserDict[str, Buffer]):
    """The dict inside a `MemoryStore`, with the peak of the bytes that it ever held.

    A cache store that is a plain `MemoryStore` takes another path than a wrapper around one.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.written: list[str] = []
        super().__init__()

    def __setitem__(self, key: str, value: Buffer) -> None:
        self.written.append(key)
        self.peak = max(self.peak, sum(map(len, self.data.values())) + len(value))
        super().__setitem__(key, value)
