"""Writes and deletes by threads without an interpreter: nobody misses what came of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.buffer import cpu
from zarr.storage import LocalStore, MemoryStore

from coherence_support import GatedStore, SyncDictStore, reached, value_sync
from support import PROTOTYPE, buf, read
from zcache import CacheStore, _files, _offload, _threads
from zcache._core import Index, Workers
from zcache._fills import Writing
from zcache._ports import LocalSyncPort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zcache._core import NewFile

LONG = 30.0


def is_there(path: Path) -> bool:
    return path.exists()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def never(_: object) -> None:
    raise AssertionError("somebody awaited this")


def late_write(io: Any, data: bytes) -> Writing:
    """Of a key whose flight and reservation nobody knows."""
    other = Index()
    ticket = other.join("a", None, None, 1.0, False)
    assert isinstance(ticket, int)
    room = other.reserve("a", None, len(data), ticket, 1.0)
    assert not isinstance(room, str)
    return Writing(io, "a", "a", data, ticket, reservation=room[0], now=1.0)


class SlowDesk:
    """A desk whose work ends when the test says so."""

    def __init__(self, _workers: object) -> None:
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._lock = threading.Condition()
        self._pending: set[int] = set()
        self._left: dict[int, Any] = {}
        self._done: list[tuple[int, Any]] = []

    def fileno(self) -> int:
        return self._bell.fileno()

    def begin(self, number: int) -> int:
        self._pending.add(number)
        return number

    def end(self, number: int, result: object) -> None:
        with self._lock:
            self._pending.remove(number)
            if number in self._left:
                self._left[number] = result
                self._lock.notify_all()
                return
            self._done.append((number, result))
        self._rope.send(b"0")

    def collect(self) -> list[tuple[int, Any]]:
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(1)
        with self._lock:
            done, self._done = self._done, []
        return done

    def leave(self, number: int) -> tuple[bool, Any]:
        with self._lock:
            if number in self._pending:
                self._left[number] = None
                return True, None
            for at, (other, result) in enumerate(self._done):
                if other == number:
                    del self._done[at]
                    return False, result
        return False, None

    def wait(self) -> tuple[int, Any] | None:
        def ended() -> list[int]:
            return [number for number, result in self._left.items() if result is not None]

        with self._lock:
            if not self._left:
                return None
            assert self._lock.wait_for(ended, LONG)
            number = ended()[0]
            return number, self._left.pop(number)

    def close(self) -> None:
        self._bell.close()
        self._rope.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    desks: list[SlowDesk] = []

    def make(workers: object) -> SlowDesk:
        desks.append(SlowDesk(workers))
        return desks[-1]

    monkeypatch.setattr(_offload, "Desk", make)
    yield
    for desk in desks:
        desk.close()


def open_counter() -> tuple[_offload.Counter, Any, asyncio.AbstractEventLoop]:
    loop = asyncio.get_running_loop()
    counter = _offload.counter(loop)
    assert counter is not None
    return counter, counter.desk, loop


async def test_values_and_errors_come_back(tmp_path: Path) -> None:
    counter, desk, loop = open_counter()
    root, time = str(tmp_path), _files.pending_time(1.0)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "theirs").write_text("not ours")
    (tmp_path / "link").symlink_to(tmp_path / "tmp")

    async def write(name: str, number: int, data: bytes) -> NewFile:
        at = desk.write(root, name, f"{root}/tmp/{number}", data, time)
        return await counter.result(at, never, loop)

    numbers = range(200)
    written = await asyncio.gather(*(write(f"a/{n}", n, b"%d" % n) for n in numbers))
    for number, file in zip(numbers, written, strict=True):
        file.seal(root, f"a/{number}")
        assert (tmp_path / f"a/{number}").read_bytes() == b"%d" % number
    with pytest.raises(FileExistsError):
        await write("theirs", 200, b"ours")
    with pytest.raises(OSError, match="symbolic links"):
        await write("link/x", 201, b"elsewhere")
    assert not list((tmp_path / "tmp").iterdir())
    names = ["a/0", "a/0", "a/none", "theirs", "theirs/x", "link/x", "x" * 300]
    removed = await counter.result(desk.remove(root, names), never, loop)
    assert removed == [None] * len(names)
    assert (tmp_path / "theirs").read_text() == "not ours"
    assert not (tmp_path / "a/0").exists()
    assert (tmp_path / "a/1").exists()


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("result", [7, OSError(5, "Input/output error")])
async def test_whoever_leaves_is_told_later(result: object) -> None:
    counter, desk, loop = open_counter()
    told: list[object] = []
    heard = threading.Event()

    def late(outcome: object) -> None:
        told.append(outcome)
        heard.set()

    task = asyncio.ensure_future(counter.result(desk.begin(1), late, loop))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == []
    desk.end(1, result)
    assert await asyncio.to_thread(heard.wait, LONG)
    assert told == [result]


@pytest.mark.usefixtures("slow")
async def test_those_who_leave_take_no_threads_from_others() -> None:
    """The threads that wait for a disk serve reads, too."""
    counter, desk, loop = open_counter()
    told: list[object] = []
    # As of many event loops, each with a write that is stuck.
    stuck = [_offload.Counter(loop, Workers(1)) for _ in range(_threads.THREADS)]
    for one in stuck:
        task = asyncio.ensure_future(one.result(one.desk.begin(0), told.append, loop))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    numbers = range(3 * _threads.THREADS)
    tasks = [
        asyncio.ensure_future(counter.result(desk.begin(number), told.append, loop))
        for number in numbers
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    others = [_threads.background(lambda: "read") for _ in range(_threads.THREADS)]
    for other in others:
        assert await asyncio.wait_for(asyncio.wrap_future(other), LONG) == "read"
    assert told == []
    # Each is told when its own work has ended; and whoever leaves once all are told, as well.
    last = counter.result(desk.begin(len(numbers)), told.append, loop)
    for number in [*reversed(numbers), len(numbers)]:
        if number == len(numbers):
            task = asyncio.ensure_future(last)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        desk.end(number, number)
        async with asyncio.timeout(LONG):
            while number not in told:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
    assert sorted(told) == list(range(len(numbers) + 1))
    for one in stuck:
        one.desk.end(0, "at last")
    async with asyncio.timeout(LONG):
        while told.count("at last") < len(stuck):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


@pytest.mark.usefixtures("slow")
async def test_a_cancellation_that_meets_the_result_on_the_desk() -> None:
    counter, desk, loop = open_counter()
    told: list[object] = []
    task = asyncio.ensure_future(counter.result(desk.begin(1), told.append, loop))
    await asyncio.sleep(0)
    desk.end(1, 7)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [7]


@pytest.mark.usefixtures("slow")
async def test_a_cancellation_that_meets_the_result_on_its_way() -> None:
    counter, desk, loop = open_counter()
    told: list[object] = []
    task = asyncio.ensure_future(counter.result(desk.begin(1), told.append, loop))
    await asyncio.sleep(0)
    desk.end(1, 7)
    # Collected in the turn in which the task is cancelled, before it hears of that.
    loop.call_soon(counter._collect, loop)
    loop.call_soon(task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [7]


@pytest.mark.usefixtures("slow")
async def test_a_result_that_meets_a_cancellation_on_its_way() -> None:
    counter, desk, loop = open_counter()
    told: list[object] = []
    task = asyncio.ensure_future(counter.result(desk.begin(1), told.append, loop))
    await asyncio.sleep(0)
    desk.end(1, 7)
    loop.call_soon(task.cancel)
    loop.call_soon(counter._collect, loop)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [7]
    assert not counter._met


@pytest.mark.usefixtures("slow")
def test_a_loop_that_is_closed() -> None:
    told = threading.Event()
    desks: list[Any] = []

    async def leave() -> None:
        counter, desk, loop = open_counter()
        desks.append(desk)
        work = counter.result(desk.begin(1), lambda _: told.set(), loop)
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        assert not task.done()

    # It cancels what it leaves behind.
    asyncio.run(leave())
    desks[0].end(1, 7)
    assert told.wait(LONG)


class Deaf(asyncio.SelectorEventLoop):
    """An event loop that watches no descriptors for others, as on some systems."""

    def add_reader(self, *_: object) -> None:
        raise NotImplementedError


@pytest.fixture(params=[asyncio.SelectorEventLoop, Deaf], ids=["bell", "deaf"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    loop = request.param()
    yield loop
    loop.close()


def test_a_cache_directory_under_any_loop(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    async def run() -> None:
        values = {f"a/{n}": cpu.Buffer.from_bytes(b"%d" % n) for n in range(10, 40)}
        store = CacheStore(
            MemoryStore(values), cache_store=LocalStore(tmp_path / "cache"), max_size=20
        )
        for key, value in values.items():
            found = await store.get(key, PROTOTYPE)
            assert found is not None
            assert found.to_bytes() == value.to_bytes()
        stats, info = store.cache_stats(), store.cache_info()
        assert (stats["evictions"], stats["refusals"], stats["cache_failures"]) == (20, 0, 0)
        assert (info["current_size"], info["cached_keys"]) == (20, 10)
        held = sorted(path.name for path in (tmp_path / "cache/a").iterdir())
        assert held == [str(n) for n in range(30, 40)]

    loop.run_until_complete(run())


@pytest.mark.usefixtures("slow")
def test_work_of_a_loop_that_was_closed_in_the_middle() -> None:
    told: list[object] = []
    desks: list[Any] = []
    first = asyncio.new_event_loop()

    async def begin() -> None:
        counter, desk, loop = open_counter()
        desks.append(desk)
        for number in (1, 2, 3):
            work = counter.result(desk.begin(number), told.append, loop)
            tasks.append(asyncio.ensure_future(work))
        await asyncio.sleep(0)

    tasks: list[asyncio.Future[Any]] = []
    first.run_until_complete(begin())
    desks[0].end(1, "done before the end")
    first.close()
    desks[0].end(2, "done after it")
    assert told == []
    _offload.see_to_closed()
    assert told == ["done before the end", "done after it"]
    desks[0].end(3, "done last")
    for _ in range(1000):
        if len(told) == 3:
            break
        threading.Event().wait(0.01)
    assert told[2:] == ["done last"]
    # Nobody is told twice, whatever becomes of the coroutines.
    for task in tasks:
        task.get_coro().close()
    assert len(told) == 3


@pytest.mark.usefixtures("slow")
async def test_a_child_leaves_the_desk_to_its_parent() -> None:
    counter, desk, loop = open_counter()
    task = asyncio.ensure_future(counter.result(desk.begin(1), never, loop))
    await asyncio.sleep(0)
    desk.end(1, 7)
    _offload.after_fork()
    # What it does with what it has inherited.
    counter._collect(loop)
    assert desk._done == [(1, 7)]
    assert _offload.counter(loop) is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    loop.remove_reader(desk.fileno())


@pytest.mark.usefixtures("slow")
async def test_an_interrupt_between_two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, desk, loop = open_counter()
    numbers = range(5)
    tasks = [
        asyncio.ensure_future(counter.result(desk.begin(number), never, loop)) for number in numbers
    ]
    await asyncio.sleep(0)
    hand_out, left = counter._hand_out, [2]

    def interrupted(number: int, result: object) -> None:
        hand_out(number, result)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(counter, "_hand_out", interrupted)
    for number in numbers:
        desk.end(number, number * number)
    with pytest.raises(KeyboardInterrupt):
        counter._collect(loop)
    async with asyncio.timeout(LONG):
        assert await asyncio.gather(*tasks) == [0, 1, 4, 9, 16]


@pytest.mark.usefixtures("slow")
async def test_whoever_leaves_when_there_is_no_thread_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    counter, desk, loop = open_counter()
    timer = threading.Timer(0.05, desk.end, (1, 7))
    monkeypatch.setattr(_threads, "background", refuse)
    monkeypatch.setattr(threading, "Thread", refuse)
    told: list[object] = []
    task = asyncio.ensure_future(counter.result(desk.begin(1), told.append, loop))
    await asyncio.sleep(0)
    task.cancel()
    timer.start()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == [7]
    timer.join()


@pytest.mark.skipif(sys.platform != "linux", reason="nobody tells how many there are")
async def test_values_on_their_way_take_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of values may be written and not yet entered; a process has few descriptors."""
    values = {f"a/{n}": cpu.Buffer.from_bytes(b"%d" % n) for n in range(300)}
    store = CacheStore(MemoryStore(values), cache_store=LocalStore(tmp_path / "cache"))
    result, written, peaks = _offload.Counter.result, [0], [0]

    async def late(self: Any, number: int, *args: Any) -> Any:
        # Nobody goes on before all are written.
        made = await result(self, number, *args)
        written[0] += 1
        peaks[0] = max(peaks[0], descriptors())
        while written[0] < len(values):  # noqa: ASYNC110 - a turn is what sleep(0) waits for
            await asyncio.sleep(0)
        return made

    before = descriptors()
    monkeypatch.setattr(_offload.Counter, "result", late)
    async with asyncio.timeout(LONG):
        await asyncio.gather(*(store.get(key, PROTOTYPE) for key in values))
    assert peaks[0] < before + 50
    assert store.cache_info()["cached_keys"] == len(values)


