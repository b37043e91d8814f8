"""Which source a store is: named by rules, or by the user, or by nothing outside its process and copies."""

from __future__ import annotations

import logging
import threading
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.storage import FsspecStore, LocalStore, ObjectStore, ZipStore

from zcache._runtime.fork import at_fork
from zcache._source.answers import ask
from zcache._source.describe import describe
from zcache._source.icechunk import REPOSITORY, snapshot_of
from zcache._source.location import (
    Location,
    bucket_of,
    held_by,
    innermost,
    kind_of,
    location_held,
    naming_location,
    outlives_process,
    protocol_below,
    protocol_of,
    unwrapped,
    values_of,
    zip_path,
)
from zcache._source.settled import is_settled, settled

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

EPHEMERAL: Final = "process:"
"""Beginning of the name of a source that ends with its process."""
UNNAMED: Final = "unnamed:"
"""Beginning of what stands for a name that is not known any more."""

_ZIP: Final = "zip://"
_log = logging.getLogger("zcache")
_KINDS: Final = (LocalStore, FsspecStore, ObjectStore)
"""Classes of stores with the location as their name. A subclass may show other values than its base."""


class SourceId(NamedTuple):
    """Which source a store is.

    Attributes
    ----------
    name : str
        Equal for equal data, in every process unless it is ephemeral. Holds no secret.
    given : bool
        Whether the user has given it, as ``source_id=``, or it has come with a copy.
    """

    name: str
    given: bool = False

    @property
    def is_ephemeral(self) -> bool:
        """Whether the source has got this name in this process, and no other source ever has it."""
        return not self.given and self.name.startswith(EPHEMERAL)


def identify(store: Any, source_id: str | None = None) -> SourceId:
    """Name a source.

    Parameters
    ----------
    store : Store
        The source.
    source_id : str, optional
        The name that the user has given it. Default is None: it is named by rules.

    Returns
    -------
    SourceId
        By rules only if it is certain which data the store shows. It may read a profile of the user's,
        and never asks a server.
    """
    if source_id is not None:
        if source_id.startswith(EPHEMERAL):
            # It has come with a copy, and is in use as long as that.
            _entry(unwrapped(store), source_id)
        return SourceId(source_id, given=True)
    inner = unwrapped(settled(store))
    name = ask(lambda: _name(inner) if is_settled(inner) else None)
    return SourceId(_ephemeral_name(inner) if name is None else name)


def _name(store: Any) -> str | None:
    if type(store) is ZipStore:
        path = zip_path(store)
        return None if path is None else f"{_ZIP}{path}"
    if kind_of(store) == ("icechunk.store", "IcechunkStore"):
        return snapshot_of(store)
    if type(store) not in _KINDS:
        return None
    # Its options may matter as well, and are listed nowhere.
    if type(store) is FsspecStore and protocol_of(store.fs) == "dir":
        return None
    location = naming_location(store)
    return None if location is None else str(location)


def location_named(name: str) -> Location | None:
    """Where the source of this name keeps its values; None where neither the name nor this process knows."""
    if name.startswith(EPHEMERAL):
        with _lock:
            held = [key for key, entry in _known.items() if entry.name == name]
        return location_held(held[0]) if held else None
    if name.startswith(REPOSITORY):
        name = name.partition("@")[2]
    return Location.parse(f"file://{name[len(_ZIP) :]}" if name.startswith(_ZIP) else name)


def same_source(one: tuple[Any, SourceId], other: tuple[Any, SourceId]) -> bool:
    """Whether two sources, each a store and its name, show the same values."""
    (mine, my_id), (theirs, their_id) = one, other
    if my_id.given and their_id.given:
        return my_id.name == their_id.name
    if my_id.given or their_id.given:
        # A name that was given may be one by rules, and one store may have both.
        if my_id.name == their_id.name:
            return True
        my_id, their_id = identify(mine), identify(theirs)
    if my_id.name == their_id.name:
        return True
    # What knows no weak references has another name each time.
    are_ephemeral = my_id.is_ephemeral and their_id.is_ephemeral
    return are_ephemeral and held_by(unwrapped(mine)) == held_by(unwrapped(theirs))


