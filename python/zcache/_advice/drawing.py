"""Curves as SVG, without any library, and where sizes stand on an axis."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

_WIDTH, _HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 100, 12, 36
_LABEL: Final = 0.2
"""Room of a label, as a part of the axis."""
_COLORS: Final = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def places(sizes: Any, least: float) -> Any:
    """Where sizes stand on an axis: a doubling is 1, and 0 stands 1 before the `least` size above it."""
    above = np.log2(np.maximum(sizes, least))
    return above - np.maximum(1 - np.asarray(sizes) / least, 0)


def least_above_zero(sizes: NDArray[np.float64]) -> float:
    """The least size that is not 0; 1 where there is none."""
    return float(sizes[sizes > 0].min(initial=np.inf)) if sizes.any() else 1.0


def with_room(at: NDArray[np.float64], apart: float) -> list[int]:
    """Which of ascending places a label is written at: each is `apart` from the one before, as a part of all."""
    found: list[int] = []
    for number, place in enumerate(at.tolist()):
        if not found or place - at[found[-1]] >= apart * (at[-1] - at[0]) > 0:
            found.append(number)
    return found


def svg(
    sizes: NDArray[np.float64],
    curves: Mapping[str, Any],
    present: float,
    text_of: Callable[[float], str],
) -> str:
    """Hit ratios over sizes, with error bands and a line at the present size.

    Parameters
    ----------
    sizes : array of float
        Bytes, ascending.
    curves : mapping of str to Curve
        By name.
    present : float
        Bytes.
    text_of : callable
        How a size is written.
    """
    least = least_above_zero(sizes)
    at = places(sizes, least)
    low, high = float(at[0]), float(at[-1])

    def x(place: Any) -> Any:
        part = (place - low) / (high - low) if high > low else 0.5
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def y(ratio: Any) -> Any:
        return _TOP + (1 - np.clip(ratio, 0, 1)) * (_HEIGHT - _TOP - _BOTTOM)

    def points(across: Any, ratios: Any) -> str:
        pairs = zip(np.atleast_1d(across), np.atleast_1d(ratios), strict=True)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)

    across = x(at) if high > low else np.full(len(at), x(low))
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" role="img" aria-label="hit ratio by size" font-family="sans-serif" '
            'font-size="11" fill="currentColor">'
        )
    ]
    parts += [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}" '
        'stroke="currentColor" stroke-opacity="0.15"/>'
        f'<text x="{_LEFT - 6}" y="{y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}</text>'
        for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    parts += [
        f'<text x="{across[n]:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
        f"{escape(text_of(sizes[n]))}</text>"
        for n in with_room(at, _LABEL)
    ]
    if low <= (place := places(present, least)) <= high:
        here = x(place)
        parts.append(
            f'<line x1="{here:.1f}" x2="{here:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" '
            'stroke="currentColor" stroke-dasharray="2 3" stroke-opacity="0.6"/>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        color = _COLORS[number % len(_COLORS)]
        upper, lower = y(curve.hit_ratio + curve.error), y(curve.hit_ratio - curve.error)
        band = f"{points(across, upper)} {points(across[::-1], lower[::-1])}"
        label = _TOP + 14 + 16 * number
        parts.append(
            f'<polygon points="{band}" fill="{color}" fill-opacity="0.15"/>'
            f'<polyline points="{points(across, y(curve.hit_ratio))}" fill="none" stroke="{color}" '
            'stroke-width="2"/>'
            f'<line x1="{_WIDTH - _RIGHT + 12}" x2="{_WIDTH - _RIGHT + 30}" y1="{label - 4}" '
            f'y2="{label - 4}" stroke="{color}" stroke-width="2"/>'
            f'<text x="{_WIDTH - _RIGHT + 36}" y="{label}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])
