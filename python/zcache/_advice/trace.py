"""Requests to simulate: a sample of them, or all that were recorded."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from math import inf
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from zcache._core import simulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zcache._core import Index

UNKNOWN: Final = 2**64 - 1
"""Stands for a size that is not known: the source has not given the value, or the cache was not told of it."""
_FORMER, _EARLIER, _DROPPED, _FILLED, _OUTDATED, _HIT = 1, 2, 4, 8, 1 << 14, 1 << 15
DROPPED: Final = 2
"""Kind of a step that is no request: a write has dropped what was cached of a key, ..."""
FILLED: Final = 3
"""... or has also put into its place what it has written."""


@dataclass(frozen=True)
class Requests:
    """Requests in their order: what they ask for, and what they have come to. Writes may stand between them.

    Attributes
    ----------
    keys : array of uint64, shape (n,)
        What stands for key and range, equal for equal ones.
    wholes : array of uint64, shape (n,)
        The same of the whole value; `keys` where that is asked for.
    ranges : array of uint64, shape (n, 3)
        Which bytes of it, as a `ByteRange`; of kind 0 where that is all.
    sizes : array of uint64, shape (n,)
        Bytes of the answers, as they were then.
    hits : array of bool, shape (n,)
        Which were hits.
    outdated : array of bool, shape (n,)
        Which no cache of any size had served: what it had was too old, or the value was being written.
    writes : array of uint8, shape (n,)
        0 for requests; for writes `DROPPED` or `FILLED`.
    """

    keys: NDArray[np.uint64]
    wholes: NDArray[np.uint64]
    ranges: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    hits: NDArray[np.bool_]
    outdated: NDArray[np.bool_]
    writes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, which: Any) -> Self:
        """Those that an index into arrays selects."""
        return replace(self, **{name: column[which] for name, column in self.columns().items()})

    def after(self, others: Requests) -> Self:
        """These, with others before them."""
        before, own = others.columns(), self.columns()
        return replace(self, **{name: np.concatenate([before[name], own[name]]) for name in own})

    def columns(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {column.name: getattr(self, column.name) for column in fields(Requests)}


@dataclass(frozen=True)
class Trace(Requests):
    """Requests to simulate, those of which the sizes are not known left out.

    Attributes
    ----------
    earlier : int
        How many of these, at the beginning, stand for what was requested or cached before the first of the others,
        one for each entry. They are part of `former`.
    former : int
        How many, at the beginning, only fill the simulated caches and do not count: the earlier ones and, where a
        sample has forgotten some, half of the requests that are left.
    rate : float
        Part of all keys that this is about, above 0 and up to 1.
    requests : float
        Requests of all keys, of which those that count are a sample.
    has_slid : bool
        Whether there were requests before the first of these that are forgotten.
    unit : int
        Bytes of a block of the cache store; 0 and 1 are the same.
    header : int
        Bytes that the cache store keeps before each value, in the same blocks.
    beside : int
        Bytes of folders or segments that the cache store has for each value, on average.
    unsized : int
        How many requests were left out because their sizes are not known.
    slices_like_python : bool
        Whether the source does, whatever the request: then a whole value serves all ranges of it.
    """

    earlier: int
    former: int
    rate: float
    requests: float
    has_slid: bool
    unit: int
    header: int
    beside: int
    unsized: int
    slices_like_python: bool

    def costs(self, beside: int | None = None) -> NDArray[np.uint64]:
        """Bytes that an entry takes in the cache store, for each request; with other bytes beside it, if they are given."""
        if self.unit <= 1:
            return self.sizes
        unit, mib = np.uint64(self.unit), np.uint64(20)
        written = self.sizes + np.uint64(self.header)
        blocks = np.maximum((written + unit - np.uint64(1)) // unit, np.uint64(1))
        costs: NDArray[np.uint64] = (blocks + (self.sizes >> mib)) * unit
        return costs + np.uint64(self.beside if beside is None else beside)


class Simulator:
    """Simulates caches that are asked these requests.

    Parameters
    ----------
    requests : Trace
        The requests.

    Attributes
    ----------
    keys : array of int, shape (n,)
        Their keys, numbered as they came, so that the same requests give the same advice, whatever their hashes.
    first : array of int
        The first request of each of these.
    """

    def __init__(self, requests: Trace) -> None:
        known, first, of_sorted = np.unique(requests.keys, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        self.keys: NDArray[np.int64] = rank[of_sorted]
        self.first = np.sort(first)
        self._keys = self.keys.astype(np.uint64).tobytes()
        self._kinds = np.where(requests.writes, requests.writes, requests.outdated).astype(np.uint8)
        self._parts, self._slices = b"", requests.slices_like_python
        self._lens = requests.sizes.tobytes()
        ranges = requests.ranges[self.first]
        if ranges[:, 0].any():
            wholes = requests.wholes[self.first]
            at = np.minimum(np.searchsorted(known, wholes), len(known) - 1)
            # Of values that are never requested as a whole there is none; numbers above all others stand for these.
            _, others = np.unique(wholes, return_inverse=True)
            numbers = np.where(known[at] == wholes, rank[at], len(known) + others)
            parts = [numbers[:, None], ranges]
            self._parts = np.hstack([part.astype(np.uint64) for part in parts]).tobytes()

    def hits(self, policy: str, capacity: int, costs: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of them a cache of so many bytes serves, where none is too old."""
        served = simulate(
            policy,
            capacity,
            self._keys,
            costs.tobytes(),
            self._parts,
            self._slices,
            self._kinds.tobytes(),
            self._lens,
        )
        return np.frombuffer(served, bool)

    def known(self) -> NDArray[np.bool_]:
        """Which of them a cache without a bound serves: all but those of which none before has brought the bytes."""
        return self.hits("none", UNKNOWN, np.zeros(len(self.keys), np.uint64))


