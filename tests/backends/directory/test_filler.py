"""Fills of a directory when its volume is full, refuses a write, or keeps no times."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

from directories import closed, open_store, reads, sizes_in, tree
from pools import CACHES, ON_DISK
from support import buf, check_quiet, drained, fill, logged, read, read_through, said, until, write
from zcache import CacheStore
from zcache._backends.directory.space import SpaceLog
from zcache.testing import FakeClock, in_flight

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parents[2]


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A volume of 2 MiB, where the machine lets us mount one."""
    small = tmp_path / "cache"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes a privilege that this machine does not give")
    yield small
    subprocess.run(["umount", "-l", str(small)], check=True)


def free_space(volume: Path) -> int:
    found = os.statvfs(volume)
    return found.f_bavail * found.f_frsize


async def test_min_free_space_fills_evict_before_they_write(
    tmp_path: Path, small_volume: Path
) -> None:
    store, source = open_store(tmp_path, min_free_space="1MiB")
    for number in range(20):
        await write(store, f"a/{number}", bytes(100_000))
        assert free_space(small_volume) >= 2**20
    sizes = sizes_in(small_volume)
    # The newest, one after the other.
    assert set(sizes) == {f"a/{number}" for number in range(20 - len(sizes), 20)}
    assert len(sizes) > 3
    # Another has taken the space: all that is cached would not be enough, so it is kept, and nothing is added.
    (small_volume / "of-another").write_bytes(bytes(free_space(small_volume) - 50_000))
    await write(store, "b", bytes(100_000))
    assert await read_through(store, "b") == bytes(100_000)
    assert set(sizes_in(small_volume)) == {*sizes, "of-another"}
    assert reads(source) == 1
    (small_volume / "of-another").unlink()
    await write(store, "b", bytes(100_000))
    assert sizes_in(small_volume)["b"] == 100_000
    assert free_space(small_volume) >= 2**20
    await check_quiet(store)


async def test_min_free_space_by_default_is_a_twentieth_of_a_small_volume(
    tmp_path: Path, small_volume: Path
) -> None:
    store, _ = open_store(tmp_path)
    for number in range(30):
        await write(store, f"a/{number}", bytes(100_000))
        assert free_space(small_volume) >= 2**21 // 20
    assert free_space(small_volume) < 2**21 // 20 + 2 * 102_400
    await check_quiet(store)


async def test_min_free_space_more_than_there_is_keeps_the_cache(tmp_path: Path) -> None:
    """Also where no volume can be mounted."""
    store, _ = open_store(tmp_path, min_free_space=0)
    await fill(store, a=b"1", b=b"2")
    assert sizes_in(tmp_path / "cache") == {"a": 1, "b": 1}
    del store
    await closed(tmp_path)
    store, _ = open_store(tmp_path, min_free_space=2**60)
    await write(store, "c", b"3")
    assert sizes_in(tmp_path / "cache") == {"a": 1, "b": 1}
    assert await read_through(store, "c") == b"3"
    await check_quiet(store)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log has said of the space on a volume."""
    messages = [record.getMessage() for record in logged(caplog)]
    return [message for message in messages if "min_free_space" in message]


@pytest.mark.parametrize("kind", ON_DISK)
async def test_values_without_space_are_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    root = tmp_path / "cache"
    for number in range(2):
        cache = CACHES[kind](root)
        # Also by the sources of one pool.
        name = str(number) if kind == "pool" else "s"
        source = MemoryStore({"a": buf(b"1"), "b": buf(b"2")})
        store = CacheStore(source, cache_store=cache, source_id=name, min_free_space=2**60)
        for key in ("a", "b", "b"):
            await read(store, key)
            assert await store.drain()
        await store.set("c", buf(b"3"))
        assert await store.drain()
        stats = store.cache_stats()
        assert (stats["refusals"], stats["cache_failures"], stats["hits"]) == (4, 0, 0)
        await until(lambda: told(caplog))
    (message,) = told(caplog)
    assert f"cache directory {root} takes nothing in" in message
    assert f"min_free_space={2**60:,}" in message
    assert "Free some of the volume, or pass a smaller min_free_space=" in message


async def test_space_that_has_gone_once_more_is_told_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = SpaceLog(str(tmp_path))
    for count in (1, 2):
        log.rejected(None)
        log.rejected(None)
        await until(lambda count=count: len(told(caplog)) == count)
        log.filled()
    default = min(2**30, shutil.disk_usage(tmp_path).total // 20)
    assert all(f"min_free_space={default:,}" in message for message in told(caplog))
    # Of a directory that is gone nothing is known.
    log = SpaceLog(str(tmp_path / "gone"))
    log._say(None)
    assert len(told(caplog)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("min_free_space", [0, 300_000])
async def test_volume_full_reads_go_on(
    tmp_path: Path, small_volume: Path, min_free_space: int
) -> None:
    """A real one; the index grows as well, on a volume without room."""
    store, source = open_store(tmp_path, min_free_space=min_free_space)
    values = {f"a/c/{number}": os.urandom(100_000) for number in range(60)}
    for key, value in values.items():
        await source.inner.set(key, buf(value))
    for _ in range(2):
        for key, value in values.items():
            assert await read(store, key) == value
    await drained(store)
    await check_quiet(store)
    for number in range(3000):
        await store.set(f"b/c/{number}", buf(b""))
    await check_quiet(store)
    assert len(sizes_in(small_volume)) > 3
    assert tree(small_volume / ".zcache/tmp") == set()


async def test_write_refused_the_value_stays_uncached_and_nothing_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock(1e9)
    store, source = open_store(tmp_path, clock=clock)
    unfinished = tmp_path / "cache/.zcache/tmp"
    unfinished.rmdir()
    unfinished.write_bytes(b"in its place")
    for number in range(30):
        await write(store, "a", b"%d" % number)
        assert await read_through(store, "a") == b"%d" % number
    assert store.cache_info()["current_size"] == 0
    assert store.cache_stats()["cache_failures"] >= 1
    assert in_flight(store) == (0, 0)
    assert reads(source) == 30
    # It may be this key's fault, for all that the error says, so others are tried.
    assert not said(caplog)
    unfinished.unlink()
    unfinished.mkdir()
    await write(store, "b", b"30")
    assert await read_through(store, "b") == b"30"
    assert sizes_in(tmp_path / "cache") == {"b": 2}
    await check_quiet(store)


LIMITED = """
import asyncio, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from directories import open_store, tree
from support import buf, check_quiet, read_through, write

