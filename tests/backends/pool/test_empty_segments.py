"""Segments without values: their files go with the last of these, by whichever process they are deleted."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import MemoryStore

from directories import SEGMENTS, closed
from pools import source_of
from support import check_quiet, fill, read, until
from zcache import CachePool, CacheStore
from zcache.testing import set_block_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

VALUES = {f"k/{n}": bytes([n]) * 50_000 for n in range(40)}
"""They are in several segments."""
BOUND = 4 * 10**6


@pytest.fixture(autouse=True)
def block_size() -> None:
    """Here blocks count, as everywhere outside the tests."""
    set_block_size(None)


def segments(path: Path) -> list[str]:
    return [file.name for file in (path / "pool" / SEGMENTS).iterdir()]


async def filled(path: Path) -> tuple[CachePool, CacheStore]:
    """A pool of one source with several segments."""
    pool = CachePool(path / "pool", max_size=BOUND)
    store = CacheStore(source_of(**VALUES), cache_store=pool, source_id="s")
    for key in VALUES:
        await read(store, key)
    assert await store.drain()
    assert len(segments(path)) > 5
    return pool, store


async def forget(pool: CachePool, _: CacheStore) -> None:
    pool.forget("s")


DELETES: dict[str, Callable[[CachePool, CacheStore], Awaitable[object]]] = {
    "forget": forget,
    "delete_dir": lambda _, store: store.delete_dir("k"),
    "clear": lambda _, store: store.clear(),
    "clear_cache": lambda _, store: store.clear_cache(),
    "invalidate": lambda _, store: store.invalidate(""),
    "delete": lambda _, store: asyncio.gather(*map(store.delete, VALUES)),
}


@pytest.mark.parametrize("how", DELETES)
async def test_segments_go_with_their_last_values(tmp_path: Path, how: str) -> None:
    pool, store = await filled(tmp_path)
    empty = pool.cache_info()["current_size"]
    await DELETES[how](pool, store)
    await until(lambda: not segments(tmp_path))
    await until(lambda: pool.cache_info()["current_size"] < empty // 50)
    await fill(store, again=b"value")
    await check_quiet(store)
    assert len(segments(tmp_path)) == 1


async def test_segments_that_a_smaller_bound_empties_go(tmp_path: Path) -> None:
    pool, store = await filled(tmp_path)
    before = len(segments(tmp_path))
    smaller = CachePool(tmp_path / "pool", max_size=BOUND // 20)
    assert smaller == pool
    assert len(segments(tmp_path)) < before // 2
    await check_quiet(store)


def test_segments_of_others_go_with_their_last_values(tmp_path: Path) -> None:
    """Also that to which another participant appends."""
    pool = CachePool(tmp_path / "pool", max_size=BOUND)
    ready, begin = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            own = CachePool(tmp_path / "pool", max_size=BOUND)
            store = CacheStore(source_of(**VALUES), cache_store=own, source_id="s")
            asyncio.run(fill(store, own=b"value"))
            store.drain_sync()
            os.write(ready[1], b"!")
            os.read(begin[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    assert len(segments(tmp_path)) == 1
    pool.forget("s")
    assert segments(tmp_path) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for end in (*ready, *begin):
        os.close(end)


class Refusing:
    """Stands before segments that cannot be removed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def remove(self, _: int) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")


async def test_segments_that_cannot_be_removed_go_with_the_next_ones(tmp_path: Path) -> None:
    pool, store = await filled(tmp_path)
    scanner: Any = pool._pool.directory.layout.scanner  # type: ignore[union-attr]
    scanner.files = Refusing(scanner.files)
    pool.forget("s")
    assert segments(tmp_path)
    scanner.files = scanner.files.inner
    await fill(store, again=b"value")
    await store.clear_cache()
    await until(lambda: not segments(tmp_path))
    await check_quiet(store)


async def test_segments_without_values_go_when_the_pool_is_opened(tmp_path: Path) -> None:
    pool, store = await filled(tmp_path)
    # A death before the last step.
    pool._pool.directory.remove_empty_segments = lambda: None  # type: ignore[union-attr, method-assign]
    await store.clear_cache()
    assert segments(tmp_path)
    store.close()
    del store, pool
    gc.collect()
    await closed(tmp_path, "pool")
    again = CachePool(tmp_path / "pool", max_size=BOUND)
    assert segments(tmp_path) == []
    await check_quiet(CacheStore(MemoryStore(), cache_store=again, source_id="s"))
