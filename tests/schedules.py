"""A scheduler that plays every order in which the steps of concurrent operations can happen.

Each operation of the source and of the cache store is held up twice: before its effect, and after
it, before its caller hears of it (where a scenario is coarse, only before). What runs between two such points is one step, for nothing else
runs meanwhile. `explore` plays one schedule after the other: at each point it lets one operation go
on, or cancels it, until every choice has been tried in every state. Two schedules that lead to the
same state have the same futures, so the second one ends there.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from coherence_support import CacheStore, DictStore, buf, check_settled, cut, index_of, read

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.abc.store import ByteRequest

_acting: contextvars.ContextVar[int] = contextvars.ContextVar("acting", default=-1)
NOTHING = object()
"""Stands for the values of writes that leave it open whether they have an effect."""


class Op(NamedTuple):
    """One operation: a method of the store, a key or prefix, and a value or a byte request."""

    method: str
    key: str = ""
    what: Any = None

    def value(self, key: str) -> Any:
        """What this leaves in the source under a key; NOTHING where it does not touch it."""
        if self.method in ("set", "set_if_not_exists") and self.key == key:
            return self.what
        if self.method == "delete" and self.key == key:
            return None
        below = self.key.rstrip("/") + "/" if self.key else ""
        if self.method in ("delete_dir", "clear") and key.startswith(below):
            return None
        return NOTHING

    @property
    def reads(self) -> bool:
        return self.method == "get"


def get(key: str, request: ByteRequest | None = None) -> Op:
    return Op("get", key, request)


def put(key: str, value: bytes) -> Op:
    return Op("set", key, value)


class Action(NamedTuple):
    """A choice: let the operation at a point go on (`point`), cancel an actor (`cancel`), or both,
    with so many turns of the event loop between them.
    """

    actor: int
    point: int | None
    cancel: bool = False
    turns: int = 0


@dataclass
class Point:
    """An operation of a store that is held up."""

    actor: int
    label: str
    gate: asyncio.Future[None]


class HeldStore(DictStore):
    """A store whose operations are held up."""

    name = ""
    world: World | None = None

    async def before(self, operation: str, key: str) -> None:
        if self.world is not None:
            await self.world.hold(f"{self.name}.{operation} {key}")

    async def after(self, operation: str, key: str, result: object) -> None:
        if self.world is not None and not self.world.scenario.coarse:
            found = bytes(result.to_bytes()) if hasattr(result, "to_bytes") else result
            await self.world.hold(f"{self.name}.{operation} {key} -> {found!r}")


class Recorder:
    """An index that writes down what each actor learned from it, and which flights are void."""

    def __init__(self, index: Any, world: World) -> None:
        self._index = index
        self._world = world
        self.void: dict[int, tuple[str, int, bool]] = {}
        self.writers: dict[str, tuple[int, bool]] = {}
        self._flights: list[tuple[object, int]] = []

    def __len__(self) -> int:
        return len(self._index)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._index, name)
        if not callable(found) or name in ("entries", "recency", "validate", "stats"):
            return found

        def call(*args: Any) -> Any:
            answer = found(*args)
            self._world.learn((name, self._plain(name, args, answer)))
            return answer

        return call

    def _plain(self, name: str, args: tuple[Any, ...], answer: Any) -> Any:
        actor = _acting.get()
        if name == "join":
            if isinstance(answer, int):
                self.void[answer] = (args[0], actor, False)
                self._flights.append((args[2], actor))
                return "lead"
            if answer is None:
                return "ready"
            return answer[0], [by for flight, by in self._flights if flight is answer[1]]
        if name in ("begin_write", "end_write"):
            key = args[0]
            self._void(key.__eq__)
            active, overlapped = self.writers.get(key, (0, False))
            if name == "begin_write":
                self.writers[key] = (active + 1, active > 0)
                return sorted(victim for _, victim in answer)
            self.writers[key] = (active - 1, overlapped)
            if active <= 1:
                del self.writers[key]
            if answer[1] is not None:
                self.void[answer[1]] = (key, actor, False)
            return sorted(victim for _, victim in answer[0]), answer[1] is None
        if name == "void_prefix":
            prefix = args[0].rstrip("/")
            below = prefix + "/" if prefix else ""
            self._void(lambda key: key == prefix or key.startswith(below))
        if name == "land":
            self.void.pop(args[1], None)
        if name in ("reserve", "settle"):
            return answer if isinstance(answer, str) else sorted(v for _, v in answer[1])
        if name in ("abort", "commit", "orphans", "sweep", "discard", "forget"):
            return sorted(victim for _, victim in answer)
        return None if name == "settled" else repr(answer)

    def _void(self, covers: Callable[[str], bool]) -> None:
        for ticket, (key, actor, _) in self.void.items():
            if covers(key):
                self.void[ticket] = (key, actor, True)
        for key, (active, _) in self.writers.items():
            if covers(key):
                self.writers[key] = (active, True)


@dataclass
class Actor:
    """One operation under way."""

    op: Op
    task: asyncio.Task[Any] | None = None
    begun: int | None = None
    ended: int | None = None
    cancelled: bool = False
    learned: list[Any] = field(default_factory=list)


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

    def with_cancels(self, cancels: int, turns: tuple[int, ...]) -> Scenario:
        return replace(self, cancels=cancels, turns=turns)


class World:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.source, self.cache = HeldStore(scenario.source), HeldStore()
        self.source.name, self.cache.name = "source", "cache"
        self.store = CacheStore(self.source, cache_store=self.cache, max_size=scenario.max_size)
        self.actors = [Actor(op) for op in scenario.ops]
        self.points: list[Point] = []
        self.clock = itertools.count(1)
        self.cancels = 0
        self.recorder: Recorder | None = None

    async def begin(self) -> None:
        # Time stands still: nothing here is about it, and states would differ by it.
        self.store._engine.books.now = lambda: 1000.0
        for op in self.scenario.warm:
            await read(self.store, op.key, op.what)
        self.recorder = Recorder(index_of(self.store), self)
        self.store._engine.books.index = self.recorder  # type: ignore[assignment]
        self.source.world = self.cache.world = self
        for number, actor in enumerate(self.actors):
            context = contextvars.copy_context()
            context.run(_acting.set, number)
            task = asyncio.get_running_loop().create_task(self._act(actor), context=context)
            actor.task = task

    async def _act(self, actor: Actor) -> Any:
        await self.hold("start")
        actor.begun = next(self.clock)
        op, store = actor.op, self.store
        if op.reads:
            result: Any = await read(store, op.key, op.what)
        elif op.method in ("set", "set_if_not_exists"):
            result = await getattr(store, op.method)(op.key, buf(op.what))
        else:
            result = await getattr(store, op.method)(*([op.key] if op.key else []))
        actor.ended = next(self.clock)
        if op.reads:
            legal = self.legal(actor)
            assert result in legal, f"{op} gave {result!r}, not one of {legal}"
        return result

    def learn(self, what: Any) -> None:
        actor = _acting.get()
        if actor >= 0:
            self.actors[actor].learned.append(what)

    async def hold(self, label: str) -> None:
        point = Point(_acting.get(), label, asyncio.get_running_loop().create_future())
        self.points.append(point)
        try:
            await point.gate
        finally:
            if point in self.points:
                self.points.remove(point)
        self.learn(label)

    # ------------------------------------------------------------ what is allowed

    def legal(self, reader: Actor) -> list[bytes | None]:
        """What a read may give: the value of a write that it overlaps, or of one that returned
        before it began and that no other one has replaced since.
        """
        key, begun = reader.op.key, reader.begun or 0
        writes = [actor for actor in self.actors if actor.op.value(key) is not NOTHING]
        writes = [actor for actor in writes if actor.begun is not None]
        sure = [w for w in writes if w.ended is not None and w.op.method != "set_if_not_exists"]
        before = [w for w in sure if (w.ended or 0) < begun]
        legal = [] if before else [self.scenario.source.get(key)]
        for write in writes:
            end = write.ended if write.ended is not None else float("inf")
            if not any((w.begun or 0) > end for w in before):
                legal.append(write.op.value(key))
        if any(w.op.method == "set_if_not_exists" for w in writes):
            legal.append(self.scenario.source.get(key))
        return [value if value is None else cut(value, reader.op.what) for value in legal]

    def check_step(self) -> None:
        index = index_of(self.store)
        index.validate()
        assert self.cache.total <= index.current_size, "bytes that nobody counts"
        bound = self.scenario.max_size
        assert bound is None or self.cache.peak <= bound, "more bytes than the bound allows"
        held = {point.actor for point in self.points}
        for number, actor in enumerate(self.actors):
            writes = not actor.op.reads and actor.begun is not None
            assert actor.task is not None
            if writes and (number in held or not actor.task.done()):
                return
        # Nobody writes: what is cached is what the source holds.
        for key, span, _, state in index.entries():
            if span is None and state == "present":
                assert self.cache.values.get(key) == self.source.values.get(key), f"stale {key}"

    # ------------------------------------------------------------------ choices

    async def choices(self, *, check: bool) -> list[Action]:
        """What can be done next, once nothing goes on by itself any more."""
        await self.quiet()
        if check:
            self.check_step()
        actions = [Action(point.actor, at) for at, point in enumerate(self.points)]
        if self.cancels < self.scenario.cancels:
            for number, actor in enumerate(self.actors):
                assert actor.task is not None
                if actor.begun is None or actor.task.done() or actor.cancelled:
                    continue
                actions.append(Action(number, None, cancel=True))
                for at, point in enumerate(self.points):
                    if point.actor == number:
                        actions += [Action(number, at, True, n) for n in self.scenario.turns]
        return actions

    async def do(self, action: Action) -> None:
        if action.point is not None:
            point = self.points.pop(action.point)
            point.gate.set_result(None)
        if action.cancel:
            for _ in range(action.turns):
                await asyncio.sleep(0)
            actor = self.actors[action.actor]
            self.cancels += 1
            if actor.task is not None and not actor.task.done():
                actor.cancelled = actor.task.cancel()

    async def quiet(self) -> None:
        """Wait until nothing can go on by itself."""
        ready: Any = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while ready._ready:
            await asyncio.sleep(0)

    def state(self) -> Any:
        """All that the future depends on."""
        assert self.recorder is not None
        index = index_of(self.store)
        tasks = [(a.begun, a.ended, a.cancelled, a.task and a.task.done()) for a in self.actors]
        # Only the order of beginnings and ends counts, and only while somebody still reads.
        order = sorted(
            (at, n, which)
            for n, actor in enumerate(self.actors)
            for which, at in enumerate((actor.begun, actor.ended))
            if at is not None
        )
        return repr(
            (
                sorted(self.source.values.items()),
                sorted(self.cache.values.items()),
                sorted(map(repr, index.entries())),
                index.recency(),
                sorted(self.recorder.void.values()),
                sorted(self.recorder.writers.items()),
                [(point.actor, point.label) for point in self.points],
                [actor.learned for actor in self.actors],
                [task[2:] for task in tasks],
                [entry[1:] for entry in order],
                self.cancels,
            )
        )

    async def check_end(self) -> None:
        for actor in self.actors:
            assert actor.task is not None
            assert actor.task.done(), f"{actor.op} waits for ever"
            assert actor.task.cancelled() == actor.cancelled
            if not actor.cancelled:
                actor.task.result()
        assert index_of(self.store).in_flight == (0, 0)
        self.source.world = self.cache.world = None
        await check_settled(self.store, self.source, self.cache)
        # Once more: this time from the cache.
        await check_settled(self.store, self.source, self.cache)


class Explored(NamedTuple):
    """How much was tried."""

    schedules: int
    states: int
    steps: int
    ends: set[str]
    """What the stores held at the ends."""


async def explore(
    scenario: Scenario,
    *,
    limit: int = 200_000,
    prune: bool = True,
    draw: Callable[[list[Action]], Action] | None = None,
    schedules: int | None = None,
) -> Explored:
    """Play every schedule of a scenario.

    Parameters
    ----------
    scenario : Scenario
        What to play.
    limit : int
        Most steps that this may take.
    prune : bool
        Follow each state only once.
    draw : callable, optional
        Makes the choices. Then so many `schedules` are played, instead of all.

    Raises
    ------
    AssertionError
        If a promise is broken. Its notes tell the schedule.
    """
    seen: set[str] = set()
    ends: set[str] = set()
    todo: list[tuple[Action, ...]] = [()] * (schedules or 1)
    played = steps = 0
    while todo:
        run = _Run(scenario, todo.pop(), draw)
        known = seen if prune and draw is None else set()
        steps += await run.play(known)
        assert steps < limit, f"more than {limit} steps"
        if draw is None:
            todo += run.others
        if run.end is not None:
            played += 1
            ends.add(run.end)
    return Explored(played, len(seen), steps, ends)


class _Run:
    """One schedule: first along a path, then by the first choice or by chance."""

    def __init__(
        self,
        scenario: Scenario,
        path: tuple[Action, ...],
        draw: Callable[[list[Action]], Action] | None,
    ) -> None:
        self.world = World(scenario)
        self.path = path
        self.draw = draw
        self.others: list[tuple[Action, ...]] = []
        self.end: str | None = None
        self._trace: list[str] = []

    async def play(self, seen: set[str]) -> int:
        """Returns the number of steps."""
        world = self.world
        await world.begin()
        done: tuple[Action, ...] = ()
        try:
            while actions := await world.choices(check=len(done) >= len(self.path)):
                if len(done) < len(self.path):
                    action = self.path[len(done)]
                elif self.draw is not None:
                    action = self.draw(actions)
                else:
                    state = world.state()
                    if state in seen:
                        return len(done)
                    seen.add(state)
                    action = actions[0]
                    self.others += [(*done, other) for other in actions[1:]]
                self._trace.append(_describe(world, action))
                done = (*done, action)
                await world.do(action)
            await world.check_end()
            self.end = repr((sorted(world.source.values.items()), sorted(world.cache.values)))
        except AssertionError as error:
            error.add_note("\n".join(["schedule:", *self._trace]))
            raise
        finally:
            await _dismiss(world)
        return len(done)


def _describe(world: World, action: Action) -> str:
    at = "" if action.point is None else world.points[action.point].label
    cancel = f" then cancel after {action.turns} turns" if action.cancel else ""
    op = world.actors[action.actor].op if action.actor >= 0 else "background"
    return f"  {action.actor} {op}: {at}{cancel}"


async def _dismiss(world: World) -> None:
    world.source.world = world.cache.world = None
    rest: Sequence[asyncio.Task[Any]] = [
        task for task in asyncio.all_tasks() if task is not asyncio.current_task()
    ]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
