"""Nothing that lies on a disk is trusted: no flipped bit reaches a user, and no file stops one."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest
from zarr.storage import LocalStore

from directory_support import flip
from support import CountingStore, buf, held, read
from zcache import CacheStore, _books, _files
from zcache._books import Books
from zcache._core import CorruptIndexError, Index

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = str(Path(__file__).parent)
INDEX = ".zcache/index"
FILES = ("head", "table", "cells", "texts")
BOUND = 6000
# Some in a directory of their own, whose name does not fit into a cell.
KEYS = [
    f"group/array{f'-{number:040x}' * (number % 2)}/c/{number}/{number}" for number in range(20)
]
RANGE = RangeByteRequest(100, 160)


def value(key: str) -> bytes:
    return random.Random(key).randbytes(160 + 3 * int(key.rpartition("/")[2]))


def open_store(where: Path, **options: Any) -> CacheStore:
    options = {"max_size": BOUND, "cache_set_data": False} | options
    return CacheStore(
        CountingStore(LocalStore(where / "source")),
        cache_store=LocalStore(where / "cache"),
        **options,
    )


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A directory with a cache of values and ranges, that nobody has open."""
    for key in KEYS:
        path = tmp_path / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key))

    async def warm() -> None:
        store = open_store(tmp_path)
        for key in KEYS[:3]:
            await read(store, key, RANGE)
        for key in KEYS[3:]:
            await read(store, key)

    asyncio.run(warm())
    gc.collect()
    return tmp_path


def reads(store: CacheStore) -> int:
    assert isinstance(store._store, CountingStore)
    return store._store.take()["get"]


async def use(store: CacheStore, seed: int = 0) -> None:
    """Read everything, some of it twice, write and delete a little: always the right bytes."""
    dice = random.Random(seed)
    for key in dice.sample(KEYS, len(KEYS)):
        assert await read(store, key, RANGE) == value(key)[100:160]
        assert await read(store, key) == value(key)
    key = dice.choice(KEYS)
    await store.set(key, buf(value(key)))
    assert await read(store, key) == value(key)
    await store.delete("group/other")


async def settle(store: CacheStore) -> None:
    """Wait until an index that is being rebuilt is complete."""
    for _ in range(500):
        if store._engine.books.must(lambda: store._engine.index.is_complete):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the index is never complete")


async def check(store: CacheStore) -> None:
    """After all, the books are right again and the bound holds."""
    await settle(store)
    await use(store)
    await settle(store)
    values = held(store._cache)
    info = store.cache_info()
    assert info["current_size"] == sum(values.values()) <= BOUND, (info, values)
    store._engine.index.validate()


# ------------------------------------------------------------------------------- values


def files_of_values(where: Path) -> list[Path]:
    cache = where / "cache"
    return [cache / name for name in held(LocalStore(cache))]


@pytest.mark.parametrize(
    ("verify", "rebuilt"),
    [("first", False), ("first", True), ("always", False), ("always", True), ("never", True)],
)
async def test_a_flip_in_any_region_of_a_value(where: Path, verify: str, rebuilt: bool) -> None:
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
    store = open_store(where, verify=verify)
    await use(store)
    assert store.cache_stats()["damaged"] >= len(paths) - 3  # A full value serves a range as well.
    await check(store)


@pytest.mark.parametrize(
    ("verify", "found_before", "found_after"),
    [("never", False, False), ("first", True, False), ("always", True, True)],
)
async def test_when_values_are_verified(
    where: Path, verify: str, found_before: bool, found_after: bool
) -> None:
    """At the first hit of each process, at each one, or never."""
    for key, reads_first, found in ((KEYS[-1], 0, found_before), (KEYS[-2], 1, found_after)):
        store = open_store(where, verify=verify)
        for _ in range(reads_first):
            assert await read(store, key) == value(key)
        flip(where / "cache" / key, 5, 0)
        assert (await read(store, key) == value(key)) == found
        assert store.cache_stats()["damaged"] == found


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("length", [0, 1, -1, 5])
async def test_values_of_another_length(where: Path, length: int, rebuilt: bool) -> None:
    """Shortened, as a loss of power does, or longer."""
    for path in files_of_values(where):
        times = path.stat()
        size = times.st_size
        os.truncate(path, size + 3 if length == 5 else length % size)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    if rebuilt:
        shutil.rmtree(where / "cache" / INDEX)
    store = open_store(where)
    await use(store)
    assert store.cache_stats()["damaged"] > 10
    await check(store)


