"""`Advice`: what requests say about the size and the policy of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from zcache._advice.drawing import least_above_zero, places, svg, with_room
from zcache._core import DEFAULT_POLICY
from zcache.exceptions import MissingClientError, OptionTypeError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zcache._types import Policy

_LABEL: Final = 1 / 9
"""Room of a turned label, as a part of the axis."""
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True, eq=False)
class Curve:
    """What one policy would have made of the requests, at each of `Advice.sizes`.

    Attributes
    ----------
    hit_ratio : array of float, shape (sizes,)
        Hits by requests, 0 to 1.
    source_requests : array of float, shape (sizes,)
        Requests that the source would have answered: each miss is one.
    source_bytes : array of float, shape (sizes,)
        Bytes that the source would have sent.
    error : array of float, shape (sizes,)
        Two standard deviations of `hit_ratio`, either way, because only some keys were looked at: the truth lay
        within 97 times of 100 in the benches, 92 where documents lie beside chunks. In directories and pools on
        disk what is not known of the room that values take beside their bytes is added, and where values have changed
        their sizes, what is not known of when they did. 0 in memory where all keys were looked at and all changes were
        writes through the cache, unless `Advice.only_latest` or `Advice.unsized_share`.
    source_bytes_error : array of float, shape (sizes,)
        The same of `source_bytes`.
    """

    hit_ratio: NDArray[np.float64]
    source_requests: NDArray[np.float64]
    source_bytes: NDArray[np.float64]
    error: NDArray[np.float64]
    source_bytes_error: NDArray[np.float64]


def _none() -> Any:
    return np.zeros(0, np.uint64)


@dataclass(frozen=True, eq=False)
class Advice:
    """What requests say about the size and the policy of a cache; see `CacheStore.advise` and `replay`.

    It is false in a condition where there were too few requests; then `reason` says so, and all else is empty.
    ``print(advice)`` shows it as a table, a notebook with the curves.

    Attributes
    ----------
    reason : str
        Why there is no advice; "" where there is.
    requests : int
        Requests that it is about: reads of values that the source has.
    only_latest : bool
        Whether these are only the latest ones, because the sample has forgotten how the others went. All other
        fields are about these as well.
    sampled_requests : int
        How many of them were looked at.
    sampling_rate : float
        Part of all keys that was looked at, above 0 and up to 1.
    unsized_share : float
        Part of all requests that is left out, 0 to 1, because the sizes of their values are not known: they did not
        come, or another process has them on their way to the cache store.
    guessed_share : float
        Part of the requests, 0 to 1, that are the first known ones of what was cached or requested before: whether a
        cache smaller than all that was requested had served them is a guess, and part of the error.
    max_size : int
        Bytes: the present size. The bound, or, where there is none, what is cached. `sizes` follow from it or,
        where it is 0, from the bytes of all that was requested.
    is_bounded : bool
        Whether that is a bound.
    policy : str
        The present eviction policy.
    hit_ratio : float
        Hits by requests that it would have at `max_size`, 0 to 1.
    sizes : array of uint64
        Bytes, ascending.
    curves : dict of str to Curve
        For each policy that was asked for what it would have made of the requests, at each of these sizes.
    best_hit_ratio : float
        What a cache without a bound would have; the rest is cold, or was too old to be served.
    smallest_size : int or None
        Bytes with which the present policy has 90 % of `best_hit_ratio`: the least, within 2 %, where its hit ratio
        only rises with the size; else a few bytes more or less may have fewer hits. On disk it has that also where
        values take as much room as they may. None if none of `sizes` is sure to have so much.
    best_policy : str
        Of the present policy and those asked for, the one with the highest hit ratio at `max_size`.
    best_policy_gain : float
        How much higher that is than `hit_ratio`.
    cold_share : float
        Part of the misses at `max_size` that are first requests of their values, or of what a write has dropped, 0 to
        1. No size and no policy saves them.
    """

    reason: str = ""
    requests: int = 0
    only_latest: bool = False
    sampled_requests: int = 0
    sampling_rate: float = 1.0
    unsized_share: float = 0.0
    guessed_share: float = 0.0
    max_size: int = 0
    is_bounded: bool = False
    policy: Policy = DEFAULT_POLICY
    hit_ratio: float = 0.0
    sizes: NDArray[np.uint64] = field(default_factory=_none)
    curves: dict[str, Curve] = field(default_factory=dict)
    best_hit_ratio: float = 0.0
    smallest_size: int | None = None
    best_policy: Policy = DEFAULT_POLICY
    best_policy_gain: float = 0.0
    cold_share: float = 0.0

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"No advice: {self.reason}"
        head, rows = self._table()
        widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in [head, *rows]
        ]
        return "\n".join([*self._sentences()[:1], "", *lines, "", *self._sentences()[1:]])

    def __repr__(self) -> str:
        if self.reason:
            return f"Advice(reason={self.reason!r})"
        return (
            f"Advice(requests={self.requests}, max_size={self.max_size}, policy={self.policy!r}, "
            f"hit_ratio={self.hit_ratio:.3f}, smallest_size={self.smallest_size}, "
            f"best_policy={self.best_policy!r}, best_policy_gain={self.best_policy_gain:.3f}, "
            f"cold_share={self.cold_share:.3f})"
        )

    def _repr_html_(self) -> str:
        if self.reason:
            return f"<p>{escape(str(self))}</p>"
        head, rows = self._table()
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in self._sentences())
        return (
            f"<div>{svg(self.sizes.astype(float), self.curves, self.max_size, size_text)}{sentences}"
            f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the hit ratios over the sizes, with their error bands.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to. Default is None: a new figure.

        Returns
        -------
        matplotlib.axes.Axes
            Where it was drawn.

        Raises
        ------
        MissingClientError
            An `ImportError`: if a new figure is asked for and there is no matplotlib.
        OptionTypeError
            A `TypeError`: `ax` are no axes.
        UsageError
            A `RuntimeError`: there is no advice.
        """
        if self.reason:
            raise UsageError(f"there is nothing to plot: {self.reason}")
        if ax is not None and not hasattr(ax, "fill_between"):
            raise OptionTypeError(
                f"invalid ax: {ax!r}. Give matplotlib's Axes, such as plt.gca(), or None for a new figure."
            )
        if ax is None:
            try:
                from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - an extra
            except ImportError as error:
                raise MissingClientError(
                    "Advice.plot() needs matplotlib: pip install 'zarr-zcache[plot]'. Without it, print "
                    "the advice, or show it in a notebook."
                ) from error
            # Else the turned labels push that of the axis out.
            _, ax = plt.subplots(layout="constrained")
        sizes = self.sizes.astype(float)
        for name, curve in self.curves.items():
            (line,) = ax.plot(sizes, curve.hit_ratio, label=name)
            low, high = _band(curve)
            ax.fill_between(sizes, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        least = least_above_zero(sizes)
        if sizes.all():
            ax.set_xscale("log", base=2)
        else:
            # 0 stands where `places` says.
            ax.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)
        if self.max_size or not sizes.all():
            ax.axvline(self.max_size, color="gray", linestyle=":")
        shown = sizes[with_room(places(sizes, least), _LABEL)]
        ax.set_xticks(shown, [size_text(size) for size in shown], rotation=30)
        ax.set_ylim(0, 1)
        ax.set_xlabel("max_size")
        ax.set_ylabel("hit ratio")
        ax.legend()
        return ax

    # -------------------------------------------------------------- as text

    def _sentences(self) -> list[str]:
        size = size_text(self.max_size)
        of = "all of them" if self.sampling_rate >= 1 else f"from {self.sampled_requests:,} sampled"
        about = f"{self.requests:,} requests ({of})."
        if self.only_latest:
            about = f"The latest {about} Earlier ones are forgotten."
        if self.unsized_share:
            about += (
                f" {self.unsized_share:.1%} of all are left out, for their sizes are not known."
            )
        if self.guessed_share:
            about += (
                f" {self.guessed_share:.1%} are of values that were cached or requested before these; what smaller "
                "caches had made of those is a guess."
            )
        bound = "max_size" if self.is_bounded else "no max_size, and in use"
        told = [(f"{about} Now: {bound} {size}, {self.policy}, hit ratio {self.hit_ratio:.2f}.")]
        if self.smallest_size is None:
            told.append(
                f"None of these sizes is sure to take {self.policy} to 90 % of what can be had (a hit ratio of "
                f"{self.best_hit_ratio:.2f})."
            )
        else:
            told.append(
                f"With {size_text(self.smallest_size)}, {self.policy} has 90 % of what can be had (a hit ratio of "
                f"{self.best_hit_ratio:.2f})."
            )
        if not self.curves.keys() - {self.policy}:
            told.append("It was compared with no other policy.")
        elif self.best_policy == self.policy:
            told.append(f"At {size}, no other policy that it was compared with is better.")
        else:
            told.append(
                f"At {size}, {self.best_policy} is the best policy: its hit ratio is higher by "
                f"{self.best_policy_gain:.2f}."
            )
        told.append(
            f"{self.cold_share:.0%} of the misses are cold: first requests of a value, which nothing saves."
        )
        return told

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Of each size the hit ratios, and what is read from the source with one policy, best the present."""
        shown = self.policy if self.policy in self.curves else next(iter(self.curves))
        head = ["size", *self.curves, f"source requests ({shown})", "source bytes"]
        rows = []
        for at, size in enumerate(self.sizes):
            own = self.curves[shown]
            ratios = [_ratio(curve, at) for curve in self.curves.values()]
            mark = "* " if int(size) == self.max_size else ""
            rows.append(
                [
                    f"{mark}{size_text(size)}",
                    *ratios,
                    f"{own.source_requests[at]:,.0f}",
                    _bytes(own, at),
                ]
            )
        return head, rows


def _ratio(curve: Curve, at: int) -> str:
    error = curve.error[at]
    return f"{curve.hit_ratio[at]:.2f}" + (f" ± {error:.2f}" if error >= 0.005 else "")


def _bytes(curve: Curve, at: int) -> str:
    found, error = curve.source_bytes[at], curve.source_bytes_error[at]
    return size_text(found) + (f" ± {size_text(error)}" if error > 0.005 * found else "")


def _band(curve: Curve) -> tuple[Any, Any]:
    low = np.maximum(curve.hit_ratio - curve.error, 0)
    return low, np.minimum(curve.hit_ratio + curve.error, 1)


def size_text(size: float) -> str:
    """A size as people read it, such as ``"1.5 GiB"``."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3g} {_UNITS[unit]}"
