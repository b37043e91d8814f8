"""The runs of the demo: who reads what through which setup, measured and checked."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from zarr.experimental.cache_store import CacheStore as ZarrCacheStore
from zarr.storage import LocalStore, MemoryStore

import zcache
from _metering import Meter, PeakDict
from _readers import Digests, Plan, Reader, XarrayReader, ZarrReader
from _report import Cell, Progress, Row, table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zarr.abc.store import Store

__all__ = ["SETUPS", "Run"]

NO_CACHE, ZARR, ZCACHE = "no cache", "zarr CacheStore", "zcache"
SETUPS: Mapping[str, Any] = {NO_CACHE: None, ZARR: ZarrCacheStore, ZCACHE: zcache.CacheStore}


class Caches:
    """Makes an empty cache store for each setup and phase, and knows how full it got.

    Parameters
    ----------
    directory
        Where cache directories go; None keeps caches in memory. Each cache gets a new directory
        of its own below it, and `remove` deletes those and nothing else.
    """

    def __init__(self, directory: Path | None) -> None:
        self._parent = directory
        self._made: list[str] = []
        self._held: PeakDict | None = None

    def new(self) -> Store:
        """Return a new, empty cache store."""
        if self._parent is None:
            self._held = PeakDict()
            return MemoryStore(self._held)
        path = tempfile.mkdtemp(prefix="zcache-demo-", dir=self._parent)
        self._made.append(path)
        return LocalStore(path)

    @property
    def peak(self) -> int | None:
        """The most bytes that the newest cache ever held; None for one in a directory."""
        return None if self._held is None else self._held.peak

    def remove(self) -> None:
        """Delete the directories that `new` made."""
        while self._made:
            shutil.rmtree(self._made.pop(), ignore_errors=True)


@dataclass(frozen=True)
class Pass:
    """One way of reading: who reads, the name of what is read, and the call that reads it."""

    reader: Reader
    what: str
    read: Callable[[Store], Digests]

    @property
    def key(self) -> tuple[str, str]:
        """What tells its values from those of other passes."""
        return self.reader.name, self.what


@dataclass
class Run:
    """One run of the demo.

    Attributes
    ----------
    source
        The store behind each setup.
    meter
        Counts what reaches the source.
    truth
        A second copy of the dataset that no cache stands before. Writes go to both, and each read
        must return what `truth` returns. None for a user's own dataset: it is never written to,
        and the reads without a cache are the truth.
    max_size
        The bound of the phase past `max_size`, in bytes; None takes half of what a whole read
        without a cache gets from the source.
    xarray
        Whether xarray can read the node.
    """

    source: Store
    meter: Meter
    plan: Plan
    caches: Caches
    truth: Store | None = None
    max_size: int | None = None
    xarray: bool = True

    def __post_init__(self) -> None:
        self._expected: dict[tuple[str, str], Digests] = {}
        self._problems: dict[str, list[str]] = {label: [] for label in SETUPS}
        self._checked = dict.fromkeys(SETUPS, 0)
        self._peaks: dict[str, int | None] = {}
        zarr_reader = ZarrReader(self.plan)
        self._readers: list[Reader] = [zarr_reader]
        if self.xarray:
            self._readers.append(XarrayReader(self.plan))
        self._parts_reader = zarr_reader
        phases = 4 if self.truth is not None else 3
        tables = len(self._readers) + (self.plan.sharded is not None)
        self._progress = Progress(tables * phases * len(SETUPS))

    def execute(self) -> bool:
        """Do all reads, print the tables, return whether zcache and the source were right."""
        try:
            whole = [row for reader in self._readers for row in self._whole_reads(reader)]
            parts = self._part_reads() if self.plan.sharded is not None else []
        finally:
            self._progress.clear()
            self.caches.remove()
        print(table("Whole reads", whole, list(SETUPS)))
        print()
        if self.plan.sharded is not None:
            title = f"Partial reads of the sharded array {self.plan.sharded.name!r}, with zarr"
            print(table(title, parts, list(SETUPS)))
        else:
            print("Partial reads: none, as there is no sharded array here.")
        print()
        self._print_summary()
        # What zarr's class gets wrong is reported, and is no failure of this demo.
        return not (self._problems[NO_CACHE] or self._problems[ZCACHE])

    def _store(self, label: str, max_size: int | None = None) -> Store:
        """Return the store that a setup reads through, with an empty cache."""
        cache_class = SETUPS[label]
        if cache_class is None:
            return self.source
        store: Store = cache_class(self.source, cache_store=self.caches.new(), max_size=max_size)
        return store

    def _whole_reads(self, reader: Reader) -> list[Row]:
        """Read all arrays through each setup: cold, warm, after a write, past `max_size`."""
        phases = ["cold", "warm", "past max_size"]
        if self.truth is not None:
            phases.insert(2, "after a write")
        rows = {phase: Row(reader.name, phase) for phase in phases}

        once = Pass(reader, "whole", reader.read)
        twice = Pass(reader, "whole, twice", partial(reader.read, repeats=2))
        for label in SETUPS:
            store = self._store(label)
            self._measure(rows["cold"], label, store, once)
            self._measure(rows["warm"], label, store, once)
            if self.truth is not None:
                row = rows["after a write"]
                self._write_and_measure(row, label, store, once)
                # The cache may hold what it was given; this shows that the source got it too.
                self._check(row, label, once, once.read(self.source), "read from the source, ")
            if self.max_size is None:
                self.max_size = max(1, rows["cold"].cells[NO_CACHE].counts.bytes_read // 2)
            row = rows["past max_size"]
            self._measure(row, label, self._store(label, self.max_size), twice)
            if label != NO_CACHE:
                self._check_peak(row, label)
        return list(rows.values())

    def _part_reads(self) -> list[Row]:
        """Read parts of the sharded array: cold, warm, after a write, after a whole read."""
        reader = self._parts_reader
        phases = ["cold", "warm", "after full read"]
        if self.truth is not None:
            phases.insert(2, "after a write")
        rows = {phase: Row(reader.name, phase) for phase in phases}
        parts = Pass(reader, "parts", reader.read_parts)
        for label in SETUPS:
            store = self._store(label)
            self._measure(rows["cold"], label, store, parts)
            self._measure(rows["warm"], label, store, parts)
            if self.truth is not None:
                self._write_and_measure(rows["after a write"], label, store, parts)
            store = self._store(label)
            if label != NO_CACHE:
                reader.read(store)
            self._measure(rows["after full read"], label, store, parts)
        return list(rows.values())

    def _write_and_measure(self, row: Row, label: str, store: Store, work: Pass) -> None:
        """Write a chunk, and an inner chunk of a shard, to the truth and the store; then read."""
        assert self.truth is not None
        cells = work.reader.new_cells(self.truth)
        work.reader.write(self.truth, cells)
        self._expected.clear()
        failure = ""
        try:
            work.reader.write(store, cells)
        except Exception as error:  # noqa: BLE001 - a store that fails is a result
            failure = f"the write failed: {_text(error)}"
        self._measure(row, label, store, work)
        if failure:
            self._blame(row, label, failure)

    def _measure(self, row: Row, label: str, store: Store, work: Pass) -> None:
        """Do one read, time and count it, put the cell into the row, and check the values."""
        self._progress.step(f"{row.reader}, {row.phase}: {label}")
        if self.truth is not None and work.key not in self._expected:
            self._expected[work.key] = work.read(self.truth)
        digests: Digests | None = None
        failure = ""
        stats, counts, start = _stats(store), self.meter.read(), time.perf_counter()
        try:
            digests = work.read(store)
        except Exception as error:  # noqa: BLE001 - a store that fails is a result
            failure = f"the read failed: {_text(error)}"
        seconds = time.perf_counter() - start
        counts, (hits, misses) = self.meter.read() - counts, _stats(store)
        hits, misses = hits - stats[0], misses - stats[1]
        ratio = hits / (hits + misses) if hits + misses else None
        row.cells[label] = Cell(counts, seconds, ratio)
        if digests is None:
            self._blame(row, label, failure)
        else:
            self._check(row, label, work, digests)

    def _check(self, row: Row, label: str, work: Pass, digests: Digests, note: str = "") -> None:
        """Compare digests with the truth, and note each read that differs."""
        # Without a second copy, the first read is one without a cache, and that is the truth.
        expected = self._expected.setdefault(work.key, digests)
        self._checked[label] += len(expected)
        for name in expected:
            if digests.get(name) != expected[name]:
                self._blame(row, label, f"{note}wrong values in {name}")

    def _blame(self, row: Row, label: str, problem: str) -> None:
        """Mark the cell, and keep the problem for the lines below the tables."""
        row.cells[label].wrong = True
        self._problems[label].append(f"{row.reader}, {row.phase}: {problem}")

    def _check_peak(self, row: Row, label: str) -> None:
        """Compare the most bytes in the cache store with the bound."""
        peak, bound = self.caches.peak, self.max_size
        if peak is None or bound is None:
            self._peaks[label] = None
            return
        self._peaks[label] = max(peak, self._peaks.get(label) or 0)
        if peak > bound:
            self._blame(row, label, f"{peak:,} bytes in the cache store, max_size is {bound:,}")

    def _print_summary(self) -> None:
        print("requests, bytes: what reached the source, and what it sent. hits: hit ratio by the")
        print("cache's own count, which may not see what passes it by. !: a problem, listed below.")
        print("After a write: the read is counted, the write is not.")
        bound = self.max_size or 0
        for label, peak in self._peaks.items():
            held = "not measured in a directory" if peak is None else f"{peak:,} bytes"
            print(f"{label}: most held with max_size {bound:,} bytes: {held}")
        for label, problems in self._problems.items():
            state = f"problems: {len(problems)}" if problems else "all as expected"
            print(f"{label}: {self._checked[label]} values verified, {state}")
            for problem in problems[:10]:
                print(f"  ! {problem}")
            if len(problems) > 10:
                print(f"  ! and {len(problems) - 10} more")


def _stats(store: Store) -> tuple[int, int]:
    """Return hits and misses so far, by the cache's own count."""
    if not hasattr(store, "cache_stats"):
        return 0, 0
    stats = store.cache_stats()
    return stats["hits"], stats["misses"]


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
