"""A cache in a directory: a `LocalStore`, whose index is shared by all processes on it."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from zcache._backends.base import DELETE_TIMEOUT, READ_TIMEOUT, Backend
from zcache._backends.directory.files import read_value
from zcache._backends.directory.page_cache import PageCacheReader, is_supported
from zcache._core import Index, recorded_size_and_checksum, remove_files
from zcache._index.handle import ignore
from zcache._runtime.coroutines import NoAnswerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zarr.core.buffer import Buffer, BufferPrototype
    from zarr.storage import LocalStore

    from zcache._backends.base import Victim
    from zcache._backends.directory.index import CacheDirectory
    from zcache._index.shared import SharedIndex
    from zcache._runtime.io import IO


class DirectoryBackend(Backend):
    """Files below a directory, each under the name of its key.

    The directory is the one of the moment in which it was opened, whatever the working directory
    becomes.
    """

    def __init__(self, store: LocalStore, shared: SharedIndex) -> None:
        super().__init__(store, shared)
        self._directory: CacheDirectory = shared.place
        self._root = self._directory.root
        self._page_cache = PageCacheReader(self._root) if is_supported() else None
        self.try_read = self._page_cache
        self.filler = self._directory.filler

    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        path = os.path.join(self._root, name)
        return await io.in_thread(
            lambda: read_value(path, prototype, total, start, size), timeout=READ_TIMEOUT
        )

    async def turn(self, size: int) -> bool:
        return self._page_cache is not None and await self._page_cache.turn(size)

    async def remove(self, io: IO, victims: Sequence[Victim]) -> None:
        handle = self.shared.handle
        work = partial(remove_files, self._root, [name for _, name in victims])
        try:
            outcome = await io.in_thread(
                work, partial(self._removed_late, victims), timeout=DELETE_TIMEOUT
            )
        except NoAnswerError as error:
            # What is being deleted stays counted until that has ended.
            self.breaker.failed(error, "delete")
            return
        except Exception as error:  # noqa: BLE001 - no thread is left, say; the user did not ask for it
            outcome = [_as_os_error(error)] * len(victims)
        except BaseException:
            if io.loop() is None:  # Nothing goes on then, so it is not reported either.
                self.remove_later(victims)
            raise
        dropped, failed = self._sort(victims, outcome)
        await handle.call_shielded(io, ignore, Index.confirm_deletes, dropped, failed)
        if failed:
            names = _names(victims, failed)
            await io.in_thread(lambda: self._directory.scanner.bury(names), timeout=DELETE_TIMEOUT)

    def _removed_late(
        self, victims: Sequence[Victim], outcome: list[OSError | None] | BaseException
    ) -> None:
        if isinstance(outcome, BaseException):
            self.remove_later(victims)
            return
        dropped, failed = self._sort(victims, outcome)
        if failed:
            self._directory.scanner.bury(_names(victims, failed))
        self.shared.handle.call_later(ignore, Index.confirm_deletes, dropped, failed)

    def _sort(
        self, victims: Sequence[Victim], outcome: Sequence[OSError | None]
    ) -> tuple[list[int], list[int]]:
        dropped, failed = [], []
        for (cell, _), error in zip(victims, outcome, strict=True):
            if error is None:
                dropped.append(cell)
            else:
                failed.append(cell)
                self.breaker.failed(error, "delete")
        if not failed:
            self.breaker.succeeded("delete")
        return dropped, failed

    async def remove_unlisted(self, io: IO, prefix: str) -> None:
        scanner = self._directory.scanner
        try:
            await io.in_thread(lambda: scanner.remove_below(prefix))
        except (OSError, RuntimeError) as error:
            self.breaker.failed(error, "delete")

    def begin(self, io: IO) -> None:  # noqa: ARG002
        self._directory.reclaim_dead()

    def recorded_size_and_checksum(self, name: str) -> tuple[int, int] | None:
        return recorded_size_and_checksum(os.path.join(self._root, name))

    def intact_size(self, name: str) -> int | None:
        path = os.path.join(self._root, name)
        recorded = recorded_size_and_checksum(path)
        try:
            size = os.stat(path).st_size
        except OSError:
            return None
        return size if recorded is not None and recorded[0] == size else None


def _as_os_error(error: Exception) -> OSError:
    return error if isinstance(error, OSError) else OSError(str(error))


def _names(victims: Sequence[Victim], cells: Sequence[int]) -> list[str]:
    wanted = set(cells)
    return [name for cell, name in victims if cell in wanted]
