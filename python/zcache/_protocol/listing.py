"""Listings: answered by the source, and remembered for a time when it cannot be asked or raises errors."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zcache._backends.base import DELETE_TIMEOUT, READ_TIMEOUT
from zcache._backends.listings import LARGEST
from zcache._byte_ranges import is_encodable, is_plain
from zcache._index.handle import ignore
from zcache._runtime.threads import NoThreadError
from zcache._source.offline import no_listing

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from zcache._backends.listings import Listings
    from zcache._protocol.stale import StaleValues
    from zcache._runtime.circuit_breaker import CircuitBreaker
    from zcache._runtime.io import IO

T = TypeVar("T")


class Lister:
    """The listings of one cache.

    Parameters
    ----------
    listings : Listings
        What is remembered of them.
    stale : StaleValues
        What is served in place of an error of the source.
    breaker : CircuitBreaker
        Of the cache store.
    """

    def __init__(self, listings: Listings, stale: StaleValues, breaker: CircuitBreaker) -> None:
        self._listings = listings
        self._breaker = breaker
        self._stale = stale

    async def list_dir(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        """Ask the source, and remember its answer once it is complete.

        Where the source raises an error, the rest of what it has answered before takes its place.
        """
        directory = prefix.rstrip("/")
        keep: Any = None
        if _can_be_kept(directory):
            keep = await self._do(io, READ_TIMEOUT, partial(self._listings.begin, directory))
        names: list[str] = []
        size = 0
        source: Any = None
        try:
            while True:
                try:
                    source = aiter(io.source.list_dir(prefix)) if source is None else source
                    name = await anext(source)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    known = await self.instead_of(error, io, prefix) if size <= LARGEST else None
                    if known is None:
                        raise
                    given, keep = set(names), None
                    for name in known:
                        if name not in given:
                            yield name
                    break
                size += len(name)
                if size <= LARGEST:
                    names.append(name)
                yield name
        finally:
            if hasattr(source, "aclose"):
                await source.aclose()
        if keep is not None and size <= LARGEST:
            await self._do(io, READ_TIMEOUT, partial(keep, names))

    async def instead_of(self, error: Exception, io: IO, prefix: str) -> list[str] | None:
        """What takes the place of this error of the source: its last answer, of any age; None for nothing."""
        if not self._stale.is_about(error):
            return None
        names = await self.remembered(io, prefix)
        if names is not None:
            self._stale.note(error)
        return names

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
        directory = prefix.rstrip("/")
        if not _can_be_kept(directory):
            return None
        return await self._do(io, READ_TIMEOUT, partial(self._listings.get, directory))

    async def forget(self, io: IO, key: str) -> None:
        """Forget what a write of this key, which begins or has ended, may change."""
        if not self._listings.has_none_of(key):
            await self._forget(io, partial(self._listings.forget, key))

    async def forget_below(self, io: IO, prefix: str) -> None:
        """Forget what a change at and below this prefix, which begins or has ended, may change."""
        prefix = prefix.rstrip("/")
        # Another name may name anything.
        below = prefix if _can_be_kept(prefix) else ""
        if not self._listings.has_none():
            await self._forget(io, partial(self._listings.forget_below, below))

    async def _forget(self, io: IO, work: Callable[[], None]) -> None:
        if not self._listings.may_wait:
            work()
            return
        timeout = self._breaker.patience("delete", DELETE_TIMEOUT)
        try:
            await io.in_thread(work, ignore, timeout)
        except NoThreadError:
            work()
        except TimeoutError as error:
            if timeout:
                self._breaker.failed(error, "delete")
        except OSError as error:
            self._breaker.failed(error, "delete")

    async def _do(self, io: IO, timeout: float, work: Callable[[], T]) -> T | None:  # noqa: ASYNC109
        if not self._listings.may_wait:
            return work()
        with contextlib.suppress(OSError, NoThreadError):  # TimeoutError is an OSError
            return await io.in_thread(work, None, timeout)
        return None


def _can_be_kept(directory: str) -> bool:
    return not directory or (is_plain(directory) and is_encodable(directory))
