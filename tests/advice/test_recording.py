"""`CacheStore.record` and `zcache.replay`: what is written, and what is made of it."""

from __future__ import annotations

import _thread
import asyncio
import csv
import gc
import gzip
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from directories import open_store
from forks import run
from interrupting import Interrupter
from pools import CACHES
from support import (
    PROTOTYPE,
    TESTS,
    buf,
    check_quiet,
    largest_file,
    read,
    read_through,
    threads,
    until,
    value_sync,
)
from zcache import (
    CacheStore,
    OptionTypeError,
    OptionValueError,
    RecordingExistsError,
    UsageError,
    replay,
)
from zcache._advice import recording
from zcache._runtime.latch import Latch
from zcache._source.slicing import slices_like_python
from zcache.testing import StoreDouble

if TYPE_CHECKING:
    from zcache.testing import FakeClock

Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """What a file says, by any tool that reads CSV in gzip, in the order of the times."""
    with gzip.open(path, "rt", newline="") as file:
        assert file.readline().startswith("# zcache requests, format 2: {")
        rows = list(csv.DictReader(file))
    return sorted(rows, key=lambda row: float(row["time"]))


def about(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt") as file:
        found: dict[str, Any] = json.loads(file.readline().partition(": ")[2])
    return found


def brief(rows: list[Row]) -> list[tuple[str, str, str, str]]:
    return [(row["key"], row["range"], row["size"], row["hit"]) for row in rows]


def source_of(count: int, size: int = 100) -> MemoryStore:
    return MemoryStore({f"a/c/{number}": buf(bytes(size)) for number in range(count)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.csv.gz"


async def test_recording_has_a_line_for_each_request(path: Path) -> None:
    store = CacheStore(source_of(3), max_size=10_000)
    await read(store, "a/c/2")
    with store.record(path):
        await read(store, "a/c/0")
        await read(store, "a/c/0", RangeByteRequest(2, 9))
        await read(store, "a/c/1", SuffixByteRequest(4))
        await read(store, "a/c/1", OffsetByteRequest(90))
        await read(store, "a/c/1", SuffixByteRequest(4))
        # Neither what is not there, nor what is never cached.
        for key in ("nothing", "nothing", "../a"):
            await read(store, key)
        await store.set("a/c/9", buf(b"123"))
    await read(store, "a/c/0")
    rows = rows_of(path)
    assert brief(rows) == [
        ("a/c/0", "", "100", "0"),
        ("a/c/0", "2-9", "7", "1"),
        ("a/c/1", "-4", "4", "0"),
        ("a/c/1", "90-", "10", "0"),
        ("a/c/1", "-4", "4", "1"),
    ]
    entries = [(row["entry_range"], row["entry_size"]) for row in rows]
    assert entries == [("", "100"), ("", "100"), ("-4", "4"), ("90-", "10"), ("-4", "4")]
    times = [float(row["time"]) for row in rows]
    assert times[0] >= 0
    assert times == sorted(times)
    assert about(path) == {
        "max_size": 10_000,
        "block_size": 1,
        "value_header": 0,
        "slices_like_python": slices_like_python(MemoryStore()),
        "eviction": "lru",
        "anonymous": False,
        "beside_value": 0,
    }


@pytest.mark.parametrize("kind", ["memory", "directory", "pool"])
async def test_recording_says_what_was_too_old(path: Path, kind: str, clock: FakeClock) -> None:
    place = CACHES[kind](path.parent / "cache")
    ages = {"b/**": 10, "**": None}
    store = CacheStore(
        MemoryStore({name: buf(b"123") for name in ("a/c/0", "b/c/0")}),
        cache_store=place,
        max_age_seconds=ages,
        clock=clock,
        source_id="here",
    )
    with store.record(path):
        for _ in range(2):
            for _ in range(2):
                for key in ("a/c/0", "b/c/0"):
                    await read_through(store, key)
            clock.advance(20)
    found = [(row["key"], row["hit"], row["outdated"]) for row in rows_of(path)]
    assert found == [
        ("a/c/0", "0", "0"),
        ("b/c/0", "0", "0"),
        ("a/c/0", "1", "0"),
        ("b/c/0", "1", "0"),
        ("a/c/0", "1", "0"),
        ("b/c/0", "0", "1"),
        ("a/c/0", "1", "0"),
        ("b/c/0", "1", "0"),
    ]


async def test_recording_takes_keys_of_any_text(path: Path) -> None:
    names = ['a, "b"', "ü\n2", "#x", "c\r", " d "]
    store = CacheStore(MemoryStore({name: buf(b"1") for name in names}))
    with store.record(path):
        for name in names:
            await read(store, name)
    assert [row["key"] for row in rows_of(path)] == names
    assert len(replay(path, sizes=[1]).sizes) == 0  # Too few; but it was read.


def test_recording_overwrites_nothing(path: Path) -> None:
    path.write_text("mine")
    store = CacheStore(source_of(1))
    with pytest.raises(RecordingExistsError, match=r"requests\.csv\.gz.*another path"):
        store.record(path)
    assert path.read_text() == "mine"
    with pytest.raises(FileNotFoundError):
        store.record(path.parent / "none" / "requests")
    # And then it can.
    with store.record(path.parent / "other"):
        value_sync(store, "a/c/0")
    assert len(rows_of(path.parent / "other")) == 1


@pytest.mark.parametrize("bad", [None, 5, True, ["a"], object()])
def test_recording_and_replay_of_what_is_no_path_name_it(bad: Any) -> None:
    store = CacheStore(source_of(1))
    for call in (store.record, replay):
        with pytest.raises(OptionTypeError, match=r"requests\.csv\.gz") as error:
            call(bad)
        assert f"invalid path: {bad!r}. Give" in str(error.value)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("", "is empty"),
        (b"", "is empty"),
        ("a\0b", "a null"),
        (b"a\0b", "a null"),
        ("\ud800", "no encoding"),
    ],
)
def test_recording_and_replay_of_an_impossible_path_name_it(bad: Any, why: str) -> None:
    store = CacheStore(source_of(1))
    for call in (store.record, replay):
        with pytest.raises(OptionValueError, match=f"{why}.*Give the path") as error:
            call(bad)
        assert repr(bad) in str(error.value)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
@pytest.mark.parametrize("anonymous", [False, True])
def test_recording_and_replay_know_the_home_of_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, anonymous: bool
) -> None:
    """A folder ``~`` was looked for in the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    store = CacheStore(source_of(1))
    with store.record(kind("~/requests.csv.gz"), anonymous=anonymous):
        for _ in range(100):
            value_sync(store, "a/c/0")
    assert len(rows_of(tmp_path / "requests.csv.gz")) == 100
    assert replay(kind("~/requests.csv.gz"), policies="lru").requests == 100
    with pytest.raises(RecordingExistsError, match=re.escape(str(tmp_path))):
        store.record(kind("~/requests.csv.gz"))


def test_recording_that_finds_no_room_names_its_file_and_leaves_none(path: Path) -> None:
    store = CacheStore(source_of(1))
    with largest_file(10), pytest.raises(OSError, match=r"requests\.csv\.gz"):
        store.record(path)
    assert not path.exists()
    with store.record(path):
        value_sync(store, "a/c/0")
    assert len(rows_of(path)) == 1


# The garbage collector closes a file where the end of its recording was interrupted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_interrupt_anywhere_leaves_no_recording_that_cannot_be_ended(tmp_path: Path) -> None:
    store = CacheStore(source_of(1))

    def record_nothing(path: Path) -> None:
        with store.record(path):
            pass

    def is_free(path: Path) -> bool:
        try:
            record_nothing(path)
        except UsageError:
            return False
        return True

    for at in itertools.count():
        path = tmp_path / f"{at}"
        if not Interrupter(at).run(partial(record_nothing, path)):
            break
        gc.collect()
        await until(partial(is_free, tmp_path / f"{at} again"))
        assert not path.exists() or rows_of(path) == []
    assert at


def test_child_that_is_forked_while_a_recording_begins_can_have_one_of_its_own(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on with that of its parent, without a thread that writes."""
    store = CacheStore(source_of(1))
    start, codes = recording.RequestWriter._start, list[int]()

    def forks_first(writer: Any) -> None:
        monkeypatch.undo()
        codes.append(run(lambda: store.record(tmp_path / "of the child").close()))
        start(writer)

    monkeypatch.setattr(recording.RequestWriter, "_start", forks_first)
    with store.record(path):
        value_sync(store, "a/c/0")
    assert codes == [0]
    assert len(rows_of(path)) == 1


