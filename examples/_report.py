"""Progress while the demo works, and the tables at its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _metering import Counts

__all__ = ["Cell", "Progress", "Row", "format_bytes", "table"]

_LABEL_WIDTH = 23
_CELL_HEAD = f"{'requests':>8} {'seconds':>7} {'hits':>4} {'bytes':>7}"


@dataclass
class Cell:
    """What one setup did in one phase.

    Attributes
    ----------
    counts
        Requests at the source, and bytes that it sent.
    seconds
        Wall-clock time.
    hit_ratio
        Hits through hits and misses, as the cache counts them, 0 to 1; None where it counted none.
    wrong
        Whether something was wrong here; shown as `!`.
    """

    counts: Counts
    seconds: float
    hit_ratio: float | None
    wrong: bool = False

    def __str__(self) -> str:
        ratio = "-" if self.hit_ratio is None else f"{self.hit_ratio:.0%}"
        mark = "!" if self.wrong else " "
        size = format_bytes(self.counts.bytes_read)
        return f"{self.counts.requests:>7}{mark} {self.seconds:>7.2f} {ratio:>4} {size:>7}"


@dataclass
class Row:
    """One line of a table: who read when, and a cell for each setup by its label."""

    reader: str
    phase: str
    cells: dict[str, Cell] = field(default_factory=dict)


class Progress:
    """Says on standard error what is being done: one line that changes, or plain lines in a log."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._live = sys.stderr.isatty()

    def step(self, text: str) -> None:
        """Announce the next step."""
        self._done += 1
        line = f"[{self._done:>2}/{self._steps}] {text}"
        if self._live:
            # Return to the start of the line and clear it; no newline until something else prints.
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the changing line away, so that other output starts on a clean line."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def table(title: str, rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Return a table with the setups side by side, one row for each reader and phase."""
    width = len(_CELL_HEAD)
    groups = " | ".join(f"{label:^{width}}" for label in labels)
    heads = " | ".join([_CELL_HEAD] * len(labels))
    rule = "-" * _LABEL_WIDTH + "".join("-+-" + "-" * width for _ in labels)
    lines = [title, f"{'':{_LABEL_WIDTH}} | {groups}", f"{'':{_LABEL_WIDTH}} | {heads}", rule]
    for row in rows:
        label = f"{row.reader:<7} {row.phase}"
        cells = " | ".join(str(row.cells[label]) for label in labels)
        lines.append(f"{label:<{_LABEL_WIDTH}} | {cells}")
    return "\n".join(lines)


def format_bytes(count: int) -> str:
    """Return a size of at most 7 characters, in decimal units as object stores bill them."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g} {units[0]}"