# ------------------------------------------------------------------------------- in this process


def keeps_values_in_process(store: Any) -> bool:
    """Whether a store without a name is known to be another source in each process.

    What is written to it stays in its process, or its path leads elsewhere in another one. Of a class of a user's own
    that is not known: its copies in other processes, forked or unpickled, count as the same source.
    """
    return ask(lambda: _keeps_values(innermost(store))) or not _leads_there(unwrapped(store))


def _keeps_values(store: Any) -> bool:
    if values_of(store) is not None:
        return True
    if isinstance(store, FsspecStore):
        return protocol_below(store) == "memory"
    bucket = bucket_of(store)
    return bucket is not None and type(bucket).__name__ == "MemoryStore"


def _leads_there(store: Any) -> bool:
    known = type(store) is ZipStore or type(store) in _KINDS
    return not known or ask(lambda: is_settled(store)) is True


class _Ephemeral:
    """A name of this process, and the stores that hold what it names."""

    def __init__(self, name: str, is_of_process: bool) -> None:
        self.name = name
        self.is_of_process = is_of_process
        self.holders: set[int] = set()
        self.said = False


def _new_name() -> str:
    return f"{EPHEMERAL}{uuid.uuid4().hex}"


# Reentrant, for inside it the garbage collector may forget a store.
_lock = threading.RLock()
_known: dict[tuple[Hashable, ...], _Ephemeral] = {}
_renamed: dict[str, str] = {}
"""In a forked child, names of its own by those of its parent, of sources that are others there."""


def _entry(store: Any, name: str | None = None) -> _Ephemeral:
    """What is known of a source without wrappers that has no name, or only one that has come with it."""
    if name is None:
        new = _Ephemeral(_new_name(), keeps_values_in_process(store))
    else:
        new = _Ephemeral(name, is_of_process=False)
    # A dict knows no weak references: its address is good as long as one of its stores lives.
    key, holder = held_by(store), id(store)
    with _lock:
        entry = _known.get(key, new)
        if holder not in entry.holders:
            try:
                weakref.finalize(store, _forget, key, entry, holder).atexit = False
            except TypeError:
                # There is no callback when it is gone, and its address another one's.
                return entry
            entry.holders.add(holder)
            _known[key] = entry
        return entry


def _ephemeral_name(store: Any) -> str:
    return _entry(store).name


def ended(names: Iterable[str]) -> list[str]:
    """Those that name a source in another process, or one that is gone: no store has them again."""
    with _lock:
        known = {entry.name for entry in _known.values()}
    return [name for name in names if name.startswith(EPHEMERAL) and name not in known]


def _forget(key: tuple[Hashable, ...], entry: _Ephemeral, holder: int) -> None:
    with _lock:
        entry.holders.discard(holder)
        if not entry.holders and _known.get(key) is entry:
            del _known[key]


def name_after_fork(name: str) -> str:
    """What a source is called in a forked child that had this name in its parent: the same, unless it is another one there."""
    return _renamed.get(name, name)


def _start_over() -> None:
    """Start with a lock of our own, and with other sources in memory: what this process does to them, no other sees."""
    global _lock
    _lock = threading.RLock()
    _renamed.clear()
    for key, entry in list(_known.items()):
        if not entry.holders:
            # Another thread was forgetting it.
            del _known[key]
            continue
        if entry.is_of_process:
            _renamed[entry.name] = entry.name = _new_name()
            entry.said = False


at_fork(_start_over)


def say_unnamed(store: Any, cache: Any) -> None:
    """Log once for each process and source that a source has no name, and how to keep its cache warm.

    Parameters
    ----------
    store : Store
        A source with an ephemeral name.
    cache : Store
        Its cache store. What ends with the process is cold at the next start in any case.
    """
    inner = unwrapped(store)
    level = logging.WARNING if outlives_process(cache) else logging.INFO
    entry = _entry(inner)
    if not _log.isEnabledFor(level):
        return
    with _lock:
        if entry.said:
            return
        entry.said = True
    _log.log(
        level,
        "source %s has no name outside this process, so a persistent cache starts cold: pass source_id= "
        "to keep it warm",
        describe(inner),
    )
