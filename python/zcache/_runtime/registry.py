"""Objects that are told of something, or asked, as long as they live."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")


class Registry(Generic[T]):
    """A set of objects that it does not keep alive; they are the same if they are one object.

    Any thread may add to it while others go through it, which a `weakref.WeakSet` does not allow. It has no lock: each
    step is one of a dict, which neither a thread nor a fork sees half done. Inside a lock the garbage collector could end
    objects that wait for locks of their own.

    Parameters
    ----------
    items : iterable, optional
        The first ones.
    """

    __slots__ = ("__weakref__", "_refs")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._refs: dict[int, weakref.ref[T]] = {}
        for item in items:
            self.add(item)

    def add(self, item: T) -> None:
        """Have an object in it until it ends."""
        refs, address = self._refs, id(item)
        # It is called before the address can be another object's.
        refs[address] = weakref.ref(item, lambda _: refs.pop(address, None))

    def discard(self, item: T) -> None:
        """Have an object not in it any more."""
        if item in self:
            self._refs.pop(id(item), None)

    def snapshot(self) -> list[T]:
        """Those that are in it now."""
        # Of a copy, which is made in one step.
        return [item for ref in self._refs.copy().values() if (item := ref()) is not None]

    def __contains__(self, item: object) -> bool:
        ref = self._refs.get(id(item))
        return ref is not None and ref() is item

    def __bool__(self) -> bool:
        # Without all of them: it is asked at each opening.
        return any(ref() is not None for ref in self._refs.copy().values())

    def __len__(self) -> int:
        # Of one that has just ended the reference may be there still.
        return len(self.snapshot())
