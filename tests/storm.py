"""One participant of many on a directory that somebody tampers with: reads, fills and writes at once.

python storm.py DIRECTORY SECONDS MAX_SIZE
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
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


def main(where: Path, seconds: float, max_size: int) -> None:
    logging.basicConfig(level=logging.CRITICAL)
    store = open_store(where, max_size=max_size)
    chance = random.Random(os.getpid())
    wrong = errors = reads = writes = 0
    own = f"own/{os.getpid()}"
    last = b""
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
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
    print(json.dumps({"wrong": wrong, "errors": errors, "reads": reads, "writes": writes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
