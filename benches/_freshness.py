"""Freshness: comparing what is too old with a slow source, and opening a warm dataset over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.storage import FsspecStore, LocalStore

from _measure import Row
from _setup import (
    SlowStore,
    chunk_keys,
    drained,
    memory_store,
    read_at_once,
    temporary_directory,
    zarr_store,
    zcache_store,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _setup import Scale

_LATENCY = 0.02
_HTTP_LATENCY = 0.005


class _Validated(SlowStore):
    """A source of which nothing changes, and that says so as slowly as it reads."""

    async def validator(self, key: str) -> str | None:
        self.reads += 1
        await asyncio.sleep(self.latency)
        return "the same"


async def revalidation(scale: Scale) -> list[Row]:
    """10,000 values of 64 KiB that are too old and have not changed: one pass, 64 at once."""
    keys = chunk_keys(scale.of(10_000, 1_000))
    inner = memory_store(keys, 65536, distinct=64)
    seconds: dict[str, float] = {}
    asked: dict[str, int] = {}
    for name in ("bare", "zcache", "zarr"):
        source = _Validated(inner, _LATENCY)
        store: Any = source
        if name == "zcache":
            store = zcache_store(source, max_age_seconds=0, revalidate=True)
        elif name == "zarr":
            store = zarr_store(source, max_age_seconds=0)
        if store is not source:
            await read_at_once(store, keys)
            await drained(store)
        source.reads = 0
        began = time.perf_counter()
        await read_at_once(store, keys)
        seconds[name] = time.perf_counter() - began
        asked[name] = source.reads
    work = f"{len(keys):,} values too old but the same, source of 20 ms"
    note = "zcache compares, the others read 64 KiB each; this source takes as long for either"
    return [
        Row(work, **seconds, ratio=seconds["zcache"] / seconds["bare"], note=note),
        Row(f"{work}: requests", unit="", **asked),
    ]


@contextlib.contextmanager
def _served(root: Path, asked: list[str]) -> Iterator[str]:
    """The URL of a server of these files that takes 5 ms for each request, and notes them."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(f"{request.method} {request.path}")
        await asyncio.sleep(_HTTP_LATENCY)
        path = root / request.path.lstrip("/")
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    loop = asyncio.new_event_loop()
    ready = threading.Event()
    port: list[int] = []

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.append(runner.addresses[0][1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def opening(scale: Scale) -> list[Row]:
    """A group of 20 arrays over HTTP, opened and looked at a second time by a new store over a warm cache."""
    rows = []
    with temporary_directory(scale) as root:
        for kind in ("consolidated", "not consolidated"):
            rows += _opening(root / kind.replace(" ", "-"), kind, scale.of(5, 2))
    return rows


def _opening(root: Path, kind: str, rounds: int) -> list[Row]:
    names = [f"variable_{number}" for number in range(20)]
    group = zarr.open_group(root / "data.zarr", mode="w")
    for name in names:
        array = group.create_array(name, shape=(64,), chunks=(64,), dtype="f4")
        array[:] = np.arange(64)
    if kind == "consolidated":
        zarr.consolidate_metadata(root / "data.zarr")
    asked: list[str] = []
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", "zcache", "zarr")}
    requests: dict[str, int] = {}
    with _served(root, asked) as url:

        def look(name: str) -> None:
            source = FsspecStore.from_url(f"{url}/data.zarr", read_only=True)
            store: Any = source
            if name == "zcache":
                store = zcache_store(source, LocalStore(root / "zcache"))
            elif name == "zarr":
                store = zarr_store(source, LocalStore(root / "zarr"))
            opened = zarr.open_group(store, mode="r")
            for one in names:
                assert opened[one].shape == (64,)
            if name == "zcache":
                assert store.drain_sync()

        for name in seconds:
            look(name)
        for number in range(rounds):
            for at in range(3):
                name = list(seconds)[(number + at) % 3]
                asked.clear()
                began = time.perf_counter()
                look(name)
                seconds[name].append(time.perf_counter() - began)
                requests[name] = len(asked)
    best = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    work = f"second opening of 20 arrays over HTTP of 5 ms, {kind}"
    ratio = best["zcache"] / best["bare"]
    return [
        Row(work, **best, ratio=ratio, zarr_ratio=best["zarr"] / best["bare"]),
        Row(f"{work}: requests", unit="", **requests),
    ]
