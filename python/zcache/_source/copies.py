"""What a copy of a store shares with it, and what it leaves behind."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Protocol

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from zcache._source.answers import ask
from zcache._source.identity import identify
from zcache._source.location import held_by, innermost, protocol_of, unwrapped, values_of

if TYPE_CHECKING:
    from zcache._source.identity import SourceId


class Original(Protocol):
    """What has to be known of a cache that a copy may share.

    Attributes
    ----------
    source : Store
        What it reads from.
    source_id : SourceId
        Which source it is.
    home : int or None
        The process that it was made in; None if it arrived there as a copy.
    """

    @property
    def source(self) -> Store: ...
    @property
    def source_id(self) -> SourceId: ...
    @property
    def home(self) -> int | None: ...


def without_contents(cache: Store) -> Store:
    """The cache store itself, unless it keeps its values in memory: then one like it, but empty."""
    if isinstance(cache, MemoryStore):
        emptied = getattr(cache, "emptied", type(cache))
        return emptied()
    inner = getattr(cache, "_store", None)
    if not isinstance(inner, Store) or not isinstance(innermost(inner), MemoryStore):
        return cache
    emptied = copy.copy(cache)
    vars(emptied)["_store"] = without_contents(inner)
    return emptied


def is_equal(one: Store, other: Store) -> bool:
    """Whether two stores certainly read the same, as their attributes say: nothing is asked where their paths lead."""
    mine, theirs = unwrapped(one), unwrapped(other)
    if type(mine) is not type(theirs):
        return False
    if type(mine) is LocalStore:
        return bool(mine.root == theirs.root)
    if type(mine) is FsspecStore:
        # Others of a client may ask another server: its environment says which, as it was when they were made.
        is_one = mine.fs is theirs.fs or (protocol_of(mine.fs) == "file" and mine.fs == theirs.fs)
        return is_one and mine.path == theirs.path
    return False


def source_of_copy(original: Original, store: Store, *, is_first: bool) -> Store | None:
    """What a copy of a `CacheStore` reads from that came with this source and meets the cache of its original.

    Parameters
    ----------
    original : Original
        The cache.
    store : Store
        What has come.
    is_first : bool
        Whether the original has sent it, not one of its copies.

    Returns
    -------
    Store or None
        What the original reads, where it is in this process and has no name: a copy of it may be other data. None if it
        needs a cache of its own: this one is of another source by now, the copy comes back from elsewhere, where it may have
        been written to, or the original cannot be opened as the copy was.
    """
    source = original.source
    if not original.source_id.is_ephemeral and values_of(source) is None:
        return store if _has_name(store, original) else None
    if original.home != os.getpid():
        return store
    if not is_first:
        return None
    if source.read_only == store.read_only:
        return source
    # A class of a user's own may raise anything.
    return ask(lambda: source.with_read_only(store.read_only))


def _has_name(store: Store, original: Original) -> bool:
    """Whether a store is the source of a cache that has a name: an environment, or a link, may say otherwise by now."""
    if original.source_id.given:
        return True
    if held_by(unwrapped(store)) == held_by(unwrapped(original.source)):
        return True
    return identify(store).name == original.source_id.name
