"""A cache directory over a source that counts, and what damages it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

from pools import cache_at
from support import files_below, until
from zcache import CacheStore
from zcache._core import SegmentFiles
from zcache.testing import StoreDouble, is_complete

if TYPE_CHECKING:
    from zarr.abc.store import Store

INDEX = ".zcache/index"
INDEX_FILES = ("head", "table", "cells", "texts", "history")
POOL_INDEX_FILES = (*INDEX_FILES, "places")
SEGMENTS = ".zcache/segments"


def open_store(
    where: Path, source: Store | None = None, **options: Any
) -> tuple[CacheStore, StoreDouble]:
    """A store with its cache in a directory (see `cache_at`), and its source, which has the same name each time."""
    double = StoreDouble(source or LocalStore(where / "source"))
    options = {"source_id": "source"} | options
    return CacheStore(double, cache_store=cache_at(where / "cache"), **options), double


def usage(root: Path) -> int:
    """What `du` says of a directory, without the index."""
    total = 0
    for folder, folders, names in os.walk(root):
        if folder == str(root / ".zcache") and "index" in folders:
            folders.remove("index")
        for path in (Path(folder), *(Path(folder) / name for name in names)):
            try:
                total += os.lstat(path).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def reads(source: StoreDouble) -> int:
    """How many reads reached the source since the last time."""
    return source.take()["get"]


def is_in_use(cache: Path) -> bool:
    """Whether any process has the index open, by a store that waits to be collected too."""
    for slot in (cache / INDEX).glob("s[0-9]*"):
        file = os.open(slot, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
    return False


async def closed(where: Path, cache: str = "cache") -> None:
    """Wait until no process uses the directory, so that the next store opens it anew."""
    while is_in_use(where / cache):
        # What waits to be collected does not count.
        gc.collect()
        await asyncio.sleep(0.01)


async def complete(store: CacheStore) -> None:
    """Wait until an index that is being rebuilt is complete."""
    await until(lambda: is_complete(store))


def tree(where: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(where)) for path in files_below(where) if path.is_file()}


def sizes_in(cache: Path) -> dict[str, int]:
    """Sizes of all values and ranges in a cache directory, of any writer, or in a pool."""
    if (cache / SEGMENTS).exists():
        values = SegmentFiles(str(cache / SEGMENTS), holes=True).values()
        return {name: size for name, size, _ in values}
    sizes = {}
    for name in tree(cache):
        with contextlib.suppress(FileNotFoundError):  # It was deleted meanwhile.
            sizes[name] = (cache / name).stat().st_size
    ranges = ".zcache/ranges/"
    return {
        name: size
        for name, size in sizes.items()
        if not name.startswith(".zcache/") or name.startswith(ranges)
    }


def flip(path: Path, position: int, bit: int) -> None:
    """Flip one bit, as a disk does: no time changes."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1 << bit]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
