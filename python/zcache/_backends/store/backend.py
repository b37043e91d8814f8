"""A cache in any other Zarr store, through the store's own methods."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from zarr.core.buffer import Buffer
from zarr.core.buffer.core import default_buffer_prototype

from zcache._backends.base import DELETE_TIMEOUT, WRITE_TIMEOUT, Backend, names_of, read_timeout
from zcache._backends.store.listing import WRITING, Listing
from zcache._backends.tombstones import RANGES, key_of, tombstone
from zcache._byte_ranges import ByteRange, is_reserved, to_request
from zcache._core import Index
from zcache._index.handle import ignore
from zcache._runtime.buffers import to_cpu_buffer, to_own
from zcache._runtime.circuit_breaker import is_name_too_long
from zcache._runtime.coroutines import NoAnswerError, guarded
from zcache._runtime.io import keeps_sync
from zcache._source.location import innermost, outlives_process, shows_partial_values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.abc.store import Store
    from zarr.core.buffer import BufferPrototype

    from zcache._backends.base import Victim
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO

Outcome = list[Exception | None]
"""For each delete None, or why it failed."""
_FIRST_BYTE: Final = to_request((1, 0, 1))
"""As much of a value as tells whether it is there."""


class StoreBackend(Backend):
    """Any store, by its coroutines; from a thread without an event loop by its synchronous methods.

    Every operation has a time limit. What was begun is never cut off from here: its end is reported to
    the index when it comes.
    """

    def __init__(self, store: Store, shared: SharedIndex) -> None:
        super().__init__(store, shared)
        kept = innermost(store)
        self.outlives_process = outlives_process(kept)
        self._shows_partial_values = self.outlives_process and shows_partial_values(kept)
        self._place = cast("Any", shared.place)
        self.filler = self._place.filler

    @property
    def needs_loop(self) -> bool:
        return not keeps_sync(self.store)

    # -------------------------------------------------------------- reading

    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        self._place.keep_bound(io, self)
        # Of nothing the last byte is read: an entry with a damaged size would else go unnoticed, and stores
        # differ in what they make of an empty range.
        first, wanted = (start, size) if size or not total else (total - 1, 1)
        to_end = first + wanted == total
        part: ByteRange | None = (1, first, first + wanted)
        if to_end:
            # One byte more than there should be: the length then tells whether the value is still the one of
            # the entry, and of one that has grown no more is read.
            part = (1, first, total + 1) if total else None
        request = to_request(part)
        store = self.store
        found = await io.call(
            read_timeout(wanted),
            lambda: store.get(name, prototype, request),
            lambda: store.get_sync(name, prototype=prototype, byte_range=request),
        )
        if isinstance(found, Buffer) and len(found) != wanted:
            return None
        value = await io.aside(wanted, partial(to_own, found, prototype))
        return value if size or not total or value is None else prototype.buffer.from_bytes(b"")

    # -------------------------------------------------------------- writing

    async def write(
        self,
        io: IO,
        name: str,
        data: bytes,
        on_detached_result: Callable[[BaseException | None], None],
    ) -> None:
        """Write a value.

        Raises
        ------
        NoAnswerError
            After `WRITE_TIMEOUT`; the write goes on.
        """
        await io.send(
            WRITE_TIMEOUT,
            lambda: self._set(name, data),
            lambda: self._set_sync(name, data),
            on_detached_result,
        )

    async def _set(self, name: str, data: bytes) -> None:
        if not self._shows_partial_values:
            await guarded(self.store.set(name, to_cpu_buffer(data)))
            return
        unfinished = f"{WRITING}{tombstone(name).rpartition('/')[2]}"
        await guarded(self.store.set(unfinished, to_cpu_buffer(b"")))
        await guarded(self.store.set(name, to_cpu_buffer(data)))
        await guarded(self.store.delete(unfinished))

    def _set_sync(self, name: str, data: bytes) -> None:
        self.store.set_sync(name, to_cpu_buffer(data))

    # ------------------------------------------------------------- deleting

    async def delete(
        self,
        io: IO,
        victims: Sequence[Victim],
        on_detached_result: Callable[[Outcome | BaseException], None],
        timeout: float = DELETE_TIMEOUT,  # noqa: ASYNC109
    ) -> Outcome:
        """Delete values; one that is gone already counts as deleted.

        Raises
        ------
        NoAnswerError
            After `timeout` seconds; the deletes go on.
        """
        names = [name for _, name in victims]
        return await io.send(
            timeout,
            lambda: self._delete_all(names),
            lambda: [self._delete_sync(name) for name in names],
            on_detached_result,
        )

    async def _delete_all(self, names: list[str]) -> Outcome:
        return [await self._delete(name) for name in names]

    async def _delete(self, name: str) -> Exception | None:
        try:
            await guarded(self.store.delete(name))
        except Exception as error:  # noqa: BLE001 - a cache store may raise anything
            # It may have failed after it took effect, or because the value is gone already.
            try:
                return error if await guarded(self.store.exists(name)) else None
            except Exception as second:  # noqa: BLE001 - then it is unknown, mostly
                return None if is_name_too_long(name, error, second) else error
        return None

    def _delete_sync(self, name: str) -> Exception | None:
        try:
            self.store.delete_sync(name)
        except Exception as error:  # noqa: BLE001 - a cache store may raise anything
            try:
                found = self.store.get_sync(
                    name, prototype=default_buffer_prototype(), byte_range=_FIRST_BYTE
                )
            except Exception as second:  # noqa: BLE001 - then it is unknown, mostly
                return None if is_name_too_long(name, error, second) else error
            return None if found is None else error
        return None

    async def remove(self, io: IO, victims: Sequence[Victim]) -> None:
        if not self.breaker.allows("delete"):
            self.remove_later(victims)
            return
        confirm = self.shared.handle.call_shielded
        timeout = self.breaker.patience("delete", DELETE_TIMEOUT)
        until = time.monotonic() + timeout
        try:
            outcome = await self.delete(io, victims, partial(self._removed_late, victims), timeout)
        except NoAnswerError as error:
            # What is being deleted stays counted until that has ended.
            if timeout:
                self.breaker.failed(error, "delete")
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            outcome = [error] * len(victims)
        dropped, failed = self.sort(victims, outcome)
        await confirm(io, ignore, Index.confirm_deletes, dropped, failed)
        if failed:
            # Each change hands over its own, also while the circuit breaker is open: that may be for slowness alone.
            until = until if self.breaker.allows("write") else -math.inf
            await self.add_tombstones(io, names_of(victims, failed), until)

    def release_unknown(self) -> None:
        self._place.filler.release_unknown()

    def _removed_late(self, victims: Sequence[Victim], outcome: Outcome | BaseException) -> None:
        if isinstance(outcome, BaseException):
            self.remove_later(victims)
            return
        dropped, failed = self.sort(victims, outcome)
        self.shared.handle.call_later(ignore, Index.confirm_deletes, dropped, failed)

    async def add_tombstones(self, io: IO, names: Sequence[str], until: float = math.inf) -> None:
        """Leave tombstones for values that are not valid any more but could not be deleted.

        Waits for all of them together for `DELETE_TIMEOUT`, and no longer than `until` on the monotonic clock, which may be
        past; those that are not written by then are written without it.
        """
        if not self.outlives_process:
            return
        timeout = min(DELETE_TIMEOUT, max(0.0, until - time.monotonic()))
        written: list[str] = []
        try:
            await io.send(
                timeout,
                partial(self._bury, names, written),
                partial(self._bury_sync, names, written),
                ignore,
            )
        except NoAnswerError as error:
            if timeout and not written:
                self.breaker.failed(error, "write")
        except Exception as error:  # noqa: BLE001 - a cache store may raise anything
            self.breaker.failed(error, "write")

    async def _bury(self, names: Sequence[str], written: list[str]) -> None:
        for name in names:
            # If that fails as well, it cannot be told.
            try:
                await guarded(self.store.set(tombstone(name), to_cpu_buffer(b"")))
            except Exception as error:  # noqa: BLE001 - a cache store may raise anything
                self.breaker.failed(error, "write")
                # Only after an error: a store that is merely slow takes them all, also after their time.
                if not self.breaker.allows("write"):
                    return
            else:
                written.append(name)

    def _bury_sync(self, names: Sequence[str], written: list[str]) -> None:
        for name in names:
            try:
                self.store.set_sync(tombstone(name), to_cpu_buffer(b""))
            except Exception as error:  # noqa: BLE001 - a cache store may raise anything
                self.breaker.failed(error, "write")
                if not self.breaker.allows("write"):
                    return
            else:
                written.append(name)

    # -------------------------------------------------------------- listing

    @property
    def completes(self) -> bool:
        # docstring inherited
        listing: Listing | None = self._place.listing
        return listing is None or listing.is_under_way()

    def begin(self, io: IO) -> None:
        listing: Listing | None = self._place.listing
        if listing is not None and not listing.begin(io, self.store, self.breaker):
            self.counters.count("skipped")
        self._place.keep_bound(io, self)

    async def remove_unlisted(
        self,
        io: IO,
        prefix: str,
        *,
        begins: bool | None = None,  # noqa: ARG002
    ) -> None:
        listing: Listing | None = self._place.listing
        if listing is None:
            return
        listing.note_change(prefix)
        # Also by name, now: should this process end before the listing does, the next one would take in
        # what is outdated.
        if io.loop() is None or not self.breaker.allows("delete"):
            return
        timeout = self.breaker.patience("delete", DELETE_TIMEOUT)
        try:
            await io.send(timeout, partial(self._remove_unlisted, listing, prefix), ignore, ignore)
        except NoAnswerError as error:
            if timeout:
                self.breaker.failed(error, "delete")
        except Exception as error:  # noqa: BLE001 - whatever it is, the user did not ask for it
            self.breaker.failed(error, "delete")

    async def _remove_unlisted(self, listing: Listing, prefix: str) -> None:
        store: Any = self.store
        found = []
        async for name in store.list_prefix(f"{RANGES}{prefix}"):
            rest = name.removeprefix(f"{RANGES}{prefix}")
            if not prefix or rest.startswith(("@", "/")):
                found.append(name)
        if prefix:
            found.append(prefix)
            found += [name async for name in store.list_prefix(f"{prefix}/")]
        else:
            found += [name async for name in store.list() if not is_reserved(name)]
        for name in found:
            # Once it is listed the index knows what is outdated, and other values may be there by now.
            if listing.has_ended():
                return
            error = await self._delete(name)
            if listing.has_ended():
                key = key_of(name)
                self.shared.handle.call_later(self.remove_later, Index.drop_missing, key)
            if error is not None:
                raise error
