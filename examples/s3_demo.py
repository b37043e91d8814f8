"""Read a dataset from S3 without a cache, through zarr's CacheStore and through zcache, side by side.

    python examples/s3_demo.py

It starts an S3-protocol server on loopback, which delays and counts each request, gives each setup
a copy of a dataset there and an empty cache directory, and compares everything that is read with a
copy in memory. Exit status: 0 if all reads through zcache were right, 1 if not, 2 if the demo could
not run, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from zarr.abc.store import Store

NEEDED = ("aiobotocore", "flask", "moto", "s3fs", "xarray", "zarr", "zcache")
NO_CACHE, ZARR, ZCACHE = SETUPS = ("no cache", "zarr CacheStore", "zcache")
MAX_SIZE = 10**9
PROCESS_SECONDS = 120
ERA_INTERIM = Path(__file__).resolve().parents[2] / "shared" / "data" / "era_interim.zarr"


# The dataset


def load_dataset(*, quick: bool) -> tuple[str, dict[str, bytes]]:
    """Return a title, and the objects of a Zarr group by their keys.

    The group is the ERA-Interim one where it lies beside the repository, else a generated one.
    """
    if quick or not ERA_INTERIM.is_dir():
        return "generated weather", generate_dataset(small=quick)
    files = (path for path in ERA_INTERIM.rglob("*") if path.is_file())
    objects = {path.relative_to(ERA_INTERIM).as_posix(): path.read_bytes() for path in files}
    return "ERA-Interim monthly means", objects


def generate_dataset(*, small: bool) -> dict[str, bytes]:
    """Return a group of two chunked arrays and a sharded one: 15 MB, or 0.1 MB when `small`."""
    import numpy as np
    import zarr
    from zarr.storage import LocalStore

    times, latitudes, longitudes = (2, 48, 96) if small else (8, 360, 720)
    wave = np.sin(np.linspace(0, 9, latitudes))[:, None] + np.cos(np.linspace(0, 12, longitudes))
    noise = np.random.default_rng(20)
    with tempfile.TemporaryDirectory() as folder:
        group = zarr.create_group(LocalStore(folder))
        for name in ("temperature", "humidity", "wind"):
            group.create_array(
                name,
                # Smooth values with noise compress as measured ones do.
                data=(wave + noise.normal(scale=0.01, size=(times, *wave.shape))).astype("f4"),
                chunks=(1, latitudes // 3, longitudes // 3),
                shards=(1, latitudes, longitudes) if name == "wind" else None,
                dimension_names=("time", "latitude", "longitude"),
            )
        with warnings.catch_warnings():
            # zarr warns that consolidated metadata is an extension of format 3; xarray writes it.
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(group.store)
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def memory_store(objects: Mapping[str, bytes]) -> Store:
    """Return a store in memory that holds `objects`."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    from_bytes = default_buffer_prototype().buffer.from_bytes
    return MemoryStore({key: from_bytes(value) for key, value in objects.items()})


# What is done with a store; each read returns digests of the values, by what they are called


def data_arrays(store: Store) -> Iterator[tuple[str, Any]]:
    """Return the arrays of more than one dimension, which are no coordinates."""
    import zarr

    for name, array in sorted(zarr.open_group(store).arrays()):
        if array.ndim > 1:
            yield name, array


def digest(values: Any) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def read_all(store: Store) -> dict[str, str]:
    """Read all variables, with xarray."""
    import xarray as xr

    with xr.open_zarr(store, chunks=None, mask_and_scale=False, decode_times=False) as dataset:
        return {str(name): digest(dataset[name].values) for name in dataset.variables}


def read_parts(store: Store) -> dict[str, str]:
    """Read the first and the last inner chunk of the shards, with zarr: byte ranges of objects."""
    digests = {}
    for name, array in data_arrays(store):
        if array.shards is not None:
            first = tuple(slice(0, chunk) for chunk in array.chunks)
            last = tuple(slice(-chunk, None) for chunk in array.chunks)
            digests[f"the first chunk of {name}"] = digest(array[first])
            digests[f"the last chunk of {name}"] = digest(array[last])
    return digests


def write_chunks(store: Store, value: int) -> None:
    """Write a chunk of each array, which for a sharded array is a part of an object."""
    for _, array in data_arrays(store):
        array[tuple(slice(0, chunk) for chunk in array.chunks)] = value


def open_source(setup: str, url: str) -> Store:
    """Return a setup's copy of the dataset on the S3 server at `url`."""
    from zarr.storage import FsspecStore

    from _s3_server import BUCKET, storage_options

    path = f"s3://{BUCKET}/{setup.replace(' ', '-')}"
    source = FsspecStore.from_url(path, storage_options=storage_options(url))
    opened.append(source.fs)
    return source


