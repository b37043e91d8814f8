"""Count what really happens: requests at a source, bytes held by a cache.

Nothing in this file trusts the books of the store that is being measured.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["Counts", "Meter", "MeteredStore", "PeakDict"]


@dataclass(frozen=True)
class Counts:
    """A reading of a `Meter`: requests, and bytes that the source sent."""

    requests: int
    bytes_read: int

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(self.requests - earlier.requests, self.bytes_read - earlier.bytes_read)


class Meter:
    """Totals of the requests that reached a source; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts(0, 0)

    def add(self, *, requests: int = 0, bytes_read: int = 0) -> None:
        """Add to the totals."""
        with self._lock:
            self._counts = Counts(
                self._counts.requests + requests, self._counts.bytes_read + bytes_read
            )

    def read(self) -> Counts:
        """Return the totals so far."""
        with self._lock:
            return self._counts


class MeteredStore(Store):
    """A read-only view of `store` that counts each call and delays it.

    It stands in front of a user's own source, where no proxy can see the requests. It subclasses
    `Store` and not `WrapperStore` so that the bulk methods, inherited from `Store`, are built on
    `get` below: each fetch is then counted, and coalescing happens before the count.

    Parameters
    ----------
    store
        The source. It is never written to.
    meter
        Where each call is counted.
    latency
        Seconds to wait before each call, 0 or more.
    """

    supports_writes = False
    supports_deletes = False

    def __init__(self, store: Store, meter: Meter, latency: float = 0.0) -> None:
        super().__init__(read_only=True)
        self._store = store
        self._meter = meter
        self._latency = latency

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeteredStore) and self._store == other._store

    # Compared by what it stands before, like zarr's own stores, which have no hash either.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MeteredStore({self._store!r})"

    @property
    def supports_listing(self) -> bool:
        """As the source says."""
        return self._store.supports_listing

    @property
    def supports_consolidated_metadata(self) -> bool:
        """As the source says."""
        return self._store.supports_consolidated_metadata

    def with_read_only(self, read_only: bool = False) -> MeteredStore:
        """Return this store for `read_only=True`; refuse to become writable."""
        if not read_only:
            raise ValueError("the demo never writes to a source that was given with --source")
        return self

    async def _request(self) -> None:
        self._meter.add(requests=1)
        if self._latency > 0:
            await asyncio.sleep(self._latency)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read a value or a part of it: one request."""
        await self._request()
        value = await self._store.get(key, prototype, byte_range)
        if value is not None:
            self._meter.add(bytes_read=len(value))
        return value

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Read several parts: one request each."""
        return list(
            await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        """Ask for a key: one request."""
        await self._request()
        return await self._store.exists(key)

    async def getsize(self, key: str) -> int:
        """Ask for a size: one request."""
        await self._request()
        return await self._store.getsize(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refuse."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """List all keys: one request, whatever the number of pages."""
        await self._request()
        async for key in self._store.list():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """List the keys under a prefix: one request, whatever the number of pages."""
        await self._request()
        async for key in self._store.list_prefix(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """List one level: one request, whatever the number of pages."""
        await self._request()
        async for key in self._store.list_dir(prefix):
            yield key


class PeakDict(dict[str, Any]):
    """The dictionary of a `MemoryStore` that remembers the most bytes it ever held.

    It counts inside the cache store, at each change, so a bound that is broken only for a moment
    shows too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0

    def __setitem__(self, key: str, value: Any) -> None:
        old = self.get(key)
        super().__setitem__(key, value)
        self.held += len(value) - (0 if old is None else len(old))
        self.peak = max(self.peak, self.held)

    def __delitem__(self, key: str) -> None:
        self.held -= len(self[key])
        super().__delitem__(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Keep the count for `MemoryStore.set_if_not_exists`."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        """Keep the count for a removal that returns the value."""
        if key in self:
            self.held -= len(self[key])
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Keep the count for a removal of the newest."""
        key, value = super().popitem()
        self.held -= len(value)
        return key, value

    def update(self, *others: Any, **values: Any) -> None:
        """Keep the count for many values at once."""
        for key, value in dict(*others, **values).items():
            self[key] = value

    def clear(self) -> None:
        """Keep the count for a removal of everything."""
        super().clear()
        self.held = 0
