"""What a rebuild of the index takes in: nothing that is older than a write that has returned."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore

from support import buf, drained_sync
from zcache import CacheStore
from zcache.testing import entries

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store

KEYS = [f"a/c/{n}" for n in range(10)]
PART = RangeByteRequest(2, 6)


def get(store: Store, key: str, byte_range: ByteRequest | None = None) -> bytes | None:
    value = store.get_sync(key, byte_range=byte_range)  # type: ignore[attr-defined]
    return None if value is None else value.to_bytes()


def put(store: Store, key: str, value: bytes) -> None:
    store.set_sync(key, buf(value))  # type: ignore[attr-defined]


def open_store(where: Path, **options: object) -> CacheStore:
    source = LocalStore(where / "source")
    return CacheStore(source, cache_store=LocalStore(where / "cache"), **options)  # type: ignore[arg-type]


def warm(where: Path) -> CacheStore:
    """A cache that holds all keys, and a range of each."""
    source = LocalStore(where / "source")
    for key in KEYS:
        put(source, key, b"old " + key.encode())
    store = open_store(where)
    for key in KEYS:
        get(store, key, PART)
        drained_sync(store)
        get(store, key)
    drained_sync(store)
    return store


def die_in_a_step(where: Path) -> None:
    """Leave the mark of a participant that was killed inside a step of the index."""
    head = os.open(where / "cache/.zcache/index/head", os.O_RDWR)
    os.pwrite(head, b"\x09", 8)
    os.close(head)


def run_until_gone(where: Path, work: str) -> subprocess.Popen[str]:
    """Another participant, which says "there" and then kills or stops itself."""
    script = f"""
        import os, sys
        from pathlib import Path
        from test_taken_in import KEYS, get, open_store
        from zcache._core import Index

        store = open_store(Path(sys.argv[1]))
        get(store, KEYS[1])
        index = store._cache.shared.handle.index
        {work}
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent.parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(where)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.stdout.close()
    return process


DROPS = {
    "a write": "index.begin_write(KEYS[7])",
    "a delete of a directory": "index.invalidate('a', True); index.drain_prefix('a')",
    "an eviction": "index.evict(2**20, 0.0)",
}


@pytest.mark.parametrize("signal", [9, 19], ids=["killed", "stopped"])
@pytest.mark.parametrize("drop", list(DROPS))
def test_a_participant_dies_between_drop_and_unlink(tmp_path: Path, drop: str, signal: int) -> None:
    """The file that it has left is not taken for the value that another one has written since."""
    store = warm(tmp_path)
    work = f"{DROPS[drop]}; print('there', flush=True); os.kill(os.getpid(), {signal})"
    other = run_until_gone(tmp_path, work)
    try:
        if signal == 9:
            other.wait()
        put(store, KEYS[7], b"new value")
        die_in_a_step(tmp_path)
        for _ in range(3):
            assert get(store, KEYS[7]) == b"new value"
            assert get(store, KEYS[7], PART) == b"w va"
            get(store, KEYS[2])
            drained_sync(store)
        del store
        fresh = open_store(tmp_path, verify="always")
        assert get(fresh, KEYS[7]) == b"new value"
        assert get(fresh, KEYS[7], PART) == b"w va"
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("how", ["set_sync", "set", "delete_sync", "delete_dir"])
def test_a_write_removes_what_the_index_does_not_know(tmp_path: Path, how: str) -> None:
    """As after damage that hides an entry: the file is found by its name."""
    store = warm(tmp_path)
    stray = tmp_path / "cache" / KEYS[7]
    ranges = tmp_path / "cache/.zcache/ranges/a/c"
    parts = [path for path in ranges.iterdir() if path.name.startswith("7@")]
    assert stray.exists()
    assert parts
    # The index forgets them, as one that is damaged does.
    index = store._cache.shared.handle.index
    index.confirm_deletes([cell for cell, _ in index.begin_write(KEYS[7])], [])
    index.end_write(KEYS[7], False)
    assert KEYS[7] not in {entry.key for entry in entries(store)}
    match how:
        case "set_sync":
            put(store, KEYS[7], b"new value")
        case "set":
            asyncio.run(store.set(KEYS[7], buf(b"new value")))
        case "delete_sync":
            store.delete_sync(KEYS[7])
        case "delete_dir":
            asyncio.run(store.delete_dir("a"))
    expected = b"new value" if how.startswith("set") else None
    drained_sync(store)
    assert not any(path.exists() for path in parts)
    if stray.exists():
        assert stray.read_bytes() == expected
    die_in_a_step(tmp_path)
    for _ in range(2):
        assert get(store, KEYS[7]) == expected
        drained_sync(store)
