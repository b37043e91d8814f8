"""One source of a pool, as its backends share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from zcache._backends.pool.handle import PoolLimits, SourceHandle
from zcache._backends.pool.register import label_of
from zcache._index.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.directory.filler import DirectoryFiller
    from zcache._backends.listings import Listings
    from zcache._backends.pool.directory import PoolDirectory
    from zcache._core import SegmentFiles
    from zcache._index.handle import IndexHandle


class SharedPool(PoolLimits, Protocol):
    """What a source needs of its pool."""

    handle: IndexHandle
    directory: PoolDirectory | None

    def wait_for_bound(self) -> None:
        """Wait until what is above the bound is evicted, some seconds at most."""

    def is_same(self, other: SharedPool) -> bool:
        """Whether another one is over the same directory."""

    def rename(self, label: str, name: str) -> None:
        """Know the source with this label by another name, which it has in a forked child."""

    def after_fork(self) -> None:
        """Start over in a forked child, once for all sources."""


class PoolSource(Place):
    """What the backends of one source of a pool share beside its view of the index.

    Attributes
    ----------
    handle : SourceHandle
        The index as the source sees it.
    clock : callable
        Seconds; what ages are counted by.
    max_pending_size, min_free_space : int or None
        What its stores ask for; see `limit_fills`.
    listings : Listings
        Answers of the source to `list_dir`.
    """

    listings: Listings

    def __init__(
        self, pool: SharedPool, name: str, limits: dict[str, Any], clock: Callable[[], float]
    ) -> None:
        self.pool = pool
        self.max_pending_size: int | None = None
        self.min_free_space: int | None = None
        self.clock = clock
        self.label = label_of(name)
        self.handle = SourceHandle(pool.handle, self.label, dict(limits), pool)
        directory = pool.directory
        if directory is None:
            return
        self._directory = directory
        self.scanner = _SourceScanner(directory, self.label)

    @property
    def root(self) -> str:
        """The directory of the pool."""
        return str(self._directory.root)

    @property
    def layout(self) -> Any:
        """What is kept in it."""
        return self._directory.layout

    @property
    def recovery(self) -> Any:
        """Brings its index back into use."""
        return self._directory.recovery

    @property
    def files(self) -> SegmentFiles:
        """Its segments."""
        found: SegmentFiles = self._directory.layout.scanner.files
        return found

    def wait_for_bound(self) -> None:
        # docstring inherited
        self.pool.wait_for_bound()

    @property
    def filler(self) -> DirectoryFiller:
        """That of the pool."""
        return self._directory.filler

    @property
    def fills(self) -> Any:
        """The queue of the pool; None in memory."""
        directory = self.pool.directory
        return None if directory is None else directory.fills

    @fills.setter
    def fills(self, queue: Any) -> None:
        self._directory.fills = queue

    def limit_fills(self, max_pending_size: int | None, min_free_space: int | None) -> None:
        # docstring inherited. The pool looks at those of all its sources when it is told of their limits.
        self.max_pending_size, self.min_free_space = max_pending_size, min_free_space

    @property
    def private_index(self) -> Any:
        """Serves it where it is only read from."""
        return self._directory.private_index

    def note_change(self, prefix: str) -> None:
        """Note that this process changes the source at and below a prefix."""
        self._directory.note_change(f"{self.label}/{prefix}".rstrip("/"))

    def note_deletes(self, emptied: bool) -> None:
        """Do what is due once the index has heard of deletes; see `CacheDirectory`."""
        self._directory.note_deletes(emptied)

    def rename(self, name: str) -> None:
        # docstring inherited. In memory all of the pool is the child's own.
        if self.pool.directory is None:
            return
        before, self.label = self.label, label_of(name)
        self.pool.rename(before, name)
        self.handle.label = self.scanner.label = self.label

    def after_fork(self) -> None:
        # docstring inherited
        self.pool.after_fork()


class _SourceScanner:
    """Finds the values of one source of a pool, whether or not the index knows them."""

    def __init__(self, directory: PoolDirectory, label: str) -> None:
        self._scanner = directory.layout.scanner
        self.label = label

    @property
    def progress(self) -> int:
        return int(self._scanner.progress)

    def _whole(self, prefix: str) -> str:
        return f"{self.label}/{prefix}".rstrip("/")

    def remove_below(self, prefix: str) -> None:
        self._scanner.remove_below(self._whole(prefix))

    def names_below(self, prefix: str) -> Any:
        return self._scanner.names_below(self._whole(prefix))

    def add_tombstones(self, names: Any) -> None:
        self._scanner.add_tombstones(names)
