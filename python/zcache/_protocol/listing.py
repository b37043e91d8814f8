"""Listings: answered by the source, and remembered for a time when it cannot be asked."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zcache._backends.base import DELETE_TIMEOUT, READ_TIMEOUT
from zcache._backends.listings import LARGEST
from zcache._byte_ranges import is_plain
from zcache._runtime.threads import NoThreadError
from zcache._source.offline import no_listing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from zcache._backends.listings import Listings
    from zcache._runtime.io import IO

T = TypeVar("T")


class Lister:
    """The listings of one cache.

    Parameters
    ----------
    listings : Listings
        What is remembered of them.
    """

    def __init__(self, listings: Listings) -> None:
        self._listings = listings

    async def list_dir(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        """Ask the source, and remember its answer once it is complete."""
        directory = prefix.rstrip("/")
        keep: Any = None
        if not directory or is_plain(directory):
            keep = await self._do(io, READ_TIMEOUT, partial(self._listings.begin, directory))
        names: list[str] = []
        size = 0
        source = io.source.list_dir(prefix)
        try:
            async for name in source:
                size += len(name)
                if keep is not None and size <= LARGEST:
                    names.append(name)
                yield name
        finally:
            if hasattr(source, "aclose"):
                await source.aclose()
        if keep is not None and size <= LARGEST:
            await self._do(io, READ_TIMEOUT, partial(keep, names))

    async def list_dir_offline(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        """What the source has answered before.

        Raises
        ------
        OfflineError
            Where that is not known.
        """
        names = await self.remembered(io, prefix)
        if names is None:
            raise no_listing(prefix)
        for name in names:
            yield name

    async def remembered(self, io: IO, prefix: str) -> list[str] | None:
        """What the source has answered before; None where that is not known."""
        return await self._do(io, READ_TIMEOUT, partial(self._listings.get, prefix.rstrip("/")))

    async def forget(self, io: IO, key: str | None) -> None:
        """Forget what a write of this key, which begins or has ended, may change; None for all."""
        if not self._listings.has_none_of(key):
            await self._do(io, DELETE_TIMEOUT, partial(self._listings.forget, key))

    async def _do(self, io: IO, timeout: float, work: Callable[[], T]) -> T | None:  # noqa: ASYNC109
        if not self._listings.may_wait:
            return work()
        with contextlib.suppress(OSError, NoThreadError):  # TimeoutError is an OSError
            return await io.in_thread(work, None, timeout)
        return None
