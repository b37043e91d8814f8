"""Marks beside the values of a cache that outlives its process: what of them nobody may take in.

The index knows which entries are not valid any more and which are not finished. Where it is lost, all
that is left are the values themselves, and these marks: empty values, by a digest of the other's name.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from zcache._core import cache_key

if TYPE_CHECKING:
    from collections.abc import Iterable

DROPPED: Final = ".zcache/dropped/"
"""Not valid any more, but could not be deleted."""
WRITING: Final = ".zcache/writing/"
"""Being written, to a store that shows halves of values."""
RANGES: Final = cache_key("", (2, 0, 0)).partition("@")[0]
"""Beginning of the names of ranges."""


def mark(kind: str, name: str) -> str:
    """The name of a mark for the value of this name."""
    return f"{kind}{_digest(name)}"


def marked(marks: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those names of values that one of these marks is about."""
    digests = {mark.rpartition("/")[2] for mark in marks}
    return [name for name in names if _digest(name) in digests] if digests else []


def key_of(name: str) -> str:
    """The key that a value of this name belongs to."""
    return name.removeprefix(RANGES).rpartition("@")[0] if name.startswith(RANGES) else name


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
