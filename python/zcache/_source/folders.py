"""Folders by what they are, not by a path: one may be mounted in two places, or a volume may fold names."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable


def identity(path: str) -> tuple[int, int] | None:
    """What a path leads to, whatever its name; None if there is nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # Some texts are no paths.
        return None
    return status.st_dev, status.st_ino


def folders_overlap(one: str, other: str) -> bool:
    """Whether two absolute paths lead to one folder, or one of them into that of the other; they may not be there yet."""
    mine, theirs = _way_to(one), _way_to(other)
    return mine[-1] in theirs or theirs[-1] in mine


def _way_to(path: str) -> list[tuple[Hashable, str]]:
    """What each folder on a path is, from the root on; of one that is not there, its path below the last one that is."""
    found: list[tuple[Hashable, str]] = []
    last, missing = None, ""
    for folder in (*reversed(PurePath(path).parents), PurePath(path)):
        here = None if missing else identity(str(folder))
        if here is None:
            missing = f"{missing}/{folder.name}"
        else:
            last = here
        found.append((last, missing))
    return found
