"""What a store holds already when it is opened: it has to be listed, in the background.

Until that is done the index is not complete: it takes nothing in, and reads go to the source.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Final

from zarr.core.buffer.core import default_buffer_prototype
from zarr.storage import MemoryStore

from zcache._backends.ownership import Kind, not_ours, other_source, parse_stamp, stamp_text
from zcache._backends.tombstones import DROPPED, RANGES, key_of, tombstone, with_tombstone
from zcache._byte_ranges import is_encodable, is_reserved
from zcache._index.calls import drained
from zcache._runtime.buffers import to_cpu_buffer
from zcache._runtime.coroutines import NoAnswerError, within
from zcache._runtime.latch import Latch
from zcache._runtime.thread_calls import run_in_background
from zcache._source.describe import describe
from zcache._source.identity import EPHEMERAL
from zcache._source.location import innermost
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from zarr.abc.store import Store

    from zcache._core import Index
    from zcache._index.handle import IndexHandle
    from zcache._runtime.circuit_breaker import CircuitBreaker
    from zcache._runtime.io import IO

logger = logging.getLogger("zcache")

STAMP: Final = ".zcache/stamp.json"
WRITING: Final = ".zcache/writing/"
"""Names of values that are being written, in a store that shows half a value."""
LIST_TIMEOUT: Final = 30.0
"""Seconds without progress after which a listing counts as failed; twice as long at each further try.

