"""Read a dataset from S3 through no cache, zarr's CacheStore and zcache, side by side.

    python examples/s3_demo.py
    python examples/s3_demo.py --source s3://bucket/data.zarr --path group

Without `--source` it starts an S3-protocol server on loopback, puts a dataset behind it, delays
each request, and stops the server at the end. With it, it only reads.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from zarr.abc.store import Store

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_ALWAYS_NEEDED = ("aiohttp", "fsspec", "xarray")
_SERVER_NEEDED = ("aiobotocore", "flask", "moto", "s3fs")
_INSTALL = "pip install 'zarr-zcache[demo]'"


class UserError(Exception):
    """What the user can put right; the text names the value and the way out."""


def parse_size(text: str) -> int:
    """Return bytes from text such as `1000000`, `256MB` or `2 GiB`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b|)\s*", text, re.IGNORECASE)
    unit = match.group(2).lower() if match else None
    size = 0
    if match is not None and (unit in _UNITS or unit == "b"):
        size = int(float(match.group(1)) * _UNITS.get(unit or "", 1))
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give bytes, 1 or more, such as 1000000, 256MB or 2GiB"
        )
    return size


def parse_latency(text: str) -> float:
    """Return milliseconds, 0 to 10,000."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 10_000:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a latency: give milliseconds, 0 to 10000")


def parse_options(text: str) -> dict[str, Any]:
    """Return the object that JSON text holds."""
    with contextlib.suppress(json.JSONDecodeError):
        options = json.loads(text)
        if isinstance(options, dict):
            return options
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a JSON object: give one in single quotes, such as '{{\"anon\": true}}'"
    )


def parse_directory(text: str) -> Path:
    """Return a directory that exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a directory: make it, or leave the option out to cache in memory"
        )
    return path


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the demo."""
    parser = argparse.ArgumentParser(
        description="Read a dataset through no cache, zarr's CacheStore and zcache, with zarr and "
        "with xarray: cold, warm, after a write and past max_size. Print what reached the source.",
        epilog="Exit status: 0 if every read through zcache was right, 1 if not, 2 if the demo "
        "could not run.",
    )
    parser.add_argument(
        "--source",
        metavar="URL",
        help="your own dataset: a local path, or a URL that zarr.storage.FsspecStore.from_url "
        "takes, such as s3://bucket/data.zarr. It is only read. Default: a dataset on an S3 "
        "server that the demo starts on loopback.",
    )
    parser.add_argument(
        "--path", default="", help="the group or array in --source to read (default: its root)"
    )
    parser.add_argument(
        "--storage-options",
        type=parse_options,
        metavar="JSON",
        help="options for the file system of --source, such as '{\"anon\": true}'",
    )
    parser.add_argument(
        "--read-limit",
        type=parse_size,
        default=parse_size("256MB"),
        metavar="SIZE",
        help="with --source: read about this much of the decoded values in one pass, an equal "
        "share of each array, from its start (default: 256MB)",
    )
    parser.add_argument(
        "--max-size",
        type=parse_size,
        metavar="SIZE",
        help="bound of the caches in the phase past max_size, such as 64MB (default: half of the "
        "bytes that one pass gets from the source)",
    )
    parser.add_argument(
        "--latency-ms",
        type=parse_latency,
        metavar="MS",
        help="delay added to each request (default: 20; with --source or --quick: 0 or 1)",
    )
    parser.add_argument(
        "--cache-dir",
        type=parse_directory,
        metavar="DIR",
        help="cache on disk, in new directories under DIR that are deleted at the end (default: "
        "cache in memory)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small generated dataset and 1 ms, for tests"
    )
    return parser


def check_dependencies(names: Sequence[str]) -> None:
    """Raise `UserError` if a package is missing."""
    if importlib.util.find_spec("zcache") is None:
        raise UserError("zcache is not installed: run `pip install .` in the repository first")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the demo needs {', '.join(missing)}; install with: {_INSTALL}")


def run_demo(args: argparse.Namespace) -> bool:
    """Run on a dataset behind an S3 server on loopback; return whether all was right."""
    check_dependencies((*_ALWAYS_NEEDED, *_SERVER_NEEDED))
    from zarr.storage import FsspecStore

    from _dataset import demo_dataset, generated_dataset, memory_store
    from _latency_proxy import LatencyProxy
    from _readers import make_plan
    from _report import format_bytes
    from _runs import Caches, Run
    from _s3_server import BUCKET, S3Server, storage_options, upload

    dataset = generated_dataset(small=True) if args.quick else demo_dataset()
    latency = args.latency_ms if args.latency_ms is not None else 1.0 if args.quick else 20.0
    truth = memory_store(dataset.objects)
    with S3Server() as server:
        print(f"S3 server (moto): process {server.pid}, {server.url}")
        print(f"dataset: {dataset.title}, {len(dataset.objects)} objects, ", end="")
        print(f"{format_bytes(dataset.size)}; {latency:g} ms added to each request", flush=True)
        upload(server.url, "dataset.zarr", dataset.objects)
        with LatencyProxy(server.url, latency / 1000) as proxy:
            source = FsspecStore.from_url(
                f"s3://{BUCKET}/dataset.zarr", storage_options=storage_options(proxy.url)
            )
            try:
                plan = make_plan(truth, "", None)
                caches = Caches(args.cache_dir)
                run = Run(source, proxy.meter, plan, caches, truth, args.max_size)
                return run.execute()
            finally:
                close_session(source)


def run_source(args: argparse.Namespace) -> bool:
    """Run on the user's own dataset, reading only; return whether all was right."""
    check_dependencies(_ALWAYS_NEEDED)
    from _metering import Meter, MeteredStore
    from _readers import NoArraysError, XarrayReader, make_plan
    from _report import format_bytes
    from _runs import Caches, Run

    latency = args.latency_ms or 0.0
    source = open_source(args.source, args.storage_options)
    try:
        path = args.path.strip("/")
        place = f"{path!r} in {args.source!r}" if path else repr(args.source)
        try:
            plan = make_plan(source, path, args.read_limit)
        except NoArraysError as error:
            raise UserError(
                f"cannot read {place}: {error}. Name a group with arrays, or an array, with --path."
            ) from error
        except Exception as error:
            raise UserError(
                f"cannot read {place}: {type(error).__name__}: {error}. Check the URL; give "
                "credentials, an endpoint or other options with --storage-options."
            ) from error
        print(f"dataset: {place}, {len(plan.arrays)} arrays; reads of ", end="")
        nbytes = sum(array.nbytes for array in plan.arrays.values())
        print(f"{format_bytes(nbytes)} decoded; {latency:g} ms added to each request")
        unreadable = XarrayReader(plan).unreadable(source)
        if unreadable:
            print(f"no reads with xarray: {unreadable}")
        sys.stdout.flush()
        meter = Meter()
        metered = MeteredStore(source, meter, latency / 1000)
        run = Run(
            metered,
            meter,
            plan,
            Caches(args.cache_dir),
            max_size=args.max_size,
            xarray=not unreadable,
        )
        return run.execute()
    finally:
        close_session(source)