async def test_recording_one_at_a_time(path: Path) -> None:
    store = CacheStore(source_of(1))
    with store.record(path):
        with pytest.raises(UsageError, match="being recorded already"):
            store.with_read_only(True).record(path.parent / "other")
        assert not (path.parent / "other").exists()
        await read(store, "a/c/0")
    assert len(rows_of(path)) == 1
    with store.record(path.parent / "other"):
        pass
    assert rows_of(path.parent / "other") == []


async def test_recording_is_of_the_store_and_its_copies(path: Path) -> None:
    source, cache = source_of(3), MemoryStore()
    store, other = (CacheStore(source, cache_store=cache) for _ in range(2))
    with store.record(path):
        await read(other, "a/c/0")
        await read(store.with_read_only(True), "a/c/1")
        await read(pickle.loads(pickle.dumps(store)), "a/c/2")
    assert [row["key"] for row in rows_of(path)] == ["a/c/1", "a/c/2"]


async def test_recording_anonymous_keeps_only_which_keys_are_equal(path: Path) -> None:
    store = CacheStore(source_of(3))
    secret = [set[str]() for _ in range(2)]
    for number in range(2):
        file = path.with_name(str(number))
        with store.record(file, anonymous=True):
            for key in (0, 1, 0):
                await read(store, f"a/c/{key}", RangeByteRequest(1, 5))
        keys = [row["key"] for row in rows_of(file)]
        assert keys[0] == keys[2] != keys[1]
        secret[number] = set(keys)
        assert b"a/c" not in gzip.decompress(file.read_bytes())
        assert [row["range"] for row in rows_of(file)] == ["1-5"] * 3
        assert about(file)["anonymous"]
    # With another secret each time.
    assert not secret[0] & secret[1]
    with pytest.raises(OptionTypeError, match="anonymous"):
        store.record(path, anonymous=1)  # type: ignore[arg-type]


