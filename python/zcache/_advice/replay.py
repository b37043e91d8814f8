"""`replay`: what recorded requests would have come to with other sizes and policies."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import zlib
from array import array
from hashlib import blake2b
from math import inf
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from zcache._advice.advise import advise, parse_policies, parse_sizes
from zcache._advice.file_format import (
    COLUMNS,
    HEAD,
    LONGEST_ROW,
    MAGIC,
    errors_name,
    path_of_recording,
)
from zcache._advice.trace import UNKNOWN, Requests, Trace, complete
from zcache._byte_ranges import from_text
from zcache._core import MAX_KEY, POLICIES
from zcache._options import MAX_BYTES, check_flag
from zcache._source.urls import redact
from zcache.exceptions import RecordingError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from zcache._advice.advice import Advice
    from zcache._types import Policy, Size

_LARGEST_VALUE: Final = 2**47
"""Bytes of the largest value that a process has room for in its addresses."""
_LARGEST_BLOCK: Final = 2**30
_PIECE: Final = 2**16
"""Bytes that are decompressed at once."""
_GZIP: Final = zlib.MAX_WBITS | 16
"""What tells zlib that its data are of gzip."""
_HEAD_LINES: Final = 2
"""Lines before the first row."""
_WRONG: Final = (ValueError, OverflowError, RecursionError, csv.Error)
"""What the text of a file that is no recording raises."""
_COPY: Final = "Copy it again from where it was made,"
_KEPT: Final = 64
"""Characters of a key that is kept as it is; of a longer one a hash is, so that memory does not depend on how long they are."""


def replay(
    path: str | os.PathLike[str],
    *,
    sizes: Iterable[Size] | None = None,
    policies: Iterable[str] | None = None,
    truncated: bool = False,
) -> Advice:
    """Simulate recorded requests, all of them, with other sizes and policies.

    Parameters
    ----------
    path : str or PathLike
        A file that `CacheStore.record` has made; a ``~`` at the beginning is the home of a user.
    sizes : iterable of int or str, optional
        Bytes, or text such as ``"2 GiB"``. Default is None: from 1/16 to 16 times the bound of the
        recorded store or, where it had none, the bytes of all entries that were requested.
    policies : iterable of str, optional
        Any of "lru", "none" and "adaptive". Default is None: all.
    truncated : bool, optional
        Whether a file may be cut off or damaged at its end: then the parts before the first one that is not whole are
        simulated, of a second or 32,768 requests each. Default is False.

    Returns
    -------
    Advice
        As `CacheStore.advise` gives, without errors of sampling, and without the writes. False in a condition, with a `reason`, if there
        are fewer than 100 requests.

    Raises
    ------
    RecordingError
        A `ValueError`: the file is damaged, or no such recording.
    OSError
        If it cannot be read.
    OptionTypeError, OptionValueError
        If a path, a size or a policy is none, or `truncated` no bool.
    """
    parsed, named = parse_sizes(sizes), parse_policies(policies)
    check_flag("truncated", truncated)
    trace, max_size, policy = load(path, truncated=truncated)
    return advise(trace, max_size=max_size, policy=policy, sizes=parsed, policies=named)


def load(
    path: str | os.PathLike[str], *, truncated: bool = False
) -> tuple[Trace, int | None, Policy]:
    """The requests of a file, in the order of their times, and the bound and the policy of the store."""
    name = path_of_recording(path)
    try:
        with errors_name(name), open(name, "rb") as file:
            return _parse(file, truncated=truncated)
    except _NotWholeError as cut:
        raise _damaged(name, str(cut), cut.way_out) from cut
    except _OtherFormatError as other:
        raise _damaged(
            name, str(other), "Read it with the version of zcache that made it,"
        ) from other
    except _WRONG as error:
        raise _damaged(name, str(error)) from error


class _NotWholeError(Exception):
    """A member of the file is not whole.

    Attributes
    ----------
    way_out : str
        What can be done with `lines` whole lines.
    """

    def __init__(self, lines: int, error: Exception) -> None:
        self.way_out = _COPY
        if lines >= _HEAD_LINES:
            self.way_out = f"Simulate what is whole with `truncated=True`, {_COPY.lower()}"
        where = f"after {lines:,} lines" if lines else "in its first part"
        if isinstance(error, EOFError):
            what = f"it is cut off {where}"
        elif lines:
            what = f"it is damaged {where} ({error})"
        else:
            what = f"it is not, or not wholly, compressed by gzip ({error})"
        super().__init__(what)


class _OtherFormatError(ValueError):
    """A version of zcache that is not this one has made the file."""


def _damaged(name: str, what: str, way_out: str = _COPY) -> RecordingError:
    return RecordingError(
        f"{redact(name)!r} is no complete recording of requests: {what}. {way_out} or record anew "
        "with `with store.record(path):`."
    )


def _members(file: BinaryIO) -> Iterator[bytes]:
    """The data of a file of gzip in pieces, and b"" after each member: then it is known to be what was written.

    Raises
    ------
    EOFError, zlib.error
        If a member is not whole.
    """
    data, member = b"", None
    while data := data or file.read(_PIECE):
        if member is None:
            member = zlib.decompressobj(_GZIP)
        if piece := member.decompress(data, _PIECE):
            yield piece
        data = member.unconsumed_tail
        if member.eof:
            data, member = member.unused_data, None
            yield b""
    if member is not None:
        raise EOFError


class _Lines:
    """The lines of a file, of rows of which none is too long.

    Attributes
    ----------
    row_size : int
        Characters of the present row; to be reset before each.
    rows : int
        Rows that were taken; to be counted by the caller.
    number : int
        Lines that were taken, ...
    whole_rows, whole_lines : int
        ... and what there was of both at the end of the last member that is whole.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._members, self._whole_members = _members(file), 0
        self.row_size = self.rows = self.number = self.whole_rows = self.whole_lines = 0

    def __iter__(self) -> Iterator[str]:
        rest = b""
        for piece in self._pieces():
            rest += piece
            # A key may hold other ends of lines.
            end = rest.rfind(b"\n") + 1
            if not end and len(rest) >= 4 * LONGEST_ROW:
                end = len(rest)
            yield from self._counted(rest[:end])
            rest = rest[end:]
        yield from self._counted(rest)

    def _counted(self, data: bytes) -> Iterator[str]:
        for line in io.StringIO(data.decode(), newline="\n"):
            self.number += 1
            self.row_size += len(line)
            # What the first line is, the caller looks at.
            if self.row_size >= LONGEST_ROW and self.number > 1:
                raise ValueError(
                    f"line {self.number} ends a row of {LONGEST_ROW} characters or more"
                )
            yield line

    def _pieces(self) -> Iterator[bytes]:
        try:
            for piece in self._members:
                if not piece:
                    self._whole_members += 1
                    self.whole_rows, self.whole_lines = self.rows, self.number
                yield piece
        except (EOFError, zlib.error) as error:
            raise _NotWholeError(self.whole_lines, error) from error

    @contextlib.contextmanager
    def of_whole_members(self) -> Iterator[None]:
        """Have what is wrong be an error of the file only if it is what was written."""
        try:
            yield
        except _WRONG:
            members = self._whole_members
            for _ in self._pieces():
                if self._whole_members > members:
                    break
            raise


