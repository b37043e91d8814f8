"""Sessions of icechunk in this process, told apart by number.

A session gives another store each time that it is asked for its store. Two of them are equal if they are of one session,
whatever it shows.
"""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import Any, Final

from zcache._runtime.fork import at_fork

# Reentrant, for inside it the garbage collector may end a store.
_lock = threading.RLock()
_numbers: Final = count(1)
_stores: list[tuple[weakref.ref[Any], int]] = []


def number_of(store: Any) -> int:
    """A number that the stores of one session have in common, as long as one of them lives, and no others."""
    global _stores
    while True:
        known = _stores
        living = [(one, number) for ref, number in known if (one := ref()) is not None]
        for one, number in living:
            if one is store:
                return number
        # Without the lock: it is icechunk that compares them.
        found = next((number for one, number in living if one == store), None)
        with _lock:
            # Another thread may have added a store of the same session.
            if _stores is known:
                number = next(_numbers) if found is None else found
                _stores = [(weakref.ref(one), n) for one, n in (*living, (store, number))]
                return number


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


at_fork(_after_fork)