async def test_recording_of_misses_waits_for_what_they_bring(path: Path) -> None:
    source = StoreDouble(source_of(3))
    store = CacheStore(source)
    gate = source.block("get", times=1)
    with store.record(path):
        slow = [asyncio.create_task(read(store, "a/c/0")) for _ in range(3)]
        await gate.entered_async()
        await read(store, "a/c/1")
        gate.release()
        await asyncio.gather(*slow)
        source.fail("get", OSError("unreachable"), times=1)
        with pytest.raises(OSError, match="unreachable"):
            await read(store, "a/c/2")
    assert brief(rows_of(path)) == [("a/c/0", "", "100", "0")] * 3 + [("a/c/1", "", "100", "0")]


async def test_recording_that_ends_before_a_read_does_has_no_size_of_it(path: Path) -> None:
    source = StoreDouble(source_of(1))
    store = CacheStore(source)
    gate = source.block("get")
    with store.record(path):
        task = asyncio.ensure_future(read(store, "a/c/0"))
        await gate.entered_async()
    gate.release()
    assert await task == bytes(100)
    assert brief(rows_of(path)) == [("a/c/0", "", "", "0")]


async def test_recording_of_batches(path: Path) -> None:
    store = CacheStore(source_of(3))
    wanted = [("a/c/0", RangeByteRequest(0, 5)), ("a/c/1", None), ("nothing", None)]
    with store.record(path):
        for _ in range(2):
            await store.get_partial_values(PROTOTYPE, wanted)
    assert sorted(brief(rows_of(path))) == [
        ("a/c/0", "0-5", "5", "0"),
        ("a/c/0", "0-5", "5", "1"),
        ("a/c/1", "", "100", "0"),
        ("a/c/1", "", "100", "1"),
    ]


async def test_recording_of_a_directory(path: Path, tmp_path: Path) -> None:
    store, source = open_store(tmp_path, LocalStore(tmp_path / "source"))
    await source.inner.set("a", buf(bytes(5000)))
    with store.record(path):
        for request in (None, None, RangeByteRequest(0, 10)):
            await read_through(store, "a", request)
    assert brief(rows_of(path)) == [
        ("a", "", "5000", "0"),
        ("a", "", "5000", "1"),
        ("a", "0-10", "10", "1"),
    ]
    await check_quiet(store)


