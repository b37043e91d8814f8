"""A source that is not asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from zarr.abc.store import Store

from zcache._byte_ranges import to_byte_range
from zcache._core import is_cacheable_key
from zcache.exceptions import OfflineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

_ONLINE = "with offline=False, and without ZCACHE_OFFLINE in the environment"
_OFFLINE = "the store is offline, so its source is not asked"
_ASK_ONCE = f"{_OFFLINE}. Ask for it once while it is online: {_ONLINE}."
_USE_ANOTHER = f"{_OFFLINE}. Use a store that is online: {_ONLINE}."
_SHOWN = 100
"""Characters of a key that is never cached: it may be very long."""


def miss(key: str, byte_range: ByteRequest | None = None) -> OfflineError:
    """The error for a key of which nothing is cached that could serve a request."""
    if not is_cacheable_key(key):
        shown = repr(key[:_SHOWN]) + ("..." if len(key) > _SHOWN else "")
        return OfflineError(
            f"{shown} is a key that is never cached (docs/freshness.md lists these), and {_USE_ANOTHER}"
        )
    if _is_never_cached(byte_range):
        return OfflineError(
            f"{byte_range!r} of {key!r} is a request that is never cached, and {_USE_ANOTHER}"
        )
    return OfflineError(f"{key!r} is not in the cache, and {_ASK_ONCE}")


def locked(key: str) -> OfflineError:
    """The error for a key of which the index does not answer what is cached."""
    return OfflineError(
        f"another process holds the lock of the index, so it is not known whether {key!r} is in the cache, and {_OFFLINE}. "
        f"Ask again once that process goes on or has ended, or use a store that is online: {_ONLINE}."
    )


def _is_never_cached(byte_range: ByteRequest | None) -> bool:
    try:
        to_byte_range(byte_range)
    except ValueError:
        return True
    return False


def _miss_of_many(requests: Iterable[tuple[str, ByteRequest | None]]) -> OfflineError:
    """`miss` for the first of these that can never be served, or else for the first one."""
    many = list(requests) or [("", None)]
    return miss(
        *next(
            (one for one in many if not is_cacheable_key(one[0]) or _is_never_cached(one[1])),
            many[0],
        )
    )


def no_listing(directory: str) -> OfflineError:
    """The error for a listing that is not remembered."""
    return OfflineError(f"the listing of {directory!r} is not remembered, and {_ASK_ONCE}")


def no_walk(prefix: str) -> OfflineError:
    """The error for a listing of all that lies below a prefix, however deep: none is ever remembered."""
    return OfflineError(
        f"what lies below {prefix!r}, however deep, only the source knows: the cache remembers answers of list_dir alone. And "
        f"{_USE_ANOTHER}"
    )


def no_change(key: str) -> OfflineError:
    """The error for a write or a delete; the key is "" for one of everything."""
    what = f"{key!r} cannot" if key else "nothing can"
    return OfflineError(
        f"{what} be written or deleted: {_OFFLINE}. Write through a store that is online: {_ONLINE}."
    )


class OfflineSource(Store):
    """In the place of the source of a store that is offline: all who ask it get an `OfflineError`."""

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(self) -> None:
        super().__init__(read_only=True)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,  # noqa: ARG002
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        raise miss(key, byte_range)

    def get_sync(self, key: str, *, byte_range: ByteRequest | None = None, **_: Any) -> NoReturn:
        """As `get`."""
        raise miss(key, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,  # noqa: ARG002
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        raise _miss_of_many(key_ranges)

    def get_ranges(
        self, key: str, byte_ranges: Iterable[ByteRequest | None], **_: Any
    ) -> AsyncIterator[Any]:
        """As `get`."""
        return _Refusal(_miss_of_many((key, one) for one in byte_ranges))

    def get_ranges_sync(
        self, key: str, byte_ranges: Iterable[ByteRequest | None], **_: Any
    ) -> NoReturn:
        """As `get`."""
        raise _miss_of_many((key, one) for one in byte_ranges)

    async def exists(self, key: str) -> bool:
        raise miss(key)

    async def getsize(self, key: str) -> int:
        raise miss(key)

    async def is_empty(self, prefix: str) -> bool:
        raise no_listing(prefix)

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        raise no_change(key)

    async def delete(self, key: str) -> None:
        raise no_change(key)

    def list(self) -> AsyncIterator[str]:
        return _Refusal(no_walk(""))

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return _Refusal(no_walk(prefix))

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return _Refusal(no_listing(prefix))


class _Refusal:
    """An iterator that raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __aiter__(self) -> _Refusal:
        return self

    async def __anext__(self) -> NoReturn:
        raise self._error
