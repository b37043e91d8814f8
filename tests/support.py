"""What the tests share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, cpu, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from zcache import CacheStore
from zcache.testing import (
    InvariantError,
    check_invariants,
    check_invariants_async,
    entries,
    in_flight,
    is_complete,
    set_block_size,
)

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator

    import pytest

# As the fixture `block_size` has it, for processes that a test starts.
set_block_size(1)

PROTOTYPE = default_buffer_prototype()
TESTS = Path(__file__).parent
"""Where the modules that tests share lie, for scripts in processes of their own."""
RANGES = ".zcache/ranges/"
"""Where a cache store holds ranges of values."""


def buf(data: bytes) -> Buffer:
    """A CPU buffer with these bytes."""
    return cpu.Buffer.from_bytes(data)


async def read(store: Store, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
    """What `get` gives, as bytes."""
    value = await store.get(key, PROTOTYPE, byte_range)
    return None if value is None else value.to_bytes()


async def fill(store: Store, **values: bytes) -> None:
    """Write keys one after the other."""
    for key, value in values.items():
        await store.set(key, buf(value))
        if isinstance(store, CacheStore):
            await drained(store)


def with_the_slot_of(store: CacheStore, key: str) -> str:
    """Another key, of which the index counts the changes in the same slot as those of this one."""
    index = store._cache.shared.handle.index

    def is_changed_with(names: list[str]) -> bool:
        [stamp] = index.begin_decodes([key], 1.0, [None])
        assert stamp is not None
        for name in names:
            index.begin_write(name)
            index.end_write(name, False)
        return not index.is_current(key, *stamp, 1.0, False, 1.0)

    names = (f"{key}-{n}" for n in itertools.count())
    while not is_changed_with(some := list(itertools.islice(names, 64))):
        pass
    return next(name for name in some if is_changed_with([name]))


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder in use, where folders may vanish meanwhile: `Path.rglob` raises then."""
    for above, _, names in os.walk(folder):
        yield from (Path(above, name) for name in names)


def sizes_of(store: Store) -> dict[str, int]:
    """Sizes of the values that a store in memory or in a directory holds, by key; nothing of zcache's."""
    inner = innermost(store)
    if isinstance(inner, MemoryStore):
        sizes = {key: len(value) for key, value in inner._store_dict.items()}
    else:
        assert isinstance(inner, LocalStore), inner
        root = Path(inner.root)
        files = files_below(root)
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in files}
    return {key: size for key, size in sizes.items() if is_value(key)}


async def drained(store: CacheStore) -> None:
    """Wait until all that was read or written before is in the cache store, or refused."""
    if (drain := getattr(store, "drain", None)) is not None:
        await drain()


def drained_sync(store: CacheStore) -> None:
    """The same, where there is no event loop."""
    if (drain := getattr(store, "drain_sync", None)) is not None:
        drain()


async def read_through(
    store: CacheStore, key: str, byte_range: ByteRequest | None = None
) -> bytes | None:
    """What `get` gives, once the cache has filled it in as well."""
    found = await read(store, key, byte_range)
    await drained(store)
    return found


async def write(store: CacheStore, key: str, value: bytes) -> None:
    """Write with `set`, and wait until the cache has it as well."""
    await store.set(key, buf(value))
    await drained(store)


async def check_quiet(store: CacheStore) -> None:
    """Assert what holds whenever nothing is under way, once nothing is."""
    await drained(store)
    try:
        await check_invariants_async(store)
    except InvariantError:
        # What was done to the files of the index is seen by a step at times: then it is being rebuilt.
        await until(lambda: is_complete(store))
        await check_invariants_async(store)
    _check_counts(store)


def check_quiet_sync(store: CacheStore) -> None:
    """The same, where there is no event loop."""
    drained_sync(store)
    check_invariants(store)
    _check_counts(store)


