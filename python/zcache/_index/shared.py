"""One index for each place and process: any number of stores over it share bounds, flights and queue."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import time
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Index
from zcache._index.changes import Changes
from zcache._index.limits import greatest, least, strictest
from zcache._index.place import Place
from zcache._index.shared_wait import LOCK_TIMEOUT
from zcache._runtime import lingering
from zcache._runtime.apart import OneForEach
from zcache._runtime.circuit_breaker import CircuitBreaker
from zcache._runtime.fork import at_fork
from zcache._runtime.refresh import Refresh
from zcache._runtime.registry import Registry
from zcache._runtime.threads import THREADS, Threads
from zcache._source.describe import describe
from zcache._source.identity import EPHEMERAL, same_source
from zcache._source.urls import redact
from zcache.exceptions import CacheOwnershipError, IndexLockTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from zarr.abc.store import Store

    from zcache._index.calls import Handle
    from zcache._source.identity import SourceId
    from zcache._source.location import Location
    from zcache._types import Minimised, Policy

_POLICY: Final = ("eviction", "minimise")
_PACKAGE: Final = __name__.partition(".")[0]
logger = logging.getLogger("zcache")


class SharedIndex:
    """The index of one place, and what all stores over it share.

    Parameters
    ----------
    handle : Handle
        The index.
    source : Store
        The source that the place holds values of.
    source_id : SourceId
        Its name; an attribute as well.
    clock : callable
        Seconds; what ages are counted by.
    breaker : CircuitBreaker
        Of the cache store; an attribute as well. That of a pool is of all its sources.

    Attributes
    ----------
    source_id : SourceId
        Name of the source.
    cache : weak reference to Store, or None
        The cache store that it was last opened for, where others may hold the same values.
    location : Location or None
        Where that keeps its values.
    listings : Listings
        Answers of the source to `list_dir`.
    place : Place
        What the backends of this place share beside the index.
    changes : Changes
        Of the source, as far as this process has made them, or has heard of them from copies.
    threads : Threads
        Run what waits for the place; those of a pool are of all its sources.
    """

    def __init__(
        self,
        handle: Handle,
        source: Store,
        source_id: SourceId,
        clock: Callable[[], float],
        breaker: CircuitBreaker,
    ) -> None:
        self.handle = handle
        self.clock = clock
        self.breaker = breaker
        self.place = Place()
        self.listings: Any = None
        self.changes = Changes()
        self.cache: weakref.ref[Store] | None = None
        self.location: Location | None = None
        # Those that may overlap it, as long as there are any.
        self._beside: Registry[SharedIndex] | None = None
        self.key: tuple[Hashable, str] = None, ""
        self._source = source
        self.source_id = source_id
        self._members: Registry[Member] = Registry()
        self._limits = Refresh()
        self.threads = Threads(THREADS)

    @property
    def fills(self) -> Any:
        """The queue of values on their way into the cache store; None where a fill takes one step."""
        return self.place.fills

    def locate(self, cache: Store, location: Location) -> list[SharedIndex]:
        """Note where the cache store keeps its values; returns those of others that overlap it."""
        with contextlib.suppress(TypeError):
            # A class of the user's own may have no such references.
            self.cache, self.location = weakref.ref(cache), location
        at = (location.root, location.endpoint)
        with _lock:
            if (beside := _by_root.get(at)) is None:
                beside = _by_root[at] = Registry()
            self._beside = beside
            beside.add(self)
        return [
            other for other in beside.snapshot() if other is not self and other._overlaps(location)
        ]

    def _overlaps(self, location: Location) -> bool:
        """Whether its cache store keeps its values in this place, inside it, or around it."""
        if self.location is None or self.cache is None or not self.location.overlaps(location):
            return False
        return self.cache() is not None

    def join(self, member: Member, *, has_come: bool = False) -> None:
        """Use it as well; the strictest limits are in force, so that none is exceeded.

        The maximum age of a look-up is each store's own; what is too old for all of them goes first. See `choose_policy` for
        `has_come`.
        """
        choose_policy(self.handle, member, has_come=has_come)
        self._members.add(member)
        self.handle.users.add(member)
        self._set_limits()
        # Its bound is kept from its beginning.
        self.place.wait_for_bound()
        weakref.finalize(member, self._set_limits, waits=False).atexit = False

    def use_as(self, member: Member, holder: object) -> None:
        """Have a member count as a user only as long as `holder` is there.

        It has asked for its policy when it came first; back in use, it goes by whatever is in force.
        """
        users = self.handle.users
        if holder in users:
            return
        is_back = member not in users
        users.add(holder)
        users.discard(member)
        weakref.finalize(holder, _apply_limits, weakref.ref(self)).atexit = False
        if is_back:
            self.handle.apply_limits()

    def _set_limits(self, *, waits: bool = True) -> None:
        self._limits.run(partial(self._take_limits, waits=waits), waits=waits)

    def _take_limits(self, *, waits: bool) -> None:
        if not (members := self._members.snapshot()):
            return
        asked = [member.limits for member in members]
        ages = [one["max_age"] for one in asked]
        age = None if None in ages else max(ages)
        limits = strictest(asked)
        size = limits["max_size"]
        before = self.handle.limits["max_size"]
        self.handle.change_limits({**limits, "max_age": age})
        self.place.limit_fills(
            least(one["max_pending_size"] for one in asked),
            greatest(one["min_free_space"] for one in asked),
        )
        self.handle.apply_limits(waits=waits)
        if size is not None and (before is None or size < before):
            self.place.enforce_bound()

    def check_source(self, cache: Store, source: Store, source_id: SourceId) -> None:
        """See that it is the index of this source.

        Raises
        ------
        CacheOwnershipError
            If it is another one's.
        """
        if not same_source((self._source, self.source_id), (source, source_id)):
            held, asked = _named(self._source, self.source_id), _named(source, source_id)
            owner = f"another {held}" if held == asked else f"{held}, not of {asked}"
            raise CacheOwnershipError(
                f"cache_store={describe(cache)} holds the cache of {owner}. Give each source a cache store of its own, "
                "or a CachePool for all of them; or, if both are the same data, pass the same source_id= to both."
            )


class Member:
    """One user of a shared index, with the limits that it asks for."""

    __slots__ = ("__weakref__", "limits")

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits


def choose_policy(handle: Handle, member: Member, *, has_come: bool = False) -> bool:
    """Go by the policy of a new member, unless others use another one; then a warning says so.

    As one of `handle.users`, which is for the caller to do, it holds others to the policy in force. Returns whether that is
    its own. Of one that has come in a pickle the log says so: a warning may be an error, which ends an executor.
    """
    wanted = in_force = _policy_of(member.limits)
    for _ in lingering.looks():
        in_force = _policy_of(handle.limits)
        if in_force == wanted or not handle.users:
            # With what is wanted it is opened, if it is not yet.
            _note_policy(handle, wanted)
            # Others may be processes. Where the index cannot be asked now, the log says so.
            asked = _Asked(wanted)
            handle.when_open(asked.ask)
            in_force = asked.in_force()
        if in_force == wanted:
            return True
    # An index that has taken the place of another one, or that another process has begun anew, may go by what is wanted.
    in_force = policy_in_force(handle, timeout=0.0)
    if in_force == wanted:
        _note_policy(handle, wanted)
        return True
    # To ask in vain holds others to nothing.
    handle.apply_limits()
    message = _other_policy(handle.name, wanted, in_force)
    if has_come:
        say_once(message)
    else:
        warnings.warn(message, UserWarning, stacklevel=_level_of_user())
    return False


_said: Final[set[str]] = set()


def say_once(message: str) -> None:
    """Log a warning, once in this process: each copy that comes may be a reason for it."""
    if message not in _said:
        _said.add(message)
        logger.warning("%s", message)


def policy_in_force(handle: Handle, timeout: float = LOCK_TIMEOUT) -> tuple[Policy, Minimised]:
    """The policy in force and what it minimises; while the index does not answer, what it has said last."""
    try:
        return handle.call_blocking(Index.policy, timeout=timeout)  # type: ignore[return-value]
    except IndexLockTimeout:
        limits = handle.limits
        return limits["eviction"], limits["minimise"]


def _note_policy(handle: Handle, policy: tuple[str, str]) -> None:
    handle.note_policy(dict(zip(_POLICY, policy, strict=True)))


def _level_of_user() -> int:
    """How far above the caller of this the line is that made a store or a pool, by whatever way."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != _PACKAGE:
            break
        level += 1
    return level


