"""The index by itself, called from Python."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from zarr.storage import MemoryStore

from _measure import Row, interleave
from _setup import batches, chunk_keys, zarr_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _measure import Work
    from _setup import Scale


def filled_index(keys: Sequence[str], size: int = 8, **options: Any) -> Any:
    """An index that holds these keys."""
    from zcache._core import Index

    index = Index(flat_namespace=True, **options)
    for start in range(0, len(keys), 10_000):
        index.adopt([(1, size, key) for key in keys[start : start + 10_000]])
    assert len(index) == len(keys)
    return index


async def bookkeeping(scale: Scale) -> list[Row]:
    """What a hit costs beside the bytes, at a million keys in random order."""
    keys = chunk_keys(scale.of(1_000_000, 100_000))
    index = filled_index(keys)
    replaced = zarr_store(MemoryStore())
    known = _track(replaced, keys)
    # Apart from the order in which they were made, inserted and are asked for now.
    random.Random(3).shuffle(keys)
    step = 500
    slices = {name: batches(keys, step) for name in ("loop", "zcache", "zarr")}
    # Each contestant is at another place of the list, so that none finds what another has read.
    for name, start in (("zcache", 0.33), ("zarr", 0.66)):
        for _ in range(int(start * len(keys) / step)):
            next(slices[name])
    lookup = index.lookup

    async def loop() -> int:
        for _ in next(slices["loop"]):
            pass
        return step

    async def mine() -> int:
        for key in next(slices["zcache"]):
            lookup(key)
        return step

    async def theirs() -> int:
        state = replaced._state
        for key in next(slices["zarr"]):
            state.hits += 1
            await replaced._update_access_order(key)
        return step

    contestants: dict[str, Work] = {"loop": loop, "zcache": mine}
    if known:
        contestants["zarr"] = theirs
    times = await interleave(contestants, scale.of(600, 60))
    empty = times.median("loop") or 0.0
    both = [times.median(name) for name in ("zcache", "zarr")]
    mine_s, theirs_s = (None if value is None else value - empty for value in both)
    return [
        Row(
            f"bookkeeping of a hit, {len(keys):,} random keys",
            zcache=mine_s,
            zarr=theirs_s,
            bare=empty,
            aim=0.35e-6,
            note="one Index.lookup, without the loop, which is in the column bare",
            disturbed=times.disturbed,
            faults=times.faults["zcache"],
        )
    ]


def _track(store: Any, keys: Sequence[str]) -> bool:
    """Enter keys in the books of zarr's class as its `_track_entry` does. False where it has others."""
    state = getattr(store, "_state", None)
    if state is None or not hasattr(state, "key_insert_times"):
        return False
    now = time.monotonic()
    for key in keys:
        state.cache_order[key] = None
        state.key_sizes[key] = 8
        state.key_insert_times[key] = now
    return True


async def throughput(scale: Scale) -> list[Row]:
    """Gets and sets a second of the index and of cachebox's LRU at a million keys."""
    try:
        import cachebox
    except ImportError:
        return [Row("index against cachebox.LRUCache", note="not measured: pip install cachebox")]
    count = scale.of(1_000_000, 100_000)
    keys, others = chunk_keys(count), chunk_keys(count, "resolved/s0")
    index = filled_index(keys, max_size=8 * count)
    lru = cachebox.LRUCache(count)
    for key in keys:
        lru[key] = 8
    random.Random(4).shuffle(keys)
    rows = []
    # A dict shows what two threads take from each other, however little is done.
    gets = {
        "zcache": _lookup(index.lookup),
        "bare": _get(lru.get),
        "dict": _get(dict.fromkeys(keys, 8).get),
    }
    slices = {name: Slices(keys) for name in gets}
    for threads in (1, 2):
        rows += await _compete("get", gets, slices, threads, scale)
    # Twice the keys that fit, and always the one that was away longest: each set is of a new key and
    # evicts another.
    sets = {"zcache": _fill(index), "bare": _insert(lru)}
    for run in sets.values():
        run(others)
    slices = {name: Slices(keys + others) for name in sets}
    before = index.stats()
    for threads in (1, 2):
        rows += await _compete("set and evict", sets, slices, threads, scale)
    # Each one must have evicted, or it was no set.
    index.validate()
    assert (index.stats() - before).evictions == slices["zcache"].taken
    assert len(index) == len(lru) == count
    rows[0].note = "bare: cachebox.LRUCache, which knows neither bytes nor ages nor flights"
    rows[3].note = "zcache: join and keep, which moves the values of a dict as well"
    return rows


