"""The names of the sources of a pool."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import time
from typing import TYPE_CHECKING, Any, Final

from zcache._core import make_way, open_own
from zcache._source.identity import UNNAMED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PAGE: Final = 4096
_LOOKED_AT_EACH: Final = 4 * _PAGE
"""Bytes by which the file grows until it is seen whether most of it is out of date."""
_PART: Final = 4
"""One byte in so many of a pool may be names."""
_LARGEST: Final = 2**24
"""Bytes of the file at most; of a larger one, which no zcache has written, the rest is not read."""
_KEPT: Final = 2**20
"""Bytes of a file at most of which is kept what was read: that takes several times as many."""
_PATIENCE: Final = 0.5
"""Seconds for which others are waited for; a line is added without the lock as well."""
_LOOK_AGAIN: Final = 0.002
"""Seconds between two looks."""
_FLAGS: Final = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_BEGINNING: Final = b'{"name": '
"""How each line begins: millions of others are passed by in a moment."""

_UNNAMED: Final = re.compile(f"{UNNAMED}([0-9a-f]{{32}})")


def label_of(source: str) -> str:
    """The folder of a source in the index of a pool: no table decides which source a value has.

    What stands for the name of one that has lost it has the label itself; see `stand_in`.
    """
    if (unnamed := _UNNAMED.fullmatch(source)) is not None:
        return unnamed[1]
    return hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()[:32]


def stand_in(label: str) -> str:
    """What stands for the name of a source of which only the label is known. No source is called so."""
    return f"{UNNAMED}{label}"


def note_of(name: str, source: str | None = None, used: float | None = None) -> dict[str, Any]:
    """What is noted of a source: its name, a text for it, when it was last opened, whether it was forgotten since."""
    return {"name": name, "source": source, "used": used, "forgotten": False}


class Register:
    """The names of the sources of a pool, for people: nothing else depends on them.

    A file to which lines are added, so that of what processes note at once nothing is lost. Where most lines are
    out of date it is written anew, and where there is no room for more: then without those that were used longest ago.
    What is damaged of it is passed by.

    It lies beside the index and is counted as little as that, so no book of it can be wrong.

    Parameters
    ----------
    index_root : str
        The folder of the index of the pool.
    max_size : int, optional
        Bytes of the pool. The names take a quarter of them at most, or a page, and 16 MiB at most. Default is None, no bound.
    """

    def __init__(self, index_root: str, max_size: int | None = None) -> None:
        self._path = os.path.join(index_root, "sources")
        self._room = _LARGEST
        self.limit(max_size)
        # Lines that were read, and what they note.
        self._known: tuple[bytes, dict[str, dict[str, Any]]] = (b"", {})

    def limit(self, max_size: int | None) -> None:
        """Have the pool be of so many bytes."""
        self._room = _LARGEST if max_size is None else min(_LARGEST, max(_PAGE, max_size // _PART))

    def names(self) -> dict[str, dict[str, Any]]:
        """What is known of each source, by label; see `note_of`."""
        lines, notes = self._known
        data = self._read()
        # As a rule there are some more: to compare the others takes much less time than to parse them.
        if not data.startswith(lines):
            lines, notes = b"", {}
        end = data.rfind(b"\n") + 1
        notes = {**notes, **_notes(data[len(lines) : end])}
        if end <= _KEPT:
            self._known = (data[:end], notes)
        return {**notes, **_notes(data[end:])}

    def _read(self) -> bytes:
        try:
            # A pipe in its place must not block.
            file = os.open(self._path, os.O_RDONLY | _FLAGS)
        except OSError:
            return b""
        try:
            _check_regular(file)
            return os.read(file, min(os.fstat(file).st_size, _LARGEST))
        except OSError:
            return b""
        finally:
            os.close(file)

    def add(self, note: dict[str, Any]) -> None:
        """Note what is known of a source now; see `note_of`."""
        line = _line(note)
        with contextlib.suppress(OSError), self._locked() as file:
            size = os.fstat(file).st_size
            if size + len(line) > self._room:
                self._replace({**self.names(), label_of(note["name"]): note}, self._room // 2)
                return
            os.write(file, line)
            if (size + len(line)) // _LOOKED_AT_EACH > size // _LOOKED_AT_EACH:
                notes = self.names()
                if 2 * sum(len(_line(note)) for note in notes.values()) <= size:
                    self._replace(notes, self._room)

    def forget(self, name: str) -> None:
        """Note that a source was forgotten; its name is kept, for stores that are open may fill it anew."""
        self.add({**self.names().get(label_of(name), note_of(name)), "forgotten": True})

    def drop(self, names: Iterable[str]) -> None:
        """Leave out the names of sources that are gone for good."""
        gone = set(names)
        with contextlib.suppress(OSError), self._locked():
            notes = self.names()
            self._replace({k: v for k, v in notes.items() if v["name"] not in gone}, self._room)

    def _replace(self, notes: dict[str, dict[str, Any]], room: int) -> None:
        """Write the file anew, with those for which there is room; to be called with its lock."""
        found = []
        for note in sorted(notes.values(), key=_rank, reverse=True):
            line = _line(note)
            if len(line) <= room:
                found.append(line)
                room -= len(line)
        # Of one name: what a process leaves that is killed here, another user's too, the next one removes.
        unfinished = f"{self._path}.new"
        make_way(unfinished)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
        with open(open_own(unfinished, os.O_WRONLY), "wb") as lines:
            lines.write(b"".join(reversed(found)))
        os.replace(unfinished, self._path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, to be added to; it is not replaced meanwhile."""
        until = time.monotonic() + _PATIENCE
        while True:
            make_way(self._path)
            file = open_own(self._path, os.O_RDWR | os.O_APPEND)
            try:
                _check_regular(file)
                is_late = time.monotonic() > until
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_locked = os.path.samestat(os.fstat(file), os.stat(self._path))
                except (BlockingIOError, FileNotFoundError):
                    is_locked = False
                if is_locked or is_late:
                    try:
                        yield file
                    finally:
                        # A child that was forked meanwhile has it as well.
                        fcntl.flock(file, fcntl.LOCK_UN)
                    return
            finally:
                os.close(file)
            time.sleep(_LOOK_AGAIN)


def _notes(lines: bytes) -> dict[str, dict[str, Any]]:
    """What lines note, by label."""
    notes = (_parse(line) for line in lines.split(b"\n"))
    return {label_of(note["name"]): note for note in notes if note is not None}


def _parse(line: bytes) -> dict[str, Any] | None:
    """What a line notes; None for half a line, of a process that was stopped, say, and for any other damage."""
    if not line.startswith(_BEGINNING):
        return None
    try:
        note = json.loads(line.decode(errors="surrogatepass"))
        name, used, source = note["name"], note["used"], note.get("source")
        is_text = isinstance(name, str) and isinstance(source, str | None)
        if not is_text or not (used is None or math.isfinite(used)):
            return None
        used = None if used is None else float(used)
        return {**note_of(name, source, used), "forgotten": bool(note.get("forgotten"))}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _rank(note: dict[str, Any]) -> tuple[bool, float]:
    """The least goes first where there is no room."""
    return not note["forgotten"], note["used"] or 0.0


def _check_regular(file: int) -> None:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _line(note: dict[str, Any]) -> bytes:
    # Two halves of a pair, each on its own, would be read as the one character that they stand for.
    text = json.dumps(note, ensure_ascii=False)
    # What was added by halves before ends here.
    return f"\n{text}\n".encode(errors="surrogatepass")