def sampled(index: Index, header: int = 0, *, slices_like_python: bool = True) -> Trace:
    """The sample of an index, of all processes that share it."""
    total, rate, has_slid, (unit, beside), *columns = index.sample()
    keys, sizes, wholes, ranges = (
        np.frombuffer(columns[number], np.uint64) for number in (0, 1, 3, 4)
    )
    flags = np.frombuffer(columns[2], np.uint16)
    dropped, filled = _has(flags, _DROPPED), _has(flags, _FILLED)
    requests = Requests(
        keys=keys,
        wholes=wholes,
        ranges=ranges.reshape(-1, 3),
        sizes=np.where(dropped, np.uint64(0), sizes),
        hits=_has(flags, _HIT),
        outdated=_has(flags, _OUTDATED),
        writes=np.select([dropped, filled], [DROPPED, FILLED], 0).astype(np.uint8),
    )
    known = dropped | (sizes != UNKNOWN)
    # What is left out for that is as frequent among those that are not sampled.
    former, earlier = _has(flags, _FORMER), _has(flags, _EARLIER)
    counts = ~former & (requests.writes == 0)
    counted = int(counts.sum())
    share = int((known & counts).sum()) / counted if counted else 1.0
    return _with_earlier(
        Trace(
            **requests.select(known).columns(),
            earlier=int((known & earlier).sum()),
            former=int((known & former).sum()),
            rate=rate,
            requests=total * share,
            has_slid=has_slid,
            unit=unit,
            header=header,
            beside=beside,
            unsized=int((~known & counts).sum()),
            slices_like_python=slices_like_python,
        )
    )


def complete(
    requests: Requests,
    unit: int,
    header: int = 0,
    beside: int = 0,
    served_by: Requests | None = None,
    *,
    slices_like_python: bool = True,
) -> Trace:
    """All requests that there were; those of what has served them as well, where that is known."""
    known = requests.sizes != UNKNOWN
    trace = Trace(
        **requests.select(known).columns(),
        earlier=0,
        former=0,
        rate=1.0,
        requests=float(known.sum()),
        has_slid=False,
        unit=unit,
        header=header,
        beside=beside,
        unsized=int((~known).sum()),
        slices_like_python=slices_like_python,
    )
    return _with_earlier(trace, served_by and served_by.select(known))


def _with_earlier(trace: Trace, served_by: Requests | None = None) -> Trace:
    """The same, after what was cached before: what has served a hit, and was not asked for until then.

    Where that is not known, it is what was asked for, unless it lies in a range that was.
    """
    simulator = Simulator(trace)
    warm = np.flatnonzero(trace.hits & ~simulator.known())
    if served_by is None:
        served_by, warm = trace, _without_parts(trace, warm)
    asked = dict(zip(trace.keys[simulator.first].tolist(), simulator.first.tolist(), strict=True))
    before: dict[int, int] = {}
    for number, key in zip(warm.tolist(), served_by.keys[warm].tolist(), strict=True):
        if asked.get(key, number) >= number:
            before.setdefault(key, number)
    return replace(
        trace.after(served_by.select(np.array(list(before.values()), int))),
        earlier=trace.earlier + len(before),
        former=trace.former + len(before),
    )


def _without_parts(trace: Trace, numbers: NDArray[np.intp]) -> NDArray[np.intp]:
    """These requests without those of ranges that lie in others of the same value, requested before."""
    left = set(numbers.tolist())
    of_parts = numbers[trace.ranges[numbers, 0] != 0]
    same = np.isin(trace.wholes, trace.wholes[of_parts]) & (trace.ranges[:, 0] != 0)
    brought: dict[tuple[int, bool], _Ranges] = defaultdict(_Ranges)
    for number in np.flatnonzero(same).tolist():
        kind, start, end = trace.ranges[number].tolist()
        size = int(trace.sizes[number])
        named = {1: end - start, 2: size, 3: start}[kind]
        # Of the last bytes it is known only how many they are.
        first, last = (0, size) if kind == 3 else (start, inf if kind == 2 else start + size)
        lies_in_another = not brought[int(trace.wholes[number]), kind == 3].add(first, last)
        # What the value cut off, or has nothing of, is served by no other range.
        if lies_in_another and named == size > 0:
            left.discard(number)
    return np.array(sorted(left), np.intp)


class _Ranges:
    """Byte ranges, none of which lies in another: so they are in the order of both their ends."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[float] = []

    def add(self, start: int, end: float) -> bool:
        """Add one; False, if it lies in one of them."""
        before = bisect_right(self._starts, start)
        if before and self._ends[before - 1] >= end:
            return False
        at = bisect_left(self._starts, start)
        past = max(at, bisect_right(self._ends, end))
        self._starts[at:past], self._ends[at:past] = [start], [end]
        return True


def _has(flags: NDArray[np.uint16], bit: int) -> NDArray[np.bool_]:
    found: Any = flags & np.uint16(bit) != 0
    return np.asarray(found, bool)
