"""A cache directory: reopened, rebuilt, and its index shared by processes.

Run as a script it is one of those processes:

    python benches/_directory.py reopen|shared|memory|fill-zcache|fill-zarr DIRECTORY NUMBER
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _measure import Row, interleave
from _setup import (
    PROTOTYPE,
    batches,
    chunk_keys,
    drained,
    index_of,
    local_store,
    read_all,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _measure import Work
    from _setup import Scale

_FIRST = "first/c/0"
"""The one key of a reopened directory that has a file."""
_VALUE = b"x" * 4096
_AGO = 1_700_000_000_000
"""Milliseconds since 1970: when everything was fetched."""
_BATCH = 10_000
_PROCESSES = 4
_VALUE_SIZE = 65536
_SECONDS = 2.0
"""That each process looks keys up."""


async def rows(scale: Scale) -> list[Row]:
    """All lines about a cache directory."""
    found = []
    with temporary_directory(scale) as where:
        found.append(await reopen(where / "reopen", scale.of(1_000_000, 20_000)))
        found.append(await rebuild(where / "rebuild", scale))
        found += await shared(where / "shared", scale)
        found.append(await on_disk(where / "bound", scale))
    return found


def open_store(where: Path) -> Any:
    return zcache_store(local_store(where / "source"), local_store(where / "cache"))


def fill_index(where: Path, values: Sequence[tuple[int, int, str]]) -> None:
    """Enter values in the index of a directory, whether they have files or not."""
    from zcache._core import Index

    store = open_store(where)
    root = str(where / "cache" / ".zcache" / "index")
    del store
    gc.collect()
    shutil.rmtree(root)
    Path(root).mkdir()
    index, fresh = Index.open(root, seed=1, flat_namespace=True)
    assert fresh
    for start in range(0, len(values), _BATCH):
        assert index.adopt(values[start : start + _BATCH])
    index.finish_rebuild()


# ---------------------------------------------------------------------------- reopening


async def reopen(where: Path, count: int) -> Row:
    """From the constructor to the first value, in a fresh process that has imported everything."""
    store = open_store(where)
    await store.set(_FIRST, _buffer(_VALUE))
    await drained(store)
    del store
    keys = chunk_keys(count - 1)
    fill_index(where, [(_AGO, 4096, key) for key in keys] + [(_AGO, len(_VALUE), _FIRST)])
    found = [_child("reopen", where, count) for _ in range(7)]
    assert all(one["entries"] == count for one in found)
    opened, imported = (
        statistics.median(one[part] for one in found) for part in ("opened", "imported")
    )
    return Row(
        f"reopen a directory of {count:,} entries, to the first hit",
        zcache=opened,
        aim=0.05,
        note=f"a fresh process, after its imports, which take {imported:.2f} s; the index has all "
        "entries, the directory one file; zarr's knows nothing then",
    )


def _buffer(data: bytes) -> Any:
    from zarr.core.buffer import cpu

    return cpu.Buffer.from_bytes(data)


def _reopen(where: Path, _: int) -> dict[str, float]:
    start = time.perf_counter()
    from zarr.storage import LocalStore

    from zcache import CacheStore

    imported = time.perf_counter() - start

    async def first() -> dict[str, float]:
        start = time.perf_counter()
        store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"))
        value = await store.get(_FIRST, PROTOTYPE)
        opened = time.perf_counter() - start
        assert value is not None
        assert value.to_bytes() == _VALUE
        assert store.cache_stats()["hits"] == 1
        return {"opened": opened, "imported": imported, "entries": len(index_of(store))}

    return asyncio.run(first())


# ------------------------------------------------------------------------------ a rebuild


def make_files(cache: Path, keys: Sequence[str]) -> None:
    """Files as zcache writes them: only their times and sizes count for a walk."""
    from zcache._core import SIGNATURE

    made: set[str] = set()
    for number, key in enumerate(keys):
        path = f"{cache}/{key}"
        directory = path.rpartition("/")[0]
        if directory not in made:
            made.add(directory)
            os.makedirs(directory, exist_ok=True)  # noqa: PTH103 - a million times
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.truncate(file, 4096)  # Takes no block.
        nanos = (_AGO + number) * 1_000_000 + SIGNATURE
        os.utime(file, ns=(nanos, nanos))
        os.close(file)


async def rebuild(where: Path, scale: Scale) -> Row:
    """A lost index is filled from a walk of the directory."""
    keys = chunk_keys(scale.of(200_000, 20_000))
    cache = where / "cache"
    index_root = cache / ".zcache" / "index"
    logging.getLogger("zcache").setLevel(logging.ERROR)  # It tells of each index that was lost.
    open_store(where)
    make_files(cache, keys)

    async def lose() -> None:
        gc.collect()
        shutil.rmtree(index_root)

    async def mine() -> int:
        store = open_store(where)
        index = index_of(store)
        # Opening does not wait for a large one.
        while not index.is_complete:  # noqa: ASYNC110 - a thread completes it
            await asyncio.sleep(0.001)
        assert len(index) == len(keys)
        return 1

    async def bare() -> int:
        count = 0
        for path, _, names in os.walk(cache):
            for name in names:
                os.stat(f"{path}/{name}")  # noqa: PTH116 - as fast as it goes
                count += 1
        assert count >= len(keys)
        return 1

    contestants: dict[str, Work] = {"zcache": mine, "bare": bare}
    times = await interleave(contestants, 5, quiet=False, before={"zcache": lose, "bare": _nothing})
    return times.row(
        f"rebuild the index of {len(keys):,} files",
        aim=3.0,
        note="opening a directory whose index is lost; bare: os.walk with os.stat of each file",
    )


async def _nothing() -> None:
    gc.collect()


# ------------------------------------------------------------------------ a shared index


async def shared(where: Path, scale: Scale) -> list[Row]:
    """A hit's bookkeeping under the lock between processes, against an index in memory."""
    from zcache._core import Index

    keys = chunk_keys(scale.of(100_000, 20_000))
    fill_index(where, [(_AGO, 8, key) for key in keys])
    one, _ = Index.open(str(where / "cache" / ".zcache" / "index"), seed=1, flat_namespace=True)
    two = _in_memory(keys)
    random.Random(5).shuffle(keys)
    step = 500
    slices = {name: batches(keys, step) for name in ("zcache", "bare")}

    def contestant(name: str, lookup: Any) -> Work:
        async def work() -> int:
            for key in next(slices[name]):
                lookup(key, None, 1.0)
            return step

        return work

    contestants = {
        "zcache": contestant("zcache", one.lookup),
        "bare": contestant("bare", two.lookup),
    }
    times = await interleave(contestants, scale.of(400, 60))
    del one
    gc.collect()
    alone = times.row(
        f"lookup in a shared index of {len(keys):,} keys, 1 process",
        note="a step under the lock of the file; bare: the same in an index in memory",
    )
    rounds = [
        (_hammer_all("shared", where, len(keys)), _hammer_all("memory", where, len(keys)))
        for _ in range(scale.of(2, 1))
    ]
    mine, theirs = (statistics.median(one[at]["seconds"] for one in rounds) for at in range(2))
    waits = statistics.median(one[0]["waits"] for one in rounds)
    together = Row(
        f"the same, {_PROCESSES} processes at once",
        zcache=mine,
        bare=theirs,
        ratio=statistics.median(a["seconds"] / b["seconds"] for a, b in rounds),
        note=f"time of one lookup in each of {_PROCESSES} processes that do nothing else, on "
        f"{os.cpu_count()} cores; bare: each has an index of its own. Out of 1,000 lookups "
        f"{waits:.2g} had to wait for more than a millisecond",
    )
    return [alone, together]


