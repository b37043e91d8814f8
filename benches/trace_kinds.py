"""Many kinds of traces, each with several shapes: what `policies.py --wide` compares policies on.

A trace is made from its kind, its shape and a seed. `SIZES` gives its keys sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import traces
from traces import Keys, in_turn, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[[int], Keys]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
"""Sizes of a cache, in parts of the bytes of all distinct keys."""


def _zipf(keys: int, requests: int, exponent: float = 0.9) -> Make:
    return lambda seed: traces.zipf(keys, requests, exponent, seed=seed)


def _view(requests: int, width: int = 128, view: int = 6) -> Make:
    return lambda seed: traces.pan_and_zoom(requests, width, view, seed=seed)


def _loop(keys: int, epochs: int) -> Make:
    return lambda seed: traces.loop(keys, epochs, seed=seed)


def _shuffled(keys: int, epochs: int) -> Make:
    return lambda seed: traces.shuffled(keys, epochs, seed=seed)


def _in_turn(*makes: Make) -> Make:
    return lambda seed: in_turn(*(make(seed + n) for n, make in enumerate(makes)))


def _beside(*makes: Make) -> Make:
    return lambda seed: interleaved(*(make(seed + n) for n, make in enumerate(makes)), seed=seed)


def _alternating(period: int, *makes: Make) -> Make:
    return lambda seed: traces.alternating(period, *(make(seed) for make in makes))


KINDS: dict[str, dict[str, Make]] = {
    "loop": {f"{keys}": _loop(keys, 60_000 // keys) for keys in (400, 1500, 6000)},
    "shuffled epochs": {f"{keys}": _shuffled(keys, 60_000 // keys) for keys in (400, 1500, 6000)},
    "epochs and validation": {
        f"{keys}, {epochs} epochs, {others}": lambda seed, keys=keys, epochs=epochs, others=others: (
            traces.validated(keys, epochs, 80_000 // (keys * epochs + others), others, seed=seed)
        )
        for keys, epochs, others in ((3000, 2, 1000), (1000, 8, 1000), (1400, 4, 4200))
    },
    "there and back": {
        f"{keys}": lambda seed, keys=keys: traces.there_and_back(keys, 50_000 // keys, seed=seed)
        for keys in (300, 4000)
    },
    "rolling window": {
        f"{width} by {step}": lambda seed, width=width, step=step: traces.rolling(
            3000, width, 3, step, seed=seed
        )
        for width, step in ((20, 2), (60, 8), (150, 8), (400, 50), (1000, 200))
    },
    "loop that changes size": {
        "shrinks": lambda _: traces.loops(range(4000, 400, -400), 4),
        "shrinks once": lambda _: traces.loops((3000, 1000), 15),
        "grows": lambda _: traces.loops(range(400, 4000, 400), 4),
        "grows once": lambda _: traces.loops((1000, 3000), 15),
    },
    "zipf": {
        f"{exponent}": _zipf(8000, 80_000, exponent) for exponent in (0.5, 0.7, 0.9, 1.1, 1.3)
    },
    "other zipf": {
        "three": _in_turn(*[_zipf(6000, 30_000)] * 3),
        "three, steep": _in_turn(*[_zipf(6000, 30_000, 1.1)] * 3),
        "eight": _in_turn(*[_zipf(3000, 12_000, 1.0)] * 8),
        "drifting": lambda seed: traces.drifting(8000, 90_000, 0.9, seed=seed),
    },
    "shortly before": {
        "far": lambda seed: traces.stack_distances(60_000, 300, seed=seed),
        "near": lambda seed: traces.stack_distances(60_000, 50, 0.1, seed=seed),
    },
    "pan and zoom": {
        "small view": _view(60_000, 128, 3),
        "view": _view(80_000, 256, 6),
        "large view": _view(80_000, 128, 10),
    },
    "hot set and scans": {
        f"{hot} {scan} {share}": lambda seed, hot=hot, scan=scan, share=share: (
            traces.hot_set_and_scans(80_000, hot, scan, share, seed=seed)
        )
        for hot, scan, share in ((3000, 1500, 0.4), (1000, 4000, 0.5), (500, 300, 0.2))
    },
    "time series at points": {
        f"{sites} of {steps}": lambda seed, sites=sites, steps=steps: traces.points(
            80_000, sites, steps, seed=seed
        )
        for sites, steps in ((1500, 12), (400, 40), (6000, 3))
    },
    "two at once": {
        "loop, zipf": _beside(_loop(3000, 12), _zipf(6000, 40_000)),
        "loop, view": _beside(_loop(3000, 15), _view(45_000)),
        "shuffled, zipf": _beside(_shuffled(3000, 12), _zipf(6000, 40_000)),
        "shuffled, view": _beside(_shuffled(3000, 12), _view(40_000)),
        "view, zipf": _beside(_view(40_000), _zipf(6000, 40_000)),
        "loop, rolling": _beside(_loop(3000, 12), lambda _: traces.rolling(1500, 60, 3, 8)),
    },
    "another after a while": {
        "loop, view, loop": _in_turn(_loop(3000, 10), _view(40_000), _loop(3000, 10)),
        "zipf, loop, zipf": _in_turn(_zipf(6000, 40_000), _loop(3000, 12), _zipf(6000, 40_000)),
        "shuffled, other": _in_turn(*[_shuffled(2500, 10)] * 3),
        "shuffled, points": _in_turn(
            _shuffled(2500, 12), lambda seed: traces.points(40_000, 500, 12, seed=seed)
        ),
        "new data, two epochs": _in_turn(*[_shuffled(2000, 2)] * 15),
        "new data, five epochs": _in_turn(*[_shuffled(2000, 5)] * 7),
    },
    "alternating": {
        "loop, view, 3000": _alternating(3000, _loop(2500, 16), _view(40_000)),
        "loop, view, 10000": _alternating(10_000, _loop(2500, 20), _view(50_000)),
        "zipf, loop, 5000": _alternating(5000, _zipf(5000, 50_000), _loop(2500, 20)),
        "shuffled, zipf, 5000": _alternating(5000, _shuffled(2500, 20), _zipf(5000, 50_000)),
    },
}


def equal(keys: Keys, seed: int) -> Keys:
    """One byte each."""
    del seed
    return np.ones_like(keys)


def lognormal(keys: Keys, seed: int) -> Keys:
    """Log-normal sizes."""
    return traces.sizes_of(keys, seed=seed)


def documents_and_chunks(keys: Keys, seed: int) -> Keys:
    """Three of ten are documents of about 1 KiB, the others chunks of 1 MiB or, at an edge, less."""
    random = np.random.default_rng(seed)
    count = int(keys.max()) + 1
    chunks = np.where(random.random(count) < 0.1, random.integers(1 << 16, 1 << 20, count), 1 << 20)
    documents = random.integers(300, 3000, count)
    return np.where(random.random(count) < 0.3, documents, chunks)[keys]


SIZES: dict[str, Callable[[Keys, int], Keys]] = {
    "equal": equal,
    "lognormal": lognormal,
    "documents": documents_and_chunks,
}