def open_source(url: str, storage_options: dict[str, Any] | None) -> Store:
    """Return a read-only store on the user's dataset."""
    from zarr.storage import FsspecStore, LocalStore

    if "://" not in url and "::" not in url:
        if not Path(url).is_dir():
            raise UserError(
                f"--source {url!r} is not a directory: give the path of a zarr group or array, or "
                "a URL such as s3://bucket/data.zarr"
            )
        return LocalStore(url, read_only=True)
    try:
        return FsspecStore.from_url(url, storage_options=storage_options, read_only=True)
    except Exception as error:
        raise UserError(
            f"cannot open --source {url!r}: {type(error).__name__}: {error}. Check the URL and "
            f"--storage-options; for s3:// install with: {_INSTALL}"
        ) from error


def close_session(store: Store) -> None:
    """Close the connections of a file system that keeps some, so that none is left open at exit."""
    from zarr.core.sync import sync

    async def close(set_session: Callable[[], Any]) -> None:
        session = await set_session()
        await session.close()

    set_session = getattr(getattr(store, "fs", None), "set_session", None)
    if set_session is not None:
        # What is left open here is closed by the end of the process; nothing depends on it.
        with contextlib.suppress(Exception):
            sync(close(set_session), timeout=2)


_TO_END = (3.0, 7.0)
"""Seconds that the demo may take to end after it was told to, before it is told again."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that every `finally` runs and the server stops."""
    if hasattr(signal, "setitimer"):
        # A library that catches everything while it is imported ignores the exception, and cleaning up
        # can hang. So it is raised once more; after that this process ends, and its server with it.
        code = 128 + signum

        def once_more(*_: object) -> None:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
            signal.setitimer(signal.ITIMER_REAL, _TO_END[1])
            raise SystemExit(code)

        signal.signal(signal.SIGALRM, once_more)
        signal.setitimer(signal.ITIMER_REAL, _TO_END[0])
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.source is None and (args.path or args.storage_options):
        parser.error("--path and --storage-options belong to --source: name your dataset with it")
    if args.source is not None and args.quick:
        parser.error("--quick is for the generated dataset: leave it out, or leave out --source")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    try:
        run = run_demo if args.source is None else run_source
        right = run(args)
        packages = ("zarr-zcache", "zarr", "xarray", "numpy")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        print(f"Python {platform.python_version()}, {versions}")
    except UserError as error:
        print(f"s3_demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("s3_demo: interrupted; its server is stopped", file=sys.stderr)
        return 130
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
