"""A long random run: threads, event loops, forked children, cancellations and faults on one store.

    python tests/soak.py [--seconds 120] [--seed N] [--round 5]

Each key has one writer, who numbers its versions. A reader notes which version was complete
before and which one had begun after, and must get one of those in between, byte for byte. At the end
of each round the index is compared with what the cache store holds. Prints what was done; the exit
code is 1 if anything did not match.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from doubles import FaultyStore
from pools import NEIGHBOURS, neighbour, neighbours_value
from support import PROTOTYPE, buf, cut, files_below, quiet, until
from zcache import CachePool, CacheStore, UsageError
from zcache.testing import FakeClock, check_invariants, check_invariants_async, entries, in_flight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zarr.abc.store import ByteRequest, Store

GROUPS, KEYS_IN_GROUP = 8, 5
KINDS = ("memory", "faulty", "directory", "pool", "memory pool")
NEIGHBOUR_KEYS = tuple(f"g0/{key}" for key in range(KEYS_IN_GROUP))
ERRORS: list[Callable[[], Exception]] = [
    lambda: OSError(28, "no space left"),
    lambda: OSError(5, "input/output error"),
    lambda: OSError(36, "name too long"),
    TimeoutError,
    lambda: KeyError("k"),
    lambda: RuntimeError("a library's own"),
]


class SourceError(Exception):
    """What the source raises now and then; the one error that users may see."""


class MismatchError(AssertionError):
    """What must never happen."""


class Source(FaultyStore):
    """A source that is slow now and then, and knows which writes are under way."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.active: Counter[str] = Counter()

    async def _do(self, operation: str, key: str, effect: Callable[[], Any]) -> Any:
        with self._lock:
            self.active[key] += operation != "get"
        try:
            if self.chance.random() < 0.3:
                await asyncio.sleep(self.chance.random() / 500)
            return await super()._do(operation, key, effect)
        finally:
            with self._lock:
                self.active[key] -= operation != "get"

    def writing(self, prefix: str) -> bool:
        """Whether something below a prefix is being changed."""
        with self._lock:
            return any(n for key, n in self.active.items() if key.startswith(prefix))


class Register:
    """The versions of one key. One writer at a time."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.begun = self.done = 0
        self.values: list[bytes | None] = [None]

    def next(self, chance: random.Random, *, delete: bool) -> bytes | None:
        """Begin a version."""
        text = f"{self.key}:{len(self.values)}:".encode()
        value = None if delete else (text * 40)[: len(text) + chance.randrange(120)]
        self.values.append(value)
        self.begun = len(self.values) - 1
        return value

    def check(self, since: int, request: ByteRequest | None, found: bytes | None) -> None:
        """Assert that a read which began when `since` was complete may give this."""
        legal = self.values[since : self.begun + 1]
        if found not in [None if value is None else cut(value, request) for value in legal]:
            text = f"{self.key} {request}: {found!r} is none of versions {since} to {self.begun}"
            raise MismatchError(text)


class Counted(Mapping[str, int]):
    """Sizes of all values that the index counts, whenever it is asked."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store
        self._sizes: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        found = entries(self._store, everything=True)
        self._sizes = {entry.name: entry.size for entry in found}
        return iter(self._sizes)

    def __getitem__(self, name: str) -> int:
        return self._sizes[name]

    def __len__(self) -> int:
        return len(self._sizes)


