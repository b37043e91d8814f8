"""Processes that share one cache directory and are killed; run as a script by tests/end_to_end.

Importing zarr takes longer than everything else here, so one process imports it and forks all others.
It never uses a cache itself, so each child opens one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore

import tracing
from forks import fork, run, wait
from pools import cache_at
from support import PROTOTYPE, buf, read, read_through
from zcache import CacheStore
from zcache.testing import (
    Step,
    check_invariants,
    index_slot,
    record_steps,
    set_block_size,
    stored_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

LONGEST = 500
"""Seconds after which a script counts as hung."""
POOL = bool(os.environ.get("ZCACHE_TEST_POOL"))
"""Whether the cache is a pool, with its bound in blocks."""
PAGE = 4096
DIRTY = 8
"""Where the head of an index has the mark of the process that is in the middle of a step."""


class LoggingStore(LocalStore):
    """Writes down each read; a short line that is appended is never torn.

    To zcache it is a store without a name, so `source_id=` has to say that all processes read the same.
    """

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        log = os.open(f"{self.root}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, f"{key}\n".encode())
        os.close(log)
        return await super().get(key, prototype, byte_range)


def reads_of(source: Path) -> list[str]:
    """What `LoggingStore` has written down."""
    log = Path(f"{source}.log")
    return log.read_text().split() if log.exists() else []


def play(what: str, where: Path, *numbers: int, pool: bool = False) -> dict[str, Any]:
    """Run one of the scripts below in a process of its own, over a directory or a pool; what it reports."""
    command = [sys.executable, __file__, what, str(where), *map(str, numbers)]
    environment = {**os.environ, "ZCACHE_TEST_POOL": "1" if pool else ""}
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=LONGEST, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-8000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


# -------------------------------------------------------------------------- children


def values_of(cache: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file of a cache directory that holds bytes of values, those that are not finished too."""
    for path, _, names in os.walk(cache):
        inside = Path(path).relative_to(cache).parts
        if inside == (".zcache",) or inside[:2] == (".zcache", "index"):
            continue
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                file = Path(path, name)
                yield str(file), file.lstat()


def size_at_one_instant(cache: Path) -> int:
    """Bytes that were there all at once.

    A walk takes time, so what it finds need not have been there together. What two walks find was
    there in between.
    """
    if POOL:
        return 0  # Blocks come and go in one file; see `blocks_at_one_instant`.
    first = {status.st_ino: status.st_size for _, status in values_of(cache)}
    second = {status.st_ino: status.st_size for _, status in values_of(cache)}
    return sum(size for number, size in first.items() if second.get(number) == size)


def blocks_at_one_instant(cache: Path, workers: list[int]) -> int:
    """Bytes of the blocks that a pool takes, while those who use it are stopped: blocks come and go in one file."""
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        for worker in workers:
            os.waitid(os.P_PID, worker, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return sum(status.st_blocks * 512 for _, status in values_of(cache))
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)


def check_directory(source: Path, cache: Path, max_size: int, keys: Iterable[str]) -> None:
    """Open a directory after a crash: right bytes, within the bound, all bytes counted."""
    store = CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=max_size)

    async def check() -> None:
        for key in keys:
            wanted = source / key
            expected = wanted.read_bytes() if wanted.exists() else None
            assert await read(store, key) == expected, key

    asyncio.run(check())
    # What a process that has died was writing or deleting is taken over, or deleted, by now.
    assert store.drain_sync()
    check_invariants(store)
    info = store.cache_info()
    if POOL:
        # That the disk holds no more than that was asserted.
        assert info["current_size"] <= max_size, info
        return
    files = {path: status.st_size for path, status in values_of(cache)}
    assert info["current_size"] == sum(files.values()) <= max_size, (info, files)
    assert sum(stored_sizes(store).values()) == sum(files.values()), files
    assert not [path for path in files if "/.zcache/tmp/" in path], files


# ------------------------------------------------------------------------ random kills

KEYS = [f"a/c/{number}" for number in range(24)]
TOGGLED = [f"b/{number}" for number in range(4)]
LENGTHS = (100, 4000)
BOUND = 70 * PAGE if POOL else 20_000


def value(key: str, version: int) -> bytes:
    """A value that says what it is, of a length that depends on it."""
    dice = random.Random(f"{key} {version}")
    text = f"{key} {version} ".encode()
    return text + dice.randbytes(dice.randrange(*LENGTHS))


def version_of(key: str, data: bytes) -> int:
    name, version, _ = data.split(b" ", 2)
    assert name.decode() == key
    assert data == value(key, int(version)), "torn or damaged"
    return int(version)