def test_recording_of_threads_and_loops_loses_nothing(path: Path) -> None:
    store = CacheStore(source_of(100), max_size=5000)

    def blocking() -> None:
        for _ in range(5):
            for number in range(100):
                value_sync(store, f"a/c/{number}")

    def looping() -> None:
        async def work() -> None:
            for _ in range(5):
                await asyncio.gather(*(read(store, f"a/c/{number}") for number in range(100)))

        asyncio.run(work())

    with store.record(path) as made, threads(blocking, looping, blocking):
        pass
    assert made.left_out == 0
    rows = rows_of(path)
    assert len(rows) == 1500
    assert {row["size"] for row in rows} == {"100"}
    stats = store.cache_stats()
    hits = sum(row["hit"] == "1" for row in rows)
    assert (stats["hits"], stats["misses"]) == (hits, 1500 - hits)
    assert replay(path).requests == 1500


def test_recording_of_a_reader_who_looks_again_tells_of_it_once(path: Path) -> None:
    """Of two who miss a value the one brings it, before the other one finds that it is there by now."""
    store = CacheStore(source_of(1))
    with store.record(path):
        hook = store._cache.reader.hits.hook
        for _ in range(2):
            hook.found("a/c/0", None, None)
        hook.brought("a/c/0", None, 100)
        hook.retract("a/c/0", None)
        hook.found("a/c/0", None, 100, served=True)
        assert value_sync(store, "a/c/0") == bytes(100)
    assert [row["key"] for row in rows_of(path)] == ["a/c/0"] * 3


@pytest.mark.parametrize("byte_range", [None, RangeByteRequest(0, 7)])
async def test_recording_of_a_value_on_its_way_into_the_cache_store_has_hits(
    path: Path, byte_range: RangeByteRequest | None
) -> None:
    cache = StoreDouble(MemoryStore())
    store = CacheStore(source_of(1), cache_store=cache)
    gate = cache.block("set")
    with store.record(path):
        await read(store, "a/c/0")
        await gate.entered_async()
        await read(store, "a/c/0", byte_range)
        await store.get_partial_values(PROTOTYPE, [("a/c/0", byte_range)] * 2)
        gate.release()
        await store.drain()
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"]) == (3, 1)
    rows = rows_of(path)
    assert [row["hit"] for row in rows] == ["0", "1", "1", "1"]
    # All of the entry that has served them.
    assert {(row["entry_range"], row["entry_size"]) for row in rows} == {("", "100")}


async def test_recording_of_a_hit_that_the_cache_store_cannot_serve_is_a_miss(path: Path) -> None:
    cache = StoreDouble(MemoryStore())
    store = CacheStore(source_of(2), cache_store=cache)
    await read_through(store, "a/c/0")
    await read_through(store, "a/c/1")
    with store.record(path):
        await read(store, "a/c/1")
        cache.fail("get", OSError("broken"), times=1)
        await read(store, "a/c/0")
    assert brief(rows_of(path)) == [("a/c/1", "", "100", "1"), ("a/c/0", "", "100", "0")]
    stats = store.cache_stats()
    assert (stats["hits"], stats["misses"]) == (1, 3)


def test_recording_of_two_who_miss_a_value_tells_of_each_what_it_came_to(
    path: Path,
) -> None:
    """Two miss a value. What the one has read is on its way into the cache when the other one joins."""
    store = CacheStore(source_of(1))
    with store.record(path):
        hook = store._cache.reader.hits.hook
        for _ in range(2):
            hook.found("a/c/0", None, None)
        hook.brought("a/c/0", None, 100)
        hook.brought("a/c/0", None, 100, hit=True)
    assert sorted(row["hit"] for row in rows_of(path)) == ["0", "1"]


def test_recording_that_cannot_keep_up_says_how_many_it_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "MOST", 20)
    monkeypatch.setattr(recording, "PAUSE", 3600.0)
    store = CacheStore(source_of(1))
    value_sync(store, "a/c/0")
    with caplog.at_level(logging.WARNING, "zcache"), store.record(path) as made:
        for _ in range(50):
            value_sync(store, "a/c/0")
    assert made.left_out == 30
    assert len(rows_of(path)) == 20
    assert "lacks 30 requests" in caplog.text


async def test_recording_of_reads_that_never_end_is_bounded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST_PENDING", 10)
    monkeypatch.setattr(recording, "PAUSE", 0.001)
    source = StoreDouble(source_of(100))
    store = CacheStore(source)
    with store.record(path) as made:
        gate = source.block("get")
        tasks = [asyncio.ensure_future(read(store, f"a/c/{number}")) for number in range(100)]
        await until(lambda: gate.entered == 100)
        await until(lambda: not made._writer._told)
        assert made._writer._outcomes.pending <= 10
    assert len(rows_of(path)) == 100
    gate.release()
    await asyncio.gather(*tasks)