def _in_memory(keys: Sequence[str]) -> Any:
    from zcache._core import Index

    index = Index(flat_namespace=True)
    for start in range(0, len(keys), _BATCH):
        index.adopt([(_AGO, 8, key) for key in keys[start : start + _BATCH]])
    return index


def _hammer_all(kind: str, where: Path, count: int) -> dict[str, float]:
    """Let processes look keys up at the same time; the mean of what they tell."""
    processes = [_start(kind, where, count) for _ in range(_PROCESSES)]
    _go(processes)
    found = [_ended(process) for process in processes]
    return {name: statistics.fmean(one[name] for one in found) for name in ("seconds", "waits")}


def _hammer(kind: str, where: Path, count: int) -> dict[str, float]:
    from zcache._core import Index, IndexBusyError

    keys = chunk_keys(count)
    if kind == "memory":
        index = _in_memory(keys)
    else:
        index, _ = Index.open(
            str(where / "cache" / ".zcache" / "index"), seed=1, flat_namespace=True
        )
    random.Random(os.getpid()).shuffle(keys)
    print("ready", flush=True)
    sys.stdin.readline()
    waits = done = 0
    gc.disable()
    start = now = time.perf_counter()
    for some in batches(keys, 200):
        for key in some:
            while True:
                try:
                    index.lookup(key, None, 1.0)
                except IndexBusyError:
                    waits += 1
                    index.wait_unlocked()
                else:
                    break
        done += 200
        now = time.perf_counter()
        if now - start > _SECONDS:
            break
    return {"seconds": (now - start) / done, "waits": waits / done * 1000}


