"""How bytes get into the cache store and out of it again, for each sort of store.

A port has two faces with the same methods: coroutines for callers in an event loop, and the same
coroutines without a suspension for callers that have none (see `drive` in `_coroutines.py`). An error
that is raised as an `Exception` means that the operation is over. Where anything else is raised (a
cancellation), the operation may go on behind our back, and its `late` callback is told how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any, TypeAlias

from zarr.core.buffer.core import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from zcache import _files
from zcache._breaker import is_too_long
from zcache._buffers import to_cpu_buffer, to_own
from zcache._coroutines import guarded, settle
from zcache._identity import innermost, outlives_process, shows_halves
from zcache._marks import DROPPED, WRITING, mark
from zcache._offload import counter
from zcache._threads import in_background, in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._books import Books
    from zcache._core import Desk, NewFile

Outcome = list[Exception | None]
"""For each delete None, or why it failed."""
Written: TypeAlias = "NewFile | None"
"""A value that is written but not sealed, where that makes a difference."""


class Port:
    """Traffic with a cache store. Names are keys of the cache store.

    A port that is `immediate` never suspends: its `write_now` and `delete_now` do the work.
    """

    immediate = False

    async def read(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        """Read a value, or None where there is none."""
        raise NotImplementedError

    async def write(
        self, name: str, data: bytes, late: Callable[[Written | BaseException], None]
    ) -> Written:
        """Write a value; to be sealed once the index has decided about it."""
        raise NotImplementedError

    async def delete(
        self, names: Sequence[str], late: Callable[[Outcome | BaseException], None]
    ) -> Outcome:
        """Delete values. One that is gone already counts as deleted."""
        raise NotImplementedError

    def write_now(self, name: str, data: bytes) -> Written:
        """Write a value on the spot."""
        raise NotImplementedError

    def seal(self, name: str, written: Written) -> None:
        """Note where the value is that it is valid."""

    def give_up(self, name: str, written: Written, /) -> None:
        """Delete a value of which the index knows nothing, as far as that takes no event loop."""

    async def remember(self, names: Sequence[str]) -> None:
        """Note values that are not valid any more but could not be deleted, for whoever comes next.

        Where that fails as well, nobody can know.
        """

    def remember_late(self, names: Sequence[str]) -> None:
        """The same, where nobody waits for it, as far as that takes no event loop."""

    def noted(self, _name: str) -> tuple[int, int] | None:
        """Length and checksum that the value should have, where they are kept beside it."""
        return None

    def whole_size(self, _name: str) -> int | None:
        """Length of the value, if it is the one that it should have."""
        return None

    def size(self, _name: str) -> int | None:
        """Length of the value, where that is told at once."""
        return None

    def delete_now(self, names: Sequence[str]) -> Outcome:
        """Delete values on the spot."""
        raise NotImplementedError


class StorePort(Port):
    """Any store, through its coroutines."""

    def __init__(self, store: Store) -> None:
        self._store = store
        kept = innermost(store)
        self._outlives = outlives_process(kept)
        self._shows_halves = self._outlives and shows_halves(kept)

    async def read(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        return to_own(await guarded(self._store.get(name, prototype, byte_range)), prototype)

    async def write(
        self,
        name: str,
        data: bytes,
        late: Callable[[Written | BaseException], None],
    ) -> Written:
        await settle(lambda: self._set(name, data), late)
        return None

    async def _set(self, name: str, data: bytes) -> None:
        if not self._shows_halves:
            await guarded(self._store.set(name, to_cpu_buffer(data)))
            return
        unfinished = mark(WRITING, name)
        await guarded(self._store.set(unfinished, to_cpu_buffer(b"")))
        await guarded(self._store.set(name, to_cpu_buffer(data)))
        await guarded(self._store.delete(unfinished))

    async def remember(self, names: Sequence[str]) -> None:
        for name in names if self._outlives else ():
            with contextlib.suppress(Exception):
                await guarded(self._store.set(mark(DROPPED, name), to_cpu_buffer(b"")))

    async def delete(
        self, names: Sequence[str], late: Callable[[Outcome | BaseException], None]
    ) -> Outcome:
        return await settle(lambda: self._delete(names), late)

    async def _delete(self, names: Sequence[str]) -> Outcome:
        return [await self._delete_one(name) for name in names]

    async def _delete_one(self, name: str) -> Exception | None:
        try:
            await guarded(self._store.delete(name))
        except Exception as error:  # noqa: BLE001 - a cache store may raise anything
            # It may have failed after it took effect, or because the value is gone already.
            try:
                return error if await guarded(self._store.exists(name)) else None
            except Exception as doubt:  # noqa: BLE001 - then nobody knows, mostly
                return None if is_too_long(name, error, doubt) else error
        return None


class ImmediatePort(Port):
    """A port that never suspends."""

    immediate = True

    def read_now(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        """Read a value on the spot, or None where there is none."""
        raise NotImplementedError

    def give_up(self, name: str, _written: Written, /) -> None:
        with contextlib.suppress(Exception):
            self.delete_now([name])

    async def read(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        return self.read_now(name, prototype, byte_range)

    async def delete(
        self, names: Sequence[str], late: Callable[[Outcome | BaseException], None]
    ) -> Outcome:
        try:
            return self.delete_now(names)
        except Exception:
            raise
        except BaseException as interrupt:
            late(interrupt)
            raise


class SyncPort(ImmediatePort):
    """A store by its synchronous methods: memory, or any from a thread that may block."""

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    def read_now(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        found = self._store.get_sync(name, prototype=prototype, byte_range=byte_range)
        return to_own(found, prototype)

    def write_now(self, name: str, data: bytes) -> Written:
        self._store.set_sync(name, to_cpu_buffer(data))
        return None

    def delete_now(self, names: Sequence[str]) -> Outcome:
        return [self._delete_one(name) for name in names]

    def _delete_one(self, name: str) -> Exception | None:
        try:
            self._store.delete_sync(name)
        except Exception as error:  # noqa: BLE001 - a cache store may raise anything
            try:
                found = self._store.get_sync(name, prototype=default_buffer_prototype())
            except Exception as doubt:  # noqa: BLE001 - then nobody knows, mostly
                return None if is_too_long(name, error, doubt) else error
            return None if found is None else error
        return None


class MemoryPort(SyncPort):
    """A dict of this process: nothing here can fail.

    Attributes
    ----------
    values : dict
        Buffers by name, of `to_cpu_buffer`: of what `set_sync` puts there, zarr 3.4 keeps a copy
        that whoever reads it can write to.
    """

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.values: Any = store._store_dict

    def write_now(self, name: str, data: bytes) -> Written:
        self.values[name] = to_cpu_buffer(data)
        return None

    def delete_now(self, names: Sequence[str]) -> Outcome:
        for name in names:
            self.values.pop(name, None)
        return [None] * len(names)


class LocalPort(Port):
    """A directory, from an event loop.

    The work is done in threads of our own, so that it neither waits for the event loop's own threads
    nor ends with it: writes and deletes in threads without an interpreter where the event loop can
    wait for those.
    """

    def __init__(self, blocking: LocalSyncPort) -> None:
        self._blocking = blocking

    async def read(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        work = self._blocking.read_now
        return await in_thread(lambda: work(name, prototype, byte_range), lambda _: None)

    async def write(
        self, name: str, data: bytes, late: Callable[[Written | BaseException], None]
    ) -> Written:
        loop = asyncio.get_running_loop()
        if (at := counter(loop)) is not None:
            number = self._blocking.hand_in(at.desk, name, data)
            try:
                written: Written = await at.result(number, late, loop)
            except (FileNotFoundError, FileExistsError):
                pass  # Something has to be done about what is in the way.
            else:
                return written
        work = self._blocking.write_now
        return await in_thread(lambda: work(name, data), late)

    def seal(self, name: str, written: Written) -> None:
        self._blocking.seal(name, written)

    def give_up(self, name: str, written: Written, /) -> None:
        in_background(lambda: self._blocking.give_up(name, written))

    async def remember(self, names: Sequence[str]) -> None:
        await in_thread(lambda: self._blocking.remember_late(names), lambda _: None)

    def remember_late(self, names: Sequence[str]) -> None:
        in_background(lambda: self._blocking.remember_late(names))

    def noted(self, name: str) -> tuple[int, int] | None:
        return self._blocking.noted(name)

    def whole_size(self, name: str) -> int | None:
        return self._blocking.whole_size(name)

    def size(self, name: str) -> int | None:
        return self._blocking.size(name)

    async def delete(
        self, names: Sequence[str], late: Callable[[Outcome | BaseException], None]
    ) -> Outcome:
        loop = asyncio.get_running_loop()
        if (at := counter(loop)) is not None:
            number = at.desk.remove(self._blocking.root, list(names))
            outcome: Outcome = await at.result(number, late, loop)
            return outcome
        return await in_thread(lambda: self._blocking.delete_now(names), late)


class LocalSyncPort(ImmediatePort):
    """A directory, from a thread that may block.

    Parameters
    ----------
    store : LocalStore
        The directory.
    books : Books
        Knows the names for unfinished files, and the clock.

    Attributes
    ----------
    root : str
        The directory, whatever the working directory is by then.
    """

    def __init__(self, store: LocalStore, books: Books) -> None:
        self.root = os.path.abspath(store.root)
        self._store = LocalStore(self.root)
        self._books = books

    def _path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def read_now(
        self, name: str, prototype: BufferPrototype, byte_range: ByteRequest | None
    ) -> Buffer | None:
        return self._store.get_sync(name, prototype=prototype, byte_range=byte_range)

    def hand_in(self, desk: Desk, name: str, data: bytes) -> int:
        """Have a value written; returns the number of the result."""
        unfinished = _files.unfinished_name(self._books.tmp())
        time = _files.pending_time(self._books.now())
        return desk.write(self.root, name, unfinished, data, time)

    def write_now(self, name: str, data: bytes) -> Written:
        books = self._books
        return _files.write_new(self.root, name, data, books.tmp(), books.now())

    def seal(self, name: str, written: Written) -> None:
        if written is not None:
            # One that cannot be sealed is no value to whoever rebuilds the index.
            with contextlib.suppress(OSError):
                _files.seal(self.root, name, written)

    def give_up(self, name: str, written: Written, /) -> None:
        if written is not None:
            # Not what others have put there since.
            with contextlib.suppress(OSError):
                written.remove(self.root, name)

    async def remember(self, names: Sequence[str]) -> None:
        self.remember_late(names)

    def remember_late(self, names: Sequence[str]) -> None:
        if (directory := self._books.directory) is not None:
            directory.remember(names)

    def noted(self, name: str) -> tuple[int, int] | None:
        return _files.noted(self._path(name))

    def whole_size(self, name: str) -> int | None:
        noted, size = self.noted(name), self.size(name)
        return size if noted is not None and noted[0] == size else None

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self._path(name)).st_size
        except OSError:
            return None

    def delete_now(self, names: Sequence[str]) -> Outcome:
        return [self._remove(name) for name in names]

    def _remove(self, name: str) -> Exception | None:
        try:
            _files.remove_below(self.root, name)
        except OSError as error:
            return error
        except ValueError:
            return None  # A name that no file can have.
        return None


def ports(store: Store, books: Books) -> tuple[Port, Port]:
    """The two faces of a cache store: for event loops, and for threads without one."""
    if type(store) is MemoryStore:
        port = MemoryPort(store)
        return port, port
    if type(store) is LocalStore:
        blocking = LocalSyncPort(store, books)
        return LocalPort(blocking), blocking
    return StorePort(store), SyncPort(store)
