"""Requests to simulate: a sample of them, or all that were recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zcache._core import Index

UNKNOWN: Final = 2**64 - 1
"""Stands for a size that is not known: the source has not given the value, or the cache was not told of it."""
_MOST_BESIDE: Final = 4
"""Blocks of folders for each value that are believed: values that are being written count as well."""
_FORMER, _SEEN, _OUTDATED, _HIT = 1, 2, 1 << 14, 1 << 15


@dataclass(frozen=True)
class Trace:
    """Requests in their order, those of which the sizes are not known left out.

    Attributes
    ----------
    keys : array of uint64, shape (n,)
        What stands for key and range, equal for equal ones.
    sizes : array of uint64, shape (n,)
        Bytes of the entries.
    hits : array of bool, shape (n,)
        Which were hits.
    outdated : array of bool, shape (n,)
        Which no cache of any size had served, because what it had was too old.
    seen_before : array of bool, shape (n,)
        Of which the key was requested before the first of these.
    former : int
        How many of these, at the beginning, only fill the simulated caches and do not count: where earlier requests
        are forgotten, one for each key of those, in their order, and then half of the requests that are left.
    rate : float
        Part of all keys that this is about, above 0 and up to 1.
    requests : float
        Requests of all keys, of which those that count are a sample.
    has_slid : bool
        Whether there were requests before the first of these.
    unit : int
        Bytes of a block of the cache store; 0 and 1 are the same.
    header : int
        Bytes that the cache store keeps before each value, in the same blocks.
    beside : int
        Bytes of folders or segments that the cache store has for each value, on average.
    unsized : int
        How many requests were left out because their sizes are not known.
    """

    keys: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    hits: NDArray[np.bool_]
    outdated: NDArray[np.bool_]
    seen_before: NDArray[np.bool_]
    former: int
    rate: float
    requests: float
    has_slid: bool
    unit: int
    header: int
    beside: int
    unsized: int

    def costs(self) -> NDArray[np.uint64]:
        """Bytes that each entry takes in the cache store."""
        if self.unit <= 1:
            return self.sizes
        unit, mib = np.uint64(self.unit), np.uint64(20)
        written = self.sizes + np.uint64(self.header)
        blocks = np.maximum((written + unit - np.uint64(1)) // unit, np.uint64(1))
        costs: NDArray[np.uint64] = (blocks + (self.sizes >> mib)) * unit
        return costs + np.uint64(self.beside)


def sampled(index: Index, header: int = 0) -> Trace:
    """The sample of an index, of all processes that share it."""
    requests, rate, has_slid, unit, *columns = index.sample()
    keys = np.frombuffer(columns[0], np.uint64)
    sizes = np.frombuffer(columns[1], np.uint64)
    flags = np.frombuffer(columns[2], np.uint16)
    known = sizes != UNKNOWN
    # What is left out for that is as frequent among those that are not sampled.
    former = _has(flags, _FORMER)
    total = int((~former).sum())
    share = int((known & ~former).sum()) / total if total else 1.0
    trace = Trace(
        keys=keys[known],
        sizes=sizes[known],
        hits=_has(flags[known], _HIT),
        outdated=_has(flags[known], _OUTDATED),
        seen_before=_has(flags[known], _SEEN),
        former=int((known & former).sum()),
        rate=rate,
        requests=requests * share,
        has_slid=has_slid,
        unit=unit,
        header=header,
        beside=0,
        unsized=int((~known & ~former).sum()),
    )
    return replace(trace, beside=_beside(index, trace))


def _beside(index: Index, trace: Trace) -> int:
    """Bytes that are cached beside the values, for each of them: what is more than their blocks."""
    entries = len(index)
    if trace.unit <= 1 or not entries or not len(trace.keys):
        return 0
    _, one_each = np.unique(trace.keys, return_index=True)
    # The index knows the bytes of its values, not those of their blocks: about as much more as for those of the sample.
    in_blocks = float((trace.costs() - trace.sizes)[one_each].mean())
    beside = (index.current_size - index.live_bytes) / entries - in_blocks
    return round(min(max(beside, 0.0), _MOST_BESIDE * trace.unit))


def complete(
    keys: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    hits: NDArray[np.bool_],
    unit: int,
    header: int = 0,
    beside: int = 0,
    outdated: NDArray[np.bool_] | None = None,
) -> Trace:
    """All requests that there were."""
    known = sizes != UNKNOWN
    unsized = int((~known).sum())
    keys, sizes, hits = keys[known], sizes[known], hits[known]
    nothing = np.zeros(len(keys), bool)
    outdated = nothing if outdated is None else outdated[known]
    return Trace(
        keys=keys,
        sizes=sizes,
        hits=hits,
        outdated=outdated,
        seen_before=nothing,
        former=0,
        rate=1.0,
        requests=float(len(keys)),
        has_slid=False,
        unit=unit,
        header=header,
        beside=beside,
        unsized=unsized,
    )


def _has(flags: NDArray[np.uint16], bit: int) -> NDArray[np.bool_]:
    found: Any = flags & np.uint16(bit) != 0
    return np.asarray(found, bool)
