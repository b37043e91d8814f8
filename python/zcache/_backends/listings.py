"""What the source has answered to `list_dir`, for a time when it cannot be asked.

An answer is remembered only if no write of anything below the directory has begun or ended since the source
was asked: whoever lists puts a blank there first, and fills in that very one; whoever writes takes away what is
there, before and after. That holds between processes as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final

from zcache._core import crc32c, is_absent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST: Final = 1024
"""Answers that are remembered at most for each cache store."""
LARGEST: Final = 64 * 1024
"""Bytes of one; a longer one is not remembered."""
_PREFIX: Final = "listing-"
_MARK: Final = "listings"
"""An empty file that is there while there may be answers."""


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
    def forget(self, key: str | None) -> None:
        """Forget what a write of this key may change; None for all."""

    def has_none_of(self, key: str | None) -> bool:  # noqa: ARG002
        """Whether `forget` would certainly change nothing, as far as that is known without waiting."""
        return False


class MemoryListings(Listings):
    """Answers that end with the process."""

    def __init__(self) -> None:
        # No step here needs a lock: each changes the dict once.
        self._answers: dict[str, list[list[str]]] = {}

    def begin(self, directory: str) -> Callable[[Sequence[str]], None] | None:
        # Empty until there is an answer.
        blank: list[list[str]] = []
        if len(self._answers) >= MOST:
            self._answers.clear()
        self._answers[directory] = blank
        return lambda names: blank.append(list(names)) if _size(names) <= LARGEST else None

    def get(self, directory: str) -> list[str] | None:
        found = self._answers.get(directory)
        return list(found[0]) if found else None

    def forget(self, key: str | None) -> None:
        if key is None:
            self._answers.clear()
            return
        for directory in _above(key):
            self._answers.pop(directory, None)

    def has_none_of(self, key: str | None) -> bool:  # noqa: ARG002
        return not self._answers


class DirectoryListings(Listings):
    """Answers in small files beside the index of a cache directory.

    Parameters
    ----------
    index_root : str
        The folder of the index.
    source : str
        Name of the source.
    """

    may_wait = True

    def __init__(self, index_root: str, source: str) -> None:
        self._root = index_root
        self._mark = os.path.join(index_root, _MARK)
        self._source = hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()

    def begin(self, directory: str) -> Callable[[Sequence[str]], None] | None:
        path = self._path(directory)
        try:
            if len(self._files()) >= MOST:
                self.forget(None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # Kept open: what is written to it is nobody's once others have taken it away.
            blank = _Blank(os.open(path, flags, self._mode()))
            # After the blank: who does not see the mark has ended before the source is asked.
            os.close(os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, self._mode()))
        except OSError:
            return None  # Read-only, or full: then it is not remembered.

        def keep(names: Sequence[str]) -> None:
            text = json.dumps(
                {"source": self._source, "directory": directory, "names": list(names)}
            )
            data = text.encode(errors="surrogatepass")
            with contextlib.suppress(OSError):
                if len(data) <= LARGEST:
                    os.write(blank.file, b"%08x" % crc32c(data) + data)

        return keep

    def get(self, directory: str) -> list[str] | None:
        try:
            file = os.open(self._path(directory), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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

    def forget(self, key: str | None) -> None:
        if key is None:
            with contextlib.suppress(OSError):
                os.unlink(self._mark)
        paths = self._files() if key is None else [self._path(above) for above in _above(key)]
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def has_none_of(self, key: str | None) -> bool:
        if is_absent(self._root, _MARK):
            return True
        return key is not None and all(is_absent(self._root, _name(above)) for above in _above(key))

    def _mode(self) -> int:
        return 0o600 | os.stat(self._root).st_mode & 0o044

    def _path(self, directory: str) -> str:
        return os.path.join(self._root, _name(directory))

    def _files(self) -> list[str]:
        try:
            names = os.listdir(self._root)
        except OSError:
            return []
        return [os.path.join(self._root, name) for name in names if name.startswith(_PREFIX)]


class _Blank:
    """A file that is open as long as somebody may fill it in."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self) -> None:
        os.close(self.file)


def _name(directory: str) -> str:
    digest = hashlib.sha256(directory.encode(errors="surrogateescape")).hexdigest()
    return f"{_PREFIX}{digest[:32]}"


def _above(key: str) -> list[str]:
    """The directories that a key is in, the root among them."""
    found = []
    while key:
        key = key.rpartition("/")[0]
        found.append(key)
    return found


def _size(names: Sequence[str]) -> int:
    return sum(len(name) + 4 for name in names)
