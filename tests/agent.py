"""Another process on the same cache directory, which does what a test tells it to.

python tests/agent.py DIRECTORY MAX_SIZE SHARES: one command a line in, one answer a line out, both as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
    from zcache.testing import Gate

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
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(where), str(max_size), str(int(shares_index))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._hear() == "ready"

    def __call__(self, what: str, key: str = "", text: str = "") -> Any:
        """Have it do something, and wait for the answer."""
        assert self.process.stdin
        print(json.dumps([what, key, text]), file=self.process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"it has died: {self.process.wait()}"
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()

    def end(self) -> None:
        """Let it come to its end, and wait for that."""
        self.process.communicate()

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


def main() -> None:
    with contextlib.nullcontext() if int(sys.argv[3]) else without_shared_index():
        serve()


def serve() -> None:
    """Do what the lines say."""
    commands = _Commands(Path(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(commands.obey(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
