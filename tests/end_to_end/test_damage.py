"""Nothing that lies on a disk is trusted: no flipped bit reaches a user, and no file stops one."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest
from zarr.storage import LocalStore

import damage
from damage import BOUND, KEYS, check, open_damaged, places, use, value
from directories import (
    INDEX,
    INDEX_FILES,
    POOL_INDEX_FILES,
    closed,
    complete,
    flip,
    reads,
    sizes_in,
)
from pools import cache_at
from support import buf, drained, logged, read, read_through, said
from zcache import CacheStore
from zcache._core import PENDING, SIGNATURE
from zcache.testing import StoreDouble, check_invariants

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def is_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the cache is a pool; see `cache_at`. Default is that it is none."""
    is_so: bool = getattr(request, "param", False)
    monkeypatch.setenv("ZCACHE_TEST_POOL", "1" if is_so else "")
    return is_so


over_both = pytest.mark.parametrize(
    "is_pool", [False, True], indirect=True, ids=["directory", "pool"]
)
each_index_file = pytest.mark.parametrize(
    ("is_pool", "name"),
    [*((False, name) for name in INDEX_FILES), *((True, name) for name in POOL_INDEX_FILES)],
    indirect=["is_pool"],
)


@pytest.fixture
def where(tmp_path: Path, is_pool: bool) -> Path:
    """A directory with a cache of values and ranges that is not in use."""
    damage.make(tmp_path)
    gc.collect()
    return tmp_path


# ------------------------------------------------------------------------------- values


def files_of_values(where: Path) -> list[Path]:
    cache = where / "cache"
    return [cache / name for name in sizes_in(cache)]


@pytest.mark.parametrize(
    ("verify", "rebuilt"),
    [("first", False), ("first", True), ("always", False), ("always", True), ("never", True)],
)
async def test_value_bit_flipped_anywhere_is_read_from_the_source(
    where: Path, verify: str, rebuilt: bool
) -> None:
    dice = random.Random(0)
    paths = files_of_values(where)
    assert any(".zcache/ranges" in str(path) for path in paths)
    for number, path in enumerate(paths):
        size = path.stat().st_size
        # First byte, last byte, and anywhere.
        position = (0, size - 1, dice.randrange(size))[number % 3]
        flip(path, position, dice.randrange(8))
    if rebuilt:
        shutil.rmtree(where / "cache" / INDEX)
    store, _source = open_damaged(where, verify=verify)
    await use(store)
    assert store.cache_stats()["damaged"] >= len(paths) - 3  # A full value serves a range as well.
    await check(store)


@pytest.mark.parametrize(
    ("verify", "found_before", "found_after"),
    [("never", False, False), ("first", True, False), ("always", True, True)],
)
async def test_value_damaged_is_found_when_verify_says_so(
    where: Path, verify: str, found_before: bool, found_after: bool
) -> None:
    """At the first hit of each process, at each one, or never."""
    for key, reads_first, found in ((KEYS[-1], 0, found_before), (KEYS[-2], 1, found_after)):
        store, _ = open_damaged(where, verify=verify)
        for _ in range(reads_first):
            assert await read(store, key) == value(key)
        flip(where / "cache" / key, 5, 0)
        assert (await read(store, key) == value(key)) == found
        assert store.cache_stats()["damaged"] == found
        await drained(store)
        del store
        # As another process does: what was verified before does not count.
        await closed(where)


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("length", [0, 1, -1, 5])
async def test_value_of_another_length_is_read_from_the_source(
    where: Path, length: int, rebuilt: bool
) -> None:
    """Shortened, as a loss of power does, or longer."""
    for path in files_of_values(where):
        times = path.stat()
        size = times.st_size
        os.truncate(path, size + 3 if length == 5 else length % size)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if rebuilt:
        shutil.rmtree(where / "cache" / INDEX)
    store, _source = open_damaged(where)
    await use(store)
    assert store.cache_stats()["damaged"] > 10
    await check(store)


async def test_value_gone_or_not_readable_is_read_from_the_source(where: Path) -> None:
    for number, path in enumerate(files_of_values(where)):
        path.unlink()
        if number % 3 == 1:
            path.mkdir()
        elif number % 3 == 2:
            path.symlink_to("nowhere")
    store, _source = open_damaged(where)
    await use(store)
    check_invariants(store)