async def test_values_that_are_gone_or_not_readable(where: Path) -> None:
    for number, path in enumerate(files_of_values(where)):
        path.unlink()
        if number % 3 == 1:
            path.mkdir()
        elif number % 3 == 2:
            path.symlink_to("nowhere")
    store = open_store(where)
    await use(store)
    store._engine.index.validate()


async def test_a_value_that_was_never_committed(where: Path) -> None:
    """Its process was killed between the link and the commit; a write may have overtaken it."""
    path = where / "cache" / KEYS[-1]
    status = path.stat()
    path.write_bytes(b"older")
    time = status.st_mtime_ns - _files.SIGNATURE + _files.PENDING
    os.utime(path, ns=(time, time))
    shutil.rmtree(where / "cache" / INDEX)
    store = open_store(where)
    assert not path.exists()
    await check(store)


# -------------------------------------------------------------------- the index, closed


def places(where: Path) -> Iterator[tuple[Path, int]]:
    """Positions all over the files of the index."""
    dice = random.Random(1)
    for name in FILES:
        path = where / "cache" / INDEX / name
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read()
        used = [position for position in range(size) if content[position]]
        # The parts in use are small against the whole.
        for position in dice.sample(used, min(len(used), 60)) + dice.sample(range(size), 10):
            yield path, position


@pytest.mark.slow
async def test_a_flip_in_any_region_of_the_index(where: Path) -> None:
    dice = random.Random(2)
    saved = where / "saved"
    shutil.copytree(where / "cache", saved)
    done = 0
    for path, position in list(places(where)):
        shutil.rmtree(where / "cache")
        shutil.copytree(saved, where / "cache")
        flip(path, position, dice.randrange(8))
        store = open_store(where)
        await use(store, done)
        await settle(store)
        await use(store, done + 1)
        current = store.cache_info()["current_size"]
        files = sum(held(store._cache).values())
        assert files <= BOUND, (path, position, current, files)
        del store
        done += 1
    assert done > 100