class Numbers:
    """Whole numbers that processes share."""

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, 8 * count)

    def __getitem__(self, at: int) -> int:
        number: int = struct.unpack("Q", self._memory[8 * at : 8 * at + 8])[0]
        return number

    def __setitem__(self, at: int, number: int) -> None:
        self._memory[8 * at : 8 * at + 8] = struct.pack("Q", number)


class Toggled:
    """Keys that are there with odd versions, and missing with even ones."""

    def __init__(self) -> None:
        # Versions that are being made, and those with a change that has returned.
        self.begun, self.done = Numbers(len(TOGGLED)), Numbers(len(TOGGLED))

    async def change(self, store: CacheStore, index: int) -> None:
        key, version = TOGGLED[index], self.begun[index] + 1
        self.begun[index] = version
        if version % 2:
            await store.set(key, buf(value(key, version)))
        else:
            await store.delete(key)
        self.done[index] = version

    async def look(self, store: CacheStore, index: int) -> None:
        key, floor = TOGGLED[index], self.done[index]
        data = await read(store, key)
        legal = range(floor, self.begun[index] + 1)
        if data is None:
            assert any(version % 2 == 0 for version in legal), (key, legal, "missing, but there")
        else:
            assert version_of(key, data) in legal, (key, legal)


def load(
    source: Path, cache: Path, floors: mmap.mmap, toggled: Toggled, number: int, seed: int
) -> None:
    """Read everything and write one's own keys, until killed."""
    store = CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=BOUND)
    dice = random.Random(seed)
    own = [index for index in range(len(KEYS)) if index % 4 == number]

    async def task(index: int) -> None:
        key = KEYS[index]
        if index in own and dice.random() < 0.3:
            # The process that wrote before may have died before it could say so.
            version = version_of(key, (source / key).read_bytes()) + 1
            await store.set(key, buf(value(key, version)))
            floors[8 * index : 8 * index + 8] = struct.pack("Q", version)
        else:
            floor = struct.unpack("Q", floors[8 * index : 8 * index + 8])[0]
            data = await read(store, key)
            assert data is not None
            assert version_of(key, data) >= floor, (key, floor, "older than what was written")

    async def rounds() -> None:
        while True:
            # Different keys: one writer for each at a time.
            others = dice.sample(range(len(TOGGLED)), 3)
            does = toggled.change if dice.random() < 0.2 else toggled.look
            await asyncio.gather(
                *map(task, dice.sample(range(len(KEYS)), 6)),
                *(toggled.look(store, index) for index in others if index != number),
                does(store, number),
            )
            if dice.random() < 0.02:
                await store.invalidate(dice.choice(["b", TOGGLED[number], KEYS[0]]))

    asyncio.run(rounds())