def test_recording_ends_where_its_file_does_and_no_read_fails(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "PAUSE", 0.001)
    monkeypatch.setattr(recording, "BATCH", 100)
    store = CacheStore(source_of(200), max_size=10**6)
    with caplog.at_level(logging.WARNING, "zcache"), largest_file(4000), store.record(path) as made:
        while not made.has_ended:
            for number in range(200):
                assert value_sync(store, f"a/c/{number}") is not None
        for number in range(200):
            assert value_sync(store, f"a/c/{number}") is not None
    while "has ended before its time" not in caplog.text:  # Its thread may log it after the end.
        time.sleep(0.001)
    # What was written is whole.
    rows = rows_of(path)
    assert len(rows) >= 100
    assert replay(path).requests == len(rows)


def test_recording_that_is_left_behind_by_its_writer_is_bounded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST", 20)
    monkeypatch.setattr(recording, "PAUSE", 3600.0)
    store = CacheStore(source_of(100))
    with store.record(path) as made:
        for number in range(100):
            value_sync(store, f"a/c/{number}")
        assert len(made._writer._told) <= 40
    rows = rows_of(path)
    assert made.left_out == 100 - len(rows) > 0
    # What those have come to that were taken.
    assert {row["size"] for row in rows} == {"100"}


def test_a_full_queue_keeps_no_reader_waiting_while_the_file_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST", 0)
    monkeypatch.setattr(recording, "PAUSE", 3600.0)
    store = CacheStore(source_of(1))
    begun, go = threading.Event(), threading.Event()
    with store.record(path) as made:
        writer = made._writer
        finish = writer._finish

        def slow(beside: int | None) -> None:
            begun.set()
            assert go.wait(60)
            finish(beside)

        monkeypatch.setattr(writer, "_finish", slow)
        closes = threading.Thread(target=made.close)
        # A reader that was in the middle of a request when the recording ended.
        reader = threading.Thread(target=lambda: writer.looked_up("a/c/0", None, 100, served=True))
        closes.start()
        assert begun.wait(60)
        reader.start()
        reader.join(30)
        is_held_up = reader.is_alive()
        go.set()
        closes.join()
        reader.join()
    assert not is_held_up
    assert made.left_out == 1


class Awaited(Latch):
    """In the place of one that is waited for without limit."""

    def wait(self, seconds: float | None = None) -> bool:
        has_happened = super().wait(30 if seconds is None else seconds)
        assert has_happened
        return has_happened


class Silent(logging.Handler):
    """Has a lock, as any other."""

    def emit(self, record: logging.LogRecord) -> None:
        pass


@pytest.mark.parametrize("warns", [False, True])
def test_recording_may_be_closed_by_the_handler_of_a_signal_anywhere_in_a_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, warns: bool
) -> None:
    """It waited for a thread that needed a lock of the reader that it had interrupted."""
    monkeypatch.setattr(recording, "Latch", Awaited)
    if warns:
        monkeypatch.setattr(recording, "MOST", 0)
    log = Silent()
    assert log.lock is not None
    monkeypatch.setattr(logging.getLogger("zcache"), "handlers", [log])
    store = CacheStore(source_of(2000))
    closed = list[int]()
    for at in range(2000):
        made = store.record(path)

        def close(made: Any = made, at: int = at) -> None:
            made.close()
            closed.append(at)

        # As if that had interrupted the log as well.
        with log.lock:
            Interrupter(at, handler=close).run(lambda n=at: value_sync(store, f"a/c/{n}"))
        made.close()
        rows_of(path)
        path.unlink()
        if len(closed) == at:
            break
    else:
        pytest.fail("it never came to its end")
    assert at > 20


def test_recording_in_a_forked_child_is_the_parents(path: Path) -> None:
    store = CacheStore(source_of(3))

    def child() -> None:
        assert value_sync(store, "a/c/1") == bytes(100)

    with store.record(path):
        value_sync(store, "a/c/0")
        assert run(child) == 0
        value_sync(store, "a/c/2")
    assert [row["key"] for row in rows_of(path)] == ["a/c/0", "a/c/2"]


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from zcache import CacheStore
from zcache._advice import recording
from support import buf, value_sync
from zarr.storage import MemoryStore
recording.PAUSE, recording.BATCH = 0.001, 200
store = CacheStore(MemoryStore({{f"a/c/{{n}}": buf(bytes(9)) for n in range(200)}}))
recorder = store.record({path!r})
print("ready", flush=True)
while True:
    for number in range(200):
        value_sync(store, f"a/c/{{number}}")
