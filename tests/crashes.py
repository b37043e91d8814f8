"""Processes that share one cache directory and are killed; run as a script by `test_processes.py`.

Importing zarr takes longer than everything else here, so one process imports it and forks all others.
It never uses a cache itself, so each child opens one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import Buffer, cpu, default_buffer_prototype
from zarr.storage import LocalStore

from zcache import CacheStore, _files, _ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import BufferPrototype

PROTOTYPE = default_buffer_prototype()
DIRTY = 8
"""Where the head of an index has the mark of whoever is at work."""


def buf(data: bytes) -> Buffer:
    return cpu.Buffer.from_bytes(data)


async def read(store: Store, key: str) -> bytes | None:
    value = await store.get(key, PROTOTYPE)
    return None if value is None else value.to_bytes()


class LoggingStore(LocalStore):
    """Writes down each read; a short line that is appended is never torn."""

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


# -------------------------------------------------------------------------- children


def child(work: Callable[[], Any]) -> int:
    """Run `work` in a process of its own."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(children: Iterable[int]) -> list[int]:
    """Exit codes; negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]


def run(work: Callable[[], Any]) -> int:
    return wait([child(work)])[0]


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
    first = {status.st_ino: status.st_size for _, status in values_of(cache)}
    second = {status.st_ino: status.st_size for _, status in values_of(cache)}
    return sum(size for number, size in first.items() if second.get(number) == size)


def check_directory(source: Path, cache: Path, max_size: int, keys: Iterable[str]) -> None:
    """Open a directory after a crash: right bytes, within the bound, all bytes counted."""
    store = CacheStore(LocalStore(source), cache_store=LocalStore(cache), max_size=max_size)

    async def check() -> None:
        for key in keys:
            wanted = source / key
            expected = wanted.read_bytes() if wanted.exists() else None
            assert await read(store, key) == expected, key

    asyncio.run(check())
    index = store._engine.index
    # Bytes whose owner has died are deleted with the next fills.
    asyncio.run(store._engine.drop(store._io, index.orphans(1000)))
    index.validate()
    files = {path: status.st_size for path, status in values_of(cache)}
    info = store.cache_info()
    assert info["current_size"] == sum(files.values()) <= max_size, (info, files, index.entries())
    assert not [path for path in files if "/.zcache/tmp/" in path], files


# ------------------------------------------------------------------------ random kills

KEYS = [f"a/c/{number}" for number in range(24)]
LENGTHS = (100, 4000)
BOUND = 20_000


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


def load(source: Path, cache: Path, floors: mmap.mmap, number: int, seed: int) -> None:
    """Read everything and write one's own keys, until somebody kills us."""
    store = CacheStore(LocalStore(source), cache_store=LocalStore(cache), max_size=BOUND)
    dice = random.Random(seed)
    own = [index for index in range(len(KEYS)) if index % 4 == number]

    async def task(index: int) -> None:
        key = KEYS[index]
        if index in own and dice.random() < 0.3:
            # Whoever wrote before us may have died before it could say so.
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
            await asyncio.gather(*map(task, dice.sample(range(len(KEYS)), 6)))

    asyncio.run(rounds())


