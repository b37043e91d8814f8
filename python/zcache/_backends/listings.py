"""What the source has answered to `list_dir`, for a time when it cannot be asked.

An answer is remembered only if no write of anything below the directory has begun or ended since the source
was asked: a reader that lists takes hold of what is there first, the last answer or a blank, and writes into that very
one; a writer takes it away, before and after. That holds between processes as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from zcache._core import MAX_KEY, crc32c, open_cached, open_own

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST: Final = 1024
"""Answers that are remembered at most for each cache store."""
LARGEST: Final = 64 * 1024
"""Bytes of one; a longer one is not remembered."""
_PREFIX: Final = "listing-"
_LEVELS: Final = 16
"""Parts of a directory that the name of its file has one by one."""
_MARK: Final = "listings"
"""An empty file that is there since the source was first asked. It stays, for an answer may come at any time."""
_FLAGS: Final = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Listings(ABC):
    """The answers that are remembered for one cache store."""

    may_wait = False
    """Whether a method reads or writes a disk."""

    @abstractmethod
    def begin(self, directory: str) -> Callable[[Sequence[str]], None] | None:
        """Say that the source is going to be asked; returns what takes the answer, if anything does."""

    @abstractmethod
    def get(self, directory: str) -> list[str] | None:
        """The answer for a directory, if it is remembered."""

    @abstractmethod
    def forget(self, key: str) -> None:
        """Forget what a write of this key may change: the directories that it is in."""

    @abstractmethod
    def forget_below(self, prefix: str) -> None:
        """Forget what a change at and below this prefix may change: those, itself and all below it."""

    @abstractmethod
    def has_none_of(self, key: str) -> bool:
        """Whether `forget` would certainly change nothing, as far as that is known without waiting."""

    def rename(self, source: str) -> None:  # noqa: B027 - what is in memory is this process's own
        """Remember the answers of the same source under another name, in a forked child."""

    @abstractmethod
    def has_none(self) -> bool:
        """Whether nothing is remembered, as far as that is known without waiting."""


class MemoryListings(Listings):
    """Answers that end with the process."""

    def __init__(self) -> None:
        # No step here needs a lock: each changes the dict once.
        self._answers: dict[str, list[list[str]]] = {}

    def begin(self, directory: str) -> Callable[[Sequence[str]], None] | None:
        if len(self._answers) >= MOST and directory not in self._answers:
            self._answers.clear()
        # Of one answer, or of none yet.
        kept = self._answers.setdefault(directory, [])

        def keep(names: Sequence[str]) -> None:
            if _size(names) <= LARGEST:
                kept[:] = [list(names)]

        return keep

    def get(self, directory: str) -> list[str] | None:
        for names in self._answers.get(directory, ()):
            return list(names)
        return None

    def forget(self, key: str) -> None:
        for directory in _above(key):
            self._answers.pop(directory, None)

    def forget_below(self, prefix: str) -> None:
        if not prefix:
            self._answers.clear()
            return
        self.forget(prefix)
        for directory in list(self._answers):
            if directory == prefix or directory.startswith(prefix + "/"):
                self._answers.pop(directory, None)

    def has_none_of(self, key: str) -> bool:  # noqa: ARG002
        return self.has_none()

    def has_none(self) -> bool:
        return not self._answers


class DirectoryListings(Listings):
    """Answers in small files beside the index of a cache directory.

    Parameters
    ----------
    index_root : str
        The folder of the index.
    source : str
        Name of the source.
    only_reads : bool, optional
        Whether no answer is added. Default is False.
    """

    may_wait = True

    def __init__(self, index_root: str, source: str, *, only_reads: bool = False) -> None:
        self._only_reads = only_reads
        self._keep_in(index_root, source)

    def _keep_in(self, root: str, source: str) -> None:
        self._root = root
        # As long as it is not there, no answer is.
        self._mark = os.path.join(root, _MARK)
        self._source = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()

    def rename(self, source: str) -> None:
        # docstring inherited
        self._keep_in(self._root, source)

    def begin(self, directory: str) -> Callable[[Sequence[str]], None] | None:
        if self._only_reads:
            return None
        path = self._path(directory)
        try:
            if not os.path.lexists(path) and len(self._files()) >= MOST:
                self.forget_below("")
            # Kept open: what is written to it is no one's once others have taken it away.
            kept = _Kept(self._open(path))
            # After that: who does not see the mark has ended before the source is asked.
            self._set_mark()
        except OSError:
            return None  # Read-only, or full: then it is not remembered.

        def keep(names: Sequence[str]) -> None:
            text = json.dumps(
                {"source": self._source, "directory": directory, "names": list(names)}
            )
            data = text.encode(errors="surrogatepass")
            data = b"%08x" % crc32c(data) + data
            with contextlib.suppress(OSError):
                if len(data) <= LARGEST + 8:
                    # Two who write at a time leave what is not read, by its checksum.
                    os.pwrite(kept.file, data, 0)
                    os.ftruncate(kept.file, len(data))

        return keep

    def _open(self, path: str) -> int:
        try:
            return open_own(path, os.O_WRONLY)
        except PermissionError:
            os.unlink(path)  # Of another user.
            return open_own(path, os.O_WRONLY)

    def _set_mark(self) -> None:
        os.close(open_own(self._mark, os.O_WRONLY))

    def get(self, directory: str) -> list[str] | None:
        try:
            file = os.open(self._path(directory), os.O_RDONLY | _FLAGS)
            try:
                data = os.read(file, LARGEST + 9)
            finally:
                os.close(file)
            if int(data[:8] or b"0", 16) != crc32c(data[8:]):
                return None  # Cut off, or a blank.
            found: Any = json.loads(data[8:])
        except (OSError, ValueError):
            return None
        if found["source"] != self._source or found["directory"] != directory:
            return None
        return list(found["names"])

    def forget(self, key: str) -> None:
        # So that `has_none` knows: without waiting, only a name that was looked up before is known to be absent.
        os.path.lexists(self._mark)
        for directory in _above(key):
            with contextlib.suppress(OSError):
                os.unlink(self._path(directory))

    def forget_below(self, prefix: str) -> None:
        self.forget(prefix)
        for path in self._files(_levels(prefix)):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def has_none_of(self, key: str) -> bool:
        return self.has_none() or all(_is_absent(self._path(above)) for above in _above(key))

    def has_none(self) -> bool:
        return _is_absent(self._mark)

    def _path(self, directory: str) -> str:
        return os.path.join(self._root, _name(directory))

    def _files(self, prefix: str = _PREFIX) -> list[str]:
        try:
            names = os.listdir(self._root)
        except OSError:
            return []
        return [os.path.join(self._root, name) for name in names if name.startswith(prefix)]


class _Kept:
    """A file that is open as long as a reader may write into it."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self) -> None:
        os.close(self.file)


def _is_absent(path: str) -> bool:
    """Whether nothing is there, as far as that is known without waiting for a disk."""
    try:
        os.close(open_cached(path))
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False


def _name(directory: str) -> str:
    digest = hashlib.sha256(directory.encode(errors="surrogatepass")).hexdigest()
    return f"{_levels(directory)}{digest[:32]}"


def _levels(directory: str) -> str:
    """How the names of the files of a directory and of those below it begin; those of a few others may, too."""
    parts = directory.split("/")[:_LEVELS] if directory else []
    checksums = (crc32c(part.encode(errors="surrogatepass")) for part in parts)
    return _PREFIX + "".join(f"{checksum:08x}-" for checksum in checksums)


def _above(key: str) -> list[str]:
    """The directories that a key is in, the root among them; no answer is kept for one that is longer than any key."""
    key = key[: MAX_KEY + 1]
    found = []
    while key:
        key = key.rpartition("/")[0]
        found.append(key)
    return found


def _size(names: Sequence[str]) -> int:
    return sum(len(name) + 4 for name in names)
