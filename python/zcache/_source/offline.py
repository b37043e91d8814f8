"""A source that is not asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from zarr.abc.store import Store

from zcache.exceptions import OfflineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

_ONLINE = "with offline=False, and without ZCACHE_OFFLINE in the environment"
_WAY_OUT = f"the store is offline, so its source is not asked. Ask for it once while it is online: {_ONLINE}."


def miss(key: str) -> OfflineError:
    """The error for a key of which nothing is cached that could serve a request."""
    return OfflineError(f"{key!r} is not in the cache, and {_WAY_OUT}")


def no_listing(directory: str) -> OfflineError:
    """The error for a listing that is not remembered."""
    return OfflineError(f"the listing of {directory!r} is not remembered, and {_WAY_OUT}")


def no_change(key: str) -> OfflineError:
    """The error for a write or a delete."""
    return OfflineError(
        f"{key!r} cannot be written or deleted: the store is offline, so its source is not asked. Write through a store "
        f"that is online: {_ONLINE}."
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
        byte_range: ByteRequest | None = None,  # noqa: ARG002
    ) -> Buffer | None:
        raise miss(key)

    def get_sync(self, key: str, **_: Any) -> NoReturn:
        """As `get`."""
        raise miss(key)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,  # noqa: ARG002
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        raise miss(next((key for key, _ in key_ranges), ""))

    def get_ranges(self, key: str, *_: Any, **__: Any) -> AsyncIterator[Any]:
        """As `get`."""
        return _Refusal(miss(key))

    def get_ranges_sync(self, key: str, *_: Any, **__: Any) -> NoReturn:
        """As `get`."""
        raise miss(key)

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
        return _Refusal(no_listing(""))

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return _Refusal(no_listing(prefix))

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
