"""A cache directory over a source that counts, as several test files open it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

from support import CountingStore
from zcache import CacheStore

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store


def open_store(where: Path, source: Store | None = None, **options: Any) -> CacheStore:
    source = source or LocalStore(where / "source")
    return CacheStore(CountingStore(source), cache_store=LocalStore(where / "cache"), **options)


def reads(store: CacheStore) -> int:
    """How many reads reached the source since the last time."""
    assert isinstance(store._store, CountingStore)
    return store._store.take()["get"]


def tree(where: Path) -> set[str]:
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit, as a disk does: no time changes."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1 << bit]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
