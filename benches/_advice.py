"""Advice: what sampling costs a hit, and how far advice from a sample is from all requests.

PYTHONPATH=python python benches/_advice.py --seed 7    # the second, on traces of another seed
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.storage import MemoryStore

import traces
from _measure import Row, interleave
from _setup import (
    PROTOTYPE,
    batches,
    chunk_keys,
    drained,
    local_store,
    memory_store,
    only_hits,
    read_all,
    temporary_directory,
    values,
    zcache_store,
)
from zcache._advice.advise import advise
from zcache._advice.trace import Requests, complete

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _measure import Work
    from _setup import Scale


async def sampling(scale: Scale) -> list[Row]:
    """A hit with its request sampled, beside one without: "bare" is `sampling=False`."""
    rows = []
    for work, count in (("memory, 1,000 keys", 1000), ("memory, 200,000 keys", 200_000)):
        keys = chunk_keys(count if count == 1000 else scale.of(count, 20_000))
        source = memory_store(keys, 100)
        stores = {
            name: zcache_store(source, sampling=on)
            for name, on in (("bare", False), ("zcache", True))
        }
        rows.append(await _hits(f"sampled hit, {work}", stores, keys, scale.of(3000, 100)))
    with temporary_directory(scale) as where:
        keys = chunk_keys(2000)
        source = memory_store(keys, 4096)
        stores = {
            name: zcache_store(
                source, local_store(where / name), sampling=name == "zcache", source_id="bench"
            )
            for name in ("bare", "zcache")
        }
        rows.append(await _hits("sampled hit, 4 KiB on disk", stores, keys, scale.of(1000, 50)))
    return rows


async def _hits(work: str, stores: dict[str, Any], keys: list[str], rounds: int) -> Row:
    for store in stores.values():
        for _ in range(2):
            await read_all(store, keys)
            await drained(store)
    with only_hits(stores["zcache"]):
        times = await interleave(
            {name: _read(store, keys) for name, store in stores.items()}, rounds
        )
    return times.row(work, 1.02, "bare: the same store with sampling=False")


def _read(store: Any, keys: list[str]) -> Work:
    slices = batches(keys, 1000)

    async def work() -> int:
        return await read_all(store, next(slices))

    return work


def _traces(part: int, seed: int) -> dict[str, traces.Keys]:
    def loop(keys: int, epochs: int) -> traces.Keys:
        return traces.loop(keys // part, epochs, seed=seed)

    def shuffled(keys: int, epochs: int) -> traces.Keys:
        return traces.shuffled(keys // part, epochs, seed=seed)

    def zipf(keys: int, requests: int, exponent: float = 0.9) -> traces.Keys:
        return traces.zipf(keys // part, requests // part, exponent, seed=seed)

    def document(keys: int, requests: int) -> traces.Keys:
        """One key has every second request."""
        rng = np.random.default_rng(seed)
        others = rng.integers(1, keys // part, requests // part)
        return np.where(rng.random(len(others)) < 0.5, 0, others)

    requests = 400_000 // part
    return {
        "loop": loop(40_000, 8),
        "shuffled epochs": shuffled(40_000, 8),
        "there and back": traces.there_and_back(40_000 // part, 8, seed=seed),
        "zipf 0.9": zipf(100_000, 400_000),
        "zipf 0.6": zipf(100_000, 400_000, 0.6),
        "pan and zoom": traces.pan_and_zoom(requests, seed=seed),
        "hot set and scans": traces.hot_set_and_scans(requests, seed=seed),
        "points": traces.points(requests, 8000 // part, seed=seed),
        "a document, and random reads": document(40_000, 160_000),
        "rolling window": traces.rolling(20_000 // part, 200, 1, seed=seed),
        "loop beside zipf": traces.interleaved(loop(30_000, 5), zipf(30_000, 150_000), seed=seed),
        "loop, zipf, epochs in turn": traces.in_turn(
            loop(30_000, 5), zipf(30_000, 150_000), shuffled(20_000, 5), seed=seed
        ),
    }


def accuracy(scale: Scale) -> list[Row]:
    """Mean distance of the curves of `advise()` from those of all requests, over sizes and policies."""
    return list(_accuracies(scale.of(1, 8), 0))


def _accuracies(part: int, seed: int) -> Iterator[Row]:
    for kind, keys in _traces(part, seed).items():
        count = int(keys.max()) + 1
        drawn = np.random.default_rng(3 + seed).normal(5, 1, count)
        for sizes, known in (
            (np.full(count, 100), "all of 100 B"),
            (np.clip(np.exp(drawn), 1, 5000).astype(np.int64), "lognormal sizes"),
            # Metadata beside chunks: all of the documents take about as much as one chunk.
            (
                np.where(drawn < np.quantile(drawn, 0.2), 1, 20_000).astype(np.int64),
                "a fifth documents of 1 B beside chunks",
            ),
        ):
            yield _accuracy(f"advice, {kind}, {known}", keys, sizes)


def _accuracy(work: str, keys: traces.Keys, sizes: traces.Keys) -> Row:
    by_size = {int(size): values(1, int(size))[0] for size in np.unique(sizes)}
    names = [f"era5/t2m/c/{key // 50}/{key % 50}" for key in range(len(sizes))]
    source = MemoryStore({names[key]: by_size[int(size)] for key, size in enumerate(sizes)})
    bound = int(sizes[np.unique(keys)].sum()) // 3
    store = zcache_store(source, max_size=bound)
    for key in keys.tolist():
        store.get_sync(names[key], prototype=PROTOTYPE)
    begun = time.perf_counter()
    advice = store.advise()
    seconds = time.perf_counter() - begun
    asked, ranges = keys.astype(np.uint64), np.zeros((len(keys), 3), np.uint64)
    never = np.zeros(len(keys), bool)
    requests = Requests(
        asked, asked, ranges, sizes[keys].astype(np.uint64), never, never, never.astype(np.uint8)
    )
    trace = complete(requests, 1)
    exact = advise(trace, max_size=bound)
    errors = np.array(
        [
            np.abs(curve.hit_ratio - exact.curves[name].hit_ratio)
            for name, curve in advice.curves.items()
        ]
    )
    bands = np.array([curve.error for curve in advice.curves.values()])
    note = (
        f"{advice.sampling_rate:.0%} of the keys; mean by policy "
        + ", ".join(
            f"{name} {error.mean():.4f}" for name, error in zip(advice.curves, errors, strict=True)
        )
        + f"; greatest {errors.max():.3f}; {(errors <= bands + 0.005).mean():.0%} within the band; "
        f"took {seconds:.1f} s"
    )
    return Row(work, unit="", zcache=float(errors.mean()), aim=0.02, note=note)


def main() -> None:
    """Print the distances on traces of a seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--part", type=int, default=1, help="traces shorter by this (default: 1)")
    options = parser.parse_args()
    for row in _accuracies(options.part, options.seed):
        print(f"{row.zcache:.4f}  {row.work}; {row.note}", flush=True)


if __name__ == "__main__":
    main()
