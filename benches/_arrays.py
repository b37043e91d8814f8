"""Whole arrays through zarr: what a user of the cache sees."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from _measure import Row, interleave
from _setup import PIPELINES, CountingStore, only_hits, pipelines, zarr_store, zcache_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from _measure import Work
    from _setup import Scale


def warm_arrays(scale: Scale) -> list[Row]:
    """Warm reads of an uncompressed array, so that what the store costs is as visible as can be."""
    rows = []
    side, chunk = scale.of(4096, 1024), 128
    source = MemoryStore()
    array = zarr.create_array(
        source, shape=(side, side), chunks=(chunk, chunk), dtype="f4", compressors=None
    )
    array[:] = np.random.default_rng(0).random((side, side), "f4")
    for pipeline in pipelines():
        with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
            caches = {
                "bare": _copy(source),
                "zcache": zcache_store(_copy(source)),
                "zarr": zarr_store(_copy(source)),
            }
            arrays = {name: zarr.open_array(store, mode="r") for name, store in caches.items()}
            for opened in arrays.values():
                opened[:]
                opened[:]
            contestants = {name: _read_parts(opened, side) for name, opened in arrays.items()}
            with only_hits(caches["zcache"]):
                times = asyncio.run(_interleave(contestants, scale.of(150, 20)))
            rows.append(times.row(f"warm array, {pipeline} pipeline, 32 chunks of 64 KiB", 1.05))
    return rows


async def _interleave(contestants: dict[str, Work], rounds: int) -> Any:
    # zarr's own threads do the work and take the core from each other, so no round is undisturbed.
    return await interleave(contestants, rounds, quiet=False)


def _copy(store: MemoryStore) -> MemoryStore:
    # A copy of the bytes too: what another contestant has read is then not in the CPU's caches.
    values = {key: value.to_bytes() for key, value in store._store_dict.items()}
    return MemoryStore({key: cpu.Buffer.from_bytes(value) for key, value in values.items()})


def _read_parts(array: Any, side: int) -> Work:
    """A stripe one chunk high at a time."""
    state = {"at": 0}

    async def work() -> int:
        at = state["at"]
        state["at"] = (at + 128) % side
        # zarr's own loop, in a thread of its own, does the work; this one only waits.
        array[at : at + 128]
        return 1

    return work


def sharded(scale: Scale) -> list[Row]:
    """What reaches the source when a sharded array is read again, in parts across its shards."""
    side = scale.of(2048, 512)
    rows = []
    for pipeline in pipelines():
        with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
            cells = {
                name: _sharded(make, side)
                for name, make in (("zcache", zcache_store), ("zarr", zarr_store))
            }
            bare = _sharded(lambda source: source, side)
        assert bare[0] > 0
        assert bare[1] > side * side
        for at, what in enumerate(("reads", "bytes")):
            rows.append(
                Row(
                    f"sharded array, second pass, {pipeline}: source {what}",
                    unit="",
                    zcache=cells["zcache"][at],
                    zarr=cells["zarr"][at],
                    bare=bare[at],
                    aim=0,
                )
            )
    return rows


def _sharded(make: Callable[[MemoryStore], Any], side: int) -> tuple[int, int]:
    source = CountingStore()
    array = zarr.create_array(
        source, shape=(side, side), shards=(side // 4, side // 4), chunks=(64, 64), dtype="f4"
    )
    expected = np.random.default_rng(1).random((side, side), "f4")
    array[:] = expected
    opened = zarr.open_array(make(source), mode="r")
    step = side // 3
    first = 0
    counts = source.counts
    for _ in range(2):
        # The first pass reads everything; a count that misses that would miss the second one too.
        counts.reads = counts.bytes_read = 0
        for row in range(0, side, step):
            for column in range(0, side, step):
                part = (slice(row, row + step), slice(column, column + step))
                assert np.array_equal(opened[part], expected[part])
        first = first or counts.reads
    assert first > 0
    return counts.reads, counts.bytes_read
