"""Compare the eviction policies of zcache with published ones, on traces of the requests of Zarr readers.

    PYTHONPATH=python python benches/policies.py [--sized] [--seed N] [NAME ...]

Prints the miss ratio of the last nine tenths of each trace, at several sizes of the cache. Needs libcachesim
(`pip install libcachesim`) and takes two minutes. See docs/eviction.md for what it shows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import libcachesim
import numpy as np

import traces
from traces import Keys
from zcache._core import simulate

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLISHED = {
    "Belady": libcachesim.Belady,
    "LRU": libcachesim.LRU,
    "S3-FIFO": libcachesim.S3FIFO,
    "W-TinyLFU": libcachesim.WTinyLFU,
    "LIRS": libcachesim.LIRS,
    "SIEVE": libcachesim.Sieve,
    "ARC": libcachesim.ARC,
    "2Q": libcachesim.TwoQ,
}
OURS = ("lru", "none", "adaptive")
LEARNING = 0.1
"""Part of a trace that does not count."""

_view = traces.pan_and_zoom
KINDS: dict[str, tuple[Callable[[int], Keys], tuple[float, ...]]] = {
    "loop": (lambda seed: traces.loop(seed=seed), (0.1, 0.5, 0.9)),
    "loop of 100": (lambda seed: traces.loop(100, 40, seed=seed), (0.5, 0.9)),
    "loop of 60,000": (lambda seed: traces.loop(60_000, 8, seed=seed), (0.5, 0.9)),
    "shuffled epochs": (lambda seed: traces.shuffled(seed=seed), (0.1, 0.5, 0.9)),
    "shuffled epochs of 100": (lambda seed: traces.shuffled(100, 40, seed=seed), (0.5, 0.9)),
    "there and back": (lambda seed: traces.there_and_back(seed=seed), (0.2, 0.5, 0.9)),
    "rolling window": (lambda seed: traces.rolling(seed=seed), (0.02, 0.06, 0.5)),
    "zipf": (lambda seed: traces.zipf(seed=seed), (0.005, 0.05, 0.3)),
    "zipf, flat": (lambda seed: traces.zipf(exponent=0.6, seed=seed), (0.05, 0.3)),
    "shortly before": (lambda seed: traces.stack_distances(seed=seed), (0.02, 0.1)),
    "pan and zoom": (lambda seed: _view(seed=seed), (0.004, 0.03, 0.2)),
    "hot set and scans": (lambda seed: traces.hot_set_and_scans(seed=seed), (0.01, 0.02, 0.04)),
    "time series at points": (lambda seed: traces.points(seed=seed), (0.05, 0.1, 0.3)),
    "loop beside zipf": (
        lambda seed: traces.interleaved(
            traces.loop(3000, 20), traces.zipf(8000, 60_000, seed=seed), seed=seed
        ),
        (0.1, 0.3),
    ),
    "loop beside pan and zoom": (
        lambda seed: traces.interleaved(traces.loop(3000, 30), _view(90_000, seed=seed), seed=seed),
        (0.05, 0.2),
    ),
    "loop, pan and zoom, loop": (
        lambda seed: traces.in_turn(
            traces.loop(3000, 15), _view(60_000, 128, seed=seed), traces.loop(3000, 15)
        ),
        (0.05, 0.1),
    ),
    "other shuffled epochs": (
        lambda seed: traces.in_turn(*(traces.shuffled(3000, seed=seed + n) for n in range(3))),
        (0.17, 0.3),
    ),
    "other zipf": (
        lambda seed: traces.in_turn(
            *(traces.zipf(10_000, 60_000, seed=seed + n) for n in range(3))
        ),
        (0.05, 0.2),
    ),
}


def write_oracle(path: Path, keys: Keys, sizes: Keys) -> None:
    """Write a trace in libcachesim's format with the next use of each key, as Belady needs it."""
    count = len(keys)
    upcoming = np.full(count, -1, np.int64)
    order = np.lexsort((np.arange(count), keys))
    again = keys[order][1:] == keys[order][:-1]
    upcoming[order[:-1][again]] = order[1:][again]
    fields = [("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")]
    rows = np.zeros(count, np.dtype(fields))
    rows["key"], rows["size"], rows["next"] = keys + 1, sizes, upcoming
    rows.tofile(path)


def published(path: Path, capacity: int, start: int, *, sized: bool) -> dict[str, float]:
    """Miss ratios of the published policies; those that cannot be so small are left out."""
    ratios = {}
    options = libcachesim.ReaderInitParam(ignore_obj_size=not sized)
    for name, policy in PUBLISHED.items():
        cache = policy(capacity)
        reader = libcachesim.TraceReader(
            str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE, options
        )
        if start:
            cache.process_trace(reader, 0, start)
        ratios[name] = cache.process_trace(reader, start)[0]
    return ratios


def ours(keys: Keys, sizes: Keys, capacity: int, start: int) -> dict[str, float]:
    """Miss ratios of the policies of zcache."""
    arguments = (capacity, keys.astype(np.int64).tobytes(), sizes.astype(np.uint64).tobytes())
    served = {name: simulate(name, *arguments) for name in OURS}
    return {name: 1 - np.frombuffer(hits, np.uint8)[start:].mean() for name, hits in served.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="kinds of trace; all of them by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sized", action="store_true", help="values of different sizes")
    options = parser.parse_args()
    print("| trace | size |", " | ".join([*PUBLISHED, *OURS]), "| behind |")
    print("|---|---|" + "---|" * (len(PUBLISHED) + len(OURS) + 1))
    worst = 0.0
    for kind, (make, shares) in KINDS.items():
        if options.names and kind not in options.names:
            continue
        keys = np.asarray(make(options.seed), np.int64)
        sizes = traces.sizes_of(keys) if options.sized else np.ones_like(keys)
        _, first = np.unique(keys, return_index=True)
        total = int(sizes[first].sum())
        start = int(LEARNING * len(keys))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace"
            write_oracle(path, keys, sizes)
            for share in shares:
                capacity = int(total * share)
                row = published(path, capacity, start, sized=options.sized)
                row |= ours(keys, sizes, capacity, start)
                best = min(row[name] for name in PUBLISHED if name != "Belady")
                behind = row["adaptive"] - best
                worst = max(worst, behind)
                cells = " | ".join(f"{ratio:.3f}" for ratio in row.values())
                print(f"| {kind} | {share:.1%} | {cells} | {behind:+.3f} |", flush=True)
    print(f"\nadaptive is behind the best published policy by at most {worst:.3f}")


if __name__ == "__main__":
    main()
