"""What is kept for a while after its last user has gone, in case another one comes.

Workers unpickle a store for each task, and drop it at its end: what it keeps in memory is of use to the next one.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zcache._runtime.fork import at_fork
from zcache._runtime.threads import Life, NoThreadError, start_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

LINGER: Final = 60.0
"""Seconds for which something is kept without a user."""
OVERHEAD: Final = 100 * 1024
"""Bytes that each thing takes beside those that it tells.

A cache with its store: 86 to 105 KiB were measured, decoded chunks of 4 KiB included.
"""
_LOOKS: Final = 5
"""Times at least that it is looked again whether something is still in use, ..."""
_PAUSE: Final = 0.02
"""... after so many each time."""


class Lease:
    """Held by each user: as long as one is, what it is about is no business of this module."""

    __slots__ = ("__weakref__",)


class _Left(NamedTuple):
    """What is not in use: its bytes now, those that it may come to, and when it goes."""

    what: Any
    sizes: dict[Hashable, int]
    limit: float
    until: float


def lease(
    key: Hashable, what: Any, sizes: Callable[[], dict[Hashable, int]], limit: float
) -> Lease:
    """Have something live as long as anyone holds what is returned, and for `LINGER` seconds after that.

    Together, things without users take no more bytes than the largest of them may: those go first that were left first.
    Each takes `OVERHEAD` more than its size.

    Parameters
    ----------
    key : hashable
        The same for all leases of this thing.
    what : object
        Must not refer to the lease.
    sizes : callable
        Bytes that it takes, by what holds them: those of what several things have in common count once. Nothing that takes
        none is kept.
    limit : float
        Bytes that it may take. Infinite is no licence to keep others: it stands for those that it takes when it is left.
    """
    with _lock:
        found = _leases.get(key)
        if found is None:
            found = _leases[key] = Lease()
            weakref.finalize(found, _leave, key, what, sizes, limit).atexit = False
        # Dropped here: `what` is the same.
        _left.pop(key, None)
    return found


def release() -> None:
    """Drop all that is not in use: it is in the way."""
    with _lock:
        gone = list(_left.values())
        _left.clear()
    # Outside the lock: the end of a store may take a while.
    del gone


def make_way() -> None:
    """Have go what only waits for the next user, or to be collected."""
    release()
    gc.collect()


def looks(patience: float = 0.0) -> Iterator[None]:
    """Look, and look again a few times, and for so many seconds: what only waits to go, or for a step in the background, does not count.

    The caller must keep nothing of what it looks for from one look to the next.
    """
    until = time.monotonic() + patience
    yield
    left = _LOOKS
    while left or time.monotonic() < until:
        make_way()
        time.sleep(_PAUSE)
        left = max(0, left - 1)
        yield


def _leave(
    key: Hashable, what: Any, sizes: Callable[[], dict[Hashable, int]], limit: float
) -> None:
    sizes_now = sizes()
    bytes_now = sum(sizes_now.values())
    with _lock:
        if key in _leases:
            return  # Another user has come meanwhile.
        now = time.monotonic()
        if bytes_now:
            most = bytes_now if math.isinf(limit) else limit
            _left[key] = _Left(what, sizes_now, most, now + LINGER)
        gone = _take_gone(now)
        _start()
    del gone


def _take_gone(now: float) -> list[_Left]:
    """Those that go now. To be called under the lock."""
    # The largest may stay, whatever its limit.
    most = max((one.limit for one in _left.values()), default=0) + OVERHEAD
    gone = [_left.pop(key) for key, one in list(_left.items()) if one.until <= now]
    # In the order in which they were left: the last one knows what it takes now.
    held: dict[Hashable, int] = {}
    users: Counter[Hashable] = Counter()
    for one in _left.values():
        held |= one.sizes
        users.update(one.sizes.keys())
    total = sum(held.values()) + OVERHEAD * len(_left)
    while total > most and _left:
        one = _left.pop(next(iter(_left)))
        gone.append(one)
        users.subtract(one.sizes.keys())
        total -= OVERHEAD + sum(held[holder] for holder in one.sizes if not users[holder])
    return gone


def _start() -> None:
    """See to it that what is kept goes in time. To be called under the lock."""
    global _timer
    if _left and _timer() is None:
        # Where there is no thread, it goes when something else is left.
        with contextlib.suppress(NoThreadError):
            start_thread(held := [Life()], _expire)
            _timer = held[0].reference


def _expire(_: Life) -> None:
    global _timer
    while True:
        with _lock:
            now = time.monotonic()
            gone = _take_gone(now)
            if not _left:
                _timer = _nothing
            pause = min((one.until for one in _left.values()), default=0) - now
        del gone
        if pause <= 0:
            return
        time.sleep(pause)


def _nothing() -> None:
    pass


# Reentrant: inside it the garbage collector may end a lease.
_lock = threading.RLock()
_leases: weakref.WeakValueDictionary[Hashable, Lease] = weakref.WeakValueDictionary()
# In the order in which they were left.
_left: dict[Hashable, _Left] = {}
# What lives as long as the thread does that drops them.
_timer: Callable[[], Life | None] = _nothing


def _after_fork() -> None:
    global _lock, _timer
    _lock = threading.RLock()
    _timer = _nothing
    # Not here, where others are not ready yet for the end of a store.
    for key, one in _left.items():
        _left[key] = one._replace(until=0.0)


at_fork(_after_fork)