class _Asked:
    """The policy that an index goes by; told to the caller, or to the log where the answer comes later."""

    def __init__(self, wanted: tuple[str, str]) -> None:
        self._wanted = wanted
        self._answer: tuple[str, str] | None = None
        self._is_late = False

    def ask(self, handle: Handle) -> None:
        handle.call_later(partial(self._answered, handle), Index.set_policy, *self._wanted)

    def _answered(self, handle: Handle, in_force: tuple[str, str]) -> None:
        self._answer = in_force
        _note_policy(handle, in_force)
        if self._is_late and self._answer != self._wanted:
            logger.warning(_other_policy(handle.name, self._wanted, self._answer))

    def in_force(self) -> tuple[str, str]:
        """What is known now; else what was asked for."""
        self._is_late = True
        return self._answer or self._wanted


def _policy_of(limits: dict[str, Any]) -> tuple[str, str]:
    return limits["eviction"], limits["minimise"]


def _other_policy(name: str, wanted: tuple[str, str], in_force: tuple[str, str]) -> str:
    asked, used = (
        ", ".join(f"{option}={value!r}" for option, value in zip(_POLICY, policy, strict=True))
        for policy in (wanted, in_force)
    )
    return (
        f"the cache {name} is in use with {used}, so this store goes by that as well, not by {asked}. Drop "
        "the other stores on it first (they count as long as anything refers to them or their copies, in any "
        "process), or give this one a cache store of its own."
    )