def kill_at_random(root: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Four processes under load; again and again one of them, or all, are killed and replaced."""
    source, cache = root / "source", root / "cache"
    for key in KEYS:
        path = source / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key, 0))
    floors = mmap.mmap(-1, 8 * len(KEYS))
    toggled = Toggled()
    dice = random.Random(1)

    def start(number: int) -> int:
        seed = dice.randrange(2**32)
        return fork(lambda: load(source, cache, floors, toggled, number, seed))

    workers = {number: start(number) for number in range(4)}
    killed, peak, until = 0, 0, time.monotonic() + seconds
    try:
        while killed < kills and time.monotonic() < until:
            time.sleep(dice.uniform(0.01, 0.1))
            peak = max(peak, size_at_one_instant(cache))
            everybody = dice.random() < 0.05
            victims = range(4) if everybody else [dice.randrange(4)]
            for number in victims:
                os.kill(workers[number], signal.SIGKILL)
            codes = wait([workers.pop(number) for number in victims])
            assert codes == [-signal.SIGKILL] * len(codes), "a worker has failed by itself"
            killed += len(codes)
            if everybody:
                assert run(lambda: check_directory(source, cache, BOUND, [*KEYS, *TOGGLED])) == 0
            for number in victims:
                workers[number] = start(number)
    finally:
        for worker in workers.values():
            os.kill(worker, signal.SIGKILL)
        codes = wait(workers.values())
    assert codes == [-signal.SIGKILL] * 4, "a worker has failed by itself"
    assert run(lambda: check_directory(source, cache, BOUND, [*KEYS, *TOGGLED])) == 0
    assert peak <= BOUND, peak
    written = sum(version_of(key, (source / key).read_bytes()) for key in KEYS)
    return {"killed": killed, "peak": peak, "written": written}


# -------------------------------------------------------------- a kill at each step

SCENE_KEYS = [f"a/c/{number}" for number in range(3)]
SCENE_MISSING = "a/c/3"
# Of a pool: its folders, two segments, and two values.
SCENE_BOUND = 16 * PAGE if POOL else 250


def open_scene(source: Path, cache: Path) -> CacheStore:
    return CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=SCENE_BOUND)


def scene(
    source: Path, cache: Path, *, before: Callable[[CacheStore], object] | None = None
) -> None:
    """A new cache, fills of a range and two values, one that evicts, a hit, an absence, writes, and deletes."""
    store = open_scene(source, cache)

    async def play() -> None:
        assert await read_through(store, "a/c/2", RangeByteRequest(0, 10))
        assert await read_through(store, "a/c/0")
        assert await read_through(store, "a/c/1")
        if before is not None:
            before(store)
        assert await read_through(store, "a/c/2")
        assert await read(store, "a/c/2")
        assert await read_through(store, SCENE_MISSING) is None
        await store.set(SCENE_MISSING, buf(b"new"))
        await store.invalidate(SCENE_MISSING)
        await store.delete(SCENE_MISSING)
        assert await read_through(store, SCENE_MISSING) is None
        await store.set("a/c/2", buf(b"new" * 40))
        await store.drain()
        await store.delete("a/c/1")
        assert await read_through(store, "a/c/0")
        await store.delete_dir("a")

    asyncio.run(play())


def set_the_scene(place: Path) -> tuple[Path, Path]:
    source, cache = place / "source", place / "cache"
    (source / "a/c").mkdir(parents=True)
    for key in SCENE_KEYS:
        (source / key).write_bytes(key.encode() * 20)
    return source, cache


def check_scene(source: Path, cache: Path) -> int:
    return run(lambda: check_directory(source, cache, SCENE_BOUND, [*SCENE_KEYS, SCENE_MISSING]))


def as_if_inside(cache: Path) -> None:
    """Leave the index as a process does that dies in the middle of a step."""
    head = cache / ".zcache/index/head"
    if head.exists() and head.stat().st_size:
        with head.open("r+b") as file:
            file.seek(DIRTY)
            file.write(struct.pack("I", 1))


def die_at_each_call(root: Path) -> dict[str, Any]:
    """Play the scene, killed at every system call of it that changes a file or takes a lock.

    Where it holds the lock of the index, once more as if it were inside a step. Then only the files count, so that is
    done once after each change of them; `die_at_each_step` does it at every step.
    """
    deaths: dict[str, int] = {}
    files_changed = True
    for step in range(1, 10_000):
        for inside in (False, True):
            source, cache = set_the_scene(root / f"{step}-{inside}")
            with tracing.Traced(functools.partial(scene, source, cache), step) as traced:
                code = traced.go()
            if code is not None:
                assert code == 0, code
                return {"deaths": deaths}  # It came to its end.
            if inside:
                as_if_inside(cache)
            deaths[traced.at] = deaths.get(traced.at, 0) + 1
            assert check_scene(source, cache) == 0, f"killed at call {step}, {traced.at}, {inside}"
            if not (traced.holds_lock and files_changed):
                break
        else:
            files_changed = False
        files_changed |= traced.at not in {"flock", "fstat"}
    raise AssertionError("it has no end")


# Small values, the oldest; one that takes nearly all of the bound; and those that are filled together.
OLDEST = [f"a/c/{number}" for number in range(20)]
LARGE = "a/large"
TOGETHER = [f"a/c/{number}" for number in range(20, 24)]
TOGETHER_BOUND = 1024 * PAGE


def fill_the_pool(source: Path, cache: Path) -> None:
    """Leave no room in a pool."""
    store = CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=TOGETHER_BOUND)

    async def fill() -> None:
        for key in (*OLDEST, LARGE):
            assert await read_through(store, key)

    asyncio.run(fill())
    assert store.cache_info()["current_size"] > TOGETHER_BOUND - 4 * PAGE


def fill_together(source: Path, cache: Path) -> None:
    """Fill several values at once, for which others have to go."""
    store = CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=TOGETHER_BOUND)
    requests = [(key, None) for key in TOGETHER]
    found = asyncio.run(store.get_partial_values(PROTOTYPE, requests))
    assert [value and value.to_bytes() for value in found] == [key.encode() for key in TOGETHER]
    assert store.drain_sync()
    assert all(map(store.is_cached, (*TOGETHER, LARGE)))
    assert not store.is_cached(OLDEST[0])


def die_together(root: Path) -> dict[str, Any]:
    """Fill several values of a pool at once, killed at every system call that changes a file or takes a lock."""
    deaths: dict[str, int] = {}
    for step in range(1, 10_000):
        place = root / f"together-{step}"
        source, cache = place / "source", place / "cache"
        (source / "a/c").mkdir(parents=True)
        for key in (*OLDEST, *TOGETHER):
            (source / key).write_bytes(key.encode())
        (source / LARGE).write_bytes(bytes(983 * PAGE))
        assert run(functools.partial(fill_the_pool, source, cache)) == 0
        with tracing.Traced(functools.partial(fill_together, source, cache), step) as traced:
            code = traced.go()
        keys = [*TOGETHER, *OLDEST, LARGE]
        check = functools.partial(check_directory, source, cache, TOGETHER_BOUND, keys)
        assert run(check) == 0, f"killed at call {step}, {traced.at}"
        shutil.rmtree(place)
        if code is not None:
            assert code == 0, code
            return {"deaths": deaths}
        deaths[traced.at] = deaths.get(traced.at, 0) + 1
    raise AssertionError("it has no end")


def stop_at_each_call(root: Path) -> dict[str, Any]:
    """The same with a process that is stopped there, and killed only after another has worked on."""
    deaths: dict[str, int] = {}
    for step in range(1, 10_000, 3):
        source, cache = set_the_scene(root / f"stop-{step}")
        ready, begin = os.pipe(), os.pipe()
        other = fork(functools.partial(work_on, source, cache, ready[1], begin[0]))
        assert os.read(ready[0], 1)
        with tracing.Traced(functools.partial(scene, source, cache), step) as traced:
            code = traced.go()
            # A write has to wait for the lock, but a read goes to the source.
            os.write(begin[1], b"r" if traced.holds_lock else b"w")
            assert wait([other]) == [0], f"stopped at call {step}, {traced.at}"
        for file in (*ready, *begin):
            os.close(file)
        if code is not None:
            assert code == 0, code
            break
        deaths[traced.at] = deaths.get(traced.at, 0) + 1
        assert check_scene(source, cache) == 0, f"stopped at call {step}, {traced.at}, then killed"
    return {"deaths": deaths}


def work_on(source: Path, cache: Path, ready: int, begin: int) -> None:
    """What another process does beside one that is stopped; it has opened the directory before."""
    signal.alarm(60)
    store = open_scene(source, cache)
    os.write(ready, b"!")
    may_write = os.read(begin, 1) == b"w"

    async def work() -> None:
        for key in SCENE_KEYS:
            wanted = source / key
            assert await read(store, key) == (wanted.read_bytes() if wanted.exists() else None)
        if may_write:
            await store.set("a/c/0", buf(b"other" * 20))
            assert await read_through(store, "a/c/0") == b"other" * 20
        assert size_at_one_instant(cache) <= SCENE_BOUND

    asyncio.run(work())


def die_at_each_step(root: Path) -> dict[str, int]:
    """The same where no process may be traced: killed after each step that Python takes of the index."""
    deaths = 0
    for inside in (False, True):
        for step in range(1, 1000):
            source, cache = set_the_scene(root / f"{inside}-{step}")
            code = run(lambda: scene(source, cache, before=Fuse(step, cache, inside=inside)))  # noqa: B023
            assert check_scene(source, cache) == 0, f"killed at step {step}, inside={inside}"
            if code == 0:
                break  # It came to its end.
            assert code == -signal.SIGKILL, code
            deaths += 1
    return {"deaths": deaths}


class Fuse:
    """Kills the process after the n-th step of the index."""

    def __init__(self, left: int, cache: Path, *, inside: bool) -> None:
        self._left = left
        self._directory = cache
        self._inside = inside
        self._recorder: Any = None

    def __call__(self, store: CacheStore) -> None:
        self._recorder = record_steps(store, self._burn)
        self._recorder.__enter__()

    def _burn(self, _: Step) -> None:
        self._left -= 1
        if self._left == 0:
            if self._inside:
                as_if_inside(self._directory)
            os.kill(os.getpid(), signal.SIGKILL)


# ----------------------------------------------------------------- sharing, epochs, forks


def share_a_bound(root: Path) -> dict[str, int]:
    """Four processes fill, write and evict at once; the parent watches the directory."""
    # Of a pool each process has a segment, and its header and map are pages as well.
    source, cache, bound = root / "source", root / "cache", 48 * PAGE if POOL else BOUND
    (source / "a/c").mkdir(parents=True)
    for key in KEYS:
        (source / key).write_bytes(value(key, 0))

    def work(number: int) -> None:
        store = CacheStore(LocalStore(source), cache_store=cache_at(cache), max_size=bound)
        dice = random.Random(number)

        async def reads() -> None:
            for _ in range(150):
                for key in dice.sample(KEYS, 4):
                    data = await read(store, key)
                    assert data is not None
                    version_of(key, data)
                if dice.random() < 0.3:
                    key = KEYS[dice.randrange(6) * 4 + number]
                    await store.set(key, buf(value(key, dice.randrange(100))))

        asyncio.run(reads())
        assert store.cache_stats()["evictions"]

    workers = [fork(lambda number=number: work(number)) for number in range(4)]
    peak, looks = 0, 0
    while workers:
        size = blocks_at_one_instant(cache, workers) if POOL else size_at_one_instant(cache)
        peak = max(peak, size)
        looks += 1
        for worker in list(workers):
            if (ended := os.waitpid(worker, os.WNOHANG))[0]:
                assert os.waitstatus_to_exitcode(ended[1]) == 0
                workers.remove(worker)
    assert run(lambda: check_directory(source, cache, bound, [*KEYS, *TOGGLED])) == 0
    return {"peak": peak, "looks": looks, "bound": bound}


def epochs(root: Path) -> dict[str, Any]:
    """A loader with four workers reads each key once per epoch, dealt out anew in each."""
    source, cache = root / "source", root / "cache"
    (source / "a/c").mkdir(parents=True)
    keys = [f"a/c/{number}" for number in range(80)]
    for key in keys:
        (source / key).write_bytes(key.encode() * 10)
    # The index is there before the workers are: while one of them makes it, the others fill nothing.
    CacheStore(LocalStore(source), cache_store=cache_at(cache), source_id="source")
    reads = []
    for epoch in range(3):
        dealt = list(keys)
        random.Random(epoch).shuffle(dealt)

        def work(share: list[str]) -> None:
            store = CacheStore(
                LoggingStore(source), cache_store=cache_at(cache), source_id="source"
            )

            async def one(key: str) -> None:
                assert await read(store, key) == key.encode() * 10

            async def all_of_them() -> None:
                await asyncio.gather(*map(one, share))
                await store.drain()

            asyncio.run(all_of_them())

        codes = wait([fork(lambda n=n: work(dealt[n::4])) for n in range(4)])  # noqa: B023
        assert codes == [0] * 4
        log = reads_of(source)
        reads.append({"all": len(log), "most": max(map(log.count, keys))})
    return {"reads": reads}


def forks(root: Path) -> dict[str, Any]:
    """A process forks while it uses the cache, and both go on with it."""
    source, cache = root / "source", root / "cache"
    (source / "a/c").mkdir(parents=True)
    for key in KEYS:
        (source / key).write_bytes(value(key, 0))

    def open_store() -> CacheStore:
        return CacheStore(
            LoggingStore(source),
            cache_store=cache_at(cache),
            max_size=BOUND,
            source_id="source",
        )

    def parent() -> None:
        store = open_store()
        first = asyncio.run(read_through(store, KEYS[0]))
        slot = index_slot(store)
        told, tell = os.pipe()

        def in_child(store: CacheStore) -> None:
            assert store.cache_stats()["hits"] == 0
            assert asyncio.run(read(store, KEYS[0])) == first
            assert store.cache_stats()["hits"] == 1
            assert index_slot(store) != slot
            asyncio.run(store.set(KEYS[1], buf(value(KEYS[1], 7))))
            assert store.drain_sync()
            os.write(tell, b"!")
            time.sleep(60)

        worker = fork(functools.partial(in_child, store))
        try:
            assert os.read(told, 1) == b"!"
            # What the child wrote is seen here.
            found = asyncio.run(read(store, KEYS[1]))
            assert found == value(KEYS[1], 7)
            assert index_slot(store) == slot
            # The child holds none of our locks: after us, our slot is free.
            del store
            gc.collect()
            assert index_slot(open_store()) == slot
        finally:
            os.kill(worker, signal.SIGKILL)
            wait([worker])

    assert run(parent) == 0
    log = reads_of(source)
    return {"most": max(log.count(key) for key in KEYS)}


if __name__ == "__main__":
    if POOL:
        set_block_size(None)
    what, where, *numbers = sys.argv[1:]
    place = Path(where)
    answer = {
        "random": lambda: kill_at_random(place, int(numbers[0]), float(numbers[1])),
        "steps": lambda: die_at_each_step(place),
        "calls": lambda: die_at_each_call(place),
        "together": lambda: die_together(place),
        "stops": lambda: stop_at_each_call(place),
        "bound": lambda: share_a_bound(place),
        "epochs": lambda: epochs(place),
        "forks": lambda: forks(place),
    }[what]()
    print(json.dumps(answer))
