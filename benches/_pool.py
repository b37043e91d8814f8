"""A pool beside files: fills that evict, hits beside one pread, and inodes."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

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
    zcache_store,
)

if TYPE_CHECKING:
    from pathlib import Path

    from _measure import Times, Work
    from _setup import Scale

_SIZES = {4096: "4 KiB", 65536: "64 KiB", 1 << 20: "1 MiB"}
# Beside a bare pread of a descriptor that is open.
_AIMS = {4096: 3.0, 65536: 1.3, 1 << 20: 1.15}


def pool_at(path: Path, **options: Any) -> Any:
    from zcache import CachePool

    return CachePool(path, **options)


def fill(store: Any, keys: list[str]) -> Work:
    slices = batches(keys, 64)

    async def work() -> int:
        chosen = next(slices)
        await asyncio.gather(*[store.get(key, PROTOTYPE) for key in chosen])
        await drained(store)
        return len(chosen)

    return work


async def fills(scale: Scale) -> list[Row]:
    """Values each of which pushes another one out, in a directory of files and in a pool, from a source without latency."""
    rows = []
    for size, name, aim in ((100, "100 B", None), (4096, "4 KiB", None), (65536, "64 KiB", 0.2)):
        with temporary_directory(scale) as root:
            keys = chunk_keys(scale.of(4096, 1024))
            source = memory_store(keys, size, distinct=64)
            # Files take whole blocks, and values of a pool as well.
            bound = len(keys) // 2 * max(size, 4096)
            stores = {
                "zcache": zcache_store(
                    source, pool_at(root / "pool"), max_size=bound, source_id="x"
                ),
                "bare": zcache_store(
                    source, local_store(root / "files"), max_size=bound, source_id="x"
                ),
            }
            for store in stores.values():
                # Until each fill evicts.
                for _ in range(2):
                    await fill_all(store, keys)
            works = {kind: fill(store, keys) for kind, store in stores.items()}
            times = await interleave(works, scale.of(60, 15))
            note = "bare is the same into a LocalStore; 64 at once, until the last is in"
            rows.append(times.row(f"pool: fill that evicts, {name}", aim, note))
            rows.append(_rate(times, name))
            if size == 65536:
                rows.append(_inodes_of_both(root, len(keys) // 2))
    return rows


def _rate(times: Times, name: str) -> Row:
    mine, files = times.median("zcache"), times.median("bare")
    return Row(
        f"pool: fills a second that evict, {name}",
        unit="/s",
        zcache=1 / mine if mine else None,
        bare=1 / files if files else None,
    )


def _inodes_of_both(root: Path, count: int) -> Row:
    return Row(
        f"pool: inodes of {count:,} values",
        unit="",
        zcache=inodes_below(root / "pool"),
        bare=inodes_below(root / "files"),
        note="bare is a LocalStore",
    )


async def fill_all(store: Any, keys: list[str]) -> None:
    for start in range(0, len(keys), 256):
        await asyncio.gather(*[store.get(key, PROTOTYPE) for key in keys[start : start + 256]])
        await drained(store)


def inodes_below(folder: Path) -> int:
    return sum(1 + len(names) for _, _, names in os.walk(folder))


async def hits(scale: Scale) -> list[Row]:
    """Hits one by one, beside pread of a descriptor that is open, and beside open, pread and close."""
    rows = []
    with temporary_directory(scale) as root:
        for size, name in _SIZES.items():
            step = 100 if size < 1 << 20 else 10
            keys = chunk_keys(step * scale.of(16, 4))
            source = memory_store(keys, size, distinct=16)
            stores = {
                "zcache": zcache_store(source, pool_at(root / f"pool-{size}"), source_id="x"),
                "files": zcache_store(source, local_store(root / f"files-{size}"), source_id="x"),
            }
            for store in stores.values():
                await fill_all(store, keys)
                await read_all(store, keys)
            works = {kind: reads(store, keys, step) for kind, store in stores.items()}
            path = root / f"bare-{size}"
            path.write_bytes(os.urandom(size) * len(keys))
            works["bare"] = _preads(path, len(keys), size, step)
            works["open"] = _opens(root / f"files-{size}", keys, size, step)
            works["segment"] = _segment_reads(root / f"pool-{size}", len(keys), size, step)
            with only_hits(stores["zcache"]):
                times = await interleave(works, scale.of(300, 60))
            files, opened = times.ratio("zcache", "files"), times.ratio("zcache", "open")
            segment = times.ratio("segment", "bare")
            note = (
                f"bare is pread; beside the hit of a LocalStore {files:.2f}, "
                f"beside open + pread + close {opened:.2f}; a read from the segment itself {segment:.2f}"
            )
            rows.append(times.row(f"pool: hit, {name}", _AIMS[size], note))
    return rows


def reads(store: Any, keys: list[str], step: int) -> Work:
    slices = batches(keys, step)

    async def work() -> int:
        return await read_all(store, next(slices))

    return work


def _preads(path: Path, count: int, size: int, step: int) -> Work:
    file = os.open(path, os.O_RDONLY)
    numbers = batches([str(n) for n in range(count)], step)

    async def work() -> int:
        chosen = next(numbers)
        for number in chosen:
            os.pread(file, size, int(number) * size)
        return len(chosen)

    return work


def _segment_reads(pool: Path, count: int, size: int, step: int) -> Work:
    """What the core asks of the system for a hit: a value and its header, out of a segment that has nothing else."""
    [path] = (pool / ".zcache/segments").iterdir()
    file = os.open(path, os.O_RDONLY)
    into = [bytearray(512), bytearray(size)]
    length = -(-(512 + size) // 4096) * 4096
    # The last value ends within the last page.
    begin = -(-path.stat().st_size // 4096) * 4096 - count * length
    numbers = batches([str(n) for n in range(count)], step)

    async def work() -> int:
        chosen = next(numbers)
        for number in chosen:
            os.preadv(file, into, begin + int(number) * length)
        return len(chosen)

    return work


def _opens(folder: Path, keys: list[str], size: int, step: int) -> Work:
    slices = batches([str(folder / key) for key in keys], step)

    async def work() -> int:
        chosen = next(slices)
        for path in chosen:
            file = os.open(path, os.O_RDONLY)
            os.pread(file, size, 0)
            os.close(file)
        return len(chosen)

    return work


async def rows(scale: Scale) -> list[Row]:
    """All lines of this module."""
    return [*await fills(scale), *await hits(scale)]