class Slices:
    """Hands out keys, round and round, and counts them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self.taken = 0

    def take(self, count: int) -> Sequence[str]:
        at = self.taken % len(self._keys)
        self.taken += count
        taken = self._keys[at : at + count]
        return [*taken, *self._keys[: count - len(taken)]]


def _lookup(lookup: Callable[..., object]) -> Callable[[Sequence[str]], None]:
    def work(keys: Sequence[str]) -> None:
        for key in keys:
            lookup(key)

    return work


def _get(get: Callable[[str], object]) -> Callable[[Sequence[str]], None]:
    def work(keys: Sequence[str]) -> None:
        for key in keys:
            get(key)

    return work


def _fill(index: Any) -> Callable[[Sequence[str]], None]:
    values: dict[str, bytes] = {}
    value = b"8 bytes."

    def work(keys: Sequence[str]) -> None:
        for key in keys:
            ticket = index.join(key, None, None, 1.0, False)
            index.fill_memory(values, key, None, value, value, ticket, 1.0)

    return work


def _insert(lru: Any) -> Callable[[Sequence[str]], None]:
    def work(keys: Sequence[str]) -> None:
        for key in keys:
            lru[key] = 8

    return work


async def _compete(
    what: str,
    work: dict[str, Callable[[Sequence[str]], None]],
    slices: dict[str, Slices],
    threads: int,
    scale: Scale,
) -> list[Row]:
    # Threads that last for milliseconds would measure their own start.
    step = 500 if threads == 1 else scale.of(60_000, 10_000)
    rounds = scale.of(500, 60) if threads == 1 else scale.of(9, 3)
    contestants = {
        name: _in_threads(run, slices[name], step, threads) for name, run in work.items()
    }
    if threads > 1:
        # Rounds this long are always interrupted, so one thread is measured the same way beside it.
        contestants |= {
            f"{name}, one": _in_threads(run, slices[name], step, 1) for name, run in work.items()
        }
    times = await interleave(contestants, rounds, quiet=threads == 1)
    mine, theirs = times.median("zcache") or 1.0, times.median("bare") or 1.0
    name = "1 thread" if threads == 1 else f"{threads} threads"
    rows = [
        Row(
            f"index, {what}, {name}",
            unit="/s",
            zcache=1 / mine,
            bare=1 / theirs,
            ratio=1 / (times.ratio("zcache") or 1.0),
            aim=1.0,
            at_least=True,
            disturbed=times.disturbed,
        )
    ]
    if threads > 1:
        one = times.median("zcache, one") or 1.0
        gained = {kind: times.ratio(kind, f"{kind}, one") for kind in work}
        others = [f"{kind} {1 / ratio:.2f}" for kind, ratio in gained.items() if ratio is not None]
        rows.append(
            Row(
                f"index, {what}, {name} against 1 of the same rounds",
                unit="/s",
                zcache=1 / mine,
                bare=1 / one,
                ratio=1 / (gained["zcache"] or 1.0),
                aim=1.0,
                at_least=True,
                note=", ".join(others) + "; bare: zcache with one thread",
            )
        )
    return rows


def _in_threads(
    run: Callable[[Sequence[str]], None], slices: Slices, step: int, threads: int
) -> Work:
    async def work() -> int:
        keys = slices.take(step)
        if threads == 1:
            run(keys)
            return step
        part = step // threads
        with ThreadPoolExecutor(threads) as pool:
            # `list` raises what a thread has raised: work that was not done is not to be counted.
            list(pool.map(run, [keys[n * part : (n + 1) * part] for n in range(threads)]))
        return step

    return work
