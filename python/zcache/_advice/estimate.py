"""From the hits that a policy has on a sample to those that it would have on all requests."""

from __future__ import annotations

from math import exp, pi, sqrt
from typing import TYPE_CHECKING, Final

import numpy as np

from zcache._advice.trace import DROPPED, Simulator
from zcache._options import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from zcache._advice.trace import Trace

_DEVIATIONS: Final = 2.0
"""Standard deviations of an error band, which holds the truth 97 times of 100 in the benches (`docs/advice.md`)."""
_HOT: Final = 0.02
"""How likely it is that requests are missing for another reason than chance: the density of their number in standard
deviations, which may be any. With less, bands of traces with a key of 1 or 2 % of all requests hold the truth less
often; with more, those of loops are wider (docs/advice.md)."""
_BESIDE_OFF: Final = 0.25
"""Part by which the bytes beside values may be off where size and policy are the present ones."""
_OTHER_VALUES: Final = 2.0
"""By how many times they may be more or less for another policy, which keeps other values."""
_HOLES: Final = 2.0
"""By how many times they may be more in a pool that evicts: its segments have holes."""
_SMALLEST: Final = 64.0
"""By how many times they are more at most in a smaller cache: a path has only so many folders."""
_KEPT_FREE: Final = 8
"""Blocks that may be kept free for the next value: of its folders, and by which those may grow."""
_LEARNED: Final = 2
"""By how many times that counts more where what is kept follows from what was kept before."""


