"""Listings: answered by the source, and remembered for a time when it cannot be asked or raises errors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from zcache._backends.base import DELETE_TIMEOUT, READ_TIMEOUT
from zcache._backends.listings import LARGEST
from zcache._byte_ranges import is_encodable, is_plain, is_too_long
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
    offline : bool
        Whether the source is not asked.
    """

    def __init__(
        self, listings: Listings, stale: StaleValues, breaker: CircuitBreaker, *, offline: bool
    ) -> None:
        self._listings = listings
        self._breaker = breaker
        self._stale = stale
        self._offline = offline

    async def is_empty(self, io: IO, prefix: str) -> bool:
        """Whether there is nothing below a prefix: the answer of the source, or what it has answered before."""
        if self._offline:
            names = await self._remembered(io, prefix)
            if names is not None:
                return not names
        try:
            return bool(await io.source.is_empty(prefix))
        except Exception as error:
            names = await self._instead_of(error, io, prefix)
            if names is None:
                raise
            return not names

    def list_dir(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        """The names below a prefix: the answer of the source, or what it has answered before.

        Raises
        ------
        OfflineError
            Where neither is known.
        """
        return self._list_offline(io, prefix) if self._offline else self._list(io, prefix)

    async def _list(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        """Ask the source, and remember its answer once it is complete.

        Where the source raises an error, the rest of what it has answered before takes its place.
        """
        directory = prefix.rstrip("/")
        keep: Any = None
        if _can_be_kept(directory):
            keep = await self._do(io, partial(self._listings.begin, directory))
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
                    known = await self._instead_of(error, io, prefix) if size <= LARGEST else None
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
            await self._do(io, partial(keep, names))

    async def _instead_of(self, error: Exception, io: IO, prefix: str) -> list[str] | None:
        """What takes the place of this error of the source: its last answer, of any age; None for nothing."""
        if not self._stale.is_about(error):
            return None
        names = await self._remembered(io, prefix)
        if names is not None:
            self._stale.note(error)
        return names

    async def _list_offline(self, io: IO, prefix: str) -> AsyncGenerator[str, None]:
        names = await self._remembered(io, prefix)
        if names is None:
            raise no_listing(prefix)
        for name in names:
            yield name

    async def _remembered(self, io: IO, prefix: str) -> list[str] | None:
        """What the source has answered before; None where that is not known."""
        directory = prefix.rstrip("/")
        if not _can_be_kept(directory):
            return None
        return await self._do(io, partial(self._listings.get, directory))

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

    async def _do(self, io: IO, work: Callable[[], T]) -> T | None:
        """Do what makes a listing remembered, or tells what is; None where the cache store does not let it."""
        if not self._listings.may_wait:
            return work()
        if not self._breaker.allows("list"):
            return None
        try:
            found = await io.in_thread(work, None, READ_TIMEOUT)
        except NoThreadError:  # That is no fault of the cache store.
            return None
        except OSError as error:  # TimeoutError is one.
            self._breaker.failed(error, "list")
            return None
        self._breaker.succeeded("list")
        return found


def _can_be_kept(directory: str) -> bool:
    is_text = is_plain(directory) and is_encodable(directory)
    return not directory or (is_text and not is_too_long(directory))
