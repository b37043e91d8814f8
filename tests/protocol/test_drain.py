"""A prefix that cuts a row out of the chunks of an array, of which there are more than one step looks at."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from pools import CACHES, one_of
from support import buf, drained, listed, read
from zcache import CacheStore
from zcache.testing import check_index, missing_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

    from zcache import CachePool

ROW = 70
KEYS = [f"a/c/{n}/{m}" for n in range(ROW) for m in range(ROW)]
CHANGES: dict[str, Callable[[CacheStore], Any]] = {
    "delete_dir": lambda store: store.delete_dir("a/c/7"),
    "invalidate": lambda store: store.invalidate("a/c/7"),
    "later": lambda store: asyncio.to_thread(store._cache.writer._drain.later, "a/c/7"),
}
cache = one_of({kind: CACHES[kind] for kind in ("memory", "memory pool", "pool")})


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("there", [True, False], ids=["values", "absences"])
async def test_row_of_very_many_chunks_goes_and_no_other(
    cache: Store | CachePool, change: str, there: bool
) -> None:
    source = MemoryStore({key: buf(b"1") for key in KEYS} if there else {})
    store = CacheStore(source, cache_store=cache, source_id="s")
    for at in range(0, len(KEYS), ROW):
        await asyncio.gather(*[read(store, key) for key in KEYS[at : at + ROW]])
    await drained(store)
    index = store._cache.shared.handle.index
    _, rest = index.drain_prefix("a/c/8") if there else ([], index.drain_absences("a/c/8"))
    assert rest is not None, "one step looks at all of them"
    await CHANGES[change](store)
    cached = await listed(store.cached_keys()) if there else sorted(missing_keys(store))
    assert cached == sorted(key for key in KEYS if not key.startswith("a/c/7/"))
    check_index(store)


@pytest.mark.parametrize("change", ["delete", "delete_dir", "invalidate"])
async def test_chunk_among_very_many_goes_in_one_step(
    cache: Store | CachePool, change: str
) -> None:
    store = CacheStore(
        MemoryStore({key: buf(b"1") for key in KEYS}), cache_store=cache, source_id="s"
    )
    for at in range(0, len(KEYS), ROW):
        await asyncio.gather(*[read(store, key) for key in KEYS[at : at + ROW]])
    await drained(store)
    index = store._cache.shared.handle.index
    victims, rest = index.drain_prefix("a/c/3/1")
    assert (len(victims), rest) == (1, None)
    await getattr(store, change)("a/c/3/4")
    assert "a/c/3/4" not in await listed(store.cached_keys())