where = Path(sys.argv[1])

async def main():
    store, source = open_store(where)
    await write(store, "small", bytes(1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    value = bytes(range(256)) * 2**13
    for _ in range(3):
        assert await read_through(store, "large") == value
        assert await read_through(store, "small") == bytes(1000)
    assert tree(where / "cache/.zcache/tmp") == set()
    assert not (where / "cache/large").exists()
    assert store.cache_info()["current_size"] == 1000
    assert store.cache_stats()["cache_failures"] >= 1
    await check_quiet(store)

asyncio.run(main())
"""


def test_write_refused_half_way_leaves_no_part_of_the_value(tmp_path: Path) -> None:
    """As a quota does: the first bytes are written, and the next ones refused."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/large").write_bytes(bytes(range(256)) * 2**13)
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def coarse_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system that keeps times in whole seconds, where the machine lets us mount one."""
    cache, image = tmp_path / "cache", tmp_path / "image"
    cache.mkdir()
    image.write_bytes(bytes(4 * 2**20))
    commands = [["mkfs.ext2", "-q", "-I", "128", image], ["mount", "-o", "loop", image, cache]]
    if os.geteuid() or shutil.which("mkfs.ext2") is None:
        pytest.skip("this machine cannot make and mount such a file system")
    for command in commands:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this machine cannot make and mount such a file system")
    (cache / "lost+found").rmdir()
    yield cache
    subprocess.run(["umount", "-l", str(cache)], check=True)


async def test_file_system_keeps_whole_seconds_nothing_is_written(
    tmp_path: Path, coarse_volume: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be told from other files, and so never be removed, is not written."""
    store, _ = open_store(tmp_path, max_size=100)
    for number in range(30):
        await write(store, f"a/c/{number}", bytes(10))
        assert await read_through(store, f"a/c/{number}") == bytes(10)
    assert [name for name in tree(coarse_volume) if not name.startswith(".zcache/")] == []
    assert tree(coarse_volume / ".zcache/tmp") == set()
    assert store.cache_info()["current_size"] == 0
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert "nanosecond" in caplog.text


async def test_fill_of_ranges_and_values_have_files_of_their_own(tmp_path: Path) -> None:
    store, source = open_store(tmp_path)
    await source.inner.set("a/c/0", buf(b"0123456789"))
    assert await read_through(store, "a/c/0", RangeByteRequest(2, 5)) == b"234"
    names = tree(tmp_path / "cache") - tree(tmp_path / "cache/.zcache/index")
    assert [name for name in names if name.startswith(".zcache/ranges/a/c/0")]
    assert not (tmp_path / "cache/a/c/0").exists()
    assert await read_through(store, "a/c/0") == b"0123456789"
    assert (tmp_path / "cache/a/c/0").read_bytes() == b"0123456789"
    await check_quiet(store)


async def test_call_of_ended_fills_without_memory_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", printed.append)
    calls = []

    def fails(directory: object) -> None:
        calls.append(directory is not None)
        raise MemoryError

    monkeypatch.setattr("zcache._backends.directory.index._became_idle", fails)
    store, _ = open_store(tmp_path)
    await write(store, "a", b"value")
    await until(lambda: calls)
    await drained(store)
    assert store.is_cached("a")
    assert printed == []
