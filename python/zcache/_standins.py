"""What stands for an index until its first use."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from zcache._core import IndexBusyError
from zcache._flights import Flight

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from zcache._books import Books
    from zcache._core import Index


_LARGEST: Final = 10_000
"""Prefixes that are remembered one by one."""


class Unopened:
    """Stands for the index of a directory until a forked child uses it."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def __getattr__(self, name: str) -> Any:
        return getattr(self._books.reopen(), name)

    def __len__(self) -> int:
        return len(self._books.reopen())


class NotListedError(IndexBusyError):
    """The index does not know yet what is in the cache store."""

    def __init__(self, owner: Unlisted, name: str) -> None:
        super().__init__(name)
        self._owner = owner
        self._name = name

    def without(self, *args: Any) -> Any:
        """Take the step though nothing is known; what it changes is dropped once it is."""
        if self._name in Unlisted.CHANGES:
            self._owner.change(args[0])
        return getattr(self._owner.within, self._name)(*args)


class Unlisted:
    """Stands for the index of a cache store until that is listed.

    Attributes
    ----------
    within : Index
        The index, which is empty so far.
    changed : set of str
        Prefixes that were changed meanwhile: what is found below them is outdated.
    listed : bool
        Whether all that the store holds is in the index: from then on nobody needs this any more.
    listing : Flight or None
        The listing that is under way, for all who wait for it; guarded by `lock`.
    """

    CHANGES: Final = frozenset({"begin_write", "void_prefix"})
    FIRST: Final = frozenset({"lookup", "peek"}) | CHANGES
    """Steps that an operation begins with."""

    def __init__(self, within: Index, changed: Iterable[str] = ()) -> None:
        self.within = within
        self.changed = set(changed)
        self.listed = False
        self.listing: Flight | None = None
        # Reentrant, for while it is held the garbage collector may end an operation.
        self.lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return _Step(self, name) if name in self.FIRST else getattr(self.within, name)

    def __len__(self) -> int:
        return 0

    def reserve(self, *_: object) -> str:
        """Nothing is filled in: nobody knows how much room there is."""
        return "unlisted"

    def begin_listing(self, loop: asyncio.AbstractEventLoop | None) -> tuple[Flight, bool]:
        """The listing that is under way, and whether it is for the caller to make it."""
        with self.lock:
            flight = self.listing
            if leads := flight is None or flight.done:
                flight = self.listing = Flight(loop)
                flight.begun = True
            return flight, leads

    def change(self, prefix: str) -> None:
        """Note a change."""
        if len(self.changed) >= _LARGEST:
            self.changed.add("")
        if "" not in self.changed:
            self.changed.add(prefix)

    def outdated(self) -> list[tuple[int, str]]:
        """Drop from the index what was changed before; a later change finds it there, and drops it."""
        prefixes = [""] if "" in self.changed else sorted(self.changed)
        victims = []
        for prefix in prefixes:
            while found := self.within.sweep(prefix):
                victims += found
        return victims


class _Step:
    """A step of an index that is not listed yet."""

    def __init__(self, owner: Unlisted, name: str) -> None:
        self.__self__ = owner
        self.__name__ = name

    def __call__(self, *_: Any) -> Any:
        raise NotListedError(self.__self__, self.__name__)
