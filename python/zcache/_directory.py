"""A cache directory: whose it is, and how its index is filled from a walk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zcache import _files
from zcache._core import Index, leads_out, volume_space
from zcache._identity import TRANSIENT
from zcache._marks import DROPPED, key_of, mark, marked
from zcache._spans import is_encodable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from zcache._repairs import Repairs

logger = logging.getLogger("zcache")

FORMAT: Final = 1
_BATCH: Final = 4096
_TAKE_OVER: Final = 60.0
"""Seconds that one who finds a directory of a source that has ended waits for another who takes it over."""
_LOOK_AGAIN: Final = 0.02
"""Seconds between two looks."""
_LONGEST_WRITE: Final = 3600.0
"""Seconds that nobody takes to write one value."""


class Directory:
    """A directory that holds a cache, with its stamp.

    Parameters
    ----------
    root : path
        The directory; made if it is missing.
    source : str
        Name of the source; see `zcache._identity.identify`.
    adopt : bool
        Take over what is there already.

    Raises
    ------
    ValueError
        If it belongs to somebody else.
    OSError
        If it cannot be used.
    """

    def __init__(self, root: os.PathLike[str] | str, source: str, *, adopt: bool) -> None:
        self.root = os.path.abspath(root)
        self.reserved = os.path.join(self.root, ".zcache")
        self.index_root = os.path.join(self.reserved, "index")
        self._stamp_path = os.path.join(self.reserved, "stamp.json")
        self.source = source
        self.cold = False
        # What was removed while a walk is on its way, which may have found it before.
        self._removed: list[str] = []
        self._walks = 0
        self._newest = 0
        self.prepare(adopt=adopt)

    def prepare(self, *, adopt: bool) -> None:
        """Make what is missing, and see whose the directory is."""
        self._check_above()
        os.makedirs(self.root, exist_ok=True)
        stamp = self._read_stamp(adopt)
        if stamp is None:
            stamp = self._claim(adopt)
        # What a source left that has ended with its process is of no use to anybody.
        self.cold = stamp["source"] != self.source
        if self.cold and not is_transient(stamp):
            raise ValueError(other_source(f"directory {self.root}", stamp, self.source))
        os.makedirs(self.index_root, exist_ok=True)
        os.makedirs(os.path.join(self.reserved, "tmp"), exist_ok=True)

    def _check_above(self) -> None:
        """A rebuild of a cache around it would take its values for that cache's own."""
        for above in Path(os.path.realpath(self.root)).parents:
            if os.path.lexists(above / ".zcache" / "stamp.json"):
                raise ValueError(
                    f"the cache directory {self.root} lies inside the cache directory {above}, which "
                    "may serve and delete what is in it. Give one that lies elsewhere."
                )

    def _read_stamp(self, adopt: bool) -> dict[str, Any] | None:
        try:
            with open(self._stamp_path, "rb") as file:
                stamp = parse_stamp(
                    file.read(), f"directory {self.root}", adopt=adopt, listed=False
                )
        except FileNotFoundError:
            return None
        if stamp is None:
            os.unlink(self._stamp_path)
        return stamp

    def _claim(self, adopt: bool) -> dict[str, Any]:
        found = [name for name in os.listdir(self.root) if name != ".zcache"]
        with contextlib.suppress(FileNotFoundError):
            found += os.listdir(os.path.join(self.reserved, "ranges"))
        if found and not adopt:
            if (stamp := self._read_stamp(adopt)) is not None:
                return stamp  # Another process was first, and these are its values.
            raise ValueError(not_ours(f"directory {self.root}", found[0], self.source))
        if found:
            self._adopt()
        return self._write_stamp(self.source, replace=False)

    def _write_stamp(self, source: str, *, replace: bool) -> dict[str, Any]:
        stamp = {"zcache": FORMAT, "source": source}
        os.makedirs(self.reserved, exist_ok=True)
        unfinished = f"{self._stamp_path}.{uuid.uuid4().hex}"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(stamp, file)
            file.flush()
            # Once per directory: an empty stamp after a loss of power would lock its owner out.
            os.fsync(file.fileno())
        if replace:
            os.replace(unfinished, self._stamp_path)
            return stamp
        try:
            os.link(unfinished, self._stamp_path)
        except FileExistsError:
            # Another process was first; its stamp counts.
            return self._read_stamp(adopt=False) or stamp
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
            raise ValueError(
                f"the directory {self.root} holds another cache directory, {below[0]}, whose values would "
                "become those of this one. Give a directory that holds none, or remove it."
            )
        for directory, names, files in os.walk(self.root):
            if directory == self.root and ".zcache" in names:
                names.remove(".zcache")
            for name in files:
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if _files.is_pending(status):
                    _files.remove(path)  # Never committed, so nobody knows whether it is valid.
                else:
                    _files.sign(path, status)

    def take_over(self, *, alone: bool) -> None:
        """Begin to make the directory the current source's. To be emptied, then `restamp`ed.

        Raises
        ------
        ValueError
            If the source that it belongs to is still in use.
        """
        if not alone:
            raise ValueError(
                f"the cache directory {self.root} is in use for another source that has no name "
                "outside its process (such as a MemoryStore). Give another directory, or pass the "
                "same source_id= to both if they are the same data."
            )
        # Nobody's meanwhile: whoever dies half way must not leave to one source what is another's.
        self._write_stamp(f"{TRANSIENT}{uuid.uuid4().hex}", replace=True)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Let nobody else take the directory over meanwhile; for it is then another's no more."""
        if not self.cold:
            yield
            return
        path = os.path.join(self.reserved, "take-over")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            give_up = time.monotonic() + _TAKE_OVER
            while time.monotonic() < give_up:
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
        self._write_stamp(self.source, replace=True)
        self.cold = False

    def tmp(self, place: int | None) -> str:
        """Beginning of the names of the unfinished files of one participant (None: without index)."""
        owner = "own" if place is None else f"p{place}"
        return os.path.join(self.reserved, "tmp", f"{owner}-{os.getpid()}-")

    def sweep_tmp(self, own: int | None = None) -> None:
        """Remove what participants that are gone have left unfinished.

        `own` is a place that is ours, so that whoever had it before is gone.
        """
        directory = os.path.join(self.reserved, "tmp")
        by_place: dict[str, list[str]] = {}
        for name in os.listdir(directory):
            by_place.setdefault(name.partition("-")[0], []).append(os.path.join(directory, name))
        for place, paths in by_place.items():
            if place == "own":
                _remove_old(paths)
            elif place == f"p{own}":
                _remove_all(paths)
            else:
                with self._if_free(place) as free:
                    if free:
                        _remove_all(paths)

    @contextlib.contextmanager
    def _if_free(self, place: str) -> Iterator[bool]:
        """Whether nobody has this place; nobody takes it meanwhile."""
        try:
            file = os.open(os.path.join(self.index_root, place), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            yield False
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(file)

    def path(self, name: str) -> str:
        """The file of a value."""
        return os.path.join(self.root, *name.split("/"))

    def free_space(self) -> tuple[int, int]:
        """Bytes that we may still write to the volume, and bytes of the whole volume."""
        return volume_space(self.root)

    def remove_below(self, prefix: str) -> None:
        """Remove the files of a key and of all keys below it, whether the index knows them or not."""
        if self._walks:
            self._removed.append(prefix)
        if prefix:
            above, _, tail = prefix.rpartition("/")
            ranges = os.path.join(self.reserved, "ranges", *above.split("/"))
            try:
                names = os.listdir(ranges)
            except (FileNotFoundError, NotADirectoryError):
                names = []
            for name in names:
                if name.rpartition("@")[0] == tail:
                    _files.remove(os.path.join(ranges, name))
            if not leads_out(self.root, prefix):
                _files.remove(self.path(prefix))
            prefix += "/"
        for below in (prefix, f".zcache/ranges/{prefix}"):
            for _, _, name in _files.walk(self.root, _files.remove, below):
                _files.remove(self.path(name))

    def remember(self, names: Iterable[str]) -> None:
        """Note values that are not valid any more but could not be deleted, for a later rebuild."""
        for name in names:
            path = os.path.join(self.root, mark(DROPPED, name))
            # On a volume that takes nothing nobody can know.
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                Path(path).touch()

    def _without_dropped(
        self, found: list[tuple[int, int, str]]
    ) -> tuple[list[tuple[int, int, str]], list[str]]:
        """Delete what could not be deleted before; returns what is left, and of that what is not valid."""
        where = os.path.join(self.root, DROPPED)
        try:
            marks = os.listdir(where)
        except OSError:
            return found, []
        dropped = set(marked(marks, (name for _, _, name in found)))
        stays = []
        for name in dropped:
            try:
                _files.remove(self.path(name))
            except OSError:
                stays.append(name)
        kept = {mark(DROPPED, name).rpartition("/")[2] for name in stays}
        _remove_all([os.path.join(where, name) for name in marks if name not in kept])
        gone = dropped.difference(stays)
        return [value for value in found if value[2] not in gone], stays

    def rebuild(self, whose: Callable[[], Repairs | None], why: str) -> None:
        """Fill an empty index from a walk of the directory.

        Parameters
        ----------
        whose : callable
            Gives the books to enter it in, or None when nobody wants them any more.
        why : str
            For the log.

        Raises
        ------
        OSError
            If the index cannot grow.
        """
        self._walks += 1
        self._newest += 1
        newest = self._newest
        try:
            self._rebuild(lambda: whose() if newest == self._newest else None, why)
        finally:
            self._walks -= 1

    def outdate_walks(self) -> None:
        """Have walks that are on their way enter nothing more: the index that they fill is emptied."""
        self._newest += 1

    def _rebuild(self, whose: Callable[[], Repairs | None], why: str) -> None:
        found, dropped = self._without_dropped(sorted(_files.walk(self.root, _remove_quietly)))
        for start in range(0, len(found), _BATCH):
            batch = [value for value in found[start : start + _BATCH] if is_encodable(value[2])]
            books = whose()
            # Or it was emptied once more, and another process fills it.
            if books is None or not books.must(books.index.adopt, batch):
                return
        if (books := whose()) is None:
            return
        for name in dropped:
            victims = books.must(books.index.forget, key_of(name))
            books.must(books.index.settled, [], [cell for cell, _ in victims])
        if found:
            # Before others may go on, so that this comes before all that they have to say.
            logger.warning(
                "the index of the cache directory %s was rebuilt (%s): %d values, %d bytes",
                self.root,
                why,
                len(found),
                sum(size for _, size, _ in found),
            )
        if (books := whose()) is None:
            return
        books.must(books.index.complete)
        while self._removed:
            self._forget_below(books, self._removed.pop())

    def _forget_below(self, books: Repairs, prefix: str) -> None:
        while victims := books.must(books.index.sweep, prefix):
            dropped, failed = [], []
            for cell, name in victims:
                try:
                    _files.remove(self.path(name))
                    dropped.append(cell)
                except OSError:
                    failed.append(cell)
            books.must(books.index.settled, dropped, failed)


def let_go(index: Any) -> None:
    """Close, in a forked child, what would keep the locks of its parent alive after its death.

    The index itself may live on: in the frames of threads that have stayed with the parent, and of
    coroutines that the child collects. Without a lock it takes no step any more.
    """
    locks = index.leave() if isinstance(index, Index) else ()
    if not locks:
        return
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for lock in locks:
            os.dup2(null, lock, inheritable=False)
    finally:
        os.close(null)


def _remove_all(paths: list[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _remove_old(paths: list[str]) -> None:
    """Remove those that nobody can be writing any more, for without an index nobody tells who lives."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ctime < time.time() - _LONGEST_WRITE:
                os.unlink(path)


def _remove_quietly(path: str) -> None:
    try:
        _files.remove(path)
    except OSError as error:
        # Of no use, but not in the way either, until its key is written.
        logger.debug("the unfinished file %s cannot be removed: %r", path, error)


def parse_stamp(text: bytes, where: str, *, adopt: bool, listed: bool) -> dict[str, Any] | None:
    """Read a stamp; None for one that cannot be read, if that may be replaced.

    `listed` tells a store whose index is made of a listing from a directory, whose index is shared: each
    would know nothing of what the other does.

    Raises
    ------
    ValueError
        If it is of another format or kind, or cannot be read.
    """
    try:
        stamp = json.loads(text)
    except (ValueError, RecursionError):
        stamp = None
    if not isinstance(stamp, dict) or not {"zcache", "source"} <= stamp.keys():
        if adopt:
            return None
        raise ValueError(
            f"the stamp of the cache {where} cannot be read. Pass adopt=True to take it over, or give "
            "another one."
        )
    if stamp["zcache"] != FORMAT:
        raise ValueError(
            f"the cache {where} has format {stamp['zcache']!r}, this zcache reads format {FORMAT}. Use "
            "the version of zcache that made it, or give another one."
        )
    if stamp.get("listed", False) is not listed:
        other = "a zarr.storage.LocalStore itself" if listed else "a store of another class"
        raise ValueError(
            f"the cache {where} was made through {other}, and keeps its books in another way. Use it "
            "through that, or give another one."
        )
    return stamp


def is_transient(stamp: dict[str, Any]) -> bool:
    """Whether the source of a stamp has ended with its process."""
    return str(stamp["source"]).startswith(TRANSIENT)


def not_ours(where: str, example: str, source: str) -> str:
    """Say that a place is not empty."""
    return (
        f"the {where} is not empty and was not made by zcache (it holds {example!r}, for instance). "
        "Give an empty or a new one; or pass adopt=True if all that it holds is a cache of "
        f"{source}, which zcache may serve and delete."
    )


def other_source(where: str, stamp: dict[str, Any], source: str) -> str:
    """Say that a place is another source's."""
    other = stamp["source"]
    return (
        f"the cache {where} holds the cache of {other}, not of {source}. Give another one; or, if both "
        f"are the same data, pass source_id={other!r}."
    )