@pytest.mark.parametrize("face", ["_io", "_sync_io"])
async def test_bytes_that_an_emptied_index_does_not_know(tmp_path: Path, face: str) -> None:
    """The index was emptied while a value was written whose reader has gone."""
    store = CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path / "cache"))
    engine = store._engine
    port = engine.sync_port
    assert isinstance(port, LocalSyncPort)
    written = port.write_now("a", b"12345")
    path = tmp_path / "cache/a"
    assert is_there(path)
    engine._written_late(late_write(getattr(store, face), b"12345"), written)
    async with asyncio.timeout(LONG):
        while is_there(path):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    assert store.cache_info()["current_size"] == 0


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_late_write_does_not_touch_what_came_after_it(tmp_path: Path, sealed: bool) -> None:
    """The index was emptied while a value was written, and the key was written and filled since."""
    source = MemoryStore({"a": cpu.Buffer.from_bytes(b"OLD!")})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"))
    engine = store._engine
    port = engine.sync_port
    assert isinstance(port, LocalSyncPort)
    late = port.write_now("a", b"OLD!")
    await engine.clear(store._io)
    port.delete_now(["a"])
    await asyncio.sleep(0.005)  # Nobody reads a source twice in the same millisecond.
    newer = port.write_now("a", b"NEW!")
    if sealed:
        port.seal("a", newer)
        with pytest.raises(FileExistsError):
            port.write_now("a", b"OLD!")
        with pytest.raises(FileExistsError):
            await engine.port.write("a", b"OLD!", never)
    # It finds that nobody knows of it, and that its file is another one by now.
    engine._finished_late(late_write(store._sync_io, b"OLD!"), late, None)
    assert (tmp_path / "cache/a").read_bytes() == b"NEW!"
    engine._finished_late(late_write(store._sync_io, b"NEW!"), newer, None)
    assert is_there(tmp_path / "cache/a") == sealed


