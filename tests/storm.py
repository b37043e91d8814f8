"""One participant of many on directories that are tampered with: reads, fills and writes at once.

python storm.py: a line in has a directory and a bound; it says "ready", begins with an empty line, ends with the next
one, and reports as JSON. Then it takes another directory.
"""

from __future__ import annotations

import json
import logging
import os
import random
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import cpu
from zarr.storage import LocalStore

from zcache import CacheStore

if TYPE_CHECKING:
    from zarr.abc.store import Store

KEYS = 40


def value(key: int) -> bytes:
    """The only value of a key that is never written."""
    return b"%08d" % key * 50


def get(store: Store, key: str) -> bytes | None:
    found = store.get_sync(key)  # type: ignore[attr-defined]
    return None if found is None else found.to_bytes()


def open_store(where: Path, **options: Any) -> CacheStore:
    """A store over `where`."""
    source = LocalStore(where / "source")
    return CacheStore(source, cache_store=LocalStore(where / "cache"), **options)


def take_part(where: Path, max_size: int) -> None:
    """Read and write until the next line comes, and report."""
    store = open_store(where, max_size=max_size)
    chance = random.Random(os.getpid())
    wrong = errors = reads = writes = 0
    own = f"own/{os.getpid()}"
    last = b""
    print("ready", flush=True)
    sys.stdin.readline()
    # On a machine that is busy the next line may be there before anything is done.
    while not writes or not select.select([sys.stdin], [], [], 0)[0]:
        key = chance.randrange(KEYS)
        try:
            wrong += get(store, f"a/c/{key}") != value(key)
            if chance.random() < 0.1:
                last = b"%08d" % writes
                store.set_sync(own, cpu.Buffer.from_bytes(last))
                writes += 1
            wrong += bool(last) and get(store, own) != last
        except Exception as error:  # noqa: BLE001 - that is what is counted
            errors += 1
            print(repr(error), file=sys.stderr)
        reads += 1
    sys.stdin.readline()
    report = {"wrong": wrong, "errors": errors, "reads": reads, "writes": writes}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    for line in iter(sys.stdin.readline, ""):
        where, max_size = json.loads(line)
        take_part(Path(where), max_size)
