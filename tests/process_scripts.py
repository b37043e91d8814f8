"""What runs in processes of its own: forked children of a busy process, and copies that travel.

python tests/process_scripts.py fork memory|directory|another CHILDREN DIRECTORY
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore, MemoryStore

from coherence_support import (
    CacheStore,
    GatedStore,
    SyncDictStore,
    ask,
    buf,
    index_of,
    read,
    value_sync,
)
from zcache._ports import LocalPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

VALUES = {f"{n}": bytes([n]) * (n + 10) for n in range(30)}
MAX_SIZE = 300
GIVE_UP = 60
"""Seconds after which a child that hangs is killed by itself."""


def work(store: CacheStore, source: Store) -> None:
    """Use every sort of operation at once, on both surfaces, and compare with the source."""

    async def use(prefix: str) -> None:
        for key in list(VALUES)[:12]:
            assert await read(store, key) == await read(source, key), key
        await store.set(f"{prefix}/a", buf(b"new"))
        assert await read(store, f"{prefix}/a") == b"new"
        await asyncio.gather(*(read(store, key) for key in VALUES))
        await store.delete(f"{prefix}/a")
        assert await read(store, f"{prefix}/a") is None
        await store.delete_dir(prefix)

    def use_now() -> None:
        for key in list(VALUES)[:12]:
            value = store.get_sync(key)
            assert value is not None
            assert value.to_bytes() == VALUES[key]

    asyncio.run(use(f"p{os.getpid()}"))
    use_now()
    threads = [threading.Thread(target=use_now) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ask(store, lambda index: index.validate())
    assert ask(store, lambda index: index.current_size) <= MAX_SIZE
    assert ask(store, lambda index: index.in_flight) == (0, 0)


def in_child(task: Callable[[], None]) -> int:
    """Fork, do something there, and leave at once. The number of the child."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(GIVE_UP)
        task()
        status = 0
    except BaseException:  # noqa: BLE001 - the parent sees the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(children: list[int]) -> int:
    """Wait for children. How many of them failed."""
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def fork_while_busy(kind: str, children: int, directory: str) -> int:
    """Fork many children while threads and loops of the parent are at work. How many failed."""
    source: Store = SyncDictStore(VALUES)
    caches: dict[str, Callable[[], Store]] = {
        "memory": MemoryStore,
        "directory": lambda: LocalStore(directory),
        "another": SyncDictStore,
    }
    store = CacheStore(source, cache_store=caches[kind](), max_size=MAX_SIZE)
    stop = threading.Event()
    errors: list[BaseException] = []

    def busy(number: int) -> None:
        try:
            while not stop.is_set():
                if number % 2:
                    asyncio.run(several(store, number))
                else:
                    for key in VALUES:
                        store.get_sync(key)
                    store.set_sync(f"t{number}", buf(b"x" * 20))
                    store.delete_sync(f"t{number}")
        except BaseException as error:  # noqa: BLE001 - the main thread tells
            errors.append(error)

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    failed = 0
    for _ in range(children // 10):
        time.sleep(0.002)
        failed += ended([in_child(lambda: work(store, source)) for _ in range(10)])
    stop.set()
    for thread in threads:
        thread.join()
    work(store, source)
    if errors:
        traceback.print_exception(errors[0])
    return failed + len(errors)


def inherit() -> int:
    """Fork while a thread reads from the source. How many children failed."""
    source = GatedStore({"k": b"value", "slow": b"slow"})
    store = CacheStore(source, cache_store=MemoryStore(), max_size=100)
    asyncio.run(read(store, "k"))
    source.shut["get"] = 1
    thread = threading.Thread(target=store.get_sync, args=("slow",))
    thread.start()
    assert source.arrived.acquire(timeout=GIVE_UP)
    assert index_of(store).in_flight == (1, 0)

    def check() -> None:
        assert index_of(store).in_flight == (0, 0)
        assert asyncio.run(read(store, "k")) == b"value"
        assert source.counts["get"] == 2, "the value was not inherited"
        # The thread that read this stayed with the parent; nobody waits for it.
        assert asyncio.run(read(store, "slow")) == b"slow"
        assert value_sync(store, "slow") == b"slow"
        assert source.counts["get"] == 3
        index_of(store).validate()
        assert store.cache_info()["current_size"] == 9

    failed = ended([in_child(check)])
    source.release()
    thread.join()
    assert value_sync(store, "slow") == b"slow"
    assert index_of(store).in_flight == (0, 0)
    return failed


def unwind(directory: str) -> int:
    """Fork in a coroutine while others fill and write; the child ends what it has inherited of them."""
    source = SyncDictStore({"a": bytes(100), "k": bytes(100)})
    store = CacheStore(source, cache_store=LocalStore(directory), max_size=150)
    delete = LocalPort.delete
    begun: list[asyncio.Event] = []

    async def deleting(*args: Any) -> Any:
        for event in begun:
            event.set()
        return await delete(*args)

    # When it makes room: bytes are promised to it then.
    LocalPort.delete = deleting  # type: ignore[method-assign]

    async def fork(work: Callable[[], Any]) -> None:
        index = index_of(store)
        begun[:] = [asyncio.Event()]
        task = asyncio.ensure_future(work())
        await begun[0].wait()
        assert index.in_flight == (1, 1)
        before = index.in_flight, index.entries()
        child = os.fork()
        if not child:
            # As the garbage collector does it.
            coroutine = task.get_coro()
            assert coroutine is not None
            coroutine.close()
            os._exit(0)
        os.waitpid(child, 0)  # noqa: ASYNC222 - nothing is to happen meanwhile
        index.validate()
        assert (index.in_flight, index.entries()) == before
        await task
        assert await read(store, "k") == await read(source, "k")
        assert index.in_flight == (0, 0)
        assert index.current_size == 100
        index.validate()

    for work in (lambda: read(store, "k"), lambda: store.set("k", buf(bytes(100)))):
        asyncio.run(read(store, "a"))
        assert index_of(store).current_size == 100
        signal.alarm(GIVE_UP)
        asyncio.run(fork(work))
    return asyncio.run(unwind_writes())


async def unwind_writes() -> int:
    """The same while the source is written to; the child has nothing to say about that."""
    gate = asyncio.Event()

    class Slow(SyncDictStore):
        async def before(self, operation: str, key: str) -> None:
            if operation == "set":
                await gate.wait()

    source, cache = Slow({"k": b"old"}), Slow()
    stores = [CacheStore(source), CacheStore(SyncDictStore({"k": b"old"}), cache_store=cache)]
    said: list[object] = []
    logging.getLogger("zcache").addHandler(Listener(said))
    begun = [stores[0].set("k", buf(b"new")), read(stores[1], "k")]
    tasks = [asyncio.ensure_future(work) for work in begun]
    while source.counts["set"] + cache.counts["set"] < len(tasks):  # noqa: ASYNC110
        await asyncio.sleep(0)
    everybody = asyncio.all_tasks() - {asyncio.current_task()}
    child = os.fork()
    if not child:
        for task in everybody:
            task.cancel()
        for task in everybody:
            coroutine = task.get_coro()
            assert coroutine is not None
            coroutine.close()
        os._exit(bool(said))
    _, status = os.waitpid(child, 0)  # noqa: ASYNC222 - nothing is to happen meanwhile
    gate.set()
    assert await asyncio.gather(*tasks) == [None, b"old"]
    for store, value in zip(stores, (b"new", b"old"), strict=True):
        assert await read(store, "k") == value
        assert store.cache_info()["cached_keys"] == 1
    return status


class Listener(logging.Handler):
    """Takes note of what is logged."""

    def __init__(self, said: list[object]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record)


async def several(store: CacheStore, number: int) -> None:
    """One round of the tasks of a busy loop."""
    await asyncio.gather(*(read(store, key) for key in VALUES))
    await store.set(f"l{number}", buf(b"y" * 30))
    await store.delete_dir(f"l{number}")


def arrive(packed: bytes, copies: int) -> dict[str, Any]:
    """Unpack copies of a store in another process and use them; tells what was found."""
    stores = [pickle.loads(packed) for _ in range(copies)]
    held = stores[0].cache_info()["current_size"]
    source = stores[0]._store
    for store in stores:
        work(store, source)
    return {
        "held": held,
        "engines": len({id(store._engine) for store in stores}),
        "equal": all(store == stores[0] for store in stores),
        "stats": [store.cache_stats() for store in stores],
        "options": [
            (store.max_size, store.max_age_seconds, store.cache_set_data, store.read_only)
            for store in stores
        ],
    }


if __name__ == "__main__":
    # Python says of every fork of a process with threads that it may deadlock. That is the question.
    warnings.simplefilter("ignore", DeprecationWarning)
    _, what, kind, children, directory = sys.argv
    if what == "fork":
        failures = fork_while_busy(kind, int(children), directory)
    else:
        failures = inherit() if what == "inherit" else unwind(directory)
    print(f"{failures} of {children} failed")
    sys.exit(bool(failures))
