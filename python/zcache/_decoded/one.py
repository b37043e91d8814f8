"""A read of one chunk that is kept: the copy, and little else.

A read runs cold, for it has just come to the thread of the event loop: each function that it calls costs three times what
it does in a loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zcache._decoded.layout import is_basic, scatter

if TYPE_CHECKING:
    from zcache._decoded.cache import DecodedCache
    from zcache._decoded.layout import Array, Layout


def copy_one(
    cache: DecodedCache, item: Any, layout: Layout, target: Array, drop_axes: tuple[int, ...]
) -> bool | None:
    """Copy out what is wanted of a chunk, or of one inner chunk, if that is kept; False if it is not.

    None where several inner chunks are wanted, or what is wanted is no block of them: nothing was looked up then.
    """
    getter, _, selection, place, _ = item
    key = getter.path
    name = f"{layout.number}/{key}"
    if layout.inner is not None:
        axes = None if drop_axes or not is_basic(place) else layout.axes_of(selection)
        if axes is None:
            return None
        part = []
        for axis in axes:
            if len(axis) > 1:
                return None
            at, wanted, _ = axis[0]
            name = f"{name}/{at}"
            part.append(wanted)
        selection = tuple(part)
    kept = cache.get(name, object(), cache.now())
    if kept is None:
        return False
    try:
        scatter(target, place, kept.array, selection, drop_axes)
    finally:
        cache.room.unpin(kept)
    return True
