"""Sizes of values, and whether they are there: from the cache, the source, or what was known before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from zcache._backends.base import ABSENT
from zcache._core import is_cacheable_key
from zcache._source.missing import MissingKeyErrors

if TYPE_CHECKING:
    from zcache._protocol.read import Reader
    from zcache._runtime.io import IO


class Sizes:
    """What one cache says of sizes.

    Parameters
    ----------
    reader : Reader
        Of its values.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._missing_key_errors = MissingKeyErrors()

    async def exists(self, io: IO, key: str) -> bool:
        """Whether there is a value."""
        size = await self._cached(io, key)
        if size is not None:
            return size is not ABSENT
        try:
            return bool(await io.source.exists(key))
        except Exception as error:
            size = await self._reader.stale.size(error, io, key)
            if size is None:
                raise
            return size is not ABSENT

    async def of(self, io: IO, key: str, *, is_listed: bool = False) -> int:
        """Bytes of a value; of one that was listed now, the source is asked where it was missing before.

        Raises
        ------
        FileNotFoundError
            If there is none: the error of the source.
        """
        size = await self._cached(io, key)
        if size is ABSENT:
            if is_listed:
                return int(await io.source.getsize(key))
            return await self._missing_key_errors.getsize(io.source, key)
        if size is not None:
            return size
        try:
            return int(await io.source.getsize(key))
        except Exception as error:
            size = await self._reader.stale.size(error, io, key)
            if size is None:
                raise
            if size is ABSENT:
                raise FileNotFoundError(key) from None
            return size

    async def _cached(self, io: IO, key: str) -> int | Literal[False] | None:
        return await self._reader.known_size(io, key) if is_cacheable_key(key) else None