def kill_at_random(root: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Four processes under load; again and again one of them, or all, are killed and replaced."""
    source, cache = root / "source", root / "cache"
    for key in KEYS:
        path = source / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value(key, 0))
    floors = mmap.mmap(-1, 8 * len(KEYS))
    dice = random.Random(1)

    def start(number: int) -> int:
        seed = dice.randrange(2**32)
        return child(lambda: load(source, cache, floors, number, seed))

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
                assert run(lambda: check_directory(source, cache, BOUND, KEYS)) == 0
            for number in victims:
                workers[number] = start(number)
    finally:
        for worker in workers.values():
            os.kill(worker, signal.SIGKILL)
        codes = wait(workers.values())
    assert codes == [-signal.SIGKILL] * 4, "a worker has failed by itself"
    assert run(lambda: check_directory(source, cache, BOUND, KEYS)) == 0
    assert peak <= BOUND, peak
    written = sum(version_of(key, (source / key).read_bytes()) for key in KEYS)
    return {"killed": killed, "peak": peak, "written": written}


# -------------------------------------------------------------- a kill at each step


class Fuse:
    """Kills the process, or stops it, at the n-th thing that it does."""

    def __init__(self, left: int, cache: Path, *, inside: bool, how: signal.Signals) -> None:
        self.left = left
        self.cache = cache
        self.inside = inside
        self.how = how

    def burn(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.inside:
                # As if it were in the middle of a step of the index.
                with (self.cache / ".zcache/index/head").open("r+b") as head:
                    head.seek(DIRTY)
                    head.write(struct.pack("I", 1))
            os.kill(os.getpid(), self.how)

    def attach(self, store: CacheStore) -> None:
        books = store._engine.books
        books.index = Fused(books.index, self)
        # The same steps as in one call, in this thread, so that it can be in between.
        vars(_ports)["counter"] = lambda _: None
        vars(_files)["_write"] = _files.write_in_steps
        for name in ("_create", "_publish", "seal", "remove", "remove_below"):
            setattr(_files, name, self.around(getattr(_files, name)))
        source: Any = store._store
        source.set = self.around_async(source.set)
        source.delete = self.around_async(source.delete)

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.burn()
            result = work(*args, **kwargs)
            self.burn()
            return result

        return call

    def around_async(self, work: Callable[..., Any]) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.burn()
            result = await work(*args, **kwargs)
            self.burn()
            return result

        return call


class Fused:
    """An index whose steps burn a fuse."""

    def __init__(self, index: Any, fuse: Fuse) -> None:
        self._index = index
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._index, name)
        return self._fuse.around(found) if callable(found) else found

    def __len__(self) -> int:
        return len(self._index)


def scene(source: Path, cache: Path, fuse: Fuse | None) -> None:
    """A fill that evicts, a hit, an overwrite, and a delete."""
    store = CacheStore(LocalStore(source), cache_store=LocalStore(cache), max_size=250)

    async def play() -> None:
        assert await read(store, "a/c/0")
        assert await read(store, "a/c/1")
        if fuse is not None:
            fuse.attach(store)
        assert await read(store, "a/c/2")
        assert await read(store, "a/c/2")
        await store.set("a/c/2", buf(b"new" * 40))
        await store.delete("a/c/1")

    asyncio.run(play())


def die_at_each_step(root: Path) -> dict[str, int]:
    """Play the scene, killed at every step of it; twice, once as if inside a step of the index."""
    keys = [f"a/c/{number}" for number in range(3)]
    deaths = 0
    for inside in (False, True):
        for step in range(1, 1000, 1 + inside):
            place = root / f"{inside}-{step}"
            source, cache = place / "source", place / "cache"
            (source / "a/c").mkdir(parents=True)
            for key in keys:
                (source / key).write_bytes(key.encode() * 20)
            fuse = Fuse(step, cache, inside=inside, how=signal.SIGKILL)
            code = run(lambda: scene(source, cache, fuse))  # noqa: B023
            check = run(lambda: check_directory(source, cache, 250, keys))  # noqa: B023
            assert check == 0, f"killed at step {step}, inside={inside}"
            if code == 0:
                break  # It came to its end.
            assert code == -signal.SIGKILL, code
            deaths += 1
    return {"deaths": deaths}


def stop_at_each_step(root: Path) -> dict[str, int]:
    """The same with a process that is stopped there, and killed only after others have worked on."""
    deaths = 0
    keys = [f"a/c/{number}" for number in range(3)]
    for step in range(1, 1000, 3):
        place = root / f"stop-{step}"
        source, cache = place / "source", place / "cache"
        (source / "a/c").mkdir(parents=True)
        for key in keys:
            (source / key).write_bytes(key.encode() * 20)
        fuse = Fuse(step, cache, inside=False, how=signal.SIGSTOP)
        victim = child(lambda: scene(source, cache, fuse))  # noqa: B023
        _, status = os.waitpid(victim, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break

        def others() -> None:
            store = CacheStore(LocalStore(source), cache_store=LocalStore(cache), max_size=250)  # noqa: B023

            async def work() -> None:
                for key in keys:
                    wanted = source / key  # noqa: B023
                    assert await read(store, key) == (
                        wanted.read_bytes() if wanted.exists() else None
                    )
                await store.set("a/c/0", buf(b"other" * 20))
                assert await read(store, "a/c/0") == b"other" * 20
                assert size_at_one_instant(cache) <= 250  # noqa: B023
                os.kill(victim, signal.SIGKILL)  # noqa: B023
                await asyncio.sleep(0)

            asyncio.run(work())

        assert run(others) == 0, f"stopped at step {step}"
        wait([victim])
        check = run(lambda: check_directory(source, cache, 250, keys))  # noqa: B023
        assert check == 0, f"stopped at step {step}, then killed"
        deaths += 1
    return {"deaths": deaths}


# ----------------------------------------------------------------- sharing, epochs, forks


def share_a_bound(root: Path) -> dict[str, int]:
    """Four processes fill, write and evict at once; somebody else watches the directory."""
    source, cache = root / "source", root / "cache"
    (source / "a/c").mkdir(parents=True)
    for key in KEYS:
        (source / key).write_bytes(value(key, 0))

    def work(number: int) -> None:
        store = CacheStore(LocalStore(source), cache_store=LocalStore(cache), max_size=BOUND)
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

    workers = [child(lambda number=number: work(number)) for number in range(4)]
    peak, looks = 0, 0
    while workers:
        peak = max(peak, size_at_one_instant(cache))
        looks += 1
        for worker in list(workers):
            if (ended := os.waitpid(worker, os.WNOHANG))[0]:
                assert os.waitstatus_to_exitcode(ended[1]) == 0
                workers.remove(worker)
    assert run(lambda: check_directory(source, cache, BOUND, KEYS)) == 0
    return {"peak": peak, "looks": looks, "bound": BOUND}


def epochs(root: Path) -> dict[str, Any]:
    """A loader with four workers reads each key once per epoch, dealt out anew in each."""
    source, cache = root / "source", root / "cache"
    (source / "a/c").mkdir(parents=True)
    keys = [f"a/c/{number}" for number in range(80)]
    for key in keys:
        (source / key).write_bytes(key.encode() * 10)
    reads = []
    for epoch in range(3):
        dealt = list(keys)
        random.Random(epoch).shuffle(dealt)

        def work(share: list[str]) -> None:
            store = CacheStore(LoggingStore(source), cache_store=LocalStore(cache))

            async def one(key: str) -> None:
                assert await read(store, key) == key.encode() * 10

            async def all_of_them() -> None:
                await asyncio.gather(*map(one, share))

            asyncio.run(all_of_them())

        codes = wait([child(lambda n=n: work(dealt[n::4])) for n in range(4)])  # noqa: B023
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

    def parent() -> None:
        store = CacheStore(LoggingStore(source), cache_store=LocalStore(cache), max_size=BOUND)
        engine = store._engine
        first = asyncio.run(read(store, KEYS[0]))
        place = engine.index.place
        held = engine.index  # As the frames of other threads do.
        told, tell = os.pipe()

        def in_child(store: CacheStore) -> None:
            assert store.cache_stats()["hits"] == 0
            assert asyncio.run(read(store, KEYS[0])) == first
            assert store.cache_stats()["hits"] == 1
            assert store._engine.index.place != place
            asyncio.run(store.set(KEYS[1], buf(value(KEYS[1], 7))))
            os.write(tell, b"!")
            time.sleep(60)

        worker = child(partial(in_child, store))
        try:
            assert os.read(told, 1) == b"!"
            # What the child wrote is seen here.
            found = asyncio.run(read(store, KEYS[1]))
            assert found == value(KEYS[1], 7)
            assert engine.index.place == place
            # The child holds none of our locks: after us, our place is free.
            del held, store, engine
            gc.collect()
            probe = CacheStore(LoggingStore(source), cache_store=LocalStore(cache))
            assert probe._engine.index.place == place
        finally:
            os.kill(worker, signal.SIGKILL)
            wait([worker])

    assert run(parent) == 0
    log = reads_of(source)
    return {"most": max(log.count(key) for key in KEYS)}


if __name__ == "__main__":
    what, where, *numbers = sys.argv[1:]
    place = Path(where)
    answer = {
        "random": lambda: kill_at_random(place, int(numbers[0]), float(numbers[1])),
        "steps": lambda: die_at_each_step(place),
        "stops": lambda: stop_at_each_step(place),
        "bound": lambda: share_a_bound(place),
        "epochs": lambda: epochs(place),
        "forks": lambda: forks(place),
    }[what]()
    print(json.dumps(answer))
