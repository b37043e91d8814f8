"""Whether a source still has the same bytes: validators, such as the ETag of an object.

A validator is a text that changes whenever the bytes of a key change. A store class of a user's own takes
part with a method ``async def validator(self, key: str) -> str | None``: the validator of the bytes that a
`get` would return now; None where it cannot tell; `FileNotFoundError` where there is no such key. With
``def validator_sync(self, key)`` its synchronous reads do as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import stat
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import FsspecStore, LocalStore, ObjectStore

from zcache._source.location import kind_of, layers

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._runtime.io import IO

LONGEST: Final = 128
"""Bytes of a validator at most; of a longer one its digest is kept."""
_TRANSPARENT: Final = frozenset(
    {
        ("zarr.storage._wrapper", "WrapperStore"),
        ("zarr.storage._logging", "LoggingStore"),
        ("zarr.testing.store", "LatencyStore"),
    }
)
"""Wrappers that read what they wrap, and nothing else. Caches do not: their bytes may be older."""
_MISSING: Final = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What zarr takes for the answer that there is no such key."""


class Validators(ABC):
    """The validators of one source."""

    @abstractmethod
    async def current(self, io: IO, key: str) -> str | None:
        """The validator of the bytes that the source has now; None where it cannot tell.

        Raises
        ------
        FileNotFoundError
            If there is no such key.
        """

    async def read(
        self,
        key: str,  # noqa: ARG002
        prototype: BufferPrototype,  # noqa: ARG002
        request: ByteRequest | None,  # noqa: ARG002
    ) -> tuple[Buffer | None, str | None] | None:
        """Bytes and validator of one answer of the source; None where it gives no such answers."""
        return None


def validators_of(source: Store) -> Validators | None:
    """The validators of a source; None where it has none."""
    for layer in layers(source):
        kind: Any = type(layer)
        if callable(getattr(kind, "validator", None)):
            return _OfStore(layer)
        if kind is LocalStore:
            return _OfFiles(layer.root)
        if kind is ObjectStore:
            return _OfObjects(layer, is_whole=layer is source)
        if kind is FsspecStore:
            return _OfFilesystem(layer)
        if kind_of(layer) not in _TRANSPARENT:
            return None
    return None


class _OfStore(Validators):
    def __init__(self, store: Any) -> None:
        self._store = store

    async def current(self, io: IO, key: str) -> str | None:
        if io.loop() is not None:
            found = await self._store.validator(key)
        elif hasattr(self._store, "validator_sync"):
            found = self._store.validator_sync(key)
        else:
            return None
        return _text(found)


class _OfFiles(Validators):
    """Modification time, size and number of a file.

    A writer that replaces a file gives it another number. One that is rewritten in place, to the same size and within
    the same tick of the clock of its file system (some milliseconds), cannot be told from what it was.
    """

    def __init__(self, root: os.PathLike[str]) -> None:
        self._root = root

    async def current(self, io: IO, key: str) -> str | None:
        work = partial(_of_file, os.path.join(self._root, key))
        return work() if io.loop() is None else await asyncio.to_thread(work)


def _of_file(path: str) -> str:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(path)
    return f"modified {found.st_mtime_ns} size {found.st_size} inode {found.st_ino}"


class _OfObjects(Validators):
    """ETags of obstore. Its answers have them beside the bytes."""

    def __init__(self, store: Any, *, is_whole: bool) -> None:
        self._source = store
        self._store = store.store
        self._is_whole = is_whole

    async def current(self, io: IO, key: str) -> str | None:  # noqa: ARG002
        import obstore  # noqa: PLC0415 - there, if such a store is

        return _strong((await obstore.head_async(self._store, key)).get("e_tag"))

    async def read(
        self, key: str, prototype: BufferPrototype, request: ByteRequest | None
    ) -> tuple[Buffer | None, str | None] | None:
        import obstore  # noqa: PLC0415

        if not self._is_whole:
            return None
        options: Any = None
        count: int | None = None
        if isinstance(request, RangeByteRequest):
            options = {"range": (request.start, request.end)}
            count = request.end - request.start
        elif isinstance(request, OffsetByteRequest):
            options = {"range": {"offset": request.offset}}
        elif isinstance(request, SuffixByteRequest):
            options = {"range": {"suffix": request.suffix}}
            count = request.suffix
        answer: Any = None
        try:
            answer = await obstore.get_async(self._store, key, options=options)
            data: Any = await answer.bytes_async()
        except _MISSING:
            return None, None
        except Exception:
            if request is None:
                raise
            data = None  # The store itself says what it makes of the range.
        if data is None or count not in (None, len(data)):
            return await self._source.get(key, prototype, request), None
        return prototype.buffer.from_bytes(data), _strong(answer.meta.get("e_tag"))


class _OfFilesystem(Validators):
    """ETags of fsspec, else time and size."""

    def __init__(self, store: FsspecStore) -> None:
        self._fs: Any = store.fs
        self._path = store.path

    async def current(self, io: IO, key: str) -> str | None:  # noqa: ARG002
        path = (
            f"{self._path}/{key}".lstrip("/") if self._path in ("", "/") else f"{self._path}/{key}"
        )
        # What it remembers of a listing may be older.
        with contextlib.suppress(Exception):
            if getattr(self._fs, "dircache", None):
                self._fs.invalidate_cache(path)
        info = await self._fs._info(path)
        for name in ("ETag", "etag"):
            if isinstance(etag := info.get(name), str) and etag:
                return _strong(etag)
        size = info.get("size")
        for name in ("LastModified", "last_modified", "mtime"):
            if size is not None and (modified := info.get(name)):
                inode = f" inode {info['ino']}" if info.get("ino") else ""
                return _text(f"modified {modified!r} size {size}{inode}")
        return None


def _strong(etag: Any) -> str | None:
    """An ETag, if it is one of bytes: a weak one says only that two values mean the same."""
    if not isinstance(etag, str) or etag.startswith("W/"):
        return None
    return _text(etag)


def _text(validator: Any) -> str | None:
    if not isinstance(validator, str) or not validator:
        return None
    data = validator.encode(errors="surrogatepass")
    if len(data) > LONGEST or not validator.isprintable():
        return f"sha256 {hashlib.sha256(data).hexdigest()}"
    return validator