Some stores yield their first name when they know the last one.
"""
_PORTION: Final = 256
"""Names that are taken in together."""
_AT_ONCE: Final = 32
"""Sizes that are asked for at the same time."""
_MOST_CHANGES: Final = 10_000
"""Changed prefixes that are kept one by one; of more, everything counts as changed."""


class Listing:
    """The listing of one store, for all who use it.

    Attributes
    ----------
    done : Latch or None
        Done when the index is complete, or will not be until the next try.
    refusal : CacheOwnershipError or None
        Why the store is not used, once that is known.
    """

    def __init__(self, handle: IndexHandle, source: str, *, adopt: bool) -> None:
        self._handle = handle
        self._source = source
        self._adopt = adopt
        self._changed: set[str] = set()
        # Reentrant: while it is held the garbage collector may end an operation.
        self._lock = threading.RLock()
        self._is_listed = False
        self._patience = LIST_TIMEOUT
        # Values that were found, or deleted: what counts as progress.
        self._seen = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.done: Latch | None = None
        self.refusal: CacheOwnershipError | None = None
        self._is_of_parent = False

    def again(self) -> Listing:
        """A new listing of the same store in a forked child, which may find values of its parent."""
        again = Listing(self._handle, self._source, adopt=True)
        again._is_of_parent = self._is_of_parent
        return again

    def rename(self, source: str) -> None:
        """Be for the same source under another name, which it has in a forked child: what is stored is its parent's."""
        self._source, self._is_of_parent = source, True

    def has_ended(self) -> bool:
        """Whether the index knows all that is stored."""
        return self._is_listed

    def is_under_way(self) -> bool:
        """Whether it has begun and not ended."""
        return self.done is not None and not self.done.is_set

    def begin(self, io: IO, cache: Store, breaker: CircuitBreaker) -> bool:
        """List the store in the background, unless that is done or under way.

        Returns
        -------
        bool
            False where the store is left alone, because its listing keeps failing.
        """
        if self._is_of_parent:
            self._leave(cache)
        if self._is_listed or self.refusal is not None or self._is_of_parent:
            return True
        # A user's own clock may do anything.
        is_allowed = breaker.allows("list")
        loop = io.loop()
        with self._lock:
            if self.is_under_way() and not self._is_stuck():
                return True
            if not is_allowed:
                return False
            done = self.done = Latch()
            self._loop = loop
        work = partial(self._list, cache, breaker, done)
        try:
            if self._loop is None:
                # A thread that has no event loop, with a caller that may run in one.
                run_in_background(lambda: asyncio.run(work()))
            else:
                self._task = self._loop.create_task(work())
        except RuntimeError as error:
            breaker.failed(error, "list")
            done.set()
        return True

    def _leave(self, cache: Store) -> None:
        """Do without the store of the parent; said once."""
        was_usable, self._handle.usable = self._handle.usable, False
        if was_usable:
            logger.warning(
                "the cache store %s is not used in this process: the one from which it was forked uses it for a source that "
                "has no name outside its process (such as a MemoryStore). Give another one, or pass source_id= if both are "
                "the same data.",
                describe(cache),
            )

    def _is_stuck(self) -> bool:
        """Whether its event loop has stopped for good."""
        return self._loop is not None and self._loop.is_closed()

    def note_change(self, prefix: str) -> None:
        """Note that what lies at and below a prefix is outdated, should the listing find it."""
        # Of a class of a user's own neither `__hash__` nor `__eq__` may run under the lock.
        prefix = "".join((prefix,))  # noqa: FLY002 - `f"{prefix}"` runs its `__format__`
        with self._lock:
            if self._is_listed:
                return
            if len(self._changed) >= _MOST_CHANGES:
                self._changed = {""}
            if "" not in self._changed:
                self._changed.add(prefix)

    async def _list(self, cache: Store, breaker: CircuitBreaker, done: Latch) -> None:
        try:
            await within(self._patience, self._take_in(cache), lambda: self._seen)
        except CacheOwnershipError as refusal:
            self.refusal = refusal
            self._handle.usable = False
            logger.warning("the cache store is not used: %s", refusal)
        except Exception as error:  # noqa: BLE001 - the cache store's, and none of the user's
            if isinstance(error, NoAnswerError):
                self._patience *= 2
            breaker.failed(error, "list")
        else:
            breaker.succeeded("list")
        finally:
            done.set()

    async def _take_in(self, cache: Store) -> None:
        """Enter all that the store holds into the index, and delete what is outdated.

        A listing does not tell when a value was written, so each is stale as soon as anything can be.
        """
        where = f"cache_store={describe(cache)}"
        # What a store in memory holds ends with it, so a stamp would tell nothing.
        in_memory = isinstance(innermost(cache), MemoryStore)
        owner = None if in_memory else await self._read_stamp(cache, where)
        is_ours = owner == self._source
        index = self._handle.index
        # First, for what is marked must not be served, not even until the listing has ended.
        marks = [name for mark in (DROPPED, WRITING) async for name in cache.list_prefix(mark)]
        marked: set[str] = set()
        left: list[str] = []
        async for names in _portions(cache):
            values = [name for name in names if _is_value(name)]
            if owner is not None and not is_ours:
                left += values
            elif is_ours or self._adopt or not values:
                marked.update(map(key_of, with_tombstone(marks, values)))
                await self._enter(cache, index, values, marked)
            else:
                raise CacheOwnershipError(not_ours(where, values[0], self._source))
        # What a source has left that ended with its process is of no use to any other.
        for name in left:
            await cache.delete(name)
            self._seen += 1
        if not (is_ours or in_memory):
            text = stamp_text(Kind.DIRECTORY, self._source, listed=True)
            await cache.set(STAMP, to_cpu_buffer(text.encode()))
        await self._drop_marked(cache, index, marks)
        # From here on without a suspension: a change is either noted before or finds its entry.
        with self._lock:
            outdated = self._outdated(index)
            index.finish_rebuild()
            self._is_listed = True
        if outdated:
            await self._delete(cache, index, outdated)

    async def _enter(self, cache: Store, index: Index, values: list[str], marked: set[str]) -> None:
        """Take values in; those of marked keys as what could not be deleted."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def size(name: str) -> tuple[int, int, str] | None:
            async with limit:
                try:
                    found = await cache.getsize(name)
                except FileNotFoundError:
                    return None
                self._seen += 1
                return 0, found, name

        found = await asyncio.gather(*map(size, values))
        # One that was told to end, and did not, may be overtaken.
        if self._is_listed:
            return
        index.adopt([value for value in found if value is not None])
        # Without a suspension since: no reader finds them.
        for key in marked.intersection(map(key_of, values)):
            index.confirm_deletes([], [cell for cell, _ in index.drop_missing(key)])

    def _outdated(self, index: Index) -> list[tuple[int, str]]:
        prefixes = [""] if "" in self._changed else sorted(self._changed)
        victims: list[tuple[int, str]] = []
        for prefix in prefixes:
            for found in drained(index.drain_prefix, prefix):
                victims += found
        self._changed.clear()
        return victims

    async def _delete(self, cache: Store, index: Index, victims: list[tuple[int, str]]) -> None:
        dropped: list[int] = []
        try:
            for cell, name in victims:
                await cache.delete(name)
                dropped.append(cell)
                self._seen += 1
        finally:
            gone = set(dropped)
            index.confirm_deletes(dropped, [cell for cell, _ in victims if cell not in gone])

    async def _drop_marked(self, cache: Store, index: Index, marks: list[str]) -> None:
        """Delete what has a tombstone or was never finished. What stays keeps its mark and counts."""
        stays: set[str] = set()
        for cell, name in index.failed_deletes(2**31) if marks else ():
            try:
                await cache.delete(name)
            except Exception:  # noqa: BLE001 - whatever the cache store raises, it is tried again
                stays.add(tombstone(name).rpartition("/")[2])
                index.confirm_deletes([], [cell])
            else:
                index.confirm_deletes([cell], [])
            self._seen += 1
        for name in marks:
            if name.rpartition("/")[2] not in stays:
                with contextlib.suppress(Exception):
                    await cache.delete(name)
                self._seen += 1

    async def _read_stamp(self, cache: Store, where: str) -> str | None:
        """Which source the store is stamped with, if any: this one, or one that has ended.

        Raises
        ------
        CacheOwnershipError
            If it is another source's.
        """
        text = await cache.get(STAMP, default_buffer_prototype())
        if text is None:
            return None
        owner = parse_stamp(text.to_bytes(), where, adopt=self._adopt, listed=True)
        if owner not in (None, self._source) and not owner.startswith(EPHEMERAL):
            raise CacheOwnershipError(other_source(where, owner, self._source))
        return owner


async def _portions(cache: Store) -> AsyncIterator[list[str]]:
    """All names in a store, some at a time."""
    portion: list[str] = []
    async for name in cache.list():
        portion.append(name)
        if len(portion) == _PORTION:
            yield portion
            portion = []
    if portion:
        yield portion


def _is_value(name: str) -> bool:
    return is_encodable(name) and (name.startswith(RANGES) or not is_reserved(name))