class Round:
    """One store and all its users for a while."""

    def __init__(self, kind: str, seed: int, directory: Path, *, forks: bool = True) -> None:
        self.chance = random.Random(seed)
        self.kind = kind
        # The source of a child is a copy, which must not get into a directory that both share.
        self.forks = forks and kind not in ("directory", "pool")
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.mismatches: list[str] = []
        self.stop = threading.Event()
        self.source = Source(random.Random(seed + 1))
        self.faulty = FaultyStore()
        caches: dict[str, Callable[[], Store | CachePool]] = {
            "memory": MemoryStore,
            "pool": lambda: CachePool(directory),
            "memory pool": CachePool,
            "directory": lambda: LocalStore(directory),
            "faulty": lambda: self.faulty,
        }
        self.max_size = self.chance.choice([500, 2000, 6000])
        self.damages_values = kind == "pool" and seed % 2 == 1
        # The pauses of the circuit breaker are counted by it.
        self.clock = FakeClock(time.time())
        cache = caches[kind]()
        self.neighbours = {}
        if isinstance(cache, CachePool):
            # Of the same keys, with other values.
            self.neighbours = {name: neighbour(cache, name, NEIGHBOUR_KEYS) for name in NEIGHBOURS}
        self.store = CacheStore(
            self.source,
            cache_store=cache,
            max_size=self.max_size,
            max_age_seconds=self.chance.choice(["infinity", 0.05, {"g0/**": 0.05, "*/1": 0}]),
            missing_max_age_seconds=self.chance.choice(["infinity", 0.1]),
            stale_if_error=self.chance.choice([0, 0.05, "infinity"]),
            # By default what was verified once, and is damaged since, is served.
            verify="always" if self.damages_values else "first",
            revalidate=self.chance.random() < 0.5,
            cache_set_data=self.chance.random() < 0.8,
            # Small, so that readers have to wait for it.
            max_pending_size=self.chance.choice([0, 300, 10**6]),
            clock=self.clock,
        )
        self.directory = directory
        self.groups = [
            [Register(f"g{group}/{key}") for key in range(KEYS_IN_GROUP)] for group in range(GROUPS)
        ]
        fault = random.Random(seed + 2)
        self.source.plan = lambda *_: SourceError() if fault.random() < 0.01 else None
        self.faulty.plan = lambda *_: fault.choice(ERRORS)() if fault.random() < 0.1 else None

    def request(self, chance: random.Random) -> ByteRequest | None:
        first, count = chance.randrange(60), chance.randrange(1, 60)
        kinds: list[ByteRequest | None] = [
            *(None, None, RangeByteRequest(first, first + count)),
            *(OffsetByteRequest(first), SuffixByteRequest(count)),
        ]
        return chance.choice(kinds)

    # -------------------------------------------------------------------- readers

    async def read(self, chance: random.Random) -> None:
        register = chance.choice(chance.choice(self.groups))
        request, since = self.request(chance), register.done
        value = await self.store.get(register.key, PROTOTYPE, request)
        register.check(since, request, None if value is None else value.to_bytes())
        self.counts["reads"] += 1

    async def look(self, chance: random.Random) -> None:
        """Ask whether a key is there, and what is cached."""
        register = chance.choice(chance.choice(self.groups))
        since = register.done
        found = await self.store.exists(register.key)
        legal = register.values[since : register.begun + 1]
        if found not in [value is not None for value in legal]:
            raise MismatchError(f"{register.key} exists: {found}, in {since} to {register.begun}")
        if chance.random() < 0.2:
            prefix = register.key.rpartition("/")[0]
            keys = [key async for key in self.store.cached_keys(prefix)]
            if not all(key.startswith(prefix) for key in keys):
                raise MismatchError(f"{keys} are not all below {prefix}")
        self.counts["reads"] += 1

    async def invalidate(self, chance: random.Random) -> None:
        """Forget a key, or what is below a prefix."""
        register = chance.choice(chance.choice(self.groups))
        await self.store.invalidate(chance.choice([register.key, register.key.rpartition("/")[0]]))
        self.counts["invalidations"] += 1

    async def read_neighbour(self, chance: random.Random) -> None:
        """Read a value of another source of the pool."""
        if self.neighbours:
            name, key = chance.choice(NEIGHBOURS), chance.choice(NEIGHBOUR_KEYS)
            value = await self.neighbours[name].get(key, PROTOTYPE)
            if value is None or value.to_bytes() != neighbours_value(name, key):
                raise MismatchError(f"{key} of the neighbour {name}: {value}")
            self.counts["reads"] += 1

    async def read_many(self, chance: random.Random) -> None:
        registers = [chance.choice(chance.choice(self.groups)) for _ in range(4)]
        asked = [(register.key, self.request(chance)) for register in registers]
        since = [register.done for register in registers]
        found = await self.store.get_partial_values(PROTOTYPE, asked)
        for register, (_, request), at, value in zip(registers, asked, since, found, strict=True):
            register.check(at, request, None if value is None else value.to_bytes())
        self.counts["reads"] += len(asked)

    def read_now(self, chance: random.Random) -> None:
        register = chance.choice(chance.choice(self.groups))
        request, since = self.request(chance), register.done
        value = self.store.get_sync(register.key, byte_range=request)
        register.check(since, request, None if value is None else value.to_bytes())
        self.counts["reads"] += 1

    # -------------------------------------------------------------------- writers

    async def write(self, chance: random.Random, group: list[Register]) -> None:
        act, register = chance.random(), chance.choice(group)
        if act < 0.1:
            for each in group:
                each.next(chance, delete=True)
            await self.store.delete_dir(group[0].key.split("/")[0])
            for each in group:
                each.done = each.begun
            self.counts["prefix deletes"] += 1
            return
        value = register.next(chance, delete=act < 0.3)
        if value is None:
            await self.store.delete(register.key)
        else:
            await self.store.set(register.key, buf(value))
        register.done = register.begun
        self.counts["writes"] += 1

    def write_now(self, chance: random.Random, group: list[Register]) -> None:
        register = chance.choice(group)
        value = register.next(chance, delete=chance.random() < 0.3)
        if value is None:
            self.store.delete_sync(register.key)
        else:
            self.store.set_sync(register.key, buf(value))
        register.done = register.begun
        self.counts["writes"] += 1

    # --------------------------------------------------------------------- actors

    def thread(self, number: int) -> None:
        """Use the synchronous surface."""
        chance = random.Random(self.seed * 1000 + number)
        while not self.stop.is_set():
            try:
                if chance.random() < 0.8:
                    self.read_now(chance)
                else:
                    self.write_now(chance, self.groups[number])
            except SourceError:
                self.counts["errors of the source"] += 1

    def loop(self, number: int) -> None:
        """Use the asynchronous surface, with many tasks at once."""
        asyncio.run(self._loop(number))

    async def _loop(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        while not self.stop.is_set():
            writer = self.write(chance, self.groups[number])
            readers = [self.read(chance) for _ in range(12)] + [self.read_many(chance)]
            readers += [self.look(chance), self.look(chance), self.read_neighbour(chance)]
            if chance.random() < 0.2:
                readers.append(self.invalidate(chance))
            tasks = [asyncio.create_task(work) for work in (writer, *readers)]
            await asyncio.sleep(chance.random() / 500)
            for task in chance.sample(tasks, 2):
                self.counts["cancelled"] += task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, SourceError):
                    self.counts["errors of the source"] += 1
                elif isinstance(result, Exception):
                    raise result
            # A write that was cancelled goes on by itself; the next one waits for it.
            prefix = self.groups[number][0].key.split("/")[0]
            await until(lambda: not self.source.writing(prefix))  # noqa: B023 - it ends here

    def damage(self, chance: random.Random) -> None:
        """Let a value vanish without the cache."""
        if self.kind == "faulty":
            names = list(self.faulty.values)
            if names:
                self.faulty.do_set(chance.choice(names), None)
        elif self.kind == "directory":
            files = [path for path in files_below(self.directory) if ".zcache" not in path.parts]
            if files:
                chance.choice(files).unlink(missing_ok=True)
        elif self.kind == "pool":
            self.damage_segment(chance)
        self.counts["values that vanished"] += self.kind not in ("memory", "memory pool")

    def damage_segment(self, chance: random.Random) -> None:
        """Overwrite a few bytes of a segment, cut it off, or take it away."""
        segments = sorted((self.directory / ".zcache/segments").glob("*"))
        if not segments:
            return
        path, how = chance.choice(segments), chance.random()
        with contextlib.suppress(FileNotFoundError):
            if how < 0.1:
                path.unlink()
                return
            with path.open("r+b") as file:
                page = chance.randrange(64, max(65, path.stat().st_size // 4096 + 1)) * 4096
                if how < 0.2:
                    file.truncate(page)
                    return
                # In the header, or in the value.
                places = [0, 100, 512, 520] if self.damages_values else [0, 100]
                file.seek(page + chance.choice(places))
                file.write(chance.randbytes(8))

    def fork(self) -> None:
        """Let a child read everything, and write something of its own."""
        child = os.fork()
        if child:
            self.counts["forks"] += 1
            status = os.waitpid(child, 0)[1]
            if status:
                raise MismatchError(f"a forked child failed with status {status}")
            return
        status = 1
        try:
            signal.alarm(60)
            self.source.plan = self.faulty.plan = lambda *_: None
            chance = random.Random(os.getpid())
            asyncio.run(self._in_child(chance))
            for _ in range(50):
                self.read_now(chance)
            check_invariants(self.store)
            status = 0
        except BaseException:  # noqa: BLE001 - the parent sees the status
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    async def _in_child(self, chance: random.Random) -> None:
        await asyncio.gather(*(self.read(chance) for _ in range(100)))
        key = f"child/{os.getpid()}"
        await self.store.set(key, buf(b"mine"))
        value = await self.store.get(key, PROTOTYPE)
        if value is None or value.to_bytes() != b"mine":
            raise MismatchError("a child does not read what it wrote")
        await self.store.delete(key)

    def watch(self) -> None:
        """Compare what can be compared while all are at work."""
        self.clock.advance(0.01)
        self.counts["checks"] += 1
        # What has vanished is counted until it is read: then only the index is compared, with itself.
        with contextlib.suppress(UsageError):  # All looks may be disturbed.
            check_invariants(
                self.store, held=None if "memory" in self.kind else Counted(self.store)
            )
        if self.store.cache_info()["current_size"] > self.max_size:
            raise MismatchError("more bytes than the bound allows")
        if self.faulty.peak > self.max_size:
            raise MismatchError(f"{self.faulty.peak} bytes were in the cache store")

    def guard(self, work: Callable[[], None]) -> None:
        """Run an actor; what it raises is a mismatch."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it was not injected
            self.mismatches.append("".join(traceback.format_exception(error)))
            self.stop.set()

    def run(self, seconds: float) -> None:
        """Let all actors work for so long, then compare all there is."""
        actors: list[Callable[[], None]] = [
            *(lambda n=n: self.thread(n) for n in range(GROUPS // 2)),
            *(lambda n=n: self.loop(n) for n in range(GROUPS // 2, GROUPS)),
        ]
        threads = [threading.Thread(target=self.guard, args=(actor,)) for actor in actors]
        for thread in threads:
            thread.start()
        self.guard(lambda: self._main(time.monotonic() + seconds))
        self.stop.set()
        for thread in threads:
            thread.join()
        self.guard(lambda: asyncio.run(self.compare()))

    def _main(self, end: float) -> None:
        turn = 0
        while time.monotonic() < end and not self.stop.is_set():
            turn += 1
            self.watch()
            if turn % 20 == 0:
                self.damage(self.chance)
            if turn % 25 == 0 and self.forks:
                self.fork()
            time.sleep(0.01)

    async def compare(self) -> None:
        """Compare index, cache store and source, once all is quiet and nothing fails."""
        self.counts["faults"] += self.source.faults + self.faulty.faults
        self.source.plan = self.faulty.plan = lambda *_: None
        store = self.store
        # Past every pause of the circuit breaker; the first operation of each kind closes it.
        self.clock.advance(1000)
        await quiet(store)
        # What vanished and was never asked for since is still counted.
        for one in (store, *self.neighbours.values()):
            await one.clear_cache()
            await quiet(one)
        for _ in range(2):
            for _ in range(20 * len(self.neighbours)):
                await self.read_neighbour(self.chance)
            for register in (register for group in self.groups for register in group):
                found = await store.get(register.key, PROTOTYPE)
                value = None if found is None else found.to_bytes()
                if value != self.source.values.get(register.key):
                    raise MismatchError(f"{register.key} is not what the source has")
        await store.drain()
        self.counts["checks"] += 1
        await check_invariants_async(store)
        # The last ones may end after what they have brought is there.
        await until(lambda: in_flight(store) == (0, 0))


def main() -> int:
    parser = argparse.ArgumentParser(description="A long random run with faults.")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--round", type=float, default=5, help="seconds for one store")
    parser.add_argument("--kind", choices=KINDS, help="the one kind of cache store to use")
    options = parser.parse_args()
    # Python says of every fork of a process with threads that it may deadlock. That is the question.
    warnings.simplefilter("ignore", DeprecationWarning)
    logging.getLogger("zcache").setLevel(logging.CRITICAL)
    total: Counter[str] = Counter()
    mismatches = 0
    end = time.monotonic() + options.seconds
    print(f"soak for {options.seconds:g} s, seed {options.seed}", flush=True)
    seed = options.seed
    while time.monotonic() < end and not mismatches:
        for kind in [options.kind] if options.kind else KINDS:
            directory = Path(tempfile.mkdtemp(prefix="zcache-soak-"))
            current = Round(kind, seed, directory)
            current.run(max(0.2, min(options.round, end - time.monotonic())))
            shutil.rmtree(directory, ignore_errors=True)
            for text in current.mismatches:
                print(f"seed {seed}, {kind}:\n{text}", file=sys.stderr)
            mismatches += len(current.mismatches)
            total.update(current.counts)
            seed += 1
            if time.monotonic() >= end:
                break
    operations = sum(total[name] for name in ("reads", "writes", "prefix deletes"))
    for name in ("reads", "writes", "prefix deletes", "invalidations", "cancelled", "forks"):
        print(f"  {name}: {total[name]}")
    print(f"  errors of the source: {total['errors of the source']}")
    print(f"  values that vanished: {total['values that vanished']}")
    print(
        f"operations: {operations}, faults injected: {total['faults']}, "
        f"checks: {total['checks']}, mismatches: {mismatches}"
    )
    return int(mismatches > 0)


if __name__ == "__main__":
    sys.exit(main())