class Estimator:
    """Hit ratios of one trace.

    The number of all requests is known, and how many of them a sample should have: the difference to what it has
    is spread over its keys by how much they may have caused of it, which is the square of their requests
    (SHARDS-adj, Waldspurger et al. 2015, takes all of it for hits; that is off where all keys are alike).

    Parameters
    ----------
    trace : Trace
        The requests.
    present : int or None
        Bytes of the present bound, or of what is cached. None if neither is known: all that was requested.
    policy : str
        The present policy.

    Attributes
    ----------
    footprint : float
        Bytes that all take that was requested.
    present : int
        Bytes of the cache that there is.
    cold : float
        Part of the requests that count of which none before has brought the bytes.
    guessed : float
        Part of the requests that count of which a cache without a bound has the bytes from before the first request
        that is left: of a smaller one no one knows.
    """

    def __init__(self, trace: Trace, present: int | None, policy: str) -> None:
        self.trace = trace
        self._policy = policy
        self._is_on_disk = trace.unit > 1
        self._simulator = Simulator(trace)
        self._key = self._simulator.keys
        is_known = self._simulator.known()
        self._may_hit = is_known & ~trace.outdated
        is_request = trace.writes == 0
        self._counted = (np.arange(len(trace.keys)) >= trace.former) & is_request
        self._bytes = trace.sizes.astype(float)
        self._all = self._per_key(self._counted)
        self._squares = float(np.square(self._all).sum())
        kept = float(self._all.sum())
        self._missing = trace.requests * trace.rate - kept
        by_chance = sqrt((1 - trace.rate) * self._squares)
        self._alike, self._alike_variance = _part_of_chance(self._missing, by_chance)
        self._total = max(kept + self._missing, 1.0)
        self.cold = min(1.0, float((~is_known[self._counted]).sum()) / self._total)
        # No one knows which others were requested between those that are forgotten and the first that is left.
        later = Simulator(trace.select(slice(trace.earlier, None))).known()
        guessed = is_known & self._counted
        guessed[trace.earlier :] &= ~later
        self.guessed = min(1.0, float(guessed.sum()) / self._total)
        self._guessed_bytes = float(trace.sizes[guessed].sum()) / trace.rate
        self._apart, self._apart_bytes = self._apart_from_wholes()
        self._unseen, self._unseen_bytes = self._unseen_changes(is_known)
        bytes_of_keys = self._most_bytes((~is_known | ~is_request) & (trace.writes != DROPPED))
        whole = bytes_of_keys.sum()
        #: Relative standard deviation of the bytes of all sampled keys.
        self._scale = (
            float(np.sqrt((1 - trace.rate) * np.square(bytes_of_keys).sum()) / whole)
            if whole
            else 0.0
        )
        self.footprint = float(whole) / trace.rate
        self.present = min(round(self.footprint), MAX_BYTES) if present is None else present

    def _per_key(
        self, which: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Requests of each key; with weights the sum of those."""
        chosen = None if weights is None else weights[which]
        count = int(self._key.max(initial=-1)) + 1
        return np.asarray(np.bincount(self._key[which], chosen, count), float)

    def _most_bytes(self, brought: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The most bytes that an entry of each key takes that is among those that are brought."""
        most = np.zeros(int(self._key.max(initial=-1)) + 1)
        np.maximum.at(most, self._key, self.trace.costs().astype(float))
        return most[np.unique(self._key[brought])]

    def _apart_from_wholes(self) -> tuple[float, float]:
        """About which part of the requests, and how many bytes, are of ranges of values that are requested whole as well, but not sampled so.

        Those are as likely to be in the sample as any, so of those that are follows how many are not.
        """
        trace = self.trace
        is_range = (trace.ranges[:, 0] != 0) & self._counted
        if trace.rate >= 1 or not is_range.any():
            return 0.0, 0.0
        whole = trace.keys[trace.ranges[:, 0] == 0]
        beside = float((is_range & np.isin(trace.wholes, whole)).sum())
        apart = min(float(is_range.sum()) - beside, beside * (1 / trace.rate - 1))
        return apart / self._total, apart * float(trace.sizes[is_range].mean()) / trace.rate

    def _unseen_changes(self, is_known: NDArray[np.bool_]) -> tuple[float, float]:
        """About which part of the requests, and how many bytes, depend on changes of values of which no one knows when they took place.

        A request shows such a change by another size than before, or by a hit where nothing was cached. What it finds
        may have been there or not, and have taken the place of others since the request before, once each.
        """
        trace = self.trace
        # Of each key in its order.
        order = np.argsort(self._key, kind="stable")
        same = self._key[order[1:]] == self._key[order[:-1]]
        same &= trace.writes[order[:-1]] != DROPPED
        after, before = order[1:][same], order[:-1][same]
        changed = np.zeros(len(self._key), bool)
        changed[after] = trace.sizes[after] != trace.sizes[before]
        changed &= ~trace.outdated
        dropped = np.isin(self._key, self._key[trace.writes == DROPPED])
        changed |= trace.hits & ~is_known & dropped
        changed &= self._counted
        if not changed.any():
            return 0.0, 0.0
        larger = self._bytes.copy()
        larger[after] = np.maximum(larger[after], self._bytes[before])
        mean = max(float(self._bytes[self._counted].mean()), 1.0)
        requests = float((1 + larger[changed] / mean).sum())
        return requests / self._total, requests * mean / trace.rate

    def hit_ratio(self, policy: str, size: int) -> float:
        """What a policy would have had with so many bytes."""
        return self._ratio(self._hits(policy, size, self._costs(policy, size)))[0]

    def sure_hit_ratio(self, policy: str, size: int) -> float:
        """The same, with as much room for values on disk as they may take."""
        ratio = self.hit_ratio(policy, size)
        if not self._is_on_disk or not size:
            return ratio
        off = max(ratio - self._ratio(other)[0] for other in self._on_disk(policy, size))
        return ratio - self._times(policy) * max(off, 0.0)

    def at(self, policy: str, size: int) -> tuple[float, float, float, float]:
        """What a policy would have had: its hit ratio and the bytes that it misses, each with its error.

        Parameters
        ----------
        policy : str
            Its name.
        size : int
            Bytes of the cache.

        Returns
        -------
        hit_ratio, error : float
            From 0 to 1.
        missed, missed_error : float
            Bytes that the source sends.
        """
        hits = self._hits(policy, size, self._costs(policy, size))
        ratio, error = self._ratio(hits)
        missed, missed_error = self._missed_bytes(hits)
        error += self._apart + self._unseen
        missed_error += self._apart_bytes + self._unseen_bytes
        if size < self.footprint:
            error += self.guessed
            missed_error += self._guessed_bytes
        off = missed_off = 0.0
        for other in self._otherwise(policy, size):
            off = max(off, abs(self._ratio(other)[0] - ratio))
            missed_off = max(missed_off, abs(self._missed_bytes(other)[0] - missed))
        times = self._times(policy)
        error, missed_error = error + times * off, missed_error + times * missed_off
        return ratio, error, missed, missed_error

    def _hits(self, policy: str, size: float, costs: NDArray[np.uint64]) -> NDArray[np.bool_]:
        capacity = min(round(size * self.trace.rate), MAX_BYTES)
        found = self._simulator.hits(policy, capacity, costs)
        return np.asarray(found & ~self.trace.outdated, bool)

    def _costs(self, policy: str, size: int) -> NDArray[np.uint64]:
        return self.trace.costs(self._beside(policy, size)[1])

    def _otherwise(self, policy: str, size: int) -> Iterator[NDArray[np.bool_]]:
        """Hits where values take more or less room than was said, by as much as it may be.

        The sampled keys may be larger or smaller than all others, values take more or less beside their own blocks,
        and some blocks are kept free for the folders of the next value. What these come to is simulated at this very
        size: between others that were asked for there may be a cliff.
        """
        if not size or not (self._scale or self._is_on_disk):
            return
        yield from self._on_disk(policy, size, 1 + _DEVIATIONS * self._scale)

    def _on_disk(self, policy: str, size: int, scale: float = 1.0) -> Iterator[NDArray[np.bool_]]:
        """The same for values that are so many times as large, or as small."""
        kept = _KEPT_FREE * self.trace.unit if self._is_on_disk else 0
        least, likely, most = self._beside(policy, size)
        rooms = [(size * scale, least), (size / scale - kept, most)]
        if self._is_on_disk:
            rooms.append((size - kept / 2, likely))
        for room, beside in rooms:
            yield self._hits(policy, max(room, 0), self.trace.costs(beside))

    def _times(self, policy: str) -> int:
        return _LEARNED if policy == "adaptive" and self._is_on_disk else 1

    def _beside(self, policy: str, size: int) -> tuple[int, int, int]:
        """Bytes that a value takes beside its own blocks: the least, what is most likely, and the most.

        That is known as a mean of what is cached now. At another size it lies between as much for each value, as if
        each had folders of its own, and as much in all, as if all shared them. It is so with segments, which are larger
        in a larger pool. Most likely is the geometric mean of the ends.
        """
        held, now = min(size, self.footprint), min(self.present, self.footprint)
        times = min(max(now, 1.0) / max(held, 1.0), _SMALLEST)
        least, likely, most = min(times, 1.0), sqrt(times), max(times, 1.0)
        # What evicts nothing leaves no holes.
        had_holes = self._policy != "none" and now < self.footprint
        has_holes = policy != "none" and held < self.footprint
        if self.trace.header and had_holes and not has_holes:
            least, likely = least / _HOLES, likely / sqrt(_HOLES)
        if self.trace.header and has_holes and not had_holes:
            most, likely = most * _HOLES, likely * sqrt(_HOLES)
        if policy == self._policy or (self.trace.header and has_holes != had_holes):
            least, most = least * (1 - _BESIDE_OFF), most * (1 + _BESIDE_OFF)
        else:
            least, most = least / _OTHER_VALUES, most * _OTHER_VALUES
        known = self.trace.beside
        return round(known * least), round(known * likely), round(known * most)

    def best(self) -> float:
        """Hit ratio of a cache without a bound."""
        return self._ratio(self._may_hit)[0]

    def _ratio(self, hits: NDArray[np.bool_]) -> tuple[float, float]:
        # Keys with so many requests are hits at any size.
        misses, error = self._of_all(self._per_key(self._counted & ~hits))
        return min(max(1 - misses / self._total, 0.0), 1.0), error / self._total

    def _missed_bytes(self, hits: NDArray[np.bool_]) -> tuple[float, float]:
        missed, error = self._of_all(self._per_key(self._counted & ~hits, self._bytes))
        return max(missed, 0.0) / self.trace.rate, error / self.trace.rate

    def _of_all(self, missed: NDArray[np.float64]) -> tuple[float, float]:
        """The sum of what each sampled key has missed, with what the sample lacks of it, and the error of that."""
        slope = float((self._all * missed).sum()) / self._squares if self._squares else 0.0
        rest = missed - slope * self._all
        variance = (1 - self.trace.rate) * float(np.square(rest).sum())
        variance += self._alike_variance * slope**2
        return float(missed.sum()) + self._alike * slope, _DEVIATIONS * sqrt(variance)


def _part_of_chance(missing: float, deviation: float) -> tuple[float, float]:
    """How many of the requests that a sample lacks are lacking by chance, and the variance of that.

    The others are of keys with so many requests that none like them is in the sample. Within a few deviations
    either may be the reason, and it counts as likely as it is; what is far beyond them is of such keys, give or
    take what chance adds.
    """
    if missing <= 0 or deviation == 0:
        return missing, 0.0
    density = exp(-((missing / deviation) ** 2) / 2) / sqrt(2 * pi)
    likely = density / (density + _HOT)
    return likely * missing, (1 - likely) * (likely * missing**2 + deviation**2)