def _parse(file: BinaryIO, *, truncated: bool) -> tuple[Trace, int | None, Policy]:
    lines = _Lines(file)
    text = iter(lines)
    head = next(text, "")
    if not head.startswith(MAGIC):
        raise ValueError(f"it begins with {head[:40]!r}, not with {HEAD!r}")
    with lines.of_whole_members():
        number, _, about = head.removeprefix(MAGIC).partition(": ")
        columns = COLUMNS.get(number)
        if columns is None:
            raise _OtherFormatError(
                f"its format is {number!r:.40}, and this version reads {' and '.join(COLUMNS)} only"
            )
        described = json.loads(about)
        max_size, (block_size, header, beside), policy = _described(described, number)
        slices = _slices_like_python(described)
        rows = csv.reader(text, strict=True)
        if tuple(next(rows, ())) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
    requests, times = _Rows(), array("d")
    try:
        with lines.of_whole_members():
            lines.row_size = 0
            for row in rows:
                lines.row_size = 0
                if len(row) != len(columns):
                    raise ValueError(f"line {rows.line_num + 1} has {len(row)} columns")
                try:
                    at, *asked = row
                    times.append(_time(at))
                    requests.append(*asked)
                except ValueError as error:
                    raise ValueError(f"line {rows.line_num + 1}: {error}") from error
                lines.rows += 1
    except _NotWholeError:
        if not truncated or lines.whole_lines < _HEAD_LINES:
            raise
        del times[lines.whole_rows :]
        requests.cut(lines.whole_rows)
    # Misses were written when they were known, not when they were made.
    order = np.argsort(np.frombuffer(times, float), kind="stable")
    found, served_by = requests.in_order(order)
    trace = complete(found, block_size, header, beside, served_by, slices_like_python=slices)
    return trace, max_size, policy


