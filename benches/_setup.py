"""Keys, values and sources that the benches share."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore, WrapperStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

PROTOTYPE = default_buffer_prototype()


@dataclass(frozen=True)
class Scale:
    """How much work the lines do.

    Attributes
    ----------
    quick
        A look at everything in under a minute: sets then fit into the caches of the CPU.
    directory
        Where caches on disk are made; None for a file system below the system's temporary directory.
    """

    quick: bool = False
    directory: str | None = None

    def of(self, full: int, quick: int) -> int:
        """A number of things or rounds."""
        return quick if self.quick else full


def chunk_keys(count: int, array: str = "era5/2m_temperature") -> list[str]:
    """Keys of the chunks of one array, shuffled."""
    keys = [f"{array}/c/{i // 2000}/{i // 40 % 50}/{i % 40}" for i in range(count)]
    random.Random(count).shuffle(keys)
    return keys


def values(count: int, size: int) -> list[Buffer]:
    """Buffers of random bytes."""
    return [cpu.Buffer.from_bytes(os.urandom(size)) for _ in range(count)]


def memory_store(keys: Sequence[str], size: int, distinct: int | None = None) -> MemoryStore:
    """A store with a value of `size` bytes for each key; `distinct` of them are different ones."""
    pool = values(len(keys) if distinct is None else distinct, size)
    return MemoryStore(dict(zip(keys, itertools.cycle(pool), strict=False)))


@contextmanager
def temporary_directory(scale: Scale) -> Iterator[Path]:
    """A directory on a real file system: /tmp may lie in memory, /var/tmp does not."""
    parent = scale.directory or ("/var/tmp" if Path("/var/tmp").is_dir() else None)
    path = Path(tempfile.mkdtemp(prefix="zcache-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def mounted(kind: str, where: Path) -> Iterator[Path | None]:
    """An empty directory on tmpfs or overlayfs; None where the machine mounts none."""
    target = where / kind
    target.mkdir()
    name, options = kind, []
    if kind == "overlayfs":
        name, layers = "overlay", [where / layer for layer in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir()
        lower, upper, work = layers
        options = ["-o", f"lowerdir={lower},upperdir={upper},workdir={work}"]
    try:
        subprocess.run(
            ["mount", "-t", name, *options, name, target], check=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", target], check=True)


def zcache_store(source: Store, cache: Store | None = None, **options: Any) -> Any:
    """The store that is measured."""
    from zcache import CacheStore

    return CacheStore(source, cache_store=cache or MemoryStore(), **options)


def zarr_store(source: Store, cache: Store | None = None, **options: Any) -> Any:
    """The one that it replaces."""
    from zarr.experimental.cache_store import CacheStore

    return CacheStore(source, cache_store=cache or MemoryStore(), **options)


def local_store(path: Path) -> LocalStore:
    path.mkdir(parents=True, exist_ok=True)
    return LocalStore(path)


async def drained(store: Any) -> None:
    """Wait until all that was read before is in the cache store; zarr's class has it there already."""
    drain = getattr(store, "drain", None)
    if drain is not None:
        assert await drain()


def index_of(store: Any) -> Any:
    """The index of a `CacheStore`, for lines that measure it alone."""
    return store._cache.shared.handle.index


@contextmanager
def only_hits(store: Any) -> Iterator[None]:
    """Fail unless zcache serves everything inside from its cache: a fast miss would be no result."""
    before = store.cache_stats()
    yield
    after = store.cache_stats()
    assert after["hits"] > before["hits"], (before, after)
    for name in ("misses", "bypassed", "damaged", "cache_failures", "evictions"):
        assert after[name] == before[name], (name, before, after)


async def read_all(store: Any, keys: Sequence[str]) -> int:
    """Read keys one by one; returns their number."""
    get = store.get
    for key in keys:
        await get(key, PROTOTYPE)
    return len(keys)


async def read_at_once(store: Any, keys: Sequence[str], at_once: int = 64) -> int:
    """Read keys, so many at a time; returns their number."""
    for start in range(0, len(keys), at_once):
        await asyncio.gather(*[store.get(key, PROTOTYPE) for key in keys[start : start + at_once]])
    return len(keys)


def batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Slices of the keys, round and round."""
    count = len(keys) // size
    for number in itertools.count():
        at = number % count * size
        yield keys[at : at + size]


class SlowWrites(WrapperStore[MemoryStore]):
    """A cache store whose every write takes `latency` seconds."""

    _supports_sync_io = False

    def __init__(self, store: MemoryStore, latency: float) -> None:
        super().__init__(store)
        self.latency = latency

    async def set(self, *args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(self.latency)
        await self._store.set(*args, **kwargs)


class SlowStore(WrapperStore[MemoryStore]):
    """A source whose every read takes `latency` seconds, and that has no synchronous methods."""

    def __init__(self, store: MemoryStore, latency: float) -> None:
        super().__init__(store)
        self.latency = latency
        self.reads = 0

    async def get(self, *args: Any, **kwargs: Any) -> Buffer | None:
        self.reads += 1
        if self.latency:
            await asyncio.sleep(self.latency)
        return await self._store.get(*args, **kwargs)


@dataclass
class Counts:
    """What a source was asked for."""

    reads: int = 0
    bytes_read: int = 0


class CountingStore(MemoryStore):
    """A source that counts its reads and the bytes that it hands out.

    All ways to read from a `MemoryStore` end in one of these two.
    """

    def __init__(self, *args: Any, counts: Counts | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = counts or Counts()

    def with_read_only(self, read_only: bool = False) -> CountingStore:
        # zarr opens an array for reading through such a copy: it has to count into the same place.
        return CountingStore(self._store_dict, read_only=read_only, counts=self.counts)

    def _count(self, value: Buffer | None) -> Buffer | None:
        self.counts.reads += 1
        self.counts.bytes_read += 0 if value is None else len(value)
        return value

    async def get(self, *args: Any, **kwargs: Any) -> Buffer | None:
        return self._count(await super().get(*args, **kwargs))

    def get_sync(self, *args: Any, **kwargs: Any) -> Buffer | None:
        return self._count(super().get_sync(*args, **kwargs))


PIPELINES = {
    "batched": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "fused": "zarr.core.codec_pipeline.FusedCodecPipeline",
}


def pipelines() -> list[str]:
    """The codec pipelines that the installed zarr has."""
    from zarr.core import codec_pipeline

    return [
        name for name, path in PIPELINES.items() if hasattr(codec_pipeline, path.split(".")[-1])
    ]
