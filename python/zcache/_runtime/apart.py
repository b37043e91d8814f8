"""One of a kind for each key, made while no lock is held that anything else needs."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

from zcache._runtime.fork import at_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")


class OneForEach(Generic[T]):
    """What is found by a key as long as it is in use. Who asks for what is being made waits for that; others do not.

    It is made with I/O and with code of others, such as handlers of the log: those may wait for threads that make something else.
    """

    def __init__(self) -> None:
        self._found: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._after_fork()
        at_fork(self._after_fork)

    def _after_fork(self) -> None:
        """Start with locks of our own: the thread that held the parent's may not exist here."""
        # Held to find and to publish. Reentrant: inside it the garbage collector may end one.
        self._lock = threading.RLock()
        # Each lives while a thread holds it, or waits for it.
        self._making: weakref.WeakValueDictionary[Hashable, threading.RLock] = (
            weakref.WeakValueDictionary()
        )

    def making(self, key: Hashable) -> threading.RLock:
        """What is held while the one with this key is made."""
        with self._lock:
            return self._making.setdefault(key, threading.RLock())

    def get(self, key: Hashable) -> T | None:
        """The one that is in use with this key."""
        with self._lock:
            return self._found.get(key)

    def find_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The one with this key, which `make` makes if there is none."""
        with self.making(key):
            found = self.get(key)
            if found is None:
                found = make()
                self.add(key, found)
            return found

    def add(self, key: Hashable, made: T) -> None:
        """Have one be found, by the thread that holds what `making` gives."""
        with self._lock:
            self._found[key] = made

    def discard(self, key: Hashable) -> None:
        """Have none be found by this key."""
        with self._lock:
            self._found.pop(key, None)

    def move(self, key: Hashable, to: Hashable) -> None:
        """Have the one with this key be found by another one."""
        with self._lock:
            if (found := self._found.pop(key, None)) is not None:
                self._found[to] = found

    def snapshot(self) -> list[T]:
        """All that are in use."""
        with self._lock:
            return list(self._found.values())
