"""Kinds of traces that "adaptive" was not made with: what `policies.py --held-out` compares policies on.

Nothing was chosen by what they show. A change that is chosen with them needs others to be judged by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import traces
from traces import Keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Make = Callable[[int], Keys]

REQUESTS = 100_000
"""At most so many in a trace."""


def loops_of_random_length(keys: int, epochs: int, least: float, *, seed: int) -> Keys:
    """Loops over the first keys, over another part of them each time: from `least` to all."""
    random = np.random.default_rng(seed)
    lengths = keys * random.uniform(least, 1, epochs)
    return np.concatenate([np.arange(int(length)) for length in lengths])


def loops_from_elsewhere(keys: int, epochs: int, *, seed: int) -> Keys:
    """The same loop, which starts at another key each time."""
    random = np.random.default_rng(seed)
    starts = random.integers(keys, size=epochs)
    return ((starts[:, None] + np.arange(keys)) % keys).ravel()


def loops_with_jitter(keys: int, epochs: int, distance: int, *, seed: int) -> Keys:
    """A loop whose requests overtake each other within a distance, as those of several threads do."""
    random = np.random.default_rng(seed)
    when = np.arange(keys) + distance * random.random((epochs, keys))
    return np.argsort(when, axis=1).ravel()


def _grid(side: int) -> Keys:
    return np.arange(side * side).reshape(side, side)


def neighbourhoods(side: int, rounds: int) -> Keys:
    """The blocks of an array by rows, by columns, and each with its neighbours (`map_overlap` of dask)."""
    blocks = _grid(side)
    around = [
        blocks[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].ravel()
        for row in range(side)
        for column in range(side)
    ]
    return np.tile(np.concatenate([blocks.ravel(), blocks.T.ravel(), *around]), rounds)


def with_transposed(side: int, rounds: int) -> Keys:
    """Each block of an array with one of another, transposed array: `a + b.T`, block by block."""
    left = _grid(side)
    right = left.size + left.T
    return np.tile(np.stack([left.ravel(), right.ravel()], axis=1).ravel(), rounds)


def product(side: int, rounds: int) -> Keys:
    """A product of matrices: for each block of the result a row of blocks of one and a column of the other."""
    left = _grid(side)
    right = left.size + left
    pairs = [
        np.stack([left[row], right[:, column]], axis=1).ravel()
        for row in range(side)
        for column in range(side)
    ]
    return np.tile(np.concatenate(pairs), rounds)


def rechunked(side: int, ratio: float, rounds: int) -> Keys:
    """New chunks from the old ones that they overlap, by rows and by columns in turn."""
    old = _grid(side)
    new = int(side / ratio)
    edges = [slice(int(n * ratio), int(np.ceil((n + 1) * ratio))) for n in range(new)]
    by_rows = [old[row, column].ravel() for row in edges for column in edges]
    by_columns = [old[row, column].ravel() for column in edges for row in edges]
    return np.concatenate([part for n in range(rounds) for part in (by_rows, by_columns)[n % 2]])


def diagonals(starts: int, leads: int, passes: int) -> Keys:
    """Forecasts for each day, one from each start before it (start by lead), and every fourth day a whole one."""
    forecasts = np.arange(starts * leads).reshape(starts, leads)
    lead = np.arange(leads)
    parts = []
    for day in range(leads, starts):
        parts.append(forecasts[day - lead, lead])
        if day % 4 == 0:
            parts.append(forecasts[day])
    return np.tile(np.concatenate(parts), passes)


def growing(days: int, chunks: int, window: int, whole: int | None) -> Keys:
    """Data that grows by some chunks a day: the last days are read again each day, and all every so often."""
    parts = []
    for day in range(1, days):
        parts.append(np.arange(max(day - window, 0) * chunks, day * chunks))
        if whole and day % whole == 0:
            parts.append(np.arange(day * chunks))
    return np.concatenate(parts)


def climatology(years: int, around: int, step: int, passes: int) -> Keys:
    """For every few days of the year the days around it, in all years."""
    days = np.arange(0, 365, step)
    windows = (days[:, None] + np.arange(-around, around + 1)) % 365
    first = 365 * np.arange(years)
    return np.tile((windows[:, None, :] + first[:, None]).ravel(), passes)


def z_stack(slices: int, tiles: int, sessions: int, *, seed: int) -> Keys:
    """A viewer of a stack: it starts somewhere, often near the middle, and scrolls, more down than up."""
    random = np.random.default_rng(seed)
    preview = slices * tiles + np.arange(20)
    parts = []
    for _ in range(sessions):
        at = random.normal(slices / 2, slices / 4)
        for step in random.choice([-1, 1], 60, p=[0.3, 0.7]):
            at = float(np.clip(at + step, 0, slices - 1))
            parts.append(int(at) * tiles + np.arange(tiles))
        parts.append(preview)
    return np.concatenate(parts)


def animation(frames: int, tiles: int, *, seed: int) -> Keys:
    """Forward, pause (the same frame again), replay, jump."""
    random = np.random.default_rng(seed)
    parts: list[Keys] = []
    frame = total = 0
    while total < REQUESTS:
        action = random.random()
        if action < 0.5:
            shown = frame + np.arange(random.integers(20, 200))
        elif action < 0.7:
            shown = np.full(random.integers(1, 8), frame)
        elif action < 0.9:
            length = int(random.integers(30, 300))
            shown = max(frame - length, 0) + np.arange(length)
        else:
            shown = random.integers(frames, size=1)
        shown = shown % frames
        frame = int(shown[-1])
        parts.append((shown[:, None] * tiles + np.arange(tiles)).ravel())
        total += parts[-1].size
    return np.concatenate(parts)[:REQUESTS]


def views_in_loops(frames: int, tiles: int, view: int, *, seed: int) -> Keys:
    """An animation of a part of the tiles, two to five times, then of another part."""
    random = np.random.default_rng(seed)
    parts: list[Keys] = []
    total = 0
    while total < REQUESTS:
        shown = random.integers(tiles - view) + np.arange(view)
        once = (np.arange(frames)[:, None] * tiles + shown).ravel()
        parts.append(np.tile(once, random.integers(2, 6)))
        total += parts[-1].size
    return np.concatenate(parts)[:REQUESTS]


def one_hit_wonders(keys: int, share: float, exponent: float, *, seed: int) -> Keys:
    """Zipf's law, and a share of the requests for keys that nobody reads again."""
    random = np.random.default_rng(seed)
    trace = traces.zipf(keys, REQUESTS, exponent, seed=seed)
    once = random.random(len(trace)) < share
    trace[once] = keys + np.arange(once.sum())
    return trace


