"""The stamp of a cache directory: it says that the directory is zcache's, of which format and source."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zcache._backends.directory import files
from zcache._backends.ownership import FORMAT, not_ours, other_source, parse_stamp
from zcache._source.identity import EPHEMERAL
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TAKE_OVER: Final = 60.0
"""Seconds that a process waits for another one that takes the directory over."""
_LOOK_AGAIN: Final = 0.02
"""Seconds between two looks."""


class InUseError(CacheOwnershipError):
    """The directory is in use for another source that ends with its process."""


class Stamp:
    """Whose a directory is.

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

    Attributes
    ----------
    is_foreign : bool
        Whether it still belongs to a source that ended with its process.

    Raises
    ------
    CacheOwnershipError
        If it belongs to another source, or holds what zcache did not write.
    OSError
        If it cannot be used.
    """

    def __init__(self, root: str, reserved: str, source: str, *, adopt: bool) -> None:
        self.root = root
        self._reserved = reserved
        self._path = os.path.join(reserved, "stamp.json")
        self.source = source
        self.is_foreign = False
        self.check(adopt=adopt)

    def check(self, *, adopt: bool) -> None:
        """Make the directory if it is missing, and see whose it is."""
        self._check_above()
        os.makedirs(self.root, exist_ok=True)
        stamp = self._read(adopt)
        if stamp is None:
            stamp = self._claim(adopt)
        # What a source has left that ended with its process is of no use to anybody.
        self.is_foreign = stamp["source"] != self.source
        if self.is_foreign and not str(stamp["source"]).startswith(EPHEMERAL):
            raise CacheOwnershipError(
                other_source(f"directory {self.root}", stamp["source"], self.source)
            )

    def _check_above(self) -> None:
        """Refuse a folder inside another cache, whose rebuild would take in the values of this one."""
        for above in Path(os.path.realpath(self.root)).parents:
            if os.path.lexists(above / ".zcache" / "stamp.json"):
                raise CacheOwnershipError(
                    f"the cache directory {self.root} lies inside the cache directory {above}, which "
                    "may serve and delete what is in it. Give one that lies elsewhere."
                )

    def _read(self, adopt: bool) -> dict[str, Any] | None:
        try:
            with open(self._path, "rb") as file:
                stamp = parse_stamp(
                    file.read(), f"directory {self.root}", adopt=adopt, listed=False
                )
        except FileNotFoundError:
            return None
        if stamp is None:
            os.unlink(self._path)
        return stamp

    def _claim(self, adopt: bool) -> dict[str, Any]:
        found = [name for name in os.listdir(self.root) if name != ".zcache"]
        with contextlib.suppress(FileNotFoundError):
            found += os.listdir(os.path.join(self._reserved, "ranges"))
        if found and not adopt:
            if (stamp := self._read(adopt)) is not None:
                return stamp  # Another process was first, and these are its values.
            raise CacheOwnershipError(not_ours(f"directory {self.root}", found[0], self.source))
        if found:
            self._adopt()
        return self._write(self.source, replace=False)

    def _write(self, source: str, *, replace: bool) -> dict[str, Any]:
        stamp = {"zcache": FORMAT, "source": source}
        os.makedirs(self._reserved, exist_ok=True)
        unfinished = f"{self._path}.{uuid.uuid4().hex}"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(stamp, file)
            file.flush()
            # Once per directory: an empty stamp after a loss of power would lock its owner out.
            os.fsync(file.fileno())
        if replace:
            os.replace(unfinished, self._path)
            return stamp
        try:
            os.link(unfinished, self._path)
        except FileExistsError:
            # Another process was first; its stamp counts.
            return self._read(adopt=False) or stamp
        finally:
            os.unlink(unfinished)
        return stamp

    def _adopt(self) -> None:
        below = [
            directory
            for directory, names, _ in os.walk(self.root)
            if ".zcache" in names and directory != self.root
        ]
        if below:
            raise CacheOwnershipError(
                f"the directory {self.root} holds another cache directory, {below[0]}, whose values would "
                "become those of this one. Give a directory that holds none, or remove it."
            )
        for directory, names, names_of_files in os.walk(self.root):
            if directory == self.root and ".zcache" in names:
                names.remove(".zcache")
            for name in names_of_files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if files.is_pending(status):
                    files.remove(path)  # Never committed, so it may not be valid.
                else:
                    files.sign(path, status)

    def take_over(self, *, alone: bool) -> None:
        """Begin to make the directory the current source's. To be emptied, then `restamp`ed.

        Raises
        ------
        InUseError
            If the source that it belongs to is still in use.
        """
        if not alone:
            raise InUseError(
                f"the cache directory {self.root} is in use for another source that has no name "
                "outside its process (such as a MemoryStore). Give another directory, or pass the "
                "same source_id= to both if they are the same data."
            )
        # Of no source meanwhile: a process that dies half way must not leave one source's values to another.
        self._write(f"{EPHEMERAL}{uuid.uuid4().hex}", replace=True)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Let only one process at a time take the directory over."""
        if not self.is_foreign:
            yield
            return
        path = os.path.join(self._reserved, "take-over")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            until = time.monotonic() + _TAKE_OVER
            while time.monotonic() < until:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
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