@pytest.mark.parametrize("kind", ["directory", "store"])
@pytest.mark.parametrize("change", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_value_whose_reader_has_gone(
    tmp_path: Path, kind: str, change: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its write cannot be called back; so the value is kept like any other, or dropped if that fails."""
    source, held = SyncDictStore({"k": b"1234"}), GatedStore()
    cache = LocalStore(tmp_path / "cache") if kind == "directory" else held
    store = CacheStore(source, cache_store=cache)
    assert await read(store, "none") is None  # Opens what has to be opened.
    begun = asyncio.Event()
    if kind == "directory":
        hand_in = LocalSyncPort.hand_in

        def handed_in(self: LocalSyncPort, desk: Any, name: str, data: bytes) -> int:
            begun.set()
            return hand_in(self, desk, "x" * 300 if fails else name, data)

        monkeypatch.setattr(LocalSyncPort, "hand_in", handed_in)
    else:
        held.shut["set"] = 1

        async def failing(operation: str, *_: object) -> None:
            if operation == "set":
                raise OSError("broken")

        if fails:
            monkeypatch.setattr(held, "after", failing)
    reads = source.counts["get"]
    work = store.set("k", buf(b"1234")) if change else read(store, "k")
    task = asyncio.ensure_future(work)
    await (begun.wait() if kind == "directory" else reached(held))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.release()
    index = store._engine.index
    async with asyncio.timeout(LONG):
        while index.in_flight != (0, 0):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    reads = source.counts["get"]
    index.validate()
    assert not store._engine._left
    assert store._engine.breaker.failures == fails
    if fails:
        monkeypatch.undo()
    assert store.cache_info()["cached_keys"] == (not fails)
    assert await read(store, "k") == b"1234"
    assert source.counts["get"] - reads == fails
    assert store.cache_info()["current_size"] == 4


@pytest.mark.parametrize("face", ["thread", "loop"])
def test_room_that_a_closed_loop_has_taken(
    tmp_path: Path, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds its tasks, so nobody ends them; whoever fills next sees to its write."""
    source = SyncDictStore({"k": b"1234", "other": b"5678"})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"), max_size=4)
    loop = asyncio.new_event_loop()
    task = loop.create_task(read(store, "k"))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    index = store._engine.index
    hand_in = LocalSyncPort.hand_in

    def last(*args: Any) -> int:
        loop.stop()
        return hand_in(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LocalSyncPort, "hand_in", last)
        loop.run_forever()
    assert index.in_flight == (1, 1)
    loop.close()
    for _ in range(1000):
        value = (
            value_sync(store, "other") if face == "thread" else asyncio.run(read(store, "other"))
        )
        assert value == b"5678"
        if index.in_flight == (0, 0):
            break
    assert index.in_flight == (0, 0)
    reads = source.counts["get"]
    assert value_sync(store, "other") == b"5678"
    assert value_sync(store, "other") == b"5678"
    assert source.counts["get"] - reads <= 1
    assert store.cache_info()["current_size"] == 4
    index.validate()


@pytest.mark.parametrize("change", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("stage", ["making room", "writing"])
def test_what_a_closed_loop_has_begun(
    tmp_path: Path, stage: str, change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tasks never go on, and somebody holds them; their room and their key are given back."""
    source = SyncDictStore({"a": b"1234", "k": b"5678"})
    store = CacheStore(source, cache_store=LocalStore(tmp_path / "cache"), max_size=6)
    assert asyncio.run(read(store, "a")) == b"1234"
    index = store._engine.index
    loop = asyncio.new_event_loop()
    port = type(store._engine.port)
    name = "delete" if stage == "making room" else "write"
    original = getattr(port, name)

    async def last(*args: Any) -> Any:
        loop.stop()
        return await original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(port, name, last)
        task = loop.create_task(store.set("k", buf(b"5678")) if change else read(store, "k"))
        loop.run_forever()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    assert index.in_flight == (1, 1)
    loop.close()
    for _ in range(1000):
        for key in ("a", "k"):
            assert asyncio.run(read(store, key)) == source.values[key]
        if index.in_flight == (0, 0):
            break
    assert index.in_flight == (0, 0)
    for key in ("a", "k"):
        asyncio.run(read(store, key))
        reads = source.counts["get"]
        assert asyncio.run(read(store, key)) == source.values[key]
        assert source.counts["get"] == reads
    assert index.current_size == 4
    index.validate()