async def test_value_never_committed_is_removed_by_a_rebuild(where: Path) -> None:
    """Its process was killed between the link and the commit; a write may have overtaken it."""
    path = where / "cache" / KEYS[-1]
    status = path.stat()
    path.write_bytes(b"older")
    time = status.st_mtime_ns - SIGNATURE + PENDING
    os.utime(path, ns=(time, time))
    shutil.rmtree(where / "cache" / INDEX)
    store, _source = open_damaged(where)
    assert not path.exists()
    await check(store)


# -------------------------------------------------------------------- the index, closed


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Leaves what there is already out of collections, which a test with very many of them has to wait for."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def remove(folder: Path) -> None:
    """Remove a folder of which a scan that has no one to tell may remove parts, too."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


@over_both
@pytest.mark.slow
@pytest.mark.usefixtures("frozen_heap")
async def test_index_bit_flipped_anywhere_serves_right_bytes_within_the_bound(where: Path) -> None:
    dice = random.Random(2)
    saved = where / "saved"
    shutil.copytree(where / "cache", saved)
    done = 0
    for path, position in list(places(where)):
        remove(where / "cache")
        shutil.copytree(saved, where / "cache")
        flip(path, position, dice.randrange(8))
        store, _source = open_damaged(where)
        await use(store, done)
        await complete(store)
        await use(store, done + 1)
        current = store.cache_info()["current_size"]
        files = sum(sizes_in(where / "cache").values())
        assert files <= BOUND, (path, position, current, files)
        await drained(store)
        del store
        await closed(where)
        done += 1
    assert done > 100


@each_index_file
async def test_index_file_cut_off_is_rebuilt_with_one_line(
    where: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = where / "cache" / INDEX / name
    for length in (0, 1, path.stat().st_size // 2, path.stat().st_size - 4096):
        os.truncate(path, max(length, 0))
        caplog.clear()
        store, _source = open_damaged(where)
        rebuilt = [record for record in logged(caplog) if "was rebuilt" in record.message]
        # One line; none where what was cut off was not in use.
        assert len(said(caplog)) == len(rebuilt) <= 1
        # What "adaptive" has learned is learned anew.
        assert length > 1 or rebuilt or name == "history"
        await check(store)
        del store
        await closed(where)


async def test_index_size_not_that_of_its_file_is_rebuilt_once(
    where: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """And then its store can go."""
    key = KEYS[-1]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other, _ = open_damaged(elsewhere, cache_set_data=True)
    await other.set(key, buf(b"short"))
    await drained(other)
    path = where / "cache" / key
    path.unlink()
    # With its times and attributes: a whole value that zcache wrote, but not this one.
    shutil.copy2(elsewhere / "cache" / key, path)
    store, _ = open_damaged(where)
    assert await read(store, key) == value(key)
    await drained(store)
    await complete(store)
    assert ["a size that is not" in message for message in said(caplog)] == [True]
    await check(store)
    del store
    await closed(where)
    assert len(said(caplog)) == 1


@over_both
async def test_index_size_below_the_start_of_a_range_serves_no_empty_range(where: Path) -> None:
    """A flip has made a value shorter than where the range begins: that is no empty range."""
    key = KEYS[-1]
    size = len(value(key))
    cells = where / "cache" / INDEX / "cells"
    before = cells.read_bytes()
    # Six bytes, and two of a check, which fails.
    as_stored = struct.pack("<Q", size)[:6]
    assert before.count(as_stored) == 1
    cells.write_bytes(before.replace(as_stored, struct.pack("<Q", 1)[:6]))
    for verify in ("never", "first", "always"):
        store, _source = open_damaged(where, verify=verify)
        for request, start, end in (
            (RangeByteRequest(100, 160), 100, 160),
            (OffsetByteRequest(100), 100, size),
            (RangeByteRequest(size - 1, size), size - 1, size),
        ):
            assert await read(store, key, request) == value(key)[start:end]
        await drained(store)
        del store
        await closed(where)


@over_both
@pytest.mark.parametrize("step", ["begin_write", "end_write"])
async def test_write_finds_index_damaged_counts_once(
    where: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is taken again, and counts once: the key is cached like any other afterwards."""
    cells = where / "cache" / INDEX / "cells"

    def damage() -> None:
        data = bytearray(cells.read_bytes())
        # One link of every entry; the first cells are directories.
        for at in range(3 * 56 + 4, 40 * 56, 56):
            data[at : at + 4] = b"\xff" * 4
        with cells.open("r+b") as file:
            file.write(data)

    class Source(StoreDouble):
        async def set(self, *args: Any) -> None:
            await super().set(*args)
            if step == "end_write":
                # Entries that may be found damaged: what is read during a write is not kept.
                for key in KEYS:
                    await read_through(store, key)
                damage()

    source = Source(LocalStore(where / "source"))
    store = CacheStore(
        source,
        cache_store=cache_at(where / "cache"),
        source_id="source",
        cache_set_data=False,
    )
    if step == "begin_write":
        damage()
    for key in KEYS[3:6]:
        await store.set(key, buf(value(key)))
    # Some damage is found only when it is read.
    for _ in range(10):
        await complete(store)
        source.take()
        for key in KEYS:
            assert await read_through(store, key) == value(key)
        if not (asked := source.take()):
            break
    assert asked == {}
    # A pool that was in use meanwhile may have missed a write.
    outcomes = ("was rebuilt", "The pool begins empty")
    assert any(text in message for message in said(caplog) for text in outcomes)


