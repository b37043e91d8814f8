"""Limits that several users of one index ask for: the strictest are in force, so that none is exceeded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_BY_STRICTNESS: Final = ("never", "first", "always")


def least(sizes: Iterable[int | None]) -> int | None:
    """The smallest of these bounds, of which None is none."""
    return min((size for size in sizes if size is not None), default=None)


def greatest(sizes: Iterable[int | None]) -> int | None:
    """The largest of these sizes, of which None asks for nothing."""
    return max((size for size in sizes if size is not None), default=None)


def strictest(limits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of these limits of an index the smallest size, and the way to verify that verifies most."""
    return {
        "max_size": least(one["max_size"] for one in limits),
        "verify": max((one["verify"] for one in limits), key=_BY_STRICTNESS.index, default="first"),
    }
