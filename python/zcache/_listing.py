"""A cache store that can only be asked what it holds: neither a directory nor a dict."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer.core import default_buffer_prototype
from zarr.storage import MemoryStore

from zcache._buffers import to_cpu_buffer
from zcache._directory import FORMAT, is_transient, not_ours, other_source, parse_stamp
from zcache._identity import innermost
from zcache._marks import DROPPED, RANGES, WRITING, key_of, mark, marked
from zcache._spans import is_encodable, is_reserved

if TYPE_CHECKING:
    from zarr.abc.store import Store

    from zcache._core import Index
    from zcache._standins import Unlisted

STAMP: Final = ".zcache/stamp.json"
_AT_ONCE: Final = 32
"""Sizes that are asked for at the same time."""


class NotOursError(ValueError):
    """The cache store belongs to somebody else."""


async def take_in(cache: Store, unlisted: Unlisted, source: str, *, adopt: bool) -> None:
    """Enter all that a cache store holds into an empty index, and delete what is outdated.

    Nobody tells when a value was written, so each is stale as soon as anything can be.

    Raises
    ------
    NotOursError
        If it belongs to somebody else.
    Exception
        Whatever the cache store raises.
    """
    names = [name async for name in cache.list()]
    values = [name for name in names if _is_value(name)]
    # What a store in memory holds ends with it, so a stamp would tell nobody anything.
    if not isinstance(innermost(cache), MemoryStore):
        values = await _check(cache, values, source, adopt=adopt)
    elif values and not adopt:
        raise NotOursError(not_ours(f"cache_store={cache!r}", values[0], source))
    limit = asyncio.Semaphore(_AT_ONCE)

    async def size(name: str) -> tuple[int, int, str] | None:
        async with limit:
            try:
                return 0, await cache.getsize(name), name
            except FileNotFoundError:
                return None

    found = await asyncio.gather(*map(size, values))
    index = unlisted.within
    index.adopt([value for value in found if value is not None])
    victims = unlisted.outdated()
    await _drop_marked(cache, index, names, values)
    dropped: list[int] = []
    try:
        for cell, name in victims:
            await cache.delete(name)
            dropped.append(cell)
    finally:
        index.settled(dropped, [cell for cell, _ in victims])


async def _drop_marked(cache: Store, index: Index, names: list[str], values: list[str]) -> None:
    """Delete what has a mark. What still cannot be deleted keeps it, counts, and is never served."""
    marks = [name for name in names if name.startswith((DROPPED, WRITING))]
    stays: set[str] = set()
    for name in marked(marks, values):
        for cell, victim in index.forget(key_of(name)):
            try:
                await cache.delete(victim)
            except Exception:  # noqa: BLE001 - whatever the cache store raises, it is tried again
                stays.add(victim)
                index.settled([], [cell])
            else:
                index.settled([cell], [])
    kept = {mark(kind, name) for kind in (DROPPED, WRITING) for name in stays}
    for name in marks:
        if name not in kept:
            with contextlib.suppress(Exception):
                await cache.delete(name)


def _is_value(name: str) -> bool:
    return is_encodable(name) and (name.startswith(RANGES) or not is_reserved(name))


async def _check(cache: Store, values: list[str], source: str, *, adopt: bool) -> list[str]:
    """See whose the store is, and make it ours if it is nobody's; returns what it then holds."""
    where = f"cache_store={cache!r}"
    text = await cache.get(STAMP, default_buffer_prototype())
    stamp: dict[str, Any] | None = None
    if text is not None:
        try:
            stamp = parse_stamp(text.to_bytes(), where, adopt=adopt, listed=True)
        except ValueError as refusal:
            raise NotOursError(str(refusal)) from None
    if stamp is not None and stamp["source"] == source:
        return values
    if stamp is None:
        if values and not adopt:
            raise NotOursError(not_ours(where, values[0], source))
    elif not is_transient(stamp):
        raise NotOursError(other_source(where, stamp, source))
    else:
        # What a source left that has ended with its process is of no use to anybody.
        for name in values:
            await cache.delete(name)
        values = []
    data = json.dumps({"zcache": FORMAT, "source": source, "listed": True}).encode()
    await cache.set(STAMP, to_cpu_buffer(data))
    return values
