"""Traces of the requests of Zarr readers: seeded generators, in numpy alone.

A trace is an array of keys (int64), in the order of the requests. `sizes_of` gives keys sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Keys = NDArray[np.int64]


def loop(keys: int = 4000, epochs: int = 10, *, seed: int = 0) -> Keys:
    """The same keys in the same order: sequential epochs, an animation."""
    del seed
    return np.tile(np.arange(keys), epochs)


def validated(
    keys: int = 3000, epochs: int = 8, rounds: int = 12, others: int = 3000, *, seed: int = 0
) -> Keys:
    """Epochs in an order of their own each, and a pass over other keys after every few."""
    rng = np.random.default_rng(seed)
    passed = keys + np.arange(others)
    parts = [[rng.permutation(keys) for _ in range(epochs)] + [passed] for _ in range(rounds)]
    return np.concatenate([one for part in parts for one in part])


def shuffled(keys: int = 4000, epochs: int = 10, *, seed: int = 0) -> Keys:
    """Each key once in each epoch, in another order each time: training."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(keys) for _ in range(epochs)])


def there_and_back(keys: int = 4000, epochs: int = 10, *, seed: int = 0) -> Keys:
    """Forwards, then backwards, and so on: back-propagation through time, a slider."""
    del seed
    forwards = np.arange(keys)
    return np.concatenate([forwards[:: 1 - 2 * (n % 2)] for n in range(epochs)])


def loops(lengths: Iterable[int], epochs: int) -> Keys:
    """Loops over the first keys: a few epochs over so many of them, then over another number."""
    return np.concatenate([np.tile(np.arange(length), epochs) for length in lengths])


def rolling(
    keys: int = 4000, width: int = 200, passes: int = 3, step: int = 8, *, seed: int = 0
) -> Keys:
    """A window that moves on by a few keys and reads all of its keys each time."""
    del seed
    starts = np.tile(np.arange(0, keys - width, step), passes)
    return (starts[:, None] + np.arange(width)).ravel()


def zipf(
    keys: int = 20_000, requests: int = 200_000, exponent: float = 0.9, *, seed: int = 0
) -> Keys:
    """Independent requests, the key of rank n with a share in proportion to n ** -exponent."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, keys + 1) ** -exponent
    names = random.permutation(keys)
    return names[random.choice(keys, requests, p=weights / weights.sum())]


def drifting(keys: int, requests: int, exponent: float, turns: int = 2, *, seed: int = 0) -> Keys:
    """Zipf's law with favourites that change little by little, all of them so many times in the trace."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, keys + 1) ** -exponent
    ranks = random.choice(keys, requests, p=weights / weights.sum())
    names = np.stack([random.permutation(keys) for _ in range(turns + 1)])
    # When each rank gets its next key.
    phase = random.random(keys)
    turn = (np.arange(requests) / requests * turns + phase[ranks]).astype(int)
    return names[turn, ranks]


def stack_distances(
    requests: int = 200_000, mean: float = 300.0, new: float = 0.03, *, seed: int = 0
) -> Keys:
    """Requests of which each repeats one from shortly before: what LRU is best at."""
    random = np.random.default_rng(seed)
    fresh = random.random(requests) < new
    back = random.geometric(1 / mean, requests)
    stack: list[int] = []
    trace = np.empty(requests, np.int64)
    made = 0
    for n in range(requests):
        if fresh[n] or back[n] > len(stack):
            key, made = made, made + 1
        else:
            key = stack.pop(-int(back[n]))
        stack.append(key)
        trace[n] = key
    return trace