class _Rows:
    """What rows ask for, and the entries that have served them, as they are read."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str | bytes, str], int] = {}
        # Of each number.
        self._wholes, self._ranges = array("Q"), array("Q")
        # Of each row: the request and the entry, and the bytes of each.
        self._keys, self._sizes = (array("Q"), array("Q")), (array("Q"), array("Q"))
        self._hits, self._outdated = array("b"), array("b")

    def append(
        self,
        key: str,
        asked: str,
        size: str,
        hit: str,
        entry_range: str,
        entry_size: str,
        outdated: str = "0",
    ) -> None:
        """Take the columns after the time."""
        of_answer, of_entry = _size("size", size), _size("entry_size", entry_size)
        if of_entry == UNKNOWN:
            entry_range, of_entry = asked, of_answer
        flags = _flag("hit", hit), _flag("outdated", outdated)
        # Each character takes a byte at least.
        if len(key) > MAX_KEY:
            raise ValueError(
                f"key has {len(key):,} characters, and none that is cached has more than {MAX_KEY:,}"
            )
        name = key if len(key) <= _KEPT else blake2b(key.encode(), digest_size=16).digest()
        pair = self._number(name, asked), self._number(name, entry_range)
        for column, value in zip(
            (*self._keys, *self._sizes, self._hits, self._outdated),
            (*pair, of_answer, of_entry, *flags),
            strict=True,
        ):
            column.append(value)

    def cut(self, rows: int) -> None:
        """Keep so many rows."""
        for column in (*self._keys, *self._sizes, self._hits, self._outdated):
            del column[rows:]

    def _number(self, key: str | bytes, text: str) -> int:
        number = self._numbers.get((key, text))
        if number is None:
            if len(text) > _KEPT:
                raise ValueError(f"range has {len(text):,} characters")
            byte_range = from_text(text)
            whole = None if byte_range is None else self._number(key, "")
            number = self._numbers[key, text] = len(self._numbers)
            self._wholes.append(number if whole is None else whole)
            self._ranges.extend(byte_range or (0, 0, 0))
        return number

    def in_order(self, order: NDArray[np.intp]) -> tuple[Requests, Requests]:
        """The requests, and the entries that have served them."""
        wholes = np.frombuffer(self._wholes, np.uint64)
        ranges = np.frombuffer(self._ranges, np.uint64).reshape(-1, 3)
        hits, outdated = (
            np.frombuffer(flags, np.int8)[order] != 0 for flags in (self._hits, self._outdated)
        )
        asked, served_by = (
            Requests(
                keys=(numbers := np.frombuffer(keys, np.uint64)[order]),
                wholes=wholes[numbers.astype(np.intp)],
                ranges=ranges[numbers.astype(np.intp)],
                sizes=np.frombuffer(sizes, np.uint64)[order],
                hits=hits,
                outdated=outdated,
                writes=np.zeros(len(order), np.uint8),
            )
            for keys, sizes in zip(self._keys, self._sizes, strict=True)
        )
        return asked, served_by


def _described(about: Any, number: str) -> tuple[int | None, list[int], Policy]:
    """The bound, the bytes of a block, before and beside a value, and the policy that the first line names."""
    if not isinstance(about, dict):
        raise ValueError("its first line has no JSON object")  # noqa: TRY004 - of the file, not of an argument
    found = []
    if number == "1":
        about = {**about, "value_header": 0, "beside_value": 0}
    for name, most in (
        ("max_size", MAX_BYTES),
        ("block_size", _LARGEST_BLOCK),
        ("value_header", _LARGEST_BLOCK),
        ("beside_value", 4 * _LARGEST_BLOCK),
    ):
        value = about.get(name, "missing")
        is_unbounded = name == "max_size" and value is None
        if not (is_unbounded or (type(value) is int and 0 <= value <= most)):
            raise ValueError(f"its {name} is {value!r:.40}, no number from 0 to {most}")
        found.append(value)
    policy = about.get("eviction", "missing")
    if policy not in POLICIES:
        raise ValueError(f"its eviction is {policy!r:.40}, none of {', '.join(POLICIES)}")
    return found[0], found[1:], policy


def _slices_like_python(about: dict[str, Any]) -> bool:
    """Whether the source does; it is taken to do so where a file does not say."""
    value = about.get("slices_like_python", True)
    if not isinstance(value, bool):
        raise ValueError(f"its slices_like_python is {value!r:.40}, not true or false")  # noqa: TRY004 - of the file
    return value


def _time(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < inf:
        raise ValueError(f"time is {text!r}, no number of seconds from 0 on")
    return seconds


def _flag(name: str, text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(f"{name} is {text!r}, not 0 or 1")
    return int(text)


def _size(name: str, text: str) -> int:
    if not text:
        return UNKNOWN
    if not (text.isascii() and text.isdecimal() and int(text) <= _LARGEST_VALUE):
        raise ValueError(f"{name} is {text!r:.40}, no number from 0 to {_LARGEST_VALUE}")
    return int(text)
