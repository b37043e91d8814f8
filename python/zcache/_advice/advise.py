"""The advice: curves for each policy, and what follows from them."""

from __future__ import annotations

from itertools import islice
from math import isqrt
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from zcache._advice.advice import Advice, Curve
from zcache._advice.estimate import Estimator
from zcache._core import DEFAULT_POLICY, POLICIES
from zcache._options import MAX_BYTES, listed, parse_size
from zcache.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from zcache._advice.trace import Trace
    from zcache._types import Policy

FEWEST: Final = 100
"""Requests below which nothing is said."""
GOOD: Final = 0.9
"""Part of what an unbounded cache would serve, which a size should reach."""
_STEPS: Final = tuple(2.0 ** (step / 2) for step in range(-8, 9))
"""Sizes that are looked at, as parts of the present one."""
_BISECTIONS: Final = 5
_MOST: Final = 10_000
"""Sizes, or policies, that may be asked for at once."""


def parse_policies(policies: object) -> tuple[Policy, ...]:
    """The policies to simulate, each once.

    Raises
    ------
    TypeError, ValueError
        If one of them is none.
    """
    if policies is None:
        return POLICIES
    names: list[Any] = [policies] if isinstance(policies, str) else _listed("policies", policies)
    for name in names:
        if not isinstance(name, str) or name not in POLICIES:
            kind = OptionValueError if isinstance(name, str) else OptionTypeError
            raise kind(
                f"invalid policies: {name!r}. Give a list of any of {listed(POLICIES, 'and')}."
            )
    if not names:
        raise OptionValueError(
            f"invalid policies: none given. Give a list of any of {listed(POLICIES, 'and')}."
        )
    return tuple(dict.fromkeys(names))


def parse_sizes(sizes: object) -> list[int] | None:
    """Sizes in bytes, ascending, each once; see `parse_size`.

    Raises
    ------
    TypeError, ValueError
        If one of them is no size.
    """
    if sizes is None:
        return None
    is_one = isinstance(sizes, (int, float, str, np.number))
    given: list[Any] = [sizes] if is_one else _listed("sizes", sizes)
    parsed = [parse_size(size, "sizes", none="") for size in given]
    if not parsed or None in parsed:
        raise OptionValueError(
            f'invalid sizes: {sizes!r}. Give a list of bytes, or of text such as "2 GiB".'
        )
    return sorted({size for size in parsed if size is not None})


def _listed(name: str, values: object) -> list[Any]:
    if isinstance(values, (bytes, bytearray, memoryview)):
        raise OptionTypeError(f"invalid {name}: {values!r}. Give text, not bytes, or a list.")
    try:
        each = iter(values)  # type: ignore[call-overload]
    except TypeError:
        raise OptionTypeError(f"invalid {name}: {values!r}. Give a list of them.") from None
    found = list(islice(each, _MOST + 1))
    if len(found) > _MOST:
        raise OptionValueError(
            f"invalid {name}: {values!r:.200} gives more than {_MOST:,}. Each is simulated: give fewer."
        )
    return found


