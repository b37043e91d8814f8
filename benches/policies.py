"""Compare the eviction policies of zcache with published ones, on traces of the requests of Zarr readers.

    PYTHONPATH=python python benches/policies.py [--sized] [--seed N] [NAME ...]
    PYTHONPATH=python python benches/policies.py --wide [--sizes equal,lognormal,documents] [--seed N] [NAME ...]
    PYTHONPATH=python python benches/policies.py --held-out [--sizes ...] [--seed N] [NAME ...]

Prints the miss ratio of the last nine tenths of each trace, at several sizes of the cache. `--wide` takes many more
traces (`trace_kinds.py`), and prints for each kind how far "adaptive" is behind the best published policy and behind
LRU; `--held-out` does so for kinds that "adaptive" was not made with (`held_out.py`). Needs libcachesim (`pip install
libcachesim`) and takes two minutes, or ten. See docs/eviction.md for what it shows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import libcachesim
import numpy as np

import held_out
import trace_kinds
import traces
from traces import Keys
from zcache._core import POLICIES, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trace_kinds import Make

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
OURS = POLICIES
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


FEWEST = 20
"""Values that fit into a cache at least: some published policies cannot be smaller."""


def distances(keys: Keys, sizes: Keys, *, sized: bool) -> list[tuple[float, float, str]]:
    """How far "adaptive" is behind the best published policy, and behind LRU, at each size of a cache."""
    _, first = np.unique(keys, return_index=True)
    total, start = int(sizes[first].sum()), int(LEARNING * len(keys))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        write_oracle(path, keys, sizes)
        for share in trace_kinds.SHARES:
            if share * len(first) < FEWEST:
                continue
            row = published(path, int(total * share), start, sized=sized)
            row |= ours(keys, sizes, int(total * share), start)
            best, name = min((row[name], name) for name in PUBLISHED if name != "Belady")
            behind_lru = row["adaptive"] - row["lru"]
            found.append((row["adaptive"] - best, behind_lru, f"{share:.0%}, {name}"))
    return found


def compare_widely(
    kinds: Mapping[str, Mapping[str, Make]], names: list[str], sizes: list[str], seed: int
) -> None:
    """Print one line for each kind of trace and of sizes, and one for all."""
    print("| trace | sizes | cases | mean behind | worst | at | above 0.02 | worst behind LRU |")
    print("|---|---|---|---|---|---|---|---|")
    all_found = []
    for kind, shapes in kinds.items():
        if names and kind not in names:
            continue
        for name in sizes:
            found = []
            for shape, make in shapes.items():
                keys = np.asarray(make(seed), np.int64)
                made = trace_kinds.SIZES[name](keys, seed)
                for behind, behind_lru, where in distances(keys, made, sized=name != "equal"):
                    found.append((behind, behind_lru, f"{shape}, {where}"))
            all_found += found
            worst = max(found)
            behind_lru = max(behind for _, behind, _ in found)
            print(
                f"| {kind} | {name} | {len(found)} | {_mean(found):.4f} | {worst[0]:+.3f} | {worst[2]} "
                f"| {_above(found)} | {behind_lru:+.3f} |",
                flush=True,
            )
    above_lru = sum(behind_lru > 0.01 for _, behind_lru, _ in all_found)
    print(
        f"\nof {len(all_found)} cases {_above(all_found)} are more than 0.02 behind the best published policy, "
        f"{_mean(all_found):.4f} in the mean of all, and {above_lru} more than 0.01 behind LRU"
    )


def _mean(found: list[tuple[float, float, str]]) -> float:
    return float(np.mean([max(behind, 0.0) for behind, _, _ in found]))


def _above(found: list[tuple[float, float, str]]) -> int:
    return sum(behind > 0.02 for behind, _, _ in found)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="kinds of trace; all of them by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sized", action="store_true", help="values of different sizes")
    parser.add_argument("--wide", action="store_true", help="many more traces")
    parser.add_argument(
        "--held-out", action="store_true", help='traces that "adaptive" was not made with'
    )
    parser.add_argument("--sizes", default="equal", help="kinds of sizes for --wide, --held-out")
    options = parser.parse_args()
    kinds = held_out.KINDS if options.held_out else trace_kinds.KINDS if options.wide else KINDS
    unknown = sorted(set(options.names) - set(kinds))
    if unknown:
        parser.error(f"no such trace: {', '.join(unknown)}; give {', '.join(kinds)}")
    if options.held_out or options.wide:
        compare_widely(kinds, options.names, options.sizes.split(","), options.seed)
        return
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
