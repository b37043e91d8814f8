"""What stands for a pool where a cache store is asked for. Nothing is read from it or written to it as a store."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

from zarr.storage import LocalStore, MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from zcache._backends.pool.options import PoolOptions


MEMORY: Final = "memory"
"""The token of the pool in memory that each process has one of by itself."""


class PoolStore(LocalStore):
    """A pool in a directory.

    Parameters
    ----------
    root : path
        The directory, from the root on: the folder of the process may be another one later.
    options : PoolOptions
        What the pool was opened with.
    read_only : bool, optional
        Whether it is only read from. Default is False.

    Attributes
    ----------
    pool : Pool or None
        The pool that was opened for it, wherever its path leads later.
    policy : object
        By which it holds that pool to its policy, as long as it lives.
    has_come : bool
        Whether it has come in a pickle.
    """

    def __init__(self, root: Path | str, options: PoolOptions, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.options = options
        self.pool: Any = None
        self.policy: object = None
        self.has_come = False

    def __repr__(self) -> str:
        return f"CachePool({str(self.root)!r})"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (str(self.root), self.options, self.read_only)


class PoolMemoryStore(MemoryStore):
    """A pool in memory. It is pickled without its values: in each process all that comes of it is one pool.

    Parameters
    ----------
    options : PoolOptions
        What the pool was opened with.
    token : str, optional
        Names the pool, in each process. Default is None: a new one.
    has_come : bool, optional
        Whether it has come in a pickle. Default is False.
    """

    def __init__(
        self, options: PoolOptions, token: str | None = None, *, has_come: bool = False
    ) -> None:
        super().__init__()
        self.options = options
        self.token = token or uuid.uuid4().hex
        self.pool: Any = None
        self.policy: object = None
        self.has_come = has_come

    def __repr__(self) -> str:
        return "CachePool()"

    __str__ = __repr__

    def __reduce__(self) -> tuple[Any, ...]:
        return _memory_again, (self.options, self.token)

    def emptied(self) -> PoolMemoryStore:
        """Itself: its values are in no pickle, and a copy in its own process is over the same pool."""
        return self


def _again(root: str, options: PoolOptions, read_only: bool) -> PoolStore:
    store = PoolStore(root, options, read_only=read_only)
    store.has_come = True
    return store


def _memory_again(options: PoolOptions, token: str) -> PoolMemoryStore:
    return PoolMemoryStore(options, token, has_come=True)
