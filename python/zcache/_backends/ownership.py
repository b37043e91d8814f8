"""Who a cache store belongs to: the contents of a stamp, and what is said where it belongs to another."""

from __future__ import annotations

import json
import os
from enum import Enum
from typing import Any, Final

from zcache.exceptions import CacheOwnershipError

STAMP_FORMAT: Final = 1
"""Format of what zcache keeps in a cache store, as its stamp says, ..."""
POOL_STAMP_FORMAT: Final = 1
"""... and of what it keeps in a pool."""
_POOL: Final = "pool "
"""What stands before the format in the stamp of a pool."""


class Kind(Enum):
    """Kinds of caches, by what their stamps say."""

    DIRECTORY = STAMP_FORMAT
    """Values in files or keys of their own: a directory, or another store."""
    POOL = f"{_POOL}{POOL_STAMP_FORMAT}"
    """Values of many sources in segments."""


_trusted: Final[set[str]] = set()
"""Directories that this process was told to adopt, or who has sent it a store over one: another user may own them."""


def trust(root: str) -> None:
    """Use a directory from now on, also where another user owns it."""
    _trusted.add(root)


def is_trusted(root: str) -> bool:
    """Whether it was said that another user may own a directory."""
    return root in _trusted


def trusted_root(cache: Any) -> str | None:
    """The directory of a cache store, if it is trusted, for copies in other processes."""
    root = getattr(cache, "root", None)
    path = os.path.realpath(root) if isinstance(root, (str, os.PathLike)) else None
    return path if path in _trusted else None


def is_stamp(text: bytes) -> bool:
    """Whether this can be read as a stamp, of whatever format."""
    try:
        stamp = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(stamp, dict) and {"zcache", "source"} <= stamp.keys()


def stamp_text(kind: Kind, source: str, *, listed: bool = False) -> str:
    """The contents of a stamp, which `parse_stamp` reads."""
    stamp = {"zcache": kind.value, "source": source}
    return json.dumps({**stamp, "listed": True} if listed else stamp)


def parse_stamp(
    text: bytes, where: str, *, adopt: bool, listed: bool, kind: Kind = Kind.DIRECTORY
) -> str | None:
    """The source that a stamp names; None for one that cannot be read, if it may be replaced.

    `listed` says that the index is made from a listing of the store, not kept in a directory: the two
    would know nothing of each other. `kind` is what is expected.

    Raises
    ------
    CacheOwnershipError
        If it is of another format or kind, or cannot be read.
    """
    try:
        stamp = json.loads(text)
    except (ValueError, RecursionError):
        stamp = None
    if not isinstance(stamp, dict) or not {"zcache", "source"} <= stamp.keys():
        if adopt:
            return None
        way_out = "Remove it" if kind is Kind.POOL else "Pass adopt=True to take it over"
        raise CacheOwnershipError(
            f"the stamp of the cache {where} cannot be read. {way_out}, or give another one."
        )
    found = stamp["zcache"]
    is_pool = isinstance(found, str) and found.startswith(_POOL)
    read, number = (Kind.POOL, POOL_STAMP_FORMAT) if is_pool else (Kind.DIRECTORY, STAMP_FORMAT)
    # First: where no other way of opening it helps, none is named.
    if found != read.value:
        has = (
            f"is a pool of format {found.removeprefix(_POOL)}"
            if is_pool
            else f"has format {found!r}"
        )
        raise CacheOwnershipError(
            f"the cache {where} {has}, this zcache reads format {number}. Use "
            "the version of zcache that made it, or give another one."
        )
    if read is not kind:
        # In full: it may be met by what has no such option.
        one, other = ("is a pool", "zcache.CachePool(path)") if is_pool else ("is no pool", "path")
        raise CacheOwnershipError(
            f"the cache {where} {one}. Use it by zcache.CacheStore(source, cache_store={other}), or give another one."
        )
    if stamp.get("listed", False) is not listed:
        other = "a zarr.storage.LocalStore itself" if listed else "a store of another class"
        raise CacheOwnershipError(
            f"the cache {where} was made through {other}, and keeps its books in another way. Use it "
            "through that, or give another one."
        )
    return str(stamp["source"])


def not_ours(where: str, example: str, source: str, kind: Kind = Kind.DIRECTORY) -> str:
    """Say that a place is not empty. What a pool holds cannot be adopted: it would be no pool."""
    way_out = (
        "."
        if kind is Kind.POOL
        else f"; or pass adopt=True if all that it holds is a cache of {source}, which zcache may serve and delete."
    )
    return (
        f"the {where} is not empty and was not made by zcache (it holds {example!r}, for instance). "
        f"Give an empty or a new one{way_out}"
    )


def other_source(where: str, other: str, source: str) -> str:
    """Say that a place is another source's."""
    return (
        f"the cache {where} holds the cache of {other}, not of {source}. Give another one; or, if both "
        f"are the same data, pass source_id={other!r}."
    )


def other_user(where: str, user: int, kind: Kind) -> str:
    """Say that a directory is another user's."""
    # Of a pool they fit each call that opens it, `zcache.open` or `CachePool`.
    ways_out = (
        "give CachePool(path, mode=0o770) if it is for a group of yours, CachePool(path, read_only=True) to only read it, or "
        "zcache.open(..., adopt=True)"
        if kind is Kind.POOL
        else "pass adopt=True, or a LocalStore with read_only=True to only read it"
    )
    return (
        f"the cache directory {where} is another user's (uid {user}), who may read and change what is cached in "
        f"it. Give one of your own; or, if you trust him, {ways_out}."
    )
