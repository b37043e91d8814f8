"""The errors of zcache. Each one is also the builtin error that callers already catch."""

from __future__ import annotations

from zcache._runtime.printable import printable

__all__ = [
    "CacheOwnershipError",
    "CacheUnreachableError",
    "IndexLockTimeout",
    "IndexRebuildTimeout",
    "MissingClientError",
    "NoSuchSourceError",
    "OfflineError",
    "OptionTypeError",
    "OptionValueError",
    "RecordingError",
    "RecordingExistsError",
    "SyncNotSupportedError",
    "UsageError",
    "ZcacheError",
]


class ZcacheError(Exception):
    """Base of all errors that zcache raises itself. Errors of the source are passed on as they are."""

    def __str__(self) -> str:
        return printable(super().__str__())


class IndexLockTimeout(ZcacheError, TimeoutError):  # noqa: N818 - named like the builtin that it is
    """Another process holds the lock of the index, and does not release it."""


class IndexRebuildTimeout(ZcacheError, TimeoutError):  # noqa: N818 - the same
    """The index is being rebuilt, so it does not know all cached values yet."""


class OptionTypeError(ZcacheError, TypeError):
    """An option has the wrong type."""


class OptionValueError(ZcacheError, ValueError):
    """An option has a value without a meaning."""


class NoSuchSourceError(OptionValueError, FileNotFoundError):
    """There is nothing at the path that is to be opened."""


class MissingClientError(ZcacheError, ImportError):
    """A package is not installed: a client that can open a URL, or matplotlib."""


class CacheOwnershipError(ZcacheError, ValueError):
    """The cache store holds what zcache did not write, or the cache of another source."""


class CacheUnreachableError(ZcacheError, OSError):
    """The cache cannot be used, and the processes that can use it cannot be told that a key is written."""


class OfflineError(ZcacheError, OSError):
    """Only the source could answer, and it is not asked: the store is offline."""


class SyncNotSupportedError(ZcacheError, TypeError):
    """A synchronous method was called, but one of the stores has none."""


class RecordingError(ZcacheError, ValueError):
    """A file of recorded requests is damaged, or is no recording."""


class RecordingExistsError(ZcacheError, FileExistsError):
    """There is a file already where requests are to be recorded."""


class UsageError(ZcacheError, RuntimeError):
    """A method was called where it cannot do its work, such as one that waits in the event loop that it waits for."""