# ---------------------------------------------------------------- one bound for all


async def on_disk(where: Path, scale: Scale) -> Row:
    """What three processes leave in one directory, by the bound that each was given."""
    keys = chunk_keys(scale.of(192, 48))
    left = {}
    for kind in ("zcache", "zarr"):
        root = where / kind
        source = local_store(root / "source")
        for key in keys:
            await source.set(key, _buffer(bytes(_VALUE_SIZE)))
        processes = [_start(f"fill-{kind}", root, len(keys)) for _ in range(3)]
        _go(processes)
        for process in processes:
            _ended(process)
        held = sum(
            path.stat().st_size
            for path in (root / "cache").rglob("*")
            if path.is_file() and ".zcache" not in path.parts
        )
        left[kind] = held / _bound(len(keys))
    return Row(
        "bytes on disk after three processes, by max_size",
        unit="",
        zcache=left["zcache"],
        zarr=left["zarr"],
        aim=1.0,
        note="each reads all of a dataset of three times max_size through the same directory",
    )


def _bound(count: int) -> int:
    return count // 3 * _VALUE_SIZE


def _fill(kind: str, where: Path, count: int) -> dict[str, float]:
    keys = chunk_keys(count)
    random.Random(os.getpid()).shuffle(keys)
    make = zcache_store if kind == "zcache" else zarr_store
    store = make(
        local_store(where / "source"), local_store(where / "cache"), max_size=_bound(count)
    )
    print("ready", flush=True)
    sys.stdin.readline()
    asyncio.run(read_all(store, keys))
    return {"read": len(keys)}


# ------------------------------------------------------------------------------ processes


def _start(what: str, where: Path, number: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, what, str(where), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _go(processes: list[subprocess.Popen[str]]) -> None:
    """Let them begin together."""
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()


def _ended(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def _child(what: str, where: Path, number: int) -> dict[str, float]:
    return _ended(_start(what, where, number))


if __name__ == "__main__":
    _, what, where, number = sys.argv
    if what == "reopen":
        print(json.dumps(_reopen(Path(where), int(number))))
    elif what.startswith("fill-"):
        print(json.dumps(_fill(what.removeprefix("fill-"), Path(where), int(number))))
    else:
        print(json.dumps(_hammer(what, Path(where), int(number))))