def advise(
    trace: Trace,
    *,
    max_size: int | None,
    in_use: int | None = None,
    policy: Policy = DEFAULT_POLICY,
    sizes: Iterable[int] | None = None,
    policies: tuple[Policy, ...] = POLICIES,
    nothing: str = "",
) -> Advice:
    """Say what these requests would have come to.

    Parameters
    ----------
    trace : Trace
        The requests.
    max_size : int or None
        Bytes of the present bound; None where there is none.
    in_use : int, optional
        Bytes that are cached, which take its place there. Default is None: those of all that was requested.
    policy : str, optional
        The present policy. Default is that of a cache that was given none.
    sizes : iterable of int, optional
        Bytes, ascending. Default is None: from 1/16 to 16 times the present size or, where that is 0, the bytes
        of all that was requested.
    policies : tuple of str, optional
        What to simulate. Default is all.
    nothing : str, optional
        Why there may be too few requests. Default is "": they were just not made.
    """
    count = int((trace.writes[trace.former :] == 0).sum())
    if count < FEWEST:
        reason = f"too little traffic: {count} of at least {FEWEST} requests are known so far"
        if trace.unsized:
            reason += f", and {trace.unsized:,} without their sizes: their values have not come yet, or the cache takes none yet"
        elif nothing and not count:
            reason = nothing
        return Advice(reason=f"{reason}.")
    estimator = Estimator(trace, in_use if max_size is None else max_size, policy)
    base = estimator.present
    if not base and max_size is None:
        return Advice(
            reason="too little traffic: no bytes are cached, and there is no max_size to compare with."
        )
    if sizes is None:
        middle = base or estimator.footprint
        sizes = [min(max(1, round(middle * step)), MAX_BYTES) for step in _STEPS]
    # As numbers and not as floats, of which the greatest would be 2**64.
    at = np.array(sorted(set(sizes)), np.uint64)
    # Each may have been a hit or not.
    unsized = trace.unsized / (count + trace.unsized)
    curves: dict[str, Curve] = {}
    now: dict[Policy, float] = {}
    # The present one is what all others are compared with, whether its curve is wanted or not.
    for name in dict.fromkeys([*policies, policy]):
        found = np.array([estimator.at(name, size) for size in at.tolist()])
        ratios, missed = found[:, 0], np.round(found[:, 2], 6)
        # Without what a float makes of a whole number.
        misses = np.round((1 - ratios) * trace.requests, 6)
        error = np.minimum(found[:, 1] + unsized, 1.0)
        missed_error = found[:, 3] + missed * unsized / (1 - unsized)
        curves[name] = Curve(ratios, misses, missed, error, missed_error)
        now[name] = estimator.hit_ratio(name, base)
    ratio = now[policy]
    # Of two that are alike, the one that is in use.
    best = max(now, key=lambda name: (round(now[name], 6), name == policy))
    best_possible = estimator.best()
    return Advice(
        requests=round(trace.requests),
        only_latest=trace.has_slid,
        sampled_requests=count,
        sampling_rate=trace.rate,
        unsized_share=unsized,
        guessed_share=estimator.guessed,
        max_size=base,
        is_bounded=max_size is not None,
        policy=policy,
        hit_ratio=ratio,
        sizes=at,
        curves={name: curves[name] for name in policies},
        best_hit_ratio=best_possible,
        smallest_size=_smallest(
            estimator, policy, at, curves[policy].hit_ratio, best_possible * GOOD
        ),
        best_policy=best,
        best_policy_gain=now[best] - ratio,
        cold_share=min(1.0, estimator.cold / (1 - ratio)) if ratio < 1 else 0.0,
    )


def _smallest(
    estimator: Estimator,
    policy: str,
    sizes: NDArray[np.uint64],
    ratios: NDArray[np.float64],
    wanted: float,
) -> int | None:
    """The smallest size with this hit ratio, within 2 %; None if it is above all that were looked at.

    It is one that was simulated: where a curve also falls, the next byte may make a difference. On disk it has that hit
    ratio also where values take as much room as they may: a size on the edge of a cliff would often miss it.
    """

    def is_enough(size: int) -> bool:
        return estimator.sure_hit_ratio(policy, size) >= wanted - 1e-9

    low = high = 0
    for size, ratio in zip(sizes.tolist(), ratios.tolist(), strict=True):
        if ratio >= wanted - 1e-9 and is_enough(size):
            high = size
            break
        low = size
    else:
        return None
    # Below the smallest of them it may be enough as well.
    if low == 0 and (high == 0 or is_enough(0)):
        return 0
    halvings = np.log2(max(1.0, 2 * np.log2(high / max(low, 1))))
    for _ in range(_BISECTIONS + int(np.ceil(halvings))):
        if high - low <= 1:
            break
        middle = max(isqrt(max(low, 1) * high), low + 1)
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high
