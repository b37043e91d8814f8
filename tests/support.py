"""What the tests share: stores that count, watch and fail, and the books of a cache."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import Counter, UserDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zarr.abc.store import ByteRequest, Store, SupportsSyncStore
from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zcache import CacheStore

PROTOTYPE = default_buffer_prototype()
RANGES = ".zcache/ranges/"
"""Where a cache store holds ranges of values."""


def buf(data: bytes) -> Buffer:
    """A CPU buffer with these bytes."""
    return cpu.Buffer.from_bytes(data)


async def read(store: Store, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
    """What `get` gives, as bytes."""
    value = await store.get(key, PROTOTYPE, byte_range)
    return None if value is None else value.to_bytes()


async def fill(store: Store, **values: bytes) -> None:
    """Write keys one after the other."""
    for key, value in values.items():
        await store.set(key, buf(value))


async def count_turns(turns: list[None]) -> None:
    """Add to a list in each turn that the event loop gives, until cancelled."""
    while True:
        turns.append(None)
        await asyncio.sleep(0)


async def listed(names: Any) -> list[str]:
    """Everything that a listing yields, sorted."""
    return sorted([name async for name in names])


def innermost(store: Store) -> Store:
    """The store below all wrappers."""
    while isinstance(store, WrapperStore):
        store = store._store
    return store


def held(store: Store) -> dict[str, int]:
    """Every value that a store holds, by key, with its size; looked up behind its back."""
    inner = innermost(store)
    if isinstance(inner, MemoryStore):
        sizes = {key: len(value) for key, value in inner._store_dict.items()}
    else:
        assert isinstance(inner, LocalStore), inner
        root = Path(inner.root)
        files = (path for path in root.rglob("*") if path.is_file())
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    return {key: size for key, size in sizes.items() if is_value(key)}


def is_value(key: str) -> bool:
    """Whether a key of a cache store is a value or a range of one, and nothing of zcache's own."""
    return not key.startswith(".zcache/") or key.startswith(RANGES)


def check_books(store: CacheStore) -> None:
    """Assert what holds whenever nothing is in flight: the books agree with each other, with the
    bound, and with what the cache store really holds.
    """
    index = store._engine.index
    index.validate()
    assert index.in_flight == (0, 0)
    values = held(store._cache)
    info = store.cache_info()
    assert info["current_size"] == sum(values.values()), (info, values, index.entries())
    assert info["tracked_keys"] == info["cached_keys"] == len(values), (info, values)
    if store.max_size is not None:
        assert info["current_size"] <= store.max_size
    stats = store.cache_stats()
    assert stats["total_requests"] == stats["hits"] + stats["misses"]
    assert stats["expirations"] <= stats["evictions"]


class Clock:
    """A clock that a test sets; see the fixture `clock`."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class Call(NamedTuple):
    """One call of a store's method."""

    method: str
    key: str | None
    """First argument, where it is text."""


class Probe(WrapperStore[Store]):
    """Passes everything on, and looks at each call of a method from `PROBED`.

    Unlike its base, it has the methods of the store behind it on every line of zarr, the
    synchronous ones and `getsize` among them.
    """

    def before(self, method: str, *args: Any) -> None:
        """Called before the method is passed on."""

    def after(self, method: str, *args: Any) -> None:
        """Called when it has returned; for a listing or `get_ranges` when it has been called."""

    def _with_store(self, store: Store) -> Self:
        # A read-only copy is watched together with the original.
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__, _store=store)
        return copy

    @property
    def _supports_sync_io(self) -> bool:
        inner = self._store
        return isinstance(inner, SupportsSyncStore) and getattr(inner, "_supports_sync_io", True)


PROBED = tuple(
    name
    for name in (
        *("get", "get_partial_values", "get_ranges", "get_sync", "get_ranges_sync", "_get_many"),
        *("exists", "getsize", "getsize_prefix", "is_empty", "list", "list_prefix", "list_dir"),
        *("set", "set_if_not_exists", "_set_many", "set_sync"),
        *("delete", "delete_sync", "delete_dir", "clear"),
    )
    if hasattr(MemoryStore, name)
)


def _probed(name: str) -> Callable[..., Any]:
    def call(self: Probe, *args: Any, **kwargs: Any) -> Any:
        self.before(name, *args)
        result = getattr(self._store, name)(*args, **kwargs)
        self.after(name, *args)
        return result

    async def call_async(self: Probe, *args: Any, **kwargs: Any) -> Any:
        self.before(name, *args)
        result = await getattr(self._store, name)(*args, **kwargs)
        self.after(name, *args)
        return result

    return call_async if inspect.iscoroutinefunction(getattr(MemoryStore, name)) else call


for _name in PROBED:
    setattr(Probe, _name, _probed(_name))


class CountingStore(Probe):
    """Counts the calls that reach the store behind it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls: list[Call] = []

    def before(self, method: str, *args: Any) -> None:
        key = args[0] if args and isinstance(args[0], str) else None
        self.calls.append(Call(method, key))

    def take(self) -> Counter[str]:
        """Calls by method since the last time."""
        calls, self.calls[:] = list(self.calls), []
        return Counter(call.method for call in calls)


_watching = threading.Lock()


class WatchedStore(Probe):
    """Keeps the books of the store behind it at each instant.

    Attributes
    ----------
    held : dict
        Bytes by key.
    peak : int
        Most bytes ever held. While a value is written, the one that it replaces counts as well.
    written : list of str
        Keys, in the order in which they were written.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.held: dict[str, int] = {}
        self.peak = 0
        self.written: list[str] = []

    def before(self, method: str, *args: Any) -> None:
        if method in ("set", "set_sync"):
            key, value = args
            with _watching:
                self.written.append(key)
                self.peak = max(self.peak, sum(self.held.values()) + len(value))
                self.held[key] = len(value)

    def after(self, method: str, *args: Any) -> None:
        if method in ("delete", "delete_sync"):
            with _watching:
                self.held.pop(args[0], None)


class WatchedDict(UserDict[str, Buffer]):
    """The dict inside a `MemoryStore`, with the peak of the bytes that it ever held.

    A cache store that is a plain `MemoryStore` takes another way than a wrapper around one.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.written: list[str] = []
        super().__init__()

    def __setitem__(self, key: str, value: Buffer) -> None:
        self.written.append(key)
        self.peak = max(self.peak, sum(map(len, self.data.values())) + len(value))
        super().__setitem__(key, value)


class FaultyStore(Probe):
    """Raises where it is told to.

    Attributes
    ----------
    faults : dict
        What each method raises, before it has an effect.
    late : dict
        The same, after it had its effect.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.faults: dict[str, Exception] = {}
        self.late: dict[str, Exception] = {}

    def before(self, method: str, *args: Any) -> None:
        if method in self.faults:
            raise self.faults[method]

    def after(self, method: str, *args: Any) -> None:
        if method in self.late:
            raise self.late[method]


def everything(store: Store) -> Iterator[tuple[str, bytes]]:
    """Every key and value of a store, through the store."""

    async def collect() -> list[tuple[str, bytes]]:
        keys = await listed(store.list())
        return [(key, await read(store, key) or b"") for key in keys]

    yield from sync(collect())
