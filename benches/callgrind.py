"""Count the instructions of a hit under callgrind: a figure that other processes do not touch.

    python benches/callgrind.py [--hits N]

Runs this file again under valgrind. There the instructions of N and of 2N hits are counted, and the
difference is divided by N, so what surrounds the hits falls out. Needs `valgrind`; takes about two
minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_KEYS = 64
_EXTRA = 1000
_BETWEEN = 16
_ROOM = 8


def contestants() -> dict[str, Callable[[int], None]]:
    """By name: what makes so many hits."""
    from _setup import PROTOTYPE, chunk_keys, memory_store, read_all, zarr_store, zcache_store

    keys = chunk_keys(_KEYS)
    source = memory_store(keys, 100)
    mine = zcache_store(source)
    stores = {
        "bare MemoryStore.get": source,
        "zcache": mine,
        "zcache, sampling=False": zcache_store(source, sampling=False),
        "zarr": zarr_store(source),
    }
    loop = asyncio.new_event_loop()

    async def hits(store: Any, count: int) -> None:
        get = store.get
        for n in range(count):
            await get(keys[n % _KEYS], PROTOTYPE)

    def by_get(store: Any) -> Callable[[int], None]:
        for _ in range(2):
            loop.run_until_complete(read_all(store, keys))
        # Past the point where the interpreter specializes the code.
        loop.run_until_complete(hits(store, 500))
        return lambda count: loop.run_until_complete(hits(store, count))

    found = {name: by_get(store) for name, store in stores.items()}
    found |= in_full_caches(loop)
    lookup = mine._cache.shared.handle.index.lookup

    def lookups(count: int) -> None:
        for n in range(count):
            lookup(keys[n % _KEYS])

    def nothing(count: int) -> None:
        for n in range(count):
            keys[n % _KEYS]

    return {**found, "Index.lookup and the loop": lookups, "the loop": nothing}


def in_full_caches(loop: asyncio.AbstractEventLoop) -> dict[str, Callable[[int], None]]:
    """Reads of a full cache under two policies, where each 16th one is a miss that pushes a value out."""
    from _setup import PROTOTYPE, chunk_keys, memory_store, zcache_store

    keys = chunk_keys(_KEYS + _EXTRA)
    source = memory_store(keys, 100)

    def by_reads(eviction: str) -> Callable[[int], None]:
        room = 100 * (_KEYS + _ROOM)
        get = zcache_store(source, max_size=room, eviction=eviction).get
        extra = itertools.cycle(keys[_KEYS:])

        async def reads(count: int) -> None:
            for n in range(count):
                await get(keys[n % _KEYS] if n % _BETWEEN else next(extra), PROTOTYPE)

        loop.run_until_complete(reads(16_000))
        return lambda count: loop.run_until_complete(reads(count))

    return {f"{name}, 15 hits and a miss": by_reads(name) for name in ("lru", "adaptive")}


def under_valgrind(hits: int) -> None:
    """Count phase by phase; callgrind writes one file for each."""

    def control(*arguments: str) -> None:
        subprocess.run(
            ["callgrind_control", *arguments, str(os.getpid())], check=True, capture_output=True
        )

    runs = contestants()
    control("--instr=on")
    for run in runs.values():
        for count in (hits, 2 * hits):
            run(hits)  # Callgrind translates code when it first sees it.
            control("--zero")
            run(count)
            control("--dump")


_ALLOCATES = re.compile(r"^(_PyObject_Malloc|malloc|calloc|realloc)(@@.*|'\d+)?$")


def _totals(directory: Path) -> list[tuple[int, int]]:
    """Instructions and allocations of each dump, in order. The file without a number comes last."""
    files = sorted(directory.glob("out.*"), key=lambda path: int(path.name.split(".")[-1]))
    totals = []
    for path in files:
        text = path.read_text(errors="replace")
        found = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        assert found is not None, path
        totals.append((int(found[1]), _allocations(text)))
    return totals


def _allocations(dump: str) -> int:
    """Calls of what gives out memory: Python's own allocator, and the system's."""
    names = dict(re.findall(r"^c?fn=(\(\d+\)) (.+)$", dump, re.MULTILINE))
    calls = re.findall(r"^cfn=(\(\d+\)).*\ncalls=(\d+)", dump, re.MULTILINE)
    return sum(int(count) for number, count in calls if _ALLOCATES.match(names[number]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hits", type=int, default=2000, help="N (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        under_valgrind(args.hits)
        return 0
    if shutil.which("valgrind") is None:
        print("callgrind.py needs valgrind, which is not installed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"]
        command += [f"--callgrind-out-file={directory}/out", sys.executable, __file__, "--child"]
        # A hash seed of its own would make each run another one.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        subprocess.run([*command, "--hits", str(args.hits)], check=True, env=environment)
        totals = _totals(Path(directory))
    names = ["bare MemoryStore.get", "zcache", "zcache, sampling=False", "zarr"]
    names += ["lru, 15 hits and a miss", "adaptive, 15 hits and a miss"]
    names += ["Index.lookup and the loop", "the loop"]
    assert len(totals) == 2 * len(names), totals
    each, allocated = (
        {
            name: (totals[2 * at + 1][what] - totals[2 * at][what]) / args.hits
            for at, name in enumerate(names)
        }
        for what in (0, 1)
    )
    bare = each["bare MemoryStore.get"]
    for name in names[:-2]:
        print(
            f"{name:<28} {each[name]:>9,.0f} instructions a hit  {each[name] / bare:5.2f} x bare"
            f"  {allocated[name]:5.1f} allocations"
        )
    lookup = each["Index.lookup and the loop"] - each["the loop"]
    print(f"{'Index.lookup':<28} {lookup:>9,.0f} instructions, those of its call included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