def breaker_of(handle: Handle, clock: Callable[[], float] | None = None) -> CircuitBreaker:
    """The circuit breaker of a place, with its pauses by this clock. Default is that of the system."""
    return CircuitBreaker(handle.name, clock or time.monotonic, _show)


def _show(error: BaseException) -> str:
    return redact(repr(error))


def _named(source: Store, source_id: SourceId) -> str:
    return describe(source) if source_id.name.startswith(EPHEMERAL) else source_id.name


def _apply_limits(shared: Callable[[], SharedIndex | None]) -> None:
    if (found := shared()) is not None:
        found.handle.apply_limits(waits=False)


# As long as they are in use; `_held` keeps those of dicts as long as their stores live.
_shared: OneForEach[SharedIndex] = OneForEach()
# By kind of place and server: only those of one can overlap. Each is kept by those that are in it.
_by_root: weakref.WeakValueDictionary[tuple[str, str | None], Registry[SharedIndex]] = (
    weakref.WeakValueDictionary()
)
_held: dict[Hashable, tuple[list[weakref.ref[Any]], SharedIndex]] = {}
# Reentrant: inside it the garbage collector may end a store.
_lock = threading.RLock()


def find_or_make(
    place: Hashable, make: Callable[[], SharedIndex], *, source: str = ""
) -> SharedIndex:
    """The index of a place, which `make` makes if this process has none yet; where there are several, that of the source of this name."""
    key = place, source

    def make_one() -> SharedIndex:
        shared = make()
        shared.key = key
        return shared

    return _shared.find_or_make(key, make_one)


def rename(shared: SharedIndex, name: str) -> None:
    """Have an index be that of its source under another name, which it has in a forked child."""
    shared.source_id = shared.source_id._replace(name=name)
    place, source = shared.key
    if source:
        _shared.move(shared.key, (place, name))
        shared.key = place, name
    if shared.listings is not None:
        shared.listings.rename(name)
    shared.place.rename(name)


def live() -> list[SharedIndex]:
    """All indexes of this process."""
    return _shared.snapshot()


def keep_while_alive(shared: SharedIndex, holder: Any) -> None:
    """Keep an index as long as `holder` lives, even if no store uses it for a while."""
    with _lock:
        refs, _ = _held.get(shared.key, ([], shared))
        if any(ref() is holder for ref in refs):
            return
        refs = [ref for ref in refs if ref() is not None]
        _held[shared.key] = ([*refs, weakref.ref(holder)], shared)
        weakref.finalize(holder, _release, shared.key).atexit = False


def _release(key: Hashable) -> None:
    with _lock:
        refs, _ = _held.get(key, ([], None))
        if not any(ref() is not None for ref in refs):
            _held.pop(key, None)


def _after_fork() -> None:
    """Start with a lock of our own: the thread that held the parent's may not exist here."""
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