def _check_counts(store: CacheStore) -> None:
    assert in_flight(store) == (0, 0)
    found = entries(store, everything=True)
    states = {entry.state for entry in found}
    assert states <= {"live", "delete-failed"}, found
    info = store.cache_info()
    live = [entry for entry in found if entry.state == "live"]
    assert info["tracked_keys"] == info["cached_keys"] == len(live)
    stats = store.cache_stats()
    assert stats["total_requests"] == stats["hits"] + stats["misses"]
    assert stats["expirations"] <= stats["evictions"]


async def quiet(store: CacheStore) -> None:
    """Wait until nothing is under way, cancelled writes that go on by themselves included."""
    await drained(store)
    for _ in range(20_000):
        states = {entry.state for entry in entries(store)}
        if in_flight(store) == (0, 0) and states <= {"live", "delete-failed"}:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"it never becomes quiet: {in_flight(store)}, {entries(store)}")


async def check_same(store: CacheStore, source: Any, cache: Any) -> None:
    """Assert that, once all is quiet, the index equals what the cache store holds and every key reads
    as the source has it. Both are of `doubles.DictStore`.
    """
    await quiet(store)
    await check_invariants_async(store, held=cache.sizes)
    _check_counts(store)
    assert store.max_size is None or cache.peak <= store.max_size
    names = [key for key in cache.values if not key.startswith(".zcache/")]
    for key in {*source.values, *names}:
        assert await read_through(store, key) == source.values.get(key), key


async def until(holds: Callable[[], object]) -> None:
    """Wait for what threads and other event loops bring about, too."""
    while not holds():  # noqa: ASYNC110 - events belong to one loop, or block it
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def threads(*works: Callable[[], object]) -> Iterator[list[Any]]:
    """Run each in a thread of its own; the results are there at the end."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
        results: list[Any] = []
        yield results
        results += [future.result(60) for future in futures]


def value_sync(
    store: CacheStore, key: str = "k", request: ByteRequest | None = None
) -> bytes | None:
    """What `get_sync` gives, as bytes."""
    value = store.get_sync(key, byte_range=request)
    return None if value is None else value.to_bytes()


class SecondBuffer(cpu.Buffer):
    """Another class of CPU buffer, as a library of its own might bring."""


SECOND = BufferPrototype(buffer=SecondBuffer, nd_buffer=cpu.NDBuffer)


def cut(value: bytes, request: ByteRequest | None) -> bytes:
    """What a request selects, as Python slices."""
    if isinstance(request, RangeByteRequest):
        return value[request.start : request.end]
    if isinstance(request, OffsetByteRequest):
        return value[request.offset :]
    if isinstance(request, SuffixByteRequest):
        return value[max(0, len(value) - request.suffix) :]
    return value


async def count_turns(turns: list[None]) -> None:
    """Add to a list in each turn that the event loop gives, until cancelled."""
    while True:
        turns.append(None)
        await asyncio.sleep(0)


async def listed(names: Any) -> list[str]:
    """Everything that a listing yields, sorted."""
    return sorted([name async for name in names])


def innermost(store: Store) -> Store:
    """The store below all wrappers."""
    while isinstance(store, WrapperStore):
        store = store._store
    return store


def is_value(key: str) -> bool:
    """Whether a key of a cache store is a value or a range of one, and nothing of zcache's own."""
    return not key.startswith(".zcache/") or key.startswith(RANGES)


def everything(store: Store) -> Iterator[tuple[str, bytes]]:
    """Every key and value of a store, through the store."""

    async def collect() -> list[tuple[str, bytes]]:
        keys = await listed(store.list())
        return [(key, await read(store, key) or b"") for key in keys]

    yield from sync(collect())


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system write no more than so many bytes of a file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What zcache has logged. asyncio may speak of tasks that earlier tests have left."""
    return [record for record in caplog.records if record.name == "zcache"]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of zcache in the log."""
    return [record.getMessage() for record in logged(caplog)]
