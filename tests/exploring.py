"""Playing every schedule of a scenario: every choice of what goes on next, or is cancelled.

Two schedules that lead to the same state have the same futures, so the second one ends there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from decoding import read_decoded
from schedules import Scenario, World, acting
from support import drained, read_through
from zcache._core import NeedsEviction, Rejected
from zcache.testing import FakeClock, entries, missing_keys, recency, record_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._core import Committed, Reservation
    from zcache.testing import Step


class Action(NamedTuple):
    """A choice: let the operation at a point go on (`point`), cancel an actor (`cancel`), or both,
    with so many turns of the event loop between them.
    """

    actor: int
    point: int | None
    cancel: bool = False
    turns: int = 0


class Recorder:
    """Notes what each actor learned from the index, and which tickets are invalid."""

    UNNOTED = frozenset({"entries", "recency", "validate", "stats", "absent_keys", "next_keys"})

    def __init__(self, world: World) -> None:
        self._world = world
        self.void: dict[int, tuple[str, int, bool]] = {}
        self.writers: dict[str, tuple[int, bool]] = {}
        self._joined: list[tuple[object, int]] = []
        self._tickets: dict[Any, int] = {}

    def __call__(self, step: Step) -> None:
        if step.name not in self.UNNOTED:
            self._world.learn((step.name, self._plain(*step)))

    def _plain(self, name: str, args: tuple[Any, ...], answer: Any) -> Any:
        """An answer without the numbers that differ between equal schedules."""
        actor = acting.get()
        if name == "join":
            if isinstance(answer, int):
                self.void[answer] = (args[0], actor, False)
                self._joined.append((args[2], actor))
                return "lead"
            if answer is None:
                return "ready"
            return answer[0], [by for flight, by in self._joined if flight is answer[1]]
        if name in ("begin_write", "end_write"):
            return self._write(name, args, answer, actor)
        if name == "invalidate":
            prefix = args[0].rstrip("/")
            below = prefix + "/" if prefix else ""
            self._void(lambda key: key == prefix or key.startswith(below))
        if name in ("complete_flight", "commit_absence"):
            self.void.pop(args[1], None)
        if name == "commit":
            return self._commit(args[0], answer)
        if name in ("reserve", "advance"):
            if isinstance(answer, Rejected):
                return answer.reason
            if name == "reserve":
                # By its number: one that is kept alive here would not be given back.
                self._tickets[id(answer.reservation)] = args[3]
            return names(answer.victims) if isinstance(answer, NeedsEviction) else "granted"
        if name in ("release", "failed_deletes", "drain_prefix", "discard", "commit_absence"):
            return names(answer[0] if name == "drain_prefix" else answer)
        return None if name == "confirm_deletes" else repr(answer)

    def _commit(self, reservation: Reservation, answer: Committed | None) -> Any:
        if answer is None:
            return None
        self.void.pop(self._tickets[id(reservation)], None)
        return names(answer.victims), answer.has_failed_deletes

    def _write(self, name: str, args: tuple[Any, ...], answer: Any, actor: int) -> Any:
        key = args[0]
        self._void(key.__eq__)
        active, overlapped = self.writers.get(key, (0, False))
        if name == "begin_write":
            self.writers[key] = (active + 1, active > 0)
            return names(answer)
        self.writers[key] = (active - 1, overlapped)
        if active <= 1:
            del self.writers[key]
        victims, ticket = answer
        if ticket is not None:
            self.void[ticket] = (key, actor, False)
            # Readers may join it until its value is in the cache store.
            self._joined.append((args[2], actor))
        return names(victims), ticket is None

    def _void(self, covers: Callable[[str], bool]) -> None:
        for ticket, (key, actor, _) in self.void.items():
            if covers(key):
                self.void[ticket] = (key, actor, True)
        for key, (active, _) in self.writers.items():
            if covers(key):
                self.writers[key] = (active, True)


def names(victims: list[tuple[int, str]]) -> list[str]:
    """What is to be deleted, without the numbers of the entries."""
    return sorted(name for _, name in victims)


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
    # What the decoded chunks and those who wait for them know is no part of a state.
    prune = prune and all(op.method != "decode" for op in scenario.ops)
    seen: set[str] = set()
    ends: set[str] = set()
    todo: list[tuple[Action, ...]] = [()] * (schedules or 1)
    played = steps = 0
    while todo:
        run = _Run(scenario, todo.pop(), draw)
        steps += await run.play(seen if prune and draw is None else set())
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
        self.scenario = scenario
        # Time stands still: nothing here is about it, and states would differ by it.
        self.world = World(scenario, clock=FakeClock())
        self.recorder = Recorder(self.world)
        self.path = path
        self.draw = draw
        self.others: list[tuple[Action, ...]] = []
        self.end: str | None = None
        self._cancels = 0
        self._trace: list[str] = []

    async def _begin(self) -> None:
        world = self.world
        for op in self.scenario.warm:
            if op.method == "decode":
                await read_decoded(world.store, op.key)
                await drained(world.store)
            else:
                await read_through(world.store, op.key, op.what)
        world.hold_up(on=True)
        for op in self.scenario.ops:
            world.start(op, held=True)

    async def play(self, seen: set[str]) -> int:
        """Returns the number of steps."""
        with record_steps(self.world.store, self.recorder):
            return await self._play(seen)

    async def _play(self, seen: set[str]) -> int:
        world = self.world
        await self._begin()
        done: tuple[Action, ...] = ()
        try:
            while True:
                await world.quiet()
                if len(done) >= len(self.path):
                    world.check_step()
                actions = self._choices()
                if not actions:
                    break
                if len(done) < len(self.path):
                    action = self.path[len(done)]
                elif self.draw is not None:
                    action = self.draw(actions)
                else:
                    state = self._state()
                    if state in seen:
                        return len(done)
                    seen.add(state)
                    action = actions[0]
                    self.others += [(*done, other) for other in actions[1:]]
                self._trace.append(self._describe(action))
                done = (*done, action)
                await self._do(action)
            await world.check_end()
            self.end = repr((sorted(world.source.values.items()), sorted(world.cache.values)))
        except AssertionError as error:
            error.add_note("\n".join(["schedule:", *self._trace]))
            raise
        finally:
            await world.dismiss()
        return len(done)

    def _choices(self) -> list[Action]:
        points = self.world.points
        actions = [Action(point.actor, at) for at, point in enumerate(points)]
        if self._cancels >= self.scenario.cancels:
            return actions
        for number, actor in enumerate(self.world.actors):
            assert actor.task is not None
            if actor.begun is None or actor.task.done() or actor.cancelled:
                continue
            actions.append(Action(number, None, cancel=True))
            for at, point in enumerate(points):
                if point.actor == number:
                    actions += [Action(number, at, True, n) for n in self.scenario.turns]
        return actions

    async def _do(self, action: Action) -> None:
        if action.point is not None:
            self.world.let_pass(action.point)
        if action.cancel:
            for _ in range(action.turns):
                await asyncio.sleep(0)
            actor = self.world.actors[action.actor]
            self._cancels += 1
            if actor.task is not None and not actor.task.done():
                actor.cancelled = actor.task.cancel()

    def _state(self) -> str:
        """All that the future depends on."""
        world = self.world
        # Of the beginnings and ends only the order counts.
        order = sorted(
            (at, number, which)
            for number, actor in enumerate(world.actors)
            for which, at in enumerate((actor.begun, actor.ended))
            if at is not None
        )
        return repr(
            (
                sorted(world.source.values.items()),
                sorted(world.cache.values.items()),
                sorted(map(repr, entries(world.store))),
                recency(world.store),
                missing_keys(world.store),
                sorted(self.recorder.void.values()),
                sorted(self.recorder.writers.items()),
                [(point.actor, point.label) for point in world.points],
                [(a.learned, a.cancelled, a.task and a.task.done()) for a in world.actors],
                [event[1:] for event in order],
                self._cancels,
            )
        )

    def _describe(self, action: Action) -> str:
        at = "" if action.point is None else self.world.points[action.point].label
        cancel = f" then cancel after {action.turns} turns" if action.cancel else ""
        op = self.world.actors[action.actor].op if action.actor >= 0 else "background"
        return f"  {action.actor} {op}: {at}{cancel}"
