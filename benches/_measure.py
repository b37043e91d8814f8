"""How the benches measure: interleaved rounds, pairs within a round, and rows of the table."""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Work = Callable[[], Awaitable[int]]

# Where the kernel took the core away in the middle of a round, the round says nothing about the
# code. It is run again, so often at most.
_TRIES = 6
# Seconds: longer than what the kernel gives a process at a time, so another try is no better.
_TOO_LONG = 0.01


@dataclass
class Row:
    """One line of the table.

    Attributes
    ----------
    work
        What was done.
    unit
        Of the three values: "s" (shown as ns, µs, ms or s), "B", "/s", or "" for a count.
    zcache, zarr, bare
        Medians; None where there is nothing to compare with.
    ratio, zarr_ratio
        Medians over the rounds of value by value in the same round; None where only the value
        counts.
    aim
        Upper bound (lower bound where `at_least`) of `ratio`, or of `zcache` where there is none.
    note
        What one has to know to read the line.
    disturbed
        Part of the rounds, 0 to 1, in which the core was taken away, however often they were repeated.
    faults
        Minor page faults of one operation of zcache; None where they were not counted.
    """

    work: str
    unit: str = "s"
    zcache: float | None = None
    zarr: float | None = None
    bare: float | None = None
    ratio: float | None = None
    zarr_ratio: float | None = None
    aim: float | None = None
    at_least: bool = False
    note: str = ""
    disturbed: float = 0.0
    faults: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one."""
        value = self.zcache if self.ratio is None else self.ratio
        if self.aim is None or value is None:
            return None
        return value >= self.aim if self.at_least else value <= self.aim

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass
class Times:
    """Seconds of one operation, by round, for each contestant."""

    seconds: dict[str, list[float]]
    disturbed: float
    faults: dict[str, float]

    def median(self, name: str) -> float | None:
        found = self.seconds.get(name)
        return statistics.median(found) if found else None

    def ratio(self, name: str, to: str = "bare") -> float | None:
        """Median over the rounds of the ratio of two contestants in the same round."""
        if name not in self.seconds or to not in self.seconds:
            return None
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def row(self, work: str, aim: float | None = None, note: str = "", **more: Any) -> Row:
        """A row of the contestants "zcache", "zarr" and "bare"."""
        return Row(
            work,
            zcache=self.median("zcache"),
            zarr=self.median("zarr"),
            bare=self.median("bare"),
            ratio=self.ratio("zcache"),
            zarr_ratio=self.ratio("zarr"),
            aim=aim,
            note=note,
            disturbed=self.disturbed,
            faults=self.faults.get("zcache"),
            **more,
        )


def settle_memory() -> None:
    """Put what was built so far out of sight of the garbage collector."""
    gc.collect()
    gc.freeze()


async def interleave(
    contestants: dict[str, Work],
    rounds: int,
    *,
    quiet: bool = True,
    before: dict[str, Callable[[], Awaitable[object]]] | None = None,
) -> Times:
    """Run each contestant once a round, each round with another one first.

    Parameters
    ----------
    contestants : dict
        By name: does a few milliseconds of work and returns the number of operations.
    rounds : int
        How often.
    quiet : bool
        Repeat a round in which the kernel took the core away. For work of milliseconds; longer work
        is always interrupted.
    before : dict, optional
        Done before a contestant's work, and not measured.
    """
    settle_memory()
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults = dict.fromkeys(names, 0)
    operations = dict.fromkeys(names, 0)
    disturbed = 0
    for number in range(rounds):
        for at in range(len(names)):
            name = names[(number + at) % len(names)]
            for attempt in range(_TRIES if quiet else 1):
                if before and name in before:
                    await before[name]()
                usage = resource.getrusage(resource.RUSAGE_THREAD)
                faulted = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter()
                count = await contestants[name]()
                elapsed = time.perf_counter() - start
                usage_after = resource.getrusage(resource.RUSAGE_THREAD)
                # Of all threads: zarr's own does much of the work.
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faulted
                operations[name] += count
                if usage_after.ru_nivcsw == usage.ru_nivcsw:
                    break
                if attempt == _TRIES - 1 or elapsed > _TOO_LONG:
                    disturbed += 1
                    break
            seconds[name].append(elapsed / count)
    return Times(
        seconds,
        disturbed / (rounds * len(names)) if quiet else 0.0,
        {name: faults[name] / operations[name] for name in names},
    )


async def watch(lags: list[float], pause: float = 0.0) -> None:
    """Note how long an event loop takes from one turn of this task to its next."""
    last = time.perf_counter()
    while True:
        await asyncio.sleep(pause)
        now = time.perf_counter()
        lags.append(now - last)
        last = now


def percentile(values: Sequence[float], part: float) -> float:
    """The value that `part` (0 to 1) of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":
        for scale, name in ((1e-9, "ns"), (1e-6, "µs"), (1e-3, "ms")):
            if value < 999.5 * scale:
                return f"{value / scale:.3g} {name}"
        return f"{value:.3g} s"
    if unit == "B":
        return f"{value:.1f} B"
    if unit == "/s":
        return f"{value:,.0f}/s"
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _aim(row: Row) -> str:
    if row.aim is None:
        return ""
    value = _number(row.aim, row.unit) if row.ratio is None else f"{row.aim:g}"
    return f"{'≥' if row.at_least else '≤'} {value} {'yes' if row.met else 'NO'}"


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["work", "zcache", "zarr", "bare", "zcache/bare", "zarr/bare", "aim"]
    lines = [
        [
            row.work + ("" if row.disturbed < 0.5 else " ~"),
            *(_number(value, row.unit) for value in (row.zcache, row.zarr, row.bare)),
            *(_ratio(value) for value in (row.ratio, row.zarr_ratio)),
            _aim(row),
        ]
        for row in rows
    ]
    widths = [max(len(line[at]) for line in [head, *lines]) for at in range(len(head))]
    text = []
    for line in [head, ["-" * width for width in widths], *lines]:
        first = line[0].ljust(widths[0])
        rest = "  ".join(
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        )
        text.append(f"{first}  {rest}".rstrip())
    notes = [f"{row.work}: {row.note}" for row in rows if row.note]
    if any(row.disturbed >= 0.5 for row in rows):
        notes.append("~: the core was taken away in most rounds; the value is an upper bound")
    return "\n".join([*text, "", *notes])
