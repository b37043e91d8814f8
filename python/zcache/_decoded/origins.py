"""Where decoded chunks come from: what the byte cache says of the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zcache._decoded.chunk import Origin
from zcache._index.resolution import RETRYABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zcache._ages import MaxAges
    from zcache._backends.base import Backend
    from zcache._core import Index
    from zcache._index.counters import Counters

TOUCH: Final = 1.0
"""Seconds after which the cached ranges of a shard count as used again, if its decoded chunks are."""


class Origins:
    """Asks the index of the byte cache.

    Parameters
    ----------
    backend : Backend
        Of the byte cache.
    ages : MaxAges
        How old bytes may be for their chunks to be served.
    counters : Counters
        Of the byte cache.
    """

    def __init__(self, backend: Backend, ages: MaxAges, counters: Counters) -> None:
        self._backend = backend
        self._handle = backend.shared.handle
        self._age_of = ages.of
        self._is_ageless = ages.is_ageless
        self._counters = counters
        self._index = self._handle.index

    def use_index(self, index: Index) -> bool:
        """Ask this index from now on. Returns whether it is another one."""
        is_other = index is not self._index
        self._index = index
        return is_other

    @property
    def is_usable(self) -> bool:
        """Whether the byte cache knows of all changes: else nothing may be served, nor kept.

        Asked once for each read.
        """
        return self._handle.is_open and self._backend.hears_of_changes

    def begin(self, keys: list[str], now: float) -> list[Origin | None]:
        """Where bytes come from that are read from now on; None where their chunks must not be kept."""
        stale = self._counters.stale
        ages = [self._age_of(key) for key in keys]
        try:
            stamps = self._index.begin_decodes(keys, now, ages)
        except RETRYABLE:
            return [None] * len(keys)
        return [
            None if stamp is None else Origin(key, now, stale, stamp, age)
            for key, stamp, age in zip(keys, stamps, ages, strict=True)
        ]

    def is_current(self, origin: Origin, landed: float, now: float) -> bool | None:
        """Whether what comes from there may be served; None where the index does not say."""
        touch = not 0 <= now - origin.touched < TOUCH
        try:
            is_current = self._index.is_current(
                origin.key,
                origin.version,
                origin.fetched,
                landed,
                touch,
                now,
                origin.max_age,
            )
        except RETRYABLE:
            return None
        if touch:
            origin.touched = now
        return is_current

    def expire(self, key: str) -> bool:
        """Whether values of a key do; else it has one, for ever."""
        return self._age_of(key) is not None

    def is_on_its_way(self, origin: Origin) -> bool:
        """Whether bytes are being read from the source that may come from there."""
        try:
            return self._index.is_in_flight(origin.key)
        except RETRYABLE:
            return False

    @property
    def lapse_unheard(self) -> bool:
        """Whether chunks may cease to be current without a change that this process makes, or is told of."""
        return self._index.shared or not self._is_ageless

    def stay_current(self, origins: Sequence[Origin], now: float) -> list[bool]:
        """Whether what comes from each of them may be served, or the index does not say. No use of them counts."""
        asked = [(o.key, o.version, o.fetched, o.landed, o.max_age) for o in origins]
        try:
            return self._index.stay_current(asked, now)
        except RETRYABLE:
            return [True] * len(origins)

    def may_be_stale(self, origin: Origin) -> bool:
        """Whether values past their age have been read since, in place of an error of the source."""
        return origin.stale != self._counters.stale