opened: list[Any] = []
"""File systems with connections that `close_sessions` closes."""


def close_sessions() -> None:
    """Close the connections to the server; aiohttp warns of those that the end of a process cuts."""
    from zarr.core.sync import sync

    async def close(filesystem: Any) -> None:
        await (await filesystem.set_session()).close()

    while opened:
        sync(close(opened.pop()))


def open_store(setup: str, url: str, directory: str) -> Store:
    """Return what a setup reads from: its source, with a cache in `directory` if it has one."""
    from zarr.experimental.cache_store import CacheStore
    from zarr.storage import LocalStore

    import zcache

    source = open_source(setup, url)
    if setup == NO_CACHE:
        return source
    classes: dict[str, Any] = {ZARR: CacheStore, ZCACHE: zcache.CacheStore}
    store: Store = classes[setup](source, cache_store=LocalStore(directory), max_size=MAX_SIZE)
    return store


class Result(NamedTuple):
    """Digests of what was read, and the seconds that it took."""

    digests: dict[str, str]
    seconds: float


def timed(read: Callable[[Store], dict[str, str]], store: Store) -> Result:
    """Read, and then wait for fills in the background, which a reader need not do."""
    start = time.perf_counter()
    digests = read(store)
    seconds = time.perf_counter() - start
    drain(store)
    return Result(digests, seconds)


def drain(store: Store) -> None:
    """Wait until all that was read is in the cache directory."""
    # zarr's CacheStore has no such method: it fills before it answers.
    getattr(store, "drain_sync", lambda: None)()


def in_another_process(setup: str, url: str, directory: str, write: int | None = None) -> Result:
    """Read everything, or write chunks, in a new process that opens its own store."""
    job = json.dumps([setup, url, directory, write])
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"another process failed: {done.stderr.strip().splitlines()[-1]}")
    return Result(*json.loads(done.stdout))


def do_job(job: str) -> None:
    """Do what `in_another_process` asks for, and print the result."""
    *place, write = json.loads(job)
    store = open_store(*place)
    result = Result({}, 0)
    if write is None:
        result = timed(read_all, store)
    else:
        write_chunks(store, write)
        drain(store)
    close_sessions()
    print(json.dumps(result))


# The run


