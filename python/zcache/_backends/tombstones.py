"""Tombstones: which values beside them are not valid any more, but could not be deleted.

The index knows that. If it is lost, all that is left are the values themselves and these empty files,
named by a digest of the value's name.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from zcache._core import cache_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DROPPED: Final = ".zcache/dropped/"
"""Where they are."""
MISSING: Final = ".zcache/missing/"
"""Marks: of values of these digests no file was there to be removed, and a rebuild takes in what is newer."""
_MARK_DIGITS: Final = 3
RANGES: Final = cache_key("", (2, 0, 0)).partition("@")[0]
"""Beginning of the names of ranges."""


def tombstone(name: str) -> str:
    """The name of the tombstone of a value."""
    return f"{DROPPED}{_digest(name)}"


def with_tombstone(tombstones: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those names of values that one of these tombstones stands for."""
    digests = {one.rpartition("/")[2] for one in tombstones}
    return [name for name in names if _digest(name) in digests] if digests else []


def with_mark(marks: Mapping[str, int], values: Iterable[tuple[int, int, str]]) -> list[str]:
    """Names of those values, each a fetch time, a size and a name, that were fetched before the mark of their name.

    `marks` are times in milliseconds, by the names of the marks.
    """
    if not marks:
        return []
    return [
        name
        for fetched, _, name in values
        if fetched <= marks.get(_digest(name)[:_MARK_DIGITS], -1)
    ]


def key_of(name: str) -> str:
    """The key that a value of this name belongs to."""
    return name.removeprefix(RANGES).rpartition("@")[0] if name.startswith(RANGES) else name


def _digest(name: str) -> str:
    # The core writes tombstones as well.
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
