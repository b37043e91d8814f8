"""Which changes of a source a process knows of: by this copies that come from elsewhere are compared.

A cache that no other process shares does not hear of the changes that those make. But who changes a source and then sends
a copy of its store means the values of now.
"""

from __future__ import annotations

import os
import threading
from typing import Protocol, TypeAlias

from zcache._runtime.registry import Registry

Version: TypeAlias = "dict[bytes, int]"
"""How many changes are known, by the process that has made them."""


class Watcher(Protocol):
    """Who keeps something that changes end."""

    def changes(self, prefix: str, *, is_key: bool) -> None:
        """Drop what is at and below a prefix, which is being changed; of one key also later."""


class Changes:
    """Counts the changes of one source, as a vector clock."""

    def __init__(self) -> None:
        self._known: Version = {}
        self._watchers: Registry[Watcher] = Registry()
        self.after_fork()

    def after_fork(self) -> None:
        """Count by itself in a forked child."""
        self._here = os.urandom(8)
        # Reentrant: inside it the garbage collector may end a change.
        self._lock = threading.RLock()

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of changes that are made here."""
        self._watchers.add(watcher)

    def tell(self, prefix: str, *, is_key: bool = False) -> None:
        """Tell all who watch that a key is being changed, or all at and below a prefix."""
        for watcher in self._watchers.snapshot():
            watcher.changes(prefix, is_key=is_key)

    def begin(self, prefix: str, *, is_key: bool = False) -> None:
        """Count the beginning of a change that is made here, and tell of it."""
        self.count()
        self.tell(prefix, is_key=is_key)

    def count(self) -> None:
        """Count the end of one."""
        with self._lock:
            self._known[self._here] = self._known.get(self._here, 0) + 1

    @property
    def version(self) -> Version:
        """What goes along with a copy."""
        with self._lock:
            return dict(self._known)

    def meet(self, version: Version) -> bool:
        """Note what a copy knows; whether that is something new."""
        with self._lock:
            new = {who: count for who, count in version.items() if count > self._known.get(who, 0)}
            self._known.update(new)
        return bool(new)