"""


def test_recording_of_a_process_that_is_killed_keeps_what_was_written(path: Path) -> None:
    code = KILLED.format(tests=str(TESTS), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    while path.stat().st_size < 50_000:
        assert process.poll() is None
    process.kill()
    process.communicate()
    data = path.read_bytes()
    # At most its last part is cut off, of which `replay` says so.
    whole = data.rindex(b"\x1f\x8b\x08")
    path.write_bytes(data[:whole])
    assert len(rows_of(path)) > 100


EXITING = """
import sys
sys.path.insert(0, {tests!r})
from zcache import CacheStore
from zcache._advice import recording
from support import buf, value_sync
from zarr.storage import MemoryStore
recording.PAUSE = 3600.0
store = CacheStore(MemoryStore({{"a": buf(bytes(9))}}))
recorder = store.record({path!r})
for _ in range(70_000):
    value_sync(store, "a")
"""


@pytest.mark.slow
def test_recording_that_is_open_when_the_process_exits_is_written_to_its_end(path: Path) -> None:
    code = EXITING.format(tests=str(TESTS), path=str(path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert len(rows_of(path)) == 70_000


async def test_recording_that_is_dropped_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PAUSE", 0.001)
    store = CacheStore(source_of(3))
    recorder = store.record(path)
    await read(store, "a/c/0")
    has_stopped = recorder._writer._has_stopped
    del recorder
    gc.collect()
    await read(store, "a/c/1")
    await until(lambda: has_stopped.is_set)
    assert [row["key"] for row in rows_of(path)] == ["a/c/0"]
    with store.record(path.parent / "other"):
        await read(store, "a/c/2")
    assert [row["key"] for row in rows_of(path.parent / "other")] == ["a/c/2"]


def test_recording_of_which_the_thread_died_at_its_start_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = _thread.start_new_thread

    def start_dying(_: object, args: tuple[Any, ...], *more: Any) -> int:
        return start(lambda *_: None, args, *more)

    # As for want of memory; `threading.Thread` would wait for it for ever.
    monkeypatch.setattr(_thread, "start_new_thread", start_dying)
    monkeypatch.setattr(threading, "_start_new_thread", start_dying, raising=False)
    store = CacheStore(source_of(1))
    with store.record(path):
        value_sync(store, "a/c/0")
    assert [row["key"] for row in rows_of(path)] == ["a/c/0"]


def test_recording_without_a_thread_is_refused_and_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    store = CacheStore(source_of(1))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        store.record(path)
    assert not path.exists()
    monkeypatch.undo()
    with store.record(path):
        value_sync(store, "a/c/0")
    assert len(rows_of(path)) == 1


def test_recording_that_is_closed_is_not_entered_again(path: Path) -> None:
    store = CacheStore(source_of(1))
    with store.record(path) as recorder:
        with recorder:
            value_sync(store, "a/c/0")
        with (
            pytest.raises(UsageError, match=r"requests\.csv\.gz' is closed.*store\.record"),
            recorder,
        ):
            pass
    recorder.close()
    assert len(rows_of(path)) == 1


async def test_recording_goes_on_while_it_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PAUSE", 0.001)
    store = CacheStore(source_of(1))
    with store.record(path):
        await read(store, "a/c/0")
        await until(lambda: len(rows_of(path)) == 1)
        await read(store, "a/c/0")
    assert len(rows_of(path)) == 2


_kept: list[object] = []


def record_in_worker(path: Path) -> None:
    store = CacheStore(source_of(3))
    _kept.append(store.record(path))
    for number in range(3):
        value_sync(store, f"a/c/{number}")

    def read_on() -> None:
        # That it has ended is known once its main thread has gone on to the end of the process.
        while "zcache-exit" not in {thread.name for thread in threading.enumerate()}:
            time.sleep(0.001)
        value_sync(store, "a/c/0")

    threading.Thread(target=read_on).start()


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_recording_that_is_open_when_a_worker_ends_is_written_to_its_end(
    path: Path, method: str
) -> None:
    """All of it was lost: such a process ends without `atexit`."""
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=record_in_worker, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert [row["key"] for row in rows_of(path)] == ["a/c/0", "a/c/1", "a/c/2", "a/c/0"]