def head_of(**changes: tuple[int, str, int]) -> list[Any]:
    return [pytest.param(*change, id=name) for name, change in changes.items()]


@over_both
@pytest.mark.parametrize(
    ("offset", "kind", "number"),
    head_of(
        magic=(0, "<Q", 0x1234),
        dirty=(8, "=I", 3),
        check=(12, "=I", 0x1234),
        older=(16, "=I", 1),
        newer=(16, "=I", 99),
        byte_order=(20, ">I", 0x01020304),
        cell_size=(24, "=I", 64),
        rebuilding=(40, "=I", 200),
        boot=(96, "=Q", 1),
    ),
)
async def test_index_of_another_format_or_owner_is_rebuilt(
    where: Path, offset: int, kind: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an older format or a newer one, of the other byte order, or left by a process that died."""
    head = where / "cache" / INDEX / "head"
    with head.open("r+b") as file:
        file.seek(offset)
        before = file.read(struct.calcsize(kind))
        after = struct.pack(kind, number)
        assert before != after
        file.seek(offset)
        file.write(after)
    store, _source = open_damaged(where)
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert "was rebuilt" in caplog.text
    await check(store)


@over_both
async def test_index_of_the_first_format_keeps_the_values(
    where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = where / "cache" / INDEX
    (index / "texts").unlink()
    with (index / "head").open("r+b") as head:
        head.seek(16)
        head.write(struct.pack("=I", 1))
    store, source = open_damaged(where)
    assert ["was rebuilt" in message for message in said(caplog)] == [True]
    for key in KEYS[3:]:
        assert await read(store, key) == value(key)
    assert reads(source) == 0
    await check(store)


@each_index_file
@pytest.mark.parametrize("what", ["text", "noise", "ones"])
async def test_index_file_replaced_by_a_foreign_one_is_rebuilt(
    where: Path, name: str, what: str
) -> None:
    path = where / "cache" / INDEX / name
    size = path.stat().st_size
    content = {
        "text": b"shopping list\n" * 1000,
        "noise": random.Random(0).randbytes(size),
        "ones": b"\xff" * size,
    }[what]
    path.write_bytes(content)
    store, _source = open_damaged(where)
    await check(store)


def replace(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    if kind == "moved":
        path.rename(path.with_name("moved"))
        path.symlink_to("moved")
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "notes").write_text("mine")


each_file = pytest.mark.parametrize(
    "name",
    [
        *(f"index/{name}" for name in ("head", "cells", "history", "lock", "owner", "s0")),
        *("index/sample", "index/stamp.json", "stamp.json"),
    ],
)
each_kind = pytest.mark.parametrize("kind", ["folder", "full folder", "pipe", "link", "moved"])


async def keeps(store: CacheStore, source: StoreDouble) -> bool:
    """Whether what is read is cached."""
    for _ in range(2):
        reads(source)
        for key in KEYS[3:10]:
            assert await read(store, key) == value(key)
        await drained(store)
    return reads(source) == 0


@over_both
@each_file
@each_kind
async def test_anything_in_place_of_a_file_makes_way(
    where: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = where / "cache/.zcache" / name
    replace(path, kind)
    store, source = open_damaged(where)
    await complete(store)
    assert await keeps(store, source)
    assert not [message for message in said(caplog) if "was rebuilt" not in message]
    assert stat.S_ISREG(path.lstat().st_mode)
    aside = list(path.parent.glob("aside-*/notes"))
    assert [notes.read_text() for notes in aside] == ["mine"] * (kind == "full folder")
    await check(store)


@over_both
@each_file
@each_kind
async def test_anything_in_place_of_a_file_in_use_makes_way(
    where: Path, name: str, kind: str
) -> None:
    store, source = open_damaged(where)
    await use(store)
    replace(where / "cache/.zcache" / name, kind)
    await use(store)
    # Until it is noticed, within a second, the source may serve all.
    for _ in range(1000):
        if await keeps(store, source):
            break
        await asyncio.sleep(0.01)
    del store
    await closed(where)
    store, source = open_damaged(where)
    await complete(store)
    assert await keeps(store, source)
    await check(store)


async def test_index_of_another_boot_keeps_the_values(where: Path) -> None:
    """What the kernel had not written yet is found by its checksum; all else is served."""
    with (where / "cache" / INDEX / "head").open("r+b") as head:
        head.seek(96)
        head.write(b"another!")
    torn = where / "cache" / KEYS[-1]
    times = torn.stat()
    torn.write_bytes(b"")
    os.utime(torn, ns=(times.st_atime_ns, times.st_mtime_ns))
    store, source = open_damaged(where)
    for key in KEYS[3:]:
        assert await read(store, key) == value(key)
    assert reads(source) == 1
    await check(store)


# ---------------------------------------------------------------------- the index, in use


class User:
    """A process that has the index mapped: if it were killed by a signal, it would not answer."""

    def __init__(self, where: Path, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, damage.__file__, str(where), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.hear("ready")

    def hear(self, expected: str) -> None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line.strip() != expected:
            _, errors = self.process.communicate(timeout=60)
            raise AssertionError(f"exit code {self.process.returncode}: {errors[-4000:]}")

    def go_on(self) -> None:
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        self.hear("ok")


@pytest.fixture(params=["strict"])
def user(where: Path, request: pytest.FixtureRequest) -> Iterator[User]:
    user = User(where, request.param)
    yield user
    user.process.kill()
    user.process.communicate()


@pytest.mark.slow
@over_both
def test_index_damaged_while_mapped_kills_no_process(
    where: Path, user: User, is_pool: bool
) -> None:
    """Cut off, overwritten, removed: found at the next step, with no signal."""
    root = where / "cache" / INDEX
    dice = random.Random(3)
    for name in POOL_INDEX_FILES if is_pool else INDEX_FILES:
        path = root / name
        for length in (0, 5000, path.stat().st_size - 4096):
            os.truncate(path, min(length, path.stat().st_size))
            user.go_on()
        for content in (b"\xff" * path.stat().st_size, dice.randbytes(path.stat().st_size)):
            with path.open("r+b") as file:
                file.write(content)
            user.go_on()
        path.unlink()
        user.go_on()
    for path in root.iterdir():
        path.unlink()
    user.go_on()
    shutil.rmtree(root)
    user.go_on()
    assert sum(sizes_in(where / "cache").values()) <= BOUND


# A flipped size or name is found when its value is read; until then the index is off by it.
@over_both
@pytest.mark.parametrize("user", ["lax"], indirect=True)
def test_index_bits_flipped_while_mapped_kill_no_process(where: Path, user: User) -> None:
    dice = random.Random(4)
    for path, position in dice.sample(list(places(where)), 40):
        if position < path.stat().st_size:
            flip(path, position, dice.randrange(8))
        user.go_on()
