"""Other processes, which do what a test tells them to; an agent is one on the same cache directory.

All of them are forked from one process that has imported zarr and never uses a cache: the import takes longer than most tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, Final, Self

from zarr.storage import LocalStore

from pools import cache_at
from support import buf, read
from zcache import CacheStore
from zcache.testing import (
    StoreDouble,
    check_invariants,
    index_slot,
    missing_keys,
    without_shared_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from zcache.testing import Gate

_CONTEXT: Final = multiprocessing.get_context("forkserver")
# Not this module: before Python 3.13.3 that process does not know our `sys.path`.
_CONTEXT.set_forkserver_preload(["pytest", "zarr.storage", "zcache.testing"])

SOURCE_ID = "source"
"""The name of the source, through whichever store it is read."""


def spawned(pickled: bytes, key: str) -> tuple[bytes | None, int, int | None]:
    """What a worker process reads through a store that came to it by pickle."""
    store = pickle.loads(pickled)
    value = asyncio.run(read(store, key))
    hits = store.cache_stats()["hits"]
    asyncio.run(store.set("b", buf(b"by a worker")))
    assert store.drain_sync()
    return value, hits, index_slot(store)


def start_reader() -> tuple[Connection, BaseProcess]:
    """Start a process that reads each array that it gets by pickle, until it gets nothing.

    It answers with the values, and how many of their chunks were decoded already.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_read_arrays, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _read_arrays(connection: Connection) -> None:
    while pickled := connection.recv_bytes():
        array = pickle.loads(pickled)
        before = array.store.cache_stats()["decoded_hits"]
        values = array[:].tolist()
        connection.send((values, array.store.cache_stats()["decoded_hits"] - before))
        del array
        gc.collect()


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Do what ``python -c`` does, without the time that imports take; functions for the exit are not called."""
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(
        target=_run, args=(theirs, script, arguments, dict(os.environ)), daemon=True
    )
    process.start()
    theirs.close()
    try:
        code, out, err = ours.recv()
    except EOFError:
        code, out, err = None, "", "it has died"
    process.join()
    return subprocess.CompletedProcess(script, process.exitcode if code is None else code, out, err)


def _run(
    result: Connection, script: str, arguments: tuple[str, ...], environment: Mapping[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # A user that it becomes may not be let into this one.
    os.chdir("/")
    sys.argv = ["-c", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            code = end.code or 0
        except BaseException:  # noqa: BLE001 - as the interpreter does with what nothing catches
            code = 1
            traceback.print_exc()
    result.send((code, out.getvalue(), err.getvalue()))


class Agent:
    """The other process, seen from the test.

    Parameters
    ----------
    where : Path
        The directory with ``source`` and ``cache`` in it.
    max_size : int, optional
        Its bound. Default is none.
    shares_index : bool, optional
        Whether it can share an index. Default is True.
    """

    def __init__(self, where: Path, max_size: int = 0, *, shares_index: bool = True) -> None:
        self._commands, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(
            target=_serve,
            args=(theirs, where, max_size, shares_index, dict(os.environ)),
            daemon=True,
        )
        self.process.start()
        theirs.close()
        assert self._hear() == "ready"

    def __call__(self, what: str, key: str = "", text: str = "") -> Any:
        """Have it do something, and wait for the answer."""
        self._commands.send((what, key, text))
        return self._hear()

    def _hear(self) -> Any:
        try:
            return self._commands.recv()
        except EOFError:
            self.process.join()
            raise AssertionError(f"it has died: {self.process.exitcode}") from None

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> None:
        """Let it come to its end, and wait for that."""
        self._commands.close()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Commands:
    """The other process itself."""

    def __init__(self, where: Path, max_size: int) -> None:
        self.source = StoreDouble(LocalStore(where / "source"))
        self.store = CacheStore(
            self.source,
            cache_store=cache_at(where / "cache"),
            max_size=max_size or None,
            source_id=SOURCE_ID,
        )
        self.gate: Gate | None = None
        self.thread: threading.Thread | None = None

    def obey(self, what: str, key: str, text: str) -> Any:
        if what == "info":
            return self.store.cache_info()
        if what == "check":
            return check_invariants(self.store)
        if what == "drain":
            return self.store.drain_sync()
        if what == "begin":
            # `text` is held up in the source, half way.
            operation, _, when = text.partition(" ")
            self.gate = self.source.block(operation, times=1, after=when == "after")
            self.thread = threading.Thread(
                target=self.run, args=(text.split(maxsplit=1)[0], key, "")
            )
            self.thread.daemon = True
            self.thread.start()
            return self.gate.wait_entered()
        if what == "end":
            assert self.gate
            assert self.thread
            self.gate.release()
            return self.thread.join()
        return self.run(what, key, text)

    def run(self, what: str, key: str, text: str) -> Any:
        return asyncio.run(self._run(what, key, text))

    async def _run(self, what: str, key: str, text: str) -> Any:
        store = self.store
        if what == "get":
            value = await read(store, key)
            return None if value is None else value.decode()
        if what == "set":
            await store.set(key, buf(text.encode()))
        elif what == "delete":
            await store.delete(key)
        elif what == "delete_dir":
            await store.delete_dir(key)
        elif what == "invalidate":
            return await store.invalidate(key)
        elif what == "exists":
            return await store.exists(key)
        elif what == "cached_keys":
            return sorted(store.cached_keys(key))
        elif what == "missing_keys":
            return missing_keys(store)
        else:
            assert what == "clear", what
            await store.clear_cache()
        return None


def _serve(
    commands: Connection,
    where: Path,
    max_size: int,
    shares_index: bool,
    environment: Mapping[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.nullcontext() if shares_index else without_shared_index():
        mine = _Commands(where, max_size)
        commands.send("ready")
        # Until the test closes its end.
        with contextlib.suppress(EOFError):
            while True:
                commands.send(mine.obey(*commands.recv()))