class Demo:
    """The table, printed as it is measured: a row for each phase, a cell for each setup.

    Parameters
    ----------
    server
        The `S3Server`, which counts the requests.
    truth
        A copy of the dataset that no cache stands before: each read must return what it returns.
    folder
        Where the cache directories go.
    """

    def __init__(self, server: Any, truth: Store, folder: str) -> None:
        self._server = server
        self._truth = truth
        self._folder = Path(folder)
        self._checked = dict.fromkeys(SETUPS, 0)
        self._problems: dict[str, list[str]] = {setup: [] for setup in SETUPS}

    def run(self) -> bool:
        """Do all phases; return whether zcache, and the reads without a cache, were right."""
        print(f"{'':<26}" + "".join(f" | {setup:^18}" for setup in SETUPS))
        print(f"{'':<26}" + f" | {'requests':>8} {'seconds':>9}" * len(SETUPS))
        print("-" * 26 + ("-+-" + "-" * 18) * len(SETUPS))

        stores = self._open_all("whole")
        expected = read_all(self._truth)
        self._row("cold", expected, lambda s: timed(read_all, stores[s]))
        self._row("warm", expected, lambda s: timed(read_all, stores[s]))
        self._row("second process", expected, self._elsewhere)

        write_chunks(self._truth, 1)
        expected = read_all(self._truth)
        self._each("a write", lambda s: write_chunks(stores[s], 1))
        self._row("after a write", expected, lambda s: timed(read_all, stores[s]))

        write_chunks(self._truth, 2)
        expected = read_all(self._truth)
        self._each("a write of a second process", lambda s: self._elsewhere(s, write=2))
        self._row("after another's write", expected, lambda s: timed(read_all, stores[s]))
        # What a cache shows, its source must have as well.
        self._each(
            "in the source", lambda s: self._check("in the source", s, expected, self._in_source(s))
        )

        stores = self._open_all("parts")
        expected = read_parts(self._truth)
        self._row("parts of shards, cold", expected, lambda s: timed(read_parts, stores[s]))
        self._row("parts of shards, warm", expected, lambda s: timed(read_parts, stores[s]))

        print("\nrequests: what reached the server. !: wrong, or failed; listed below.")
        for setup, problems in self._problems.items():
            state = f"problems: {len(problems)}" if problems else "all as expected"
            print(f"{setup}: {self._checked[setup]} values verified, {state}")
            for problem in problems[:10]:
                print(f"  ! {problem}")
        # What zarr's class gets wrong is shown, and is no failure of this demo.
        return not (self._problems[NO_CACHE] or self._problems[ZCACHE])

    def _place(self, setup: str, folder: str = "whole") -> tuple[str, str, str]:
        """Return the arguments of `open_store`."""
        return setup, self._server.url, str(self._folder / folder / setup.replace(" ", "-"))

    def _open_all(self, folder: str) -> dict[str, Store]:
        return {setup: open_store(*self._place(setup, folder)) for setup in SETUPS}

    def _elsewhere(self, setup: str, write: int | None = None) -> Result:
        return in_another_process(*self._place(setup), write)

    def _in_source(self, setup: str) -> dict[str, str]:
        return read_all(open_source(setup, self._server.url))

    def _each(self, phase: str, work: Callable[[str], object]) -> None:
        """Do something for each setup; what fails is a result."""
        for setup in SETUPS:
            try:
                work(setup)
            except Exception as error:  # noqa: BLE001 - a store that fails is a result
                self._problems[setup].append(f"{phase}: {type(error).__name__}: {error}")

    def _row(self, phase: str, expected: dict[str, str], read: Callable[[str], Result]) -> None:
        """Do one read through each setup, and print the cells as they come."""
        print(f"{phase:<26}", end="", flush=True)

        def cell(setup: str) -> None:
            before, count = self._server.requests(), len(self._problems[setup])
            text = f"{'failed':>18}!"
            try:
                result = read(setup)
                requests = self._server.requests() - before
                self._check(phase, setup, expected, result.digests)
                text = f"{requests:>8} {result.seconds:>8.2f}"
            finally:
                right = len(self._problems[setup]) == count
                print(f" | {text:>17}{' ' if right else '!'}", end="", flush=True)

        self._each(phase, cell)
        print()

    def _check(
        self, phase: str, setup: str, expected: dict[str, str], digests: dict[str, str]
    ) -> None:
        """Compare what was read with the truth, and note what differs."""
        self._checked[setup] += len(expected)
        self._problems[setup] += [
            f"{phase}: wrong values in {name}"
            for name, value in expected.items()
            if digests.get(name) != value
        ]


def parse_latency(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 10_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a latency: give milliseconds, 0 to 10000")


def parse_directory(text: str) -> Path:
    if Path(text).is_dir():
        return Path(text)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a directory: make it, or leave the option out for the system's own"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--latency-ms",
        type=parse_latency,
        metavar="MS",
        help="delay of each request (default: 20; with --quick: 1)",
    )
    parser.add_argument(
        "--cache-dir",
        type=parse_directory,
        metavar="DIR",
        help="where the caches go, in a new directory that is deleted at the end\n"
        "(default: the system's directory for temporary files)",
    )
    parser.add_argument("--quick", action="store_true", help="a small generated dataset, for tests")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.latency_ms is None:
        options.latency_ms = 1 if options.quick else 20
    return options


@contextlib.contextmanager
def stopped_by_signals(folder: str) -> Iterator[None]:
    """Delete `folder` and end the process on SIGINT and SIGTERM; the S3 server ends with it.

    Not by an exception: libraries that catch all exceptions, while they are imported for example,
    would go on.
    """

    def stop(number: int, _: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return its exit status."""
    options = parse_arguments(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"s3_demo: no {', '.join(missing)}; pip install 'zarr-zcache[demo]'", file=sys.stderr)
        return 2
    if options.job is not None:
        do_job(options.job)
        return 0
    from _s3_server import S3Server

    title, objects = load_dataset(quick=options.quick)
    size = sum(map(len, objects.values())) / 1e6
    with (
        tempfile.TemporaryDirectory(prefix="zcache-demo-", dir=options.cache_dir) as folder,
        stopped_by_signals(folder),
        S3Server(options.latency_ms) as server,
    ):
        print(f"S3 server (moto): process {server.pid}, {server.url}")
        print(f"dataset: {title}, {len(objects)} objects, {size:.1f} MB; ", end="")
        print(f"each request waits {options.latency_ms:g} ms\n", flush=True)
        for setup in SETUPS:
            server.upload(setup.replace(" ", "-"), objects)
        try:
            right = Demo(server, memory_store(objects), folder).run()
        finally:
            close_sessions()
    packages = ("zarr-zcache", "zarr", "xarray", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"Python {platform.python_version()}, {versions}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
