"""A loader with several worker processes: without a cache, with a cache for each worker, with one for all.

    python examples/workers.py
    python examples/workers.py --workers 8 --epochs 5 --latency 0.05

As a PyTorch `DataLoader` with `num_workers=4` does, each epoch deals the samples out anew. All three
setups get the same disk space: one cache of it, or a part for each worker. The source is a directory
whose reads wait as long as those of an object store; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import queue
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr
from zarr.storage import LocalStore

from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.process import BaseProcess
    from multiprocessing.queues import Queue

    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

SETUPS = {"none": "no cache", "each": "a cache for each worker", "shared": "one shared cache"}
PATIENCE = 120.0
"""Seconds that one epoch may take before the workers count as hung."""


class DistantStore(LocalStore):
    """A directory that is as far away as an object store, and counts its reads."""

    # Hides the synchronous methods, which would not wait.
    _supports_sync_io = False

    def __init__(
        self, root: str | Path, latency: float, log: str, *, read_only: bool = False
    ) -> None:
        super().__init__(root, read_only=read_only)
        self._latency = latency
        self._log = log

    def with_read_only(self, read_only: bool = False) -> Self:
        return type(self)(self.root, self._latency, self._log, read_only=read_only)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        await asyncio.sleep(self._latency)
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, b".")
        os.close(log)
        return await super().get(key, prototype, byte_range)


def open_source(place: Path, setup: str, number: int, options: argparse.Namespace) -> Store:
    """The store that worker `number` reads from."""
    source = DistantStore(place / "data", options.latency, str(place / f"{setup}.log"))
    if setup == "none":
        return source
    size = options.samples * options.bytes * 5 // 4
    if setup == "shared":
        return CacheStore(source, cache_store=LocalStore(place / "shared"), max_size=size)
    cache = LocalStore(place / f"each-{number}")
    return CacheStore(source, cache_store=cache, max_size=size // options.workers)


def work(
    place: Path,
    setup: str,
    number: int,
    options: argparse.Namespace,
    orders: Queue[list[int] | None],
    done: Queue[tuple[int, int | str]],
) -> None:
    """Read the samples that come in, until None comes: what a worker process does."""
    try:
        array: Any = zarr.open_array(open_source(place, setup, number, options), mode="r")
        while (samples := orders.get()) is not None:
            done.put((number, sum(int(array[sample].sum()) for sample in samples)))
    except BaseException as error:  # noqa: BLE001 - the loader has to hear of it
        done.put((number, repr(error)))


class Loader:
    """Worker processes of one setup; they are stopped when the block ends."""

    def __init__(self, place: Path, setup: str, options: argparse.Namespace) -> None:
        # spawn, for the event loop of zarr runs in a thread, which does not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.done: Queue[tuple[int, int | str]] = context.Queue()
        self.orders = [context.Queue() for _ in range(options.workers)]
        self.processes: list[BaseProcess] = [
            context.Process(
                target=work, args=(place, setup, number, options, orders, self.done), daemon=True
            )
            for number, orders in enumerate(self.orders)
        ]

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        self.epoch([])  # Who starts up does not count.
        return self

    def __exit__(self, *_: object) -> None:
        for orders in self.orders:
            orders.put(None)
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()

    def epoch(self, samples: Sequence[int]) -> int:
        """Have all samples read once; returns their sum."""
        count = len(self.orders)
        for number, orders in enumerate(self.orders):
            orders.put(list(samples[number::count]))
        total = 0
        for _ in self.orders:
            try:
                number, answer = self.done.get(timeout=PATIENCE)
            except queue.Empty:
                raise SystemExit(f"no answer from the workers within {PATIENCE:.0f} s") from None
            if isinstance(answer, str):
                raise SystemExit(f"worker {number} failed: {answer}")
            total += answer
        return total


def make_data(place: Path, options: argparse.Namespace) -> int:
    """Write the samples, one chunk each; returns their sum."""
    values = np.random.default_rng(0).integers(0, 256, (options.samples, options.bytes), "u1")
    array = zarr.create_array(
        LocalStore(place / "data"),
        shape=values.shape,
        chunks=(1, options.bytes),
        dtype="u1",
        compressors=None,
    )
    array[:] = values
    return int(values.sum(dtype="u8"))


def bytes_cached(place: Path, setup: str) -> int:
    """Bytes that a setup keeps on disk at the end."""
    roots = {"none": "-", "each": "each-*", "shared": "shared"}
    size = 0
    for root in place.glob(roots[setup]):
        size += sum(path.stat().st_size for path in root.glob("c/**/*") if path.is_file())
    return size


def run(place: Path, setup: str, options: argparse.Namespace, total: int) -> Iterator[str]:
    """Cells of one line of the table: reads of the source and seconds for each epoch, bytes on disk."""
    log = place / f"{setup}.log"
    with Loader(place, setup, options) as loader:
        for epoch in range(options.epochs):
            samples = list(range(options.samples))
            random.Random(epoch).shuffle(samples)
            before = log.stat().st_size if log.exists() else 0
            start = time.perf_counter()
            if loader.epoch(samples) != total:
                raise SystemExit(f"{SETUPS[setup]}: wrong values in epoch {epoch + 1}")
            seconds = time.perf_counter() - start
            reads = (log.stat().st_size if log.exists() else 0) - before
            yield f"{reads:>6} {seconds:>7.2f} s"
    yield f"{bytes_cached(place, setup) / 1e6:>8.1f} MB"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--workers", type=int, default=4, help="worker processes (default 4)")
    parser.add_argument("--epochs", type=int, default=3, help="default 3")
    parser.add_argument("--samples", type=int, default=400, help="of the dataset (default 400)")
    parser.add_argument("--bytes", type=int, default=100_000, help="of a sample (default 100000)")
    parser.add_argument(
        "--latency", type=float, default=0.02, help="seconds of a read at the source (default 0.02)"
    )
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.workers, options.epochs, options.samples = 2, 2, 24
        options.bytes, options.latency = 1000, 0.001
    for name in ("workers", "epochs", "samples", "bytes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    print(
        f"{options.samples} samples of {options.bytes / 1e3:g} kB, {options.workers} workers, "
        f"{options.latency * 1e3:g} ms for a read at the source\n"
    )
    epochs = "".join(f" | {f'epoch {number + 1}':^16}" for number in range(options.epochs))
    print(f"{'':<24}{epochs} | {'on disk':^11}")
    print(f"{'':<24}" + f" | {'reads':>6} {'time':>9}" * options.epochs + f" | {'':^11}")
    with tempfile.TemporaryDirectory(prefix="zcache-workers-") as folder:
        place = Path(folder)
        total = make_data(place, options)
        for setup, label in SETUPS.items():
            print(f"{label:<24}", end="", flush=True)
            for cell in run(place, setup, options, total):
                print(f" | {cell}", end="", flush=True)
            print()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
