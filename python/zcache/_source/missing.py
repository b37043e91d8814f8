"""What a source raises for a key that it does not have, to be raised again without asking it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, NoReturn

import zarr.storage
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

from zcache._source.location import innermost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import BufferPrototype

_OWN_WORDS: Final = (FsspecStore, ObjectStore)
"""Stores that pass on what another library says."""
_NONE_IN_MANY: Final[tuple[type, ...]] = (
    FsspecStore,
    MemoryStore,
    # zarr 3.1 has none.
    getattr(zarr.storage, "ManagedMemoryStore", MemoryStore),
    ZipStore,
)
"""Stores that give None for a missing key among many, ..."""
_READS: Final = ("get", "get_partial_values", "_get")
"""... by these methods. Another one of a subclass may do anything."""
_GONE: Final = (404, 410)
"""Answers of HTTP that there is no such key."""


class _Nothing:
    """A source that has no keys: what zarr's methods make of that is what they raise for a missing key."""

    async def get(self, *_: Any, **__: Any) -> None:
        """Find nothing."""

    def get_sync(self, *_: Any, **__: Any) -> None:
        """Find nothing."""


_nothing: Final[Any] = _Nothing()


class MissingKeyErrors:
    """What one source raises for the size of a missing key, once it has said so itself."""

    def __init__(self) -> None:
        # A key, and what the source has raised for it.
        self._seen: tuple[str, FileNotFoundError] | None = None

    async def getsize(self, source: Store, key: str) -> int:
        """Do what a source does for the size of a key that `get` does not find: raise, in general.

        Only a `LocalStore` is asked each time, for it has a size for what `get` does not find, a directory;
        and what passes on the words of another library is asked once.

        Raises
        ------
        FileNotFoundError
            As the source raises it.
        """
        kept = innermost(source)
        if isinstance(kept, LocalStore):
            size = await source.getsize(key)
            if not await source.exists(key):
                return size
            # It was made meanwhile, and is seen later, as by `get`.
            path = str(kept.root / key)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(kept, _OWN_WORDS):
            if self._seen is not None:
                raise _for_key(*self._seen, key)
            try:
                await source.getsize(key)
            except FileNotFoundError as error:
                self._seen = key, _for_key(key, error, key)
                raise
        raise FileNotFoundError(key)


def finds_none_in_many(source: Store) -> bool:
    """Whether it is known that `get_partial_values` gives None for a missing key, as `get` does: others raise."""
    kept = innermost(source)
    kind = type(kept)
    base: Any = next((base for base in kind.__mro__ if base in _NONE_IN_MANY), None)
    return base is not None and not any(
        name in vars(kept) or getattr(kind, name, None) is not getattr(base, name, None)
        for name in _READS
    )


def _for_key(seen: str, error: FileNotFoundError, key: str) -> FileNotFoundError:
    """The same error about another key."""

    def other(value: object) -> object:
        return value.replace(seen, key) if isinstance(value, str) else value

    again = type(error)(*map(other, error.args))
    for name in ("filename", "filename2"):
        if (value := getattr(error, name, None)) is not None:
            setattr(again, name, other(value))
    return again


async def raise_for_ranges(
    key: str, byte_ranges: Sequence[ByteRequest | None], prototype: BufferPrototype, *, sync: bool
) -> NoReturn:
    """Raise what zarr's `get_ranges`, or `get_ranges_sync`, raises for ranges of a missing key.

    Raises
    ------
    BaseExceptionGroup
        Always; holds a `FileNotFoundError`.
    """
    store: Any = Store
    if sync and hasattr(store, "get_ranges_sync"):
        store.get_ranges_sync(_nothing, key, byte_ranges, prototype=prototype)
    elif not sync and hasattr(store, "get_ranges"):
        async for _ in store.get_ranges(_nothing, key, byte_ranges, prototype=prototype):
            pass
    # zarr before 3.3 has neither.
    missing = FileNotFoundError(key)
    raise BaseExceptionGroup("a range of a missing key was asked for", [missing])


def says_missing(error: BaseException) -> bool:
    """Whether all that went wrong is that there is no such key."""
    if isinstance(error, BaseExceptionGroup):
        return all(says_missing(one) for one in error.exceptions)
    if not isinstance(error, FileNotFoundError):
        return False
    # fsspec over HTTP raises one for whatever keeps it from the size, and says what that was.
    cause = error.__cause__
    return cause is None or not _is_failure(cause)


def _is_failure(cause: BaseException) -> bool:
    """Whether a source did not get to the answer that there is no such key, as its library tells it."""
    status = getattr(cause, "status", None)
    if isinstance(status, int) and status:
        return status not in _GONE
    if isinstance(cause, FileNotFoundError):
        return not says_missing(cause)
    if isinstance(cause, (IsADirectoryError, NotADirectoryError)):
        return False
    modules = {kind.__module__ for kind in type(cause).__mro__}
    return isinstance(cause, OSError) or "aiohttp.client_exceptions" in modules
