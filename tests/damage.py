"""A cache that is about to be damaged, and what has to be right of it afterwards.

python tests/damage.py DIRECTORY strict|lax: uses it once for each line of its input.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import RangeByteRequest

from directories import INDEX, INDEX_FILES, POOL_INDEX_FILES, SEGMENTS, complete, open_store
from support import buf, check_quiet, drained, read
from zcache.testing import check_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zcache import CacheStore
    from zcache.testing import StoreDouble

BOUND = 6000
# Some in a directory of their own, with a name that does not fit into a cell.
KEYS = [
    f"group/array{f'-{number:040x}' * (number % 2)}/c/{number}/{number}" for number in range(20)
]
RANGE = RangeByteRequest(100, 160)


def value(key: str) -> bytes:
    return random.Random(key).randbytes(160 + 3 * int(key.rpartition("/")[2]))


def open_damaged(where: Path, **options: Any) -> tuple[CacheStore, StoreDouble]:
    return open_store(where, **({"max_size": BOUND, "cache_set_data": False} | options))


def make(where: Path) -> None:
    """Make a cache of values and ranges."""
    for key in KEYS:
        path = where / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key))

    async def warm() -> None:
        store, _ = open_damaged(where)
        for key in KEYS[:3]:
            await read(store, key, RANGE)
        for key in KEYS[3:]:
            await read(store, key)
        await drained(store)

    asyncio.run(warm())


def places(where: Path) -> Iterator[tuple[Path, int]]:
    """Positions all over the files of the index."""
    dice = random.Random(1)
    names = POOL_INDEX_FILES if (where / "cache" / SEGMENTS).exists() else INDEX_FILES
    for name in names:
        path = where / "cache" / INDEX / name
        content = path.read_bytes()
        used = [position for position, byte in enumerate(content) if byte]
        # The parts in use are small against the whole.
        chosen = dice.sample(used, min(len(used), 30)) + dice.sample(range(len(content)), 5)
        for position in chosen:
            yield path, position


async def use(store: CacheStore, seed: int = 0) -> None:
    """Read everything, some of it twice, write and delete a little: always the right bytes."""
    dice = random.Random(seed)
    for key in dice.sample(KEYS, len(KEYS)):
        assert await read(store, key, RANGE) == value(key)[100:160]
        assert await read(store, key) == value(key)
    key = dice.choice(KEYS)
    await store.set(key, buf(value(key)))
    assert await read(store, key) == value(key)
    await store.delete("group/other")
    await drained(store)


async def check(store: CacheStore) -> None:
    """After all, the index is right again and the bound holds."""
    await complete(store)
    await use(store)
    # Finds damage where no read came by, and has the index rebuilt for it.
    check_index(store)
    await complete(store)
    await check_quiet(store)


async def obey(where: Path, how: str) -> None:
    store, _ = open_damaged(where)
    await use(store)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        await use(store, number)
        await complete(store)
        if how == "strict":
            await check(store)
        print("ok", flush=True)


if __name__ == "__main__":
    asyncio.run(obey(Path(sys.argv[1]), sys.argv[2]))
