"""A prefix that cuts a row out of the chunks of an array, of which there are more than one step looks at."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from pools import CACHES, ON_DISK, one_of
from support import buf, drained, listed, read
from zcache import CacheStore
from zcache._core import Index
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
on_disk = one_of({kind: CACHES[kind] for kind in ON_DISK})


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


@pytest.mark.parametrize("key", ["a/c/7", "a/c/7/.zarray"])
async def test_key_that_is_cached_between_two_steps_of_a_drain_is_no_damage(
    on_disk: Store | CachePool, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The delete has ended by then, and another thread writes there again."""
    source = MemoryStore({key: buf(b"1") for key in KEYS})
    store = CacheStore(source, cache_store=on_disk, source_id="s")
    for at in range(0, len(KEYS), ROW):
        await asyncio.gather(*[read(store, key) for key in KEYS[at : at + ROW]])
    await drained(store)
    handle, has_ended, cached = store._cache.shared.handle, False, []

    def write() -> None:
        store.set_sync(key, buf(b"2"))
        assert store.drain_sync(timeout=60)
        cached.append(store.is_cached(key))

    def take(step: Any, *args: Any) -> Any:
        nonlocal has_ended
        has_ended = has_ended or (step is Index.invalidate and args[-1] is False)
        # The walk has passed the cells that are free again.
        is_last = step is Index.drain_prefix and args[-1][0][0] > 4096
        if has_ended and is_last and not cached:
            writer = threading.Thread(target=write)
            writer.start()
            writer.join(60)
        return step(*args)

    handle.take = take  # type: ignore[method-assign]
    await store.delete_dir("a/c/7")
    assert cached == [True]
    assert await read(store, key) == b"2"
    left = set(await listed(store.cached_keys()))
    assert left - {key} == {key for key in KEYS if not key.startswith("a/c/7/")}
    assert not caplog.records
    check_index(store)