@pytest.mark.parametrize("name", FILES)
async def test_a_file_of_the_index_that_is_cut_off(
    where: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = where / "cache" / INDEX / name
    for length in (0, 1, path.stat().st_size // 2, path.stat().st_size - 4096):
        os.truncate(path, max(length, 0))
        caplog.clear()
        store = open_store(where)
        rebuilt = [record for record in caplog.records if "was rebuilt" in record.message]
        # One line; none where what was cut off was not in use.
        assert len(caplog.records) == len(rebuilt) <= 1
        assert length > 1 or rebuilt
        await check(store)
        del store
        gc.collect()


async def test_a_walk_that_takes_long_goes_on_in_the_background(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever opens a directory waits for a second, not for a million files."""
    (where / "cache" / INDEX / "head").write_bytes(b"")
    go, walk = threading.Event(), _files.walk

    def slow_walk(*args: Any) -> Iterator[tuple[int, int, str]]:
        assert len(args) == 3 or go.wait(60)  # Not where one prefix is looked through.
        yield from walk(*args)

    monkeypatch.setattr(_files, "walk", slow_walk)
    monkeypatch.setattr(_books, "_PATIENCE", 0.05)
    store = open_store(where)
    index = store._engine.index
    assert not index.is_complete
    # Meanwhile the source serves, and nothing is taken in; what is written is not served old later.
    for key in KEYS:
        assert await read(store, key) == value(key)
    await store.set(KEYS[0], buf(b"new"))
    assert await read(store, KEYS[0]) == b"new"
    assert len(index) == 0
    go.set()
    await settle(store)
    assert len(index) > 0
    assert await read(store, KEYS[0]) == b"new"
    await store.set(KEYS[0], buf(value(KEYS[0])))
    await check(store)


async def test_a_walk_in_the_background_that_fails(
    where: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (where / "cache" / INDEX / "head").write_bytes(b"")
    go = threading.Event()

    def no_walk(*_: Any) -> Iterator[tuple[int, int, str]]:
        assert go.wait(60)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_files, "walk", no_walk)
    monkeypatch.setattr(_books, "_PATIENCE", 0.05)
    store = open_store(where)
    go.set()
    for _ in range(500):
        if "cannot be used any more" in caplog.text:
            break
        await asyncio.sleep(0.01)
    for key in KEYS:
        assert await read(store, key) == value(key)
    assert len(caplog.records) == 1


async def test_a_size_that_is_not_the_one_of_its_file(
    where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The index is rebuilt once, and then its store can go."""
    key = KEYS[-1]
    path = where / "cache" / key
    fetched = path.stat().st_mtime
    path.unlink()
    unfinished = str(where / "cache" / ".zcache" / "tmp" / "p0-")
    file = _files.write_new(str(where / "cache"), key, b"short", unfinished, fetched)
    _files.seal(str(where / "cache"), key, file)
    store = open_store(where)
    assert await read(store, key) == value(key)
    await settle(store)
    assert ["a size that is not" in message for message in caplog.messages] == [True]
    await check(store)
    engine = weakref.ref(store._engine)
    del store
    for _ in range(500):
        gc.collect()
        if engine() is None:
            break
        await asyncio.sleep(0.01)
    assert engine() is None
    assert len(caplog.records) == 1


async def test_a_size_from_which_on_a_range_would_be_empty(where: Path) -> None:
    """A flip has made a value shorter than where the range begins: that is no empty range."""
    key = KEYS[-1]
    size = len(value(key))
    cells = where / "cache" / INDEX / "cells"
    before = cells.read_bytes()
    assert before.count(struct.pack("<Q", size)) == 1
    cells.write_bytes(before.replace(struct.pack("<Q", size), struct.pack("<Q", 1)))
    for verify in ("never", "first", "always"):
        store = open_store(where, verify=verify)
        for request, start, end in (
            (RangeByteRequest(100, 160), 100, 160),
            (OffsetByteRequest(100), 100, size),
            (RangeByteRequest(size - 1, size), size - 1, size),
        ):
            assert await read(store, key, request) == value(key)[start:end]
        store.close()


async def test_damage_that_comes_back(
    where: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read waits for an index that is never right: it is given up, with one line in the log."""
    monkeypatch.setattr(Books, "_start_over", lambda *_: None)
    store = open_store(where)
    os.truncate(where / "cache" / INDEX / "head", 100)
    await use(store)
    assert store.cache_info()["current_size"] == 0
    assert ["goes to the source" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("step", ["begin_write", "end_write"])
async def test_a_write_that_finds_the_index_damaged(
    where: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is taken again, and counts once: the key is cached like any other afterwards."""
    store = open_store(where, max_size=None)
    cells = where / "cache" / INDEX / "cells"

    def damage() -> None:
        data = bytearray(cells.read_bytes())
        # One link of every entry; the first cells are directories.
        for at in range(3 * 56 + 4, 40 * 56, 56):
            data[at : at + 4] = b"\xff" * 4
        with cells.open("r+b") as file:
            file.write(data)

    class Source(CountingStore):
        async def set(self, *args: Any) -> None:
            await super().set(*args)
            if step == "end_write":
                await self.others()
                damage()

        async def others(self) -> None:
            # Entries that may be found damaged: what is read during a write is not kept.
            for key in KEYS:
                await read(store, key)

    source = Source(LocalStore(where / "source"))
    store._io.source = store._store = source
    if step == "begin_write":
        damage()
    for key in KEYS[3:6]:
        await store.set(key, buf(value(key)))
    # Some damage is found only when it is read.
    for _ in range(10):
        await settle(store)
        source.take()
        for key in KEYS:
            assert await read(store, key) == value(key)
        if not (asked := source.take()):
            break
    assert asked == {}
    assert any("was rebuilt" in message for message in caplog.messages)


def head_of(**changes: tuple[int, str, int]) -> list[Any]:
    return [pytest.param(*change, id=name) for name, change in changes.items()]


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
async def test_an_index_of_somebody_else(
    where: Path, offset: int, kind: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an older format or a newer one, of the other byte order, or left by one who died."""
    head = where / "cache" / INDEX / "head"
    with head.open("r+b") as file:
        file.seek(offset)
        before = file.read(struct.calcsize(kind))
        after = struct.pack(kind, number)
        assert before != after
        file.seek(offset)
        file.write(after)
    store = open_store(where)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "was rebuilt" in caplog.text
    await check(store)


async def test_an_index_from_before_there_was_a_file_of_texts(
    where: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = where / "cache" / INDEX
    (index / "texts").unlink()
    with (index / "head").open("r+b") as head:
        head.seek(16)
        head.write(struct.pack("=I", 1))
    store = open_store(where)
    assert ["was rebuilt" in message for message in caplog.messages] == [True]
    for key in KEYS[3:]:
        assert await read(store, key) == value(key)
    assert reads(store) == 0
    await check(store)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["text", "noise", "ones"])
async def test_a_foreign_file_in_its_place(where: Path, name: str, what: str) -> None:
    path = where / "cache" / INDEX / name
    size = path.stat().st_size
    content = {
        "text": b"shopping list\n" * 1000,
        "noise": random.Random(0).randbytes(size),
        "ones": b"\xff" * size,
    }[what]
    path.write_bytes(content)
    store = open_store(where)
    await check(store)


async def test_directories_in_its_place(where: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("head", "lock"):
        path = where / "cache" / INDEX / name
        path.unlink()
        path.mkdir()
    store = open_store(where)
    assert len(caplog.records) == 1
    await use(store)


async def test_another_boot_of_the_machine_keeps_the_values(where: Path) -> None:
    """What the kernel had not written yet is found by its checksum; all else is served."""
    with (where / "cache" / INDEX / "head").open("r+b") as head:
        head.seek(96)
        head.write(b"another!")
    torn = where / "cache" / KEYS[-1]
    times = torn.stat()
    torn.write_bytes(b"")
    os.utime(torn, ns=(times.st_atime_ns, times.st_mtime_ns))
    store = open_store(where)
    for key in KEYS[3:]:
        assert await read(store, key) == value(key)
    assert reads(store) == 1
    await check(store)


# ---------------------------------------------------------------------- the index, in use

IN_USE = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_damage as t

where = Path(sys.argv[1])
store = t.open_store(where)

async def main():
    await t.use(store)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        await t.use(store, number)
        await t.settle(store)
        if sys.argv[3] == "strict":
            await t.check(store)
        print("ok", flush=True)

asyncio.run(main())
"""


class User:
    """A process that has the index mapped: if it were killed by a signal, nobody would answer."""

    def __init__(self, where: Path, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_USE, str(where), HERE, how],
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


def test_damage_while_it_is_mapped(where: Path, user: User) -> None:
    """Cut off, overwritten, removed: found at the next step, with no signal."""
    root = where / "cache" / INDEX
    dice = random.Random(3)
    for name in FILES:
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
    assert sum(held(LocalStore(where / "cache")).values()) <= BOUND


# A flipped size or name is found when its value is read; until then the books are off by it.
@pytest.mark.parametrize("user", ["lax"], indirect=True)
def test_flips_while_it_is_mapped(where: Path, user: User) -> None:
    dice = random.Random(4)
    for path, position in dice.sample(list(places(where)), 40):
        if position < path.stat().st_size:
            flip(path, position, dice.randrange(8))
        user.go_on()


def claim(index: Index, key: str) -> str:
    """What becomes of a fill: `granted`, or why not."""
    ticket = index.join(key, None, object(), 2.0, False)
    assert isinstance(ticket, int)
    try:
        room = index.reserve(key, None, 3, ticket, 2.0)
        if isinstance(room, str):
            return room
        index.finish(room[0], None, 2.0)
        return "granted"
    finally:
        index.land(key, ticket)


@pytest.mark.parametrize("how", ["damaged", "removed"])
@pytest.mark.parametrize("end", ["ends", "dies"])
def test_who_is_writing_is_known_after_the_index_was_emptied(
    tmp_path: Path, how: str, end: str
) -> None:
    """By another: nothing is kept of what is being written, though its writer takes no step meanwhile."""
    one, fresh = Index.open(tmp_path)
    assert fresh
    one.complete()
    other, fresh = Index.open(tmp_path)
    assert not fresh
    one.begin_write("a/k")
    one.void_prefix("b", True)
    if how == "removed":
        # Whoever finds that opens new files, which the writer hears of at its next step.
        for name in FILES:
            (tmp_path / name).unlink()
        assert one.restart(1)
        one.complete()
        assert not other.restart(2)
    else:
        with (tmp_path / "head").open("r+b") as head:
            head.seek(8)
            head.write(struct.pack("=I", 3))
        with pytest.raises(CorruptIndexError):
            other.lookup("a/k")
        assert other.restart(1)
        other.complete()
    void = "overtaken by a write"
    assert [claim(other, key) for key in ("a/k", "b/c/0", "a/j")] == [void, void, "granted"]
    if end == "ends":
        one.end_write("a/k", True)
        one.void_prefix("b", False)
    else:
        del one
        gc.collect()
        other.reap()
    assert [claim(other, key) for key in ("a/k", "b/c/0")] == ["granted", "granted"]
    other.validate()


def test_new_files_are_filled_by_who_has_opened_them(tmp_path: Path) -> None:
    """Though somebody else has the lock at once: what is being written is said before that."""
    one, _ = Index.open(tmp_path)
    one.complete()
    one.begin_write("a/k")
    for name in (*FILES, "lock"):
        (tmp_path / name).unlink()
    with (tmp_path / "lock").open("w"):
        assert one.restart(1)
        other, fresh = Index.open(tmp_path)
        assert not fresh
        one.complete()
        assert claim(other, "a/k") == "overtaken by a write"
        assert claim(other, "a/j") == "granted"
