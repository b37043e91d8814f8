"""The stamp of a cache directory: it says that the directory is zcache's, of which format and source.

A purge takes the oldest files first, and the stamp is one of them. So there is a copy beside the index,
each value has a note of its source, and each process that uses the directory puts back what has gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zcache._backends.directory import files
from zcache._backends.ownership import (
    Kind,
    is_stamp,
    is_trusted,
    not_ours,
    other_source,
    other_user,
    parse_stamp,
    stamp_text,
    trust,
)
from zcache._core import IndexBusyError, make_folder, make_way, open_own
from zcache._source.identity import EPHEMERAL
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK_AGAIN: Final = 0.02
"""Seconds between two looks."""
_YOUNG: Final = 3600.0
"""Seconds after which the stamp of a directory in use gets a new time: purges go by that."""
_LARGEST: Final = 65536
"""Bytes of a stamp at most."""
_FOLDERS: Final = ("index", "tmp", "ranges", "dropped")
"""Folders of zcache's own below ``.zcache``."""

logger = logging.getLogger("zcache")


class InUseError(CacheOwnershipError):
    """The directory is in use for another source that ends with its process."""


class Stamp:
    """Which source owns a directory.

    Parameters
    ----------
    root : str
        The directory; made if it is missing.
    reserved : str
        The folder ``.zcache`` in it.
    source : str
        Name of the source.
    adopt : bool
        Whether to take over what is there already.
    kind : Kind, optional
        What it is. Default is a directory of files.
    mode : int, optional
        Permissions of the directory, if it is made. Where its group may write, and is one of this user's, others of the group
        are trusted: else only where it is adopted. Default is 0o700.

    Attributes
    ----------
    paths : tuple of str
        Where it is kept.
    is_foreign : bool
        Whether it still belongs to a source that ended with its process.
    is_doubtful : bool
        Whether nothing but the notes beside its values says which source they have.
    has_adopted : bool
        Whether it has signed files that the index may not list.

    Raises
    ------
    CacheOwnershipError
        If it belongs to another source, or holds what zcache did not write.
    OSError
        If it cannot be used.
    """

    def __init__(
        self,
        root: str,
        reserved: str,
        source: str,
        *,
        adopt: bool,
        kind: Kind = Kind.DIRECTORY,
        mode: int = 0o700,
    ) -> None:
        self.root = root
        self._kind = kind
        self._reserved = reserved
        self._path = os.path.join(reserved, "stamp.json")
        self._copy = os.path.join(reserved, "index", "stamp.json")
        self.paths = self._path, self._copy
        self._identity: tuple[int, int] | None = None
        self.is_doubtful = self.has_adopted = False
        if adopt:
            # Also when it is used again later.
            trust(root)
        self._mode = mode
        self.source = source
        self.is_foreign = False
        self.check(adopt=adopt)

    @staticmethod
    def source_of(root: str, kind: Kind = Kind.DIRECTORY) -> str | None:
        """Name of the source of a cache directory, which stays as it is; None where that is unknown."""
        reserved = os.path.join(root, ".zcache")
        for path in (
            os.path.join(reserved, "stamp.json"),
            os.path.join(reserved, "index/stamp.json"),
        ):
            try:
                text = _read_small(path)
            except OSError:
                continue
            if text is not None and is_stamp(text):
                where = f"directory {root}"
                return parse_stamp(text, where, adopt=False, listed=False, kind=kind)
        return None

    def check(self, *, adopt: bool) -> None:
        """Make the directory if it is missing, and see which source owns it."""
        check_above(self.root)
        if not os.path.isdir(self.root):
            files.make_folders(os.path.dirname(self.root))
        make_folder(self.root, self._mode)
        self._check_owner()
        for folder in (self._reserved, *(os.path.join(self._reserved, name) for name in _FOLDERS)):
            if os.path.islink(folder):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), folder)
        for path in self.paths:
            with contextlib.suppress(OSError):
                make_way(path)
        owner = self._read(adopt)
        if owner is None:
            owner = self._claim(adopt)
        elif adopt and owner == self.source:
            self.has_adopted = self._adopt()
        # What a source has left that ended with its process is of no use to any other.
        self.is_foreign = owner != self.source
        if self.is_foreign and not owner.startswith(EPHEMERAL):
            raise CacheOwnershipError(other_source(f"directory {self.root}", owner, self.source))
        self._identity = files.identity(self.root)
        self._keep_copy(owner)
        # What zcache keeps there may have been made by another user meanwhile.
        self._check_owner()

    def keep(self) -> None:
        """Put back, in a directory in use, what a purge has taken of the stamp; and keep it young.

        Raises
        ------
        OSError
            If the file system refuses.
        """
        if self.is_foreign or files.identity(self.root) != self._identity:
            return
        now = time.time()
        try:
            make_way(self._path)
            status = os.lstat(self._path)
        except FileNotFoundError:
            self._write(self.source, replace=False)
            return
        if status.st_mtime < now - _YOUNG:
            for path in self.paths:
                with contextlib.suppress(OSError):
                    os.utime(path, follow_symlinks=False)

    def make_folder(self) -> None:
        """Make the folder ``.zcache`` if it is missing."""
        make_folder(self._reserved, group_writes=self.is_of_group())

    def is_of_group(self) -> bool:
        """Whether the group of the directory is one of this user's, who has asked that it may write."""
        return bool(self._mode & stat.S_IWGRP) and os.stat(self.root).st_gid in _groups()

    def _check_owner(self) -> None:
        """Refuse a directory of another user, who may change what is cached in it; one given as read-only has no stamp here.

        In a directory that all may write, what zcache keeps can be another user's than the directory itself.
        """
        if is_trusted(self.root):
            return
        root = os.stat(self.root)
        # In a set-gid directory that all may write, the group of what is there does not tell of which group its owner is.
        tells_group = not (root.st_mode & stat.S_ISGID and root.st_mode & stat.S_IWOTH)
        for folder in (self.root, self._reserved):
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(folder)
                if found.st_uid in (os.geteuid(), 0):
                    continue
                is_of_group = found.st_gid == root.st_gid and self.is_of_group()
                if is_of_group and (folder == self.root or tells_group):
                    continue
                if found.st_uid != _user_of_files(folder):
                    raise CacheOwnershipError(other_user(folder, found.st_uid, self._kind))

    def _read(self, adopt: bool) -> str | None:
        """The source by the stamp, or by its copy where that is all there is; None where there is neither."""
        where = f"directory {self.root}"
        text = _read_small(self._path)
        if text is None or not is_stamp(text):
            copy = _read_small(self._copy)
            if copy is not None and is_stamp(copy):
                owner = parse_stamp(copy, where, adopt=adopt, listed=False, kind=self._kind)
                if owner is not None:
                    with contextlib.suppress(OSError):
                        self._write(owner, replace=text is not None)
                return owner
        if text is None:
            return None
        owner = parse_stamp(text, where, adopt=adopt, listed=False, kind=self._kind)
        if owner is None:
            os.unlink(self._path)
        return owner

    def _claim(self, adopt: bool) -> str:
        was_cache = os.path.lexists(self._reserved)
        ours, foreign = self._survey()
        if adopt:
            self.has_adopted = self._adopt()
        elif foreign is not None and not (ours and was_cache):
            if (owner := self._read(adopt)) is not None:
                return owner  # Another process was first, and these are its values.
            where = f"directory {self.root}"
            raise CacheOwnershipError(not_ours(where, foreign, self.source, self._kind))
        elif ours:
            logger.warning(
                "the stamp of the cache directory %s has gone, so what it holds is taken in again as far as "
                "it is noted to be of this source; the rest of what zcache wrote is removed.",
                self.root,
            )
            self.is_doubtful = True
            # What it lists may be another source's.
            _remove_files(os.path.join(self._reserved, "index"))
        self.make_folder()
        # In another user's, nothing is left behind.
        self._check_owner()
        return self._write(self.source, replace=False)

    def _survey(self) -> tuple[bool, str | None]:
        """Whether there are values of zcache's, and the name of something else that is there, if any."""
        ours, foreign = False, None
        reserved = os.path.join(self._reserved, "ranges")
        for top in (self.root, reserved):
            for directory, folders, names in os.walk(top):
                if directory == self.root:
                    folders[:] = [
                        name
                        for name in folders
                        if name != ".zcache" and not files.is_tolerated(name)
                    ]
                for name in names:
                    if files.is_tolerated(name):
                        continue
                    path = os.path.join(directory, name)
                    try:
                        is_ours = files.owner(path) != "foreign"
                    except OSError:
                        continue
                    if is_ours:
                        ours = True
                    else:
                        foreign = foreign or os.path.relpath(path, self.root)
                if ours and foreign:
                    return ours, foreign
        return ours, foreign

    def _write(self, source: str, *, replace: bool) -> str:
        """Stamp the directory with a source; returns that, or the one of a process that was first."""
        self.make_folder()
        unfinished = f"{self._path}.{uuid.uuid4().hex}"
        with open(open_own(unfinished, os.O_WRONLY), "w", encoding="utf-8") as file:
            file.write(stamp_text(self._kind, source))
            file.flush()
            # Once per directory: an empty stamp after a loss of power would lock its owner out.
            os.fsync(file.fileno())
        if replace:
            # It must not outlive a stamp of another source.
            self._remove_copy()
            os.replace(unfinished, self._path)
        else:
            try:
                _link(unfinished, self._path)
            except FileExistsError:
                # Another process was first; its stamp counts.
                owner = self._read(adopt=False)
                return source if owner is None else owner
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(unfinished)
            # A process that is not the first must leave the copy of the first: this one belonged to no stamp.
            self._remove_copy()
        self._keep_copy(source)
        return source

    def _remove_copy(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._copy)

    def _keep_copy(self, source: str) -> None:
        """Have a copy of the stamp beside the index that can be read, where that can be."""
        with contextlib.suppress(OSError):
            copy = _read_small(self._copy)
            if copy is not None and is_stamp(copy):
                return
            make_folder(os.path.dirname(self._copy))
            unfinished = f"{self._copy}.{uuid.uuid4().hex}"
            with open(open_own(unfinished, os.O_WRONLY), "w", encoding="utf-8") as file:
                file.write(stamp_text(self._kind, source))
            os.replace(unfinished, self._copy)

    def _adopt(self) -> bool:
        """Sign all files; returns whether any was not signed before."""
        signed = False
        below = [
            directory
            for directory, names, _ in os.walk(self.root)
            if ".zcache" in names and directory != self.root
        ]
        if below:
            raise CacheOwnershipError(
                f"the directory {self.root} holds another cache directory, {below[0]}; its values would "
                "become those of this one. Give a directory that holds none, or remove it."
            )
        for directory, folders, names_of_files in os.walk(self.root):
            if directory == self.root and ".zcache" in folders:
                folders.remove(".zcache")
            # What is mounted there is no part of the cache.
            folders[:] = [
                name
                for name in folders
                if not (files.is_tolerated(name) or os.path.ismount(os.path.join(directory, name)))
            ]
            for name in names_of_files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if files.is_tolerated(name) or not stat.S_ISREG(status.st_mode):
                    continue
                owner = files.owner(path)
                relative = os.path.relpath(path, self.root)
                if owner == "pending":
                    # Never committed, so it may not be valid.
                    files.remove_value(self.root, relative)
                elif not files.is_signed(status):
                    files.sign(self.root, relative, status)
                    signed = True
        return signed

    def take_over(self) -> None:
        """Begin to make the directory the current source's, which no other process uses. To be emptied, then `restamp`ed."""
        # Of no source meanwhile: a process that dies half way must not leave one source's values to another.
        self._write(f"{EPHEMERAL}{uuid.uuid4().hex}", replace=True)

    def in_use(self) -> InUseError:
        """The error where the source that it belongs to may still be in use."""
        return InUseError(
            f"the cache directory {self.root} is in use for another source that has no name "
            "outside its process (such as a MemoryStore). Give another directory, or pass the "
            "same source_id= to both if they are the same data."
        )

    @contextlib.contextmanager
    def one_at_a_time(self, until: float) -> Iterator[None]:
        """Let only one process at a time take the directory over.

        Raises
        ------
        IndexBusyError
            If another one is at it at the time `until`, on the clock of `time.monotonic`.
        """
        if not self.is_foreign:
            yield
            return
        path = os.path.join(self._reserved, "take-over")
        file = open_own(path, os.O_RDWR)
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise IndexBusyError("another process takes the directory over") from None
                    time.sleep(_LOOK_AGAIN)
                else:
                    break
            yield
        finally:
            # By name: a child that was forked meanwhile has the file open as well.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def restamp(self) -> None:
        """Make the directory the current source's, now that it is empty."""
        self._write(self.source, replace=True)
        self.is_foreign = False


def check_above(root: str) -> None:
    """Refuse a folder inside another cache: a rebuild of that would take in the values of this one.

    Raises
    ------
    CacheOwnershipError
        If it is inside one.
    """
    for above in Path(os.path.realpath(root)).parents:
        if os.path.lexists(above / ".zcache" / "stamp.json"):
            raise CacheOwnershipError(
                f"the cache directory {root} lies inside the cache directory {above}, which "
                "may serve and delete what is in it. Give one that lies elsewhere."
            )


def _read_small(path: str) -> bytes | None:
    """Contents of a regular file, empty for anything else; None where there is nothing."""
    try:
        # A pipe in its place must not block.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return b""
        return os.read(file, _LARGEST)
    finally:
        os.close(file)


def _groups() -> tuple[int, ...]:
    """The groups of this user."""
    return os.getegid(), *os.getgroups()


def _user_of_files(folder: str) -> int | None:
    """The owner of the files that this process makes in a folder: some servers give them to another user. None where it makes none."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None


def _link(path: str, to: str) -> None:
    """Give a file a second name, or move it there where the file system knows no links.

    Raises
    ------
    FileExistsError
        If the name is taken.
    """
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(to):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to) from None
        os.rename(path, to)


def _remove_files(folder: str) -> None:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