def in_bursts(parts: Sequence[Keys], mean: float, *, seed: int) -> Keys:
    """Readers at the same time, each with keys of its own, by bursts of so many requests in the mean."""
    random = np.random.default_rng(seed)
    order: list[NDArray[np.int64]] = []
    left = np.array([len(part) for part in parts])
    while left.any():
        reader = int(random.choice(len(parts), p=left / left.sum()))
        burst = min(int(random.geometric(1 / mean)), int(left[reader]))
        order.append(np.full(burst, reader))
        left[reader] -= burst
    return traces.merged(np.concatenate(order), parts)


def viewer_and_trainer(keys: int, *, seed: int) -> Keys:
    """Panning and zooming beside shuffled epochs."""
    viewer = traces.pan_and_zoom(45_000, 128, 5, seed=seed)
    trainer = traces.shuffled(keys, 48_000 // keys, seed=seed)
    return in_bursts([viewer, trainer], 50, seed=seed)


def three_users(keys: int, *, seed: int) -> Keys:
    """A loop, Zipf's law, and panning and zooming, in one cache."""
    loop = traces.loop(keys, 33_000 // keys)
    favourites = traces.zipf(2 * keys, 33_000, 1.0, seed=seed)
    viewer = traces.pan_and_zoom(33_000, 128, 5, seed=seed)
    return in_bursts([loop, favourites, viewer], 20, seed=seed)


KINDS: dict[str, dict[str, Make]] = {
    "loops of random length": {
        f"{keys} from {least:.0%}": lambda seed, keys=keys, least=least: loops_of_random_length(
            keys, 80_000 // keys, least, seed=seed
        )
        for keys, least in ((4000, 0.5), (1000, 0.2))
    },
    "loops from elsewhere": {
        f"{keys}": lambda seed, keys=keys: loops_from_elsewhere(keys, 80_000 // keys, seed=seed)
        for keys in (3000, 500)
    },
    "loops with jitter": {
        f"{keys} by {distance}": lambda seed, keys=keys, distance=distance: loops_with_jitter(
            keys, REQUESTS // keys, distance, seed=seed
        )
        for keys, distance in ((3000, 64), (2000, 600), (20_000, 256))
    },
    "blocks of arrays": {
        "neighbours": lambda _: neighbourhoods(40, 5),
        "with transposed": lambda _: with_transposed(40, 25),
        "product": lambda _: product(24, 3),
    },
    "rechunking": {
        f"by {ratio}": lambda _, ratio=ratio: rechunked(60, ratio, 8) for ratio in (1.6, 2.5)
    },
    "diagonals": {
        f"{starts} by {leads}": lambda _, starts=starts, leads=leads: diagonals(starts, leads, 6)
        for starts, leads in ((200, 40), (400, 20))
    },
    "growing data": {
        "12 a day": lambda _: growing(250, 12, 30, None),
        "8 a day, all each 90": lambda _: growing(380, 8, 30, 90),
    },
    "climatology": {
        "30 years, 15 days": lambda _: climatology(30, 7, 4, 2),
        "14 years, 31 days": lambda _: climatology(14, 15, 5, 3),
    },
    "z-stack": {
        f"{slices} of {tiles}": lambda seed, slices=slices, tiles=tiles: z_stack(
            slices, tiles, 120, seed=seed
        )
        for slices, tiles in ((400, 9), (1200, 4))
    },
    "animation": {
        f"{frames} of {tiles}": lambda seed, frames=frames, tiles=tiles: animation(
            frames, tiles, seed=seed
        )
        for frames, tiles in ((1200, 6), (400, 6))
    },
    "one view after another": {
        f"{frames} frames": lambda seed, frames=frames: views_in_loops(frames, 40, 6, seed=seed)
        for frames in (300, 60)
    },
    "one-hit wonders": {
        f"{share:.0%}, zipf {exponent}": lambda seed, share=share, exponent=exponent: (
            one_hit_wonders(3000, share, exponent, seed=seed)
        )
        for share, exponent in ((0.5, 0.9), (0.8, 0.7), (0.3, 0.3))
    },
    "viewer beside trainer": {
        f"{keys}": lambda seed, keys=keys: viewer_and_trainer(keys, seed=seed)
        for keys in (4000, 1000)
    },
    "three users": {
        f"{keys}": lambda seed, keys=keys: three_users(keys, seed=seed) for keys in (2500, 800)
    },
}
