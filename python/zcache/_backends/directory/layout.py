"""What zcache keeps in a cache directory beside the values, and which source the directory belongs to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar, Final

from zcache._backends.access import Access
from zcache._backends.directory import files
from zcache._backends.directory.scan import Scanner
from zcache._backends.directory.space import SpaceLog
from zcache._backends.directory.stamp import Stamp
from zcache._backends.directory.temporary import TemporaryFiles, remove_unfinished_folders
from zcache._backends.ownership import Kind, other_source
from zcache._core import Index, make_folder, make_way, open_own
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from zcache._core import SegmentFiles

logger = logging.getLogger("zcache")

BLOCK_SIZE: int | None = None
"""Bytes of a block of all cache directories, or 1 to count bytes; None asks the volume of each."""
_TICK: Final = 0.001
"""Seconds; file systems do not tell shorter times apart."""


class Layout:
    """The folders of a cache directory, its stamp, and the files of its index.

    Parameters
    ----------
    root : path
        The directory.
    source : str or None
        Name of the source; None for a directory of which nothing is used.

    Attributes
    ----------
    digest : bytes
        Short name of the source, as it is recorded with each value.
    scanner : Scanner
        Finds the values, whether or not the index knows them.
    temporary : TemporaryFiles
        The unfinished files.
    space_log : SpaceLog
        Says once that the volume is full.
    stamp : Stamp
        Says which source the directory belongs to; there once it is claimed.
    is_others : bool
        Whether it is, by now, the cache of another source.
    access : Access
        What may be done with its values; see `set_access`.
    has_own_index : bool
        Whether this process fills it with an index of its own, for it cannot be shared.
    folds_names : bool
        Whether names that differ in case are one file.
    mode : int
        Permissions of a directory that is made.
    """

    stamp: Stamp
    kind: ClassVar[Kind] = Kind.DIRECTORY
    """What the stamp says it is."""

    def __init__(self, root: os.PathLike[str] | str, source: str | None) -> None:
        # Without links, which are not followed below it.
        self.root = os.path.realpath(root)
        self.reserved = os.path.join(self.root, ".zcache")
        self.index_root = os.path.join(self.reserved, "index")
        self.lock_path = os.path.join(self.index_root, "lock")
        self._name(source)
        self.scanner = Scanner(self.root, self.reserved, self.digest)
        self.temporary = TemporaryFiles(self.reserved, self.index_root)
        self.space_log = SpaceLog(self.root)
        self.is_others = False
        self.access = Access.FILLS
        self.has_own_index = self.folds_names = False
        self._is_claimed = False
        # The process from which this one was forked, where the directory is of the source that this was there.
        self._parent: int | None = None
        self._is_silent = False
        self.mode = 0o700
        self._block_size = 1

    def _name(self, source: str | None) -> None:
        self.source = source
        self.digest = hashlib.sha256((source or "").encode(errors="surrogatepass")).digest()[:8]

    def rename(self, source: str) -> None:
        """Be of the same source under another name, which it has in a forked child: what is there is its parent's."""
        if self.source is None:
            return
        self._name(source)
        self.scanner.source = self.digest
        self._parent = os.getppid()
        if self._is_claimed:
            self.stamp.source, self.stamp.is_foreign = source, True

    def check_parent(self) -> None:
        """See that it is not in use by the process from which this one was forked; its many children need no lock for that.

        Raises
        ------
        InUseError
            If it may be, for another source.
        """
        if self._parent == os.getppid() and self._is_claimed and self.stamp.is_foreign:
            raise self.stamp.in_use()

    def claim(self, *, adopt: bool) -> None:
        """See which source owns the directory, make what is missing of it, and see what its volume is like.

        Raises
        ------
        CacheOwnershipError
            If it belongs to another source or user.
        OSError
            If it cannot be used.
        """
        self.stamp = Stamp(
            self.root,
            self.reserved,
            self.source or "",
            adopt=adopt,
            kind=self.kind,
            mode=self.mode,
        )
        self._is_claimed = True
        self.make_folders()
        self.note_block_size()
        self.folds_names = self.scanner.folds_names = files.folds_names(self.temporary.path)

    @property
    def segment_files(self) -> SegmentFiles | None:
        """Where values are appended; None where each is a file."""
        return None

    def set_access(self, access: Access) -> None:
        """Have this be done with its values and no more; who looks for them removes none unless some may be added."""
        self.access = access
        self.scanner.only_looks = access is not Access.FILLS

    def note_block_size(self, *, only_looks: bool = False) -> None:
        """See in what the volume gives out space; where `only_looks`, by nothing that is written to it.

        Raises
        ------
        OSError
            If it does not tell.
        """
        unit = BLOCK_SIZE
        if unit is None and only_looks:
            unit = os.statvfs(self.root).f_frsize
        elif unit is None:
            try:
                unit = files.block_size(self.temporary.path)
            except OSError:
                # A volume that is full, say, or read-only.
                unit = os.statvfs(self.root).f_frsize
        self._block_size = unit

    def is_of_source(self) -> bool:
        """Whether the directory is a cache of the source by now; it stays as it is, also where there is none.

        Raises
        ------
        CacheOwnershipError
            If it belongs to another source.
        """
        owner = Stamp.source_of(self.root, self.kind)
        if owner is not None and owner != self.source:
            where = f"directory {self.root}"
            raise CacheOwnershipError(other_source(where, owner, self.source or ""))
        return owner is not None

    def check(self) -> None:
        """See once more which source owns the directory: others may have taken it over or removed it.

        Raises
        ------
        CacheOwnershipError
            If it belongs to another source or user.
        OSError
            If it cannot be used.
        """
        self.stamp.check(adopt=False)
        self.make_folders()

    def make_folders(self) -> None:
        """Make what is missing of the folders, and remove those that could not be finished before."""
        self.stamp.make_folder()
        for folder in (self.index_root, self.temporary.path):
            make_folder(folder)
        remove_unfinished_folders(self.root)

    def note_doubt(self) -> None:
        """Have the next scan take in only what is recorded to be the source's, where all else is gone."""
        if self.stamp.is_doubtful:
            self.scanner.strict = True
            self.stamp.is_doubtful = False

    def note_owner(self, failure: Exception) -> None:
        """Note whether the directory is the cache of another source, which is left alone."""
        stamp = os.path.join(self.reserved, "stamp.json")
        self.is_others = isinstance(failure, CacheOwnershipError) and os.path.lexists(stamp)

    def is_empty(self) -> bool:
        """Whether there are no values."""
        ranges = os.path.join(self.reserved, "ranges")
        return os.listdir(self.root) == [".zcache"] and not os.path.exists(ranges)

    # ------------------------------------------------------------ the index

    def own_limits(self) -> dict[str, Any]:
        """Limits of the index that come from the volume: it counts in blocks."""
        return {"unit": self._block_size}

    def open_index(self, limits: dict[str, Any], until: float) -> tuple[Index, bool]:
        """Open the index, and say whether it is new.

        Raises
        ------
        IndexBusyError
            If another process holds its lock at the time `until`, on the clock of `time.monotonic`.
        OSError
            If it cannot be used.
        """
        patience = max(0.0, until - time.monotonic())
        return Index.open(self.index_root, seed=new_seed(), timeout=patience, **limits)

    def tell_others(self) -> None:
        """Say that the source is changed by a process that does not share the index.

        A process that finds another time of the lock file than the last one, in a step of the index or in a
        commit to an index of its own, ends all reads of the source that have begun before: what they bring
        is not cached.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        lock = self.lock_path
        try:
            if self.access is not Access.READS:
                with contextlib.suppress(OSError):
                    make_way(lock)
            before = os.lstat(lock).st_mtime_ns
            try:
                now = time.time_ns()
                os.utime(lock, ns=(now, now), follow_symlinks=False)
            except PermissionError:
                # It is another user's, who lets us write: then it can be set to the time of now only.
                os.utime(lock, follow_symlinks=False)
                while os.lstat(lock).st_mtime_ns == before:
                    time.sleep(_TICK)
                    os.utime(lock, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            # A process that shares an index makes it anew, and begins with what is there then.
            if self.has_own_index:
                self.make_folders()
                os.close(open_own(lock, os.O_RDWR))
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            # Who cannot write to it either serves what is there already, and takes nothing in.
            self._say_silent()

    def _say_silent(self) -> None:
        if not self._is_silent:
            self._is_silent = True
            logger.warning(
                "the cache directory %s is on a volume that is mounted read-only here, so no other process is told that "
                "this one changes the source, until it can be written to. One that can write to it, through another mount, "
                "may cache what it has read before such a change, and serve that: have it clear its cache, or write "
                "where the volume is writable.",
                self.root,
            )


def new_seed() -> int:
    """A number that cannot be guessed, for the hashes of an index."""
    return int.from_bytes(os.urandom(8), "little")
