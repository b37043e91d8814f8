"""A world in which concurrent operations go on only where a test lets them.

Each operation of the source and of the cache store is held up twice: before its effect, and after
it, before its caller hears of it (where a scenario is coarse, only before). What runs between two
such points is one step, for nothing else runs meanwhile. After each step `World.check_step` compares
the index with what the cache store holds, and each read is compared with what the writes around it allow.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from decoding import ROOM, check_decoded, check_decoded_quiet, read_decoded
from doubles import SyncDictStore
from pools import NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours
from support import PROTOTYPE, RANGES, buf, check_same, cut, read
from zcache import CacheStore, OfflineError
from zcache.testing import (
    InvariantError,
    cache_store_of,
    check_invariants,
    entries,
    missing_keys,
    stored_sizes,
)

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest

acting: contextvars.ContextVar[int] = contextvars.ContextVar("acting", default=-1)
NOTHING = object()
"""Stands for the value of a write that does not touch a key."""


class SourceError(Exception):
    """What a source raises: the one error that users see."""


class Op(NamedTuple):
    """One operation: a method of the store, a key or prefix, and a value or a byte request.

    `get_partial_values` has its requests, and `_set_many` its keys and values, in `what`. `decode` reads a
    value by way of a decoded chunk.
    """

    method: str
    key: str = ""
    what: Any = None

    def value(self, key: str) -> Any:
        """What this leaves in the source under a key; NOTHING where it does not touch it."""
        if self.method == "_set_many":
            return dict(self.what).get(key, NOTHING)
        if self.method in ("set", "set_if_not_exists") and self.key == key:
            return self.what
        if self.method == "delete" and self.key == key:
            return None
        below = self.key.rstrip("/") + "/" if self.key else ""
        if self.method in ("delete_dir", "clear") and key.startswith(below):
            return None
        return NOTHING

    @property
    def reads(self) -> list[tuple[str, ByteRequest | None]]:
        """Keys and requests that this reads."""
        if self.method in ("get", "get_offline", "decode"):
            return [(self.key, self.what)]
        return list(self.what) if self.method == "get_partial_values" else []

    @property
    def is_write(self) -> bool:
        """Whether this changes the source."""
        return not self.reads and self.method not in ("exists", "invalidate", "clear_cache")


def get(key: str, request: ByteRequest | None = None) -> Op:
    return Op("get", key, request)


def decode(key: str) -> Op:
    return Op("decode", key)


def put(key: str, value: bytes) -> Op:
    return Op("set", key, value)


@dataclass
class Point:
    """An operation of a store that is held up."""

    actor: int
    label: str
    gate: asyncio.Future[None]


class HeldStore(SyncDictStore):
    """A store that holds up its operations, and may be told to fail the next ones.

    Attributes
    ----------
    faults : list of (str, str, Exception)
        Operations, "before" or "after", and what each raises, once.
    raised : int
        How often that has happened.
    """

    name = ""
    world: World | None = None

    def __init__(self, values: dict[str, bytes] | None = None, **options: Any) -> None:
        super().__init__(values, **options)
        self.faults: list[tuple[str, str, Exception]] = []
        self.raised = 0

    def _raise_if(self, operation: str, when: str) -> None:
        for at, fault in enumerate(self.faults):
            if fault[:2] == (operation, when):
                del self.faults[at]
                self.raised += 1
                raise fault[2]

    async def before(self, operation: str, key: str) -> None:
        if self.world is not None:
            await self.world.hold(f"{self.name}.{operation} {key}")
        self._raise_if(operation, "before")

    async def after(self, operation: str, key: str, result: object) -> None:
        if self.world is not None and not self.world.scenario.coarse:
            found = bytes(result.to_bytes()) if hasattr(result, "to_bytes") else result
            await self.world.hold(f"{self.name}.{operation} {key} -> {found!r}")
        self._raise_if(operation, "after")

    def before_now(self, operation: str, key: str) -> None:
        self._raise_if(operation, "before")

    def after_now(self, operation: str, key: str) -> None:
        self._raise_if(operation, "after")


@dataclass
class Actor:
    """One operation under way."""

    op: Op
    task: asyncio.Task[Any] | None = None
    begun: int | None = None
    ended: int | None = None
    cancelled: bool = False
    failed: bool = False
    learned: list[Any] = field(default_factory=list)

    @property
    def sure(self) -> bool:
        """Whether this certainly had its effect, and only until it returned."""
        known = self.ended is not None and not self.failed
        return known and self.op.method != "set_if_not_exists"


@dataclass(frozen=True)
class Scenario:
    """What is played."""

    ops: tuple[Op, ...]
    source: dict[str, bytes]
    warm: tuple[Op, ...] = ()
    max_size: int | None = None
    cancels: int = 0
    """How many cancellations one schedule may have."""
    turns: tuple[int, ...] = (0,)
    """Turns of the event loop between a step and a cancellation that strikes while it goes on."""
    coarse: bool = False
    """Operations are held up before their effect only: fewer schedules."""
    pool: bool = False
    """Over a pool in memory that two other sources use as well, of which nothing is held up."""

    def with_cancels(self, cancels: int, turns: tuple[int, ...]) -> Scenario:
        return replace(self, cancels=cancels, turns=turns)


class PooledValues:
    """What a pool in memory holds, as `HeldStore` tells it: `values` of the source of a store, `sizes` of all."""

    store: CacheStore
    world: World | None = None
    peak = 0

    @property
    def values(self) -> dict[str, bytes]:
        kept: Any = cache_store_of(self.store)
        folder = f"{self.store._cache.shared.place.label}/"
        found = {}
        for name, value in list(kept._store_dict.items()):
            ranges = RANGES if name.startswith(RANGES) else ""
            own = name.removeprefix(ranges)
            if own.startswith(folder):
                found[ranges + own.removeprefix(folder)] = value.to_bytes()
        return found

    @property
    def sizes(self) -> dict[str, int]:
        return stored_sizes(self.store, everything=True)


class World:
    """A source, a cache, and the operations that are under way.

    Parameters
    ----------
    scenario : Scenario
        What there is in the beginning.
    with_offline : bool
        Whether there is a store over the same cache that never asks the source.
    **options
        Of the `CacheStore`.
    """

    def __init__(self, scenario: Scenario, *, with_offline: bool = False, **options: Any) -> None:
        self.scenario = scenario
        self.source, self.cache = HeldStore(scenario.source), self._cache()
        self.source.name, self.cache.name = "source", "cache"
        # Room for two decoded chunks.
        options = {"max_size": scenario.max_size, "decoded_size": 2 * ROOM + 5, **options}
        cache = self.pool or self.cache
        self.store = CacheStore(self.source, cache_store=cache, **options)
        if self.pool is not None:
            self.cache.store = self.store
        # Over the same cache, for operations that ask for it.
        self.offline = self.store
        if with_offline:
            clock = options.get("clock")
            self.offline = CacheStore(
                self.source, cache_store=self.cache, offline=True, clock=clock
            )
        self.actors: list[Actor] = []
        self.points: list[Point] = []
        self._ticks = itertools.count(1)

    def _cache(self) -> Any:
        self.pool = pool_with_neighbours() if self.scenario.pool else None
        return HeldStore() if self.pool is None else PooledValues()

    def hold_up(self, *, on: bool) -> None:
        """Whether operations are held up from now on."""
        self.source.world = self.cache.world = self if on else None

    def start(self, op: Op, *, held: bool) -> Actor:
        """Start an operation; `held` before its very first step."""
        actor = Actor(op)
        context = contextvars.copy_context()
        context.run(acting.set, len(self.actors))
        self.actors.append(actor)
        loop = asyncio.get_running_loop()
        actor.task = loop.create_task(self._act(actor, held), context=context)
        return actor

    async def _act(self, actor: Actor, held: bool) -> None:
        if held:
            await self.hold("start")
        actor.begun = next(self._ticks)
        try:
            results = await self._call(actor.op)
        except (SourceError, OfflineError):
            actor.failed = True
            return
        finally:
            if not (actor.task and actor.task.cancelling()):
                actor.ended = next(self._ticks)
        self.check_results(actor, results)

    async def _call(self, op: Op) -> list[bytes | None]:
        store = self.store
        if op.method == "get":
            return [await read(store, op.key, op.what)]
        if op.method == "get_offline":
            return [await read(self.offline, op.key, op.what)]
        if op.method == "decode":
            return [await read_decoded(store, op.key)]
        if op.method == "get_partial_values":
            found = await store.get_partial_values(PROTOTYPE, op.what)
            return [None if value is None else value.to_bytes() for value in found]
        if op.method == "exists":
            return [b"" if await store.exists(op.key) else None]
        if op.method in ("set", "set_if_not_exists"):
            await getattr(store, op.method)(op.key, buf(op.what))
        elif op.method == "_set_many":
            await store._set_many([(key, buf(value)) for key, value in op.what])
        else:
            whole = op.method in ("clear", "clear_cache")
            await getattr(store, op.method)(*([] if whole else [op.key]))
        return []

    def call_now(self, op: Op) -> None:
        """Do an operation without an event loop, from the beginning to the end."""
        actor = Actor(op, begun=next(self._ticks))
        self.actors.append(actor)
        results: list[bytes | None] = []
        try:
            if op.method == "get":
                value = self.store.get_sync(op.key, byte_range=op.what)
                results = [None if value is None else value.to_bytes()]
            elif op.method == "set":
                self.store.set_sync(op.key, buf(op.what))
            else:
                self.store.delete_sync(op.key)
        except SourceError:
            actor.failed = True
            return
        finally:
            actor.ended = next(self._ticks)
        self.check_results(actor, results)

    def learn(self, what: Any) -> None:
        """Note what an actor was told: its future depends on that."""
        if (actor := acting.get()) >= 0:
            self.actors[actor].learned.append(what)

    async def hold(self, label: str) -> None:
        """Wait until the schedule lets this point pass."""
        point = Point(acting.get(), label, asyncio.get_running_loop().create_future())
        self.points.append(point)
        try:
            await point.gate
        finally:
            if point in self.points:
                self.points.remove(point)
        self.learn(label)

    def let_pass(self, at: int) -> None:
        """Let the operation at a point go on."""
        self.points.pop(at).gate.set_result(None)

    async def quiet(self) -> None:
        """Wait until nothing can go on by itself."""
        loop: Any = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)
            if not loop._ready:
                return

    # ------------------------------------------------------------ what is allowed

    def legal(self, key: str, request: ByteRequest | None, begun: int) -> list[bytes | None]:
        """What a read may give: the value of a write that it overlaps, or of one that returned
        before it began and that no other one has replaced since.
        """
        writes = [a for a in self.actors if a.begun and a.op.value(key) is not NOTHING]
        before = [w for w in writes if w.sure and (w.ended or 0) < begun]
        legal = [] if before else [self.scenario.source.get(key)]
        for write in writes:
            end = write.ended if write.sure else None
            replaced = end is not None and any((w.begun or 0) > end for w in before)
            if not replaced:
                legal.append(write.op.value(key))
            if write.op.method == "set_if_not_exists":
                # Where there was one, it is still that.
                legal.append(self.scenario.source.get(key))
        return [value if value is None else cut(value, request) for value in legal]

    def check_results(self, actor: Actor, results: list[bytes | None]) -> None:
        """Assert that a read gave what it may give."""
        if actor.op.method == "exists":
            legal = self.legal(actor.op.key, None, actor.begun or 0)
            assert any((value is None) == (results[0] is None) for value in legal), actor.op
            return
        for (key, request), result in zip(actor.op.reads, results, strict=True):
            legal = self.legal(key, request, actor.begun or 0)
            assert result in legal, f"{key} {request} gave {result!r}, not one of {legal}"

    def someone_writes(self) -> bool:
        """Whether a write is under way, or goes on by itself after its caller has left."""
        held = {point.actor for point in self.points}
        return any(
            actor.op.is_write
            and actor.begun is not None
            and (number in held or (actor.task is not None and not actor.task.done()))
            for number, actor in enumerate(self.actors)
        )

    def check_step(self, damaged: frozenset[str] = frozenset()) -> None:
        """Assert what holds after every step. The values of `damaged` keys are not ours any more."""
        while True:
            sizes = self.cache.sizes
            held = {name: size for name, size in sizes.items() if name not in damaged}
            # What others have damaged counts with the size that it had.
            lost = {each.name: each.size for each in entries(self.store) if each.name in damaged}
            try:
                check_invariants(self.store, held={**held, **lost})
                break
            except InvariantError:
                # What was read without an event loop is filled in by a thread, perhaps right now.
                if sizes == self.cache.sizes:
                    raise
        check_decoded(self.store)
        bound = self.scenario.max_size
        assert bound is None or self.cache.peak <= bound, "more bytes than the bound allows"
        if self.someone_writes():
            return
        assert not self.source.values.keys() & set(missing_keys(self.store)), "missing, but there"
        cached = {entry.key for entry in entries(self.store) if entry.state == "live"}
        assert {key for key in self.store.cached_keys() if not self.store.is_cached(key)} <= {
            entry.key for entry in entries(self.store) if entry.byte_range is not None
        }
        assert set(self.store.cached_keys()) <= cached
        for entry in entries(self.store):
            key = entry.key
            if entry.byte_range is None and entry.state == "live" and key not in damaged:
                assert self.cache.values.get(key) == self.source.values.get(key), f"stale {key}"

    async def check_end(self) -> None:
        """Assert what holds when no operation is held up any more."""
        for actor in self.actors:
            if actor.task is not None:
                assert actor.task.done(), f"{actor.op} waits for ever"
                assert actor.task.cancelled() == actor.cancelled
                if not actor.cancelled:
                    actor.task.result()
        self.hold_up(on=False)
        await check_same(self.store, self.source, self.cache)
        if self.pool is not None:
            for name in NEIGHBOURS:
                await check_neighbour(neighbour(self.pool, name), name)
        # Once more: this time from the cache.
        await check_same(self.store, self.source, self.cache)
        # First what may be kept: there is room for two.
        for key in dict.fromkeys([*(actor.op.key for actor in self.actors), *self.source.values]):
            for _ in range(2):
                assert await read_decoded(self.store, key) == self.source.values.get(key), key
        check_decoded_quiet(self.store)

    async def dismiss(self) -> None:
        """End everything."""
        self.hold_up(on=False)
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