def pan_and_zoom(
    requests: int = 200_000, width: int = 256, view: int = 6, *, seed: int = 0
) -> Keys:
    """A viewer of a pyramid of tiles: its view moves by a tile or so, zooms, and jumps now and then."""
    random = np.random.default_rng(seed)
    levels = int(np.log2(width)) - 2
    first = np.cumsum([0] + [(width >> level) ** 2 for level in range(levels)])
    level, x, y = 2, width / 8, width / 8
    parts: list[Keys] = []
    heading = 0.0
    total = 0
    while total < requests:
        action = random.random()
        side = width >> level
        if action < 0.02:
            x, y = random.random(2) * side
        elif action < 0.12:
            step = int(random.choice([-1, 1]))
            if 0 <= level + step < levels:
                level += step
                x, y = (x / 2, y / 2) if step > 0 else (x * 2, y * 2)
                side = width >> level
        else:
            heading += random.normal(0, 0.4)
            x, y = x + np.cos(heading), y + np.sin(heading)
        x, y = min(max(x, 0.0), side - view), min(max(y, 0.0), side - view)
        rows = np.arange(int(y), min(int(y) + view, side))
        columns = np.arange(int(x), min(int(x) + view, side))
        tiles = (first[level] + rows[:, None] * side + columns).ravel()
        parts.append(tiles)
        total += len(tiles)
    return np.concatenate(parts)[:requests]


def hot_set_and_scans(
    requests: int = 200_000, hot: int = 3000, scan: int = 1500, share: float = 0.4, *, seed: int = 0
) -> Keys:
    """Readers of a hot set, and now and then a pass over keys that nobody reads again."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, hot + 1) ** -0.6
    parts: list[Keys] = []
    total, fresh = 0, hot
    while total < requests:
        burst = int(scan * (1 - share) / share)
        scanned = np.arange(fresh, fresh + scan)
        read = random.choice(hot, burst, p=weights / weights.sum())
        mixed = np.concatenate([scanned, read])
        if random.random() < 0.7:
            where = np.sort(random.choice(scan + burst, scan, replace=False))
            mixed = np.empty(scan + burst, np.int64)
            rest = np.ones(scan + burst, bool)
            rest[where] = False
            mixed[where], mixed[rest] = scanned, read
        parts.append(mixed)
        fresh += scan
        total += len(mixed)
    return np.concatenate(parts)[:requests]


def points(requests: int = 200_000, sites: int = 1500, steps: int = 12, *, seed: int = 0) -> Keys:
    """Time series at points: all chunks in time of one tile, some tiles far more often than others."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, sites + 1) ** -1.1
    chosen = random.permutation(sites)[
        random.choice(sites, requests // steps, p=weights / weights.sum())
    ]
    return (chosen[:, None] * steps + np.arange(steps)).ravel()


def interleaved(*traces: Keys, seed: int = 0) -> Keys:
    """Readers at the same time, each with keys of its own."""
    random = np.random.default_rng(seed)
    order = np.repeat(np.arange(len(traces)), [len(trace) for trace in traces])
    random.shuffle(order)
    return merged(order, traces)


def merged(order: Keys, traces: Sequence[Keys]) -> Keys:
    """The requests of readers with keys of their own; `order` says for each whose it is."""
    mixed = np.empty(len(order), np.int64)
    offset = 0
    for n, trace in enumerate(traces):
        mixed[order == n] = trace + offset
        offset += int(trace.max()) + 1
    return mixed


def in_turn(*traces: Keys, seed: int = 0) -> Keys:
    """One kind of work after another, each with keys of its own."""
    del seed
    offsets = np.cumsum([0] + [int(trace.max()) + 1 for trace in traces])
    return np.concatenate([trace + offset for trace, offset in zip(traces, offsets, strict=False)])


def alternating(period: int, *traces: Keys) -> Keys:
    """So many requests of each in turn, each with keys of its own, as long as all have some."""
    offsets = np.cumsum([0] + [int(trace.max()) + 1 for trace in traces])
    shifted = [trace + offset for trace, offset in zip(traces, offsets, strict=False)]
    parts = min(len(trace) for trace in traces) // period
    slices = [slice(n * period, (n + 1) * period) for n in range(parts)]
    return np.concatenate([trace[part] for part in slices for trace in shifted])


def sizes_of(
    keys: Keys, *, mean: int = 100_000, sigma: float = 1.5, seed: int = 0
) -> NDArray[np.int64]:
    """Bytes of the value of each request: log-normal, the same for the same key."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.normal(np.log(mean) - sigma**2 / 2, sigma, int(keys.max()) + 1))
    return np.maximum(sizes, 200).astype(np.int64)[keys]
