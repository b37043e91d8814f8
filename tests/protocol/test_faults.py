"""A cache failure is never a user failure: whatever the cache store does, the source's bytes are read."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from doubles import DictStore, FaultyStore, SyncDictStore
from support import (
    PROTOTYPE,
    buf,
    check_quiet,
    check_same,
    drained,
    largest_file,
    logged,
    read,
    read_through,
    until,
    write,
)
from zcache import CachePool, CacheStore
from zcache.testing import FakeClock, StoreDouble, check_invariants_async, entries

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path


class LibraryError(Exception):
    """An error of a library's own."""

    def __init__(self, code: int, *, retry: bool) -> None:
        super().__init__(f"code {code}, retry {retry}")


ERRORS: dict[str, Callable[[], Exception]] = {
    **{
        name: lambda name=name: OSError(getattr(errno, name), os.strerror(getattr(errno, name)))  # type: ignore[misc]
        for name in (
            *("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "EMFILE", "ESTALE", "ENOENT"),
            *("EISDIR", "ENOTDIR", "ENAMETOOLONG", "EEXIST", "EINVAL", "ENOTEMPTY"),
        )
    },
    "time-out": TimeoutError,
    "library": lambda: LibraryError(503, retry=True),
    "key": lambda: KeyError("k"),
    "value": lambda: ValueError("no such thing"),
    "text": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "memory": MemoryError,
    "runtime": lambda: RuntimeError("cannot schedule new futures after shutdown"),
    "group": lambda: ExceptionGroup("several", [OSError(5, "a"), ValueError("b")]),
}
SOURCE = {f"{d}{n}": bytes([n]) * (10 + n) for d in ("", "d/") for n in range(4)}
REQUESTS = (None, RangeByteRequest(2, 7), OffsetByteRequest(4), SuffixByteRequest(3))


@pytest.fixture
def pause() -> FakeClock:
    """The clock by which a failing cache store is left alone."""
    return FakeClock()


FAILURES_TO_OPEN = 5
"""Failures in a row that open the circuit breaker."""


async def all_read(store: CacheStore) -> None:
    """Assert that every value is what it is in the beginning."""
    for key, value in SOURCE.items():
        assert await read_through(store, key) == value


async def use(store: CacheStore, source: DictStore, *, sync: bool = False) -> None:
    """Read, write and delete in turn; assert that it does what the source alone would do."""

    async def check(key: str) -> None:
        for request in REQUESTS:
            expected = await read(source, key, request)
            if sync:
                value = store.get_sync(key, byte_range=request)
                await drained(store)
                assert (None if value is None else value.to_bytes()) == expected
            else:
                assert await read_through(store, key, request) == expected
        assert await store.exists(key) == (key in source.values)
        found = await store.get_partial_values(PROTOTYPE, [(key, r) for r in REQUESTS])
        assert [v and v.to_bytes() for v in found] == [await read(source, key, r) for r in REQUESTS]

    for key in list(SOURCE):
        await check(key)
        await check(key)
    for n, key in enumerate(list(SOURCE)):
        value = buf(bytes([65 + n]) * (30 - 2 * n))
        if sync:
            store.set_sync(key, value)
        else:
            await store.set(key, value)
        await drained(store)
        await check(key)
    if sync:
        store.delete_sync("0")
    else:
        await store.delete("0")
    await store.delete_dir("d")
    await store.set_if_not_exists("1", buf(b"unused"))
    for key in SOURCE:
        await check(key)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["get", "set", "delete", "exists", "all"])
async def test_cache_store_that_raises_any_error_costs_no_read(
    operation: str, when: str, sync: bool, pause: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    for name, error in ERRORS.items():
        for often in (2, 10**6):
            source, cache = SyncDictStore(SOURCE), FaultyStore()
            store = CacheStore(source, cache_store=cache, max_size=100, clock=pause)
            left = often

            def plan(at: str, _: str, now: str, error: Any = error) -> Any:
                nonlocal left
                if now == when and operation in (at, "all") and left > 0:
                    left -= 1
                    return error()
                return None

            cache.plan = plan
            await use(store, source, sync=sync)
            assert cache.peak <= 100
            stats = store.cache_stats()
            # A delete that fails after its effect is found out to have had it.
            if operation != "exists" and (operation, when) != ("delete", "after"):
                assert stats["cache_failures"] > 0, name
            # It recovers: what could not be deleted is deleted, and the books are right.
            left = 0
            pause.advance(1000)
            await read_through(store, "1")
            await check_same(store, source, cache)
            before = store.cache_stats()["hits"]
            await read_through(store, "2")
            await read_through(store, "2")
            assert store.cache_stats()["hits"] > before
    assert {record.levelno for record in logged(caplog)} <= {logging.DEBUG, 20, logging.WARNING}


@pytest.mark.parametrize("seed", range(10))
async def test_random_faults_leave_the_index_equal_to_the_cache_store(
    seed: int, pause: FakeClock
) -> None:
    """One operation of the cache store in three fails, before or after its effect."""
    chance = random.Random(seed)
    source, cache = SyncDictStore(SOURCE), FaultyStore()
    store = CacheStore(source, cache_store=cache, max_size=80, clock=pause)
    errors = list(ERRORS.values())
    cache.plan = lambda *_: chance.choice(errors)() if chance.random() < 0.3 else None
    for _ in range(6):
        pause.advance(100)
        keys = list(SOURCE)
        tasks = [read(store, chance.choice(keys), chance.choice(REQUESTS)) for _ in range(30)]
        tasks += [store.set(k, buf(bytes(chance.randrange(40)))) for k in chance.sample(keys, 4)]
        tasks += [store.delete(chance.choice(keys)), store.delete_dir("d")]
        await asyncio.gather(*tasks)
        await check_invariants_async(store, held=cache.sizes)
        for key in keys:
            assert await read_through(store, key) == source.values.get(key)
        assert cache.peak <= 80
    assert cache.faults > 20
    cache.plan = lambda *_: None
    pause.advance(1000)
    await check_same(store, source, cache)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
async def test_delete_of_unknown_outcome_stays_counted(
    error: Callable[[], BaseException], pause: FakeClock
) -> None:
    """Whatever the errors say, the bytes may be there: they count."""
    source, cache = SyncDictStore({"a": b"12345"}), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    await read_through(store, "a")
    cache.plan = lambda operation, *_: None if operation == "set" else error()
    await store.delete("a")
    assert store.cache_info()["current_size"] == cache.total == 5
    cache.plan = lambda *_: None
    pause.advance(1000)
    await check_same(store, source, cache)


def damage_file(path: Path, new: bytes | None) -> None:
    """Change a file as a failing disk does: it still looks like ours."""
    times = path.stat()
    path.unlink()
    if new is not None:
        path.write_bytes(new)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("kind", ["memory", "directory", "another"])
@pytest.mark.parametrize("damage", ["vanish", "shrink", "grow", "empty"])
async def test_value_that_vanished_or_changed_its_length_is_read_anew(
    kind: str, damage: str, verify: Any, tmp_path: Path
) -> None:
    source = SyncDictStore(SOURCE)
    cache: Any = {"memory": MemoryStore, "another": SyncDictStore}.get(kind, lambda: None)()
    cache = cache or LocalStore(tmp_path / "cache")
    store = CacheStore(source, cache_store=cache, max_size=400, verify=verify)
    for key in SOURCE:
        await read_through(store, key)
    for key, value in SOURCE.items():
        new = {"vanish": None, "shrink": value[:-1], "grow": value + b"!", "empty": b""}[damage]
        if kind == "memory":
            cache._store_dict.pop(key)
            if new is not None:
                cache._store_dict[key] = buf(new)
        elif kind == "another":
            cache.do_set(key, new)
        else:
            damage_file(tmp_path / "cache" / key, new)
    for request in REQUESTS[::-1]:
        for key in SOURCE:
            assert await read_through(store, key, request) == await read(source, key, request)
    stats = store.cache_stats()
    assert 0 < stats["damaged"] <= len(SOURCE)
    assert stats["cache_failures"] == 0
    await check_invariants_async(store)
    for key in SOURCE:
        assert await read_through(store, key) == source.values[key]


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("kind", ["directory", "pool", "another"])
@pytest.mark.parametrize("sizes", [(300, 300, 300), (300, 900, 300)])
async def test_read_that_was_overtaken_drops_no_newer_value(
    sizes: tuple[int, ...], kind: str, verify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: Any = {"directory": LocalStore, "pool": CachePool}.get(kind, lambda _: SyncDictStore())
    store = CacheStore(
        SyncDictStore(), cache_store=cache(tmp_path / "cache"), source_id="source", verify=verify
    )
    backend, hits = store._cache.backend, store._hits
    values = [bytes([n]) * size for n, size in enumerate(sizes)]
    await write_through(store, values[0])
    # Only what has to wait can be overtaken.
    monkeypatch.setattr(hits, "_try_read", None)
    monkeypatch.setattr(hits, "_look_up", hits._look_up_alone)
    read_value, intact_size = backend.read, backend.intact_size

    async def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(backend, "read", read_value)
        await write_through(store, values[1])
        return None

    async def again(*args: Any) -> int | None:
        size = await intact_size(*args)
        await write_through(store, values[2])
        return size

    monkeypatch.setattr(backend, "read", overtaken)
    monkeypatch.setattr(backend, "intact_size", again)
    index = backend.index
    assert await read(store, "k") in values[1:]
    assert backend.index is index
    assert store.is_cached("k")
    assert store.cache_stats()["damaged"] == 0
    await check_invariants_async(store)


async def write_through(store: CacheStore, value: bytes) -> None:
    await write(store, "k", value)
    await drained(store)
    # What tells two values of one size is the millisecond of their fetch.
    now = store._hits.now()
    await until(lambda: store._hits.now() > now + 0.001)


class Confused(SyncDictStore):
    """Gives something else for each value."""

    answer: Any = None

    def do_get(self, key: str, *args: Any) -> Any:
        return None if super().do_get(key, *args) is None else self.answer


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("verify", ["first", "never"])
@pytest.mark.parametrize("answer", [b"0123456789", "0123456789", [1] * 10, 12345, object()])
async def test_value_of_a_wrong_type_is_read_anew(answer: object, verify: Any, sync: bool) -> None:
    source, cache = SyncDictStore({"k": b"0123456789"}), Confused()
    cache.answer = answer
    store = CacheStore(source, cache_store=cache, verify=verify)
    for _ in range(8):
        found = store.get_sync("k") if sync else await store.get("k", PROTOTYPE)
        await drained(store)
        assert found is not None
        assert found.to_bytes() == b"0123456789"
    assert store.cache_stats()["cache_failures"] > 0


@pytest.mark.parametrize("operation", ["get", "set", "delete", "all"])
async def test_cache_store_that_raises_cancelled_error_cancels_no_caller(operation: str) -> None:
    """That is a failure of the cache store, and no cancellation of its caller."""

    class Timed(DictStore):
        async def before(self, at: str, key: str) -> None:
            if operation in (at, "all"):
                raise asyncio.CancelledError("too late")

    source = DictStore(SOURCE)
    store = CacheStore(source, cache_store=Timed(), max_size=30)
    for _ in range(3):
        await all_read(store)
    await write(store, "1", b"new")
    assert await read_through(store, "1") == b"new"
    await store.delete("1")
    assert await read_through(store, "1") is None
    assert store.cache_stats()["cache_failures"] > 0
    await check_invariants_async(store)


async def test_cache_store_that_cancels_its_own_task_cancels_no_reader() -> None:
    """As a cancel scope of another library may, which no one has asked to."""

    class Cancelling(DictStore):
        cancels = False

        async def get(self, *args: Any) -> Any:
            task = asyncio.current_task()
            if self.cancels and task is not None:
                task.cancel()
                await asyncio.sleep(0)
            return await super().get(*args)

    cache = Cancelling()
    store = CacheStore(DictStore(SOURCE), cache_store=cache)
    await all_read(store)
    cache.cancels = True
    await all_read(store)
    assert store.cache_stats()["cache_failures"] > 0
    await check_invariants_async(store)


async def test_source_and_cache_store_that_both_fail_raise_the_sources_error(
    pause: FakeClock,
) -> None:
    """Where both fail, the error is the source's own, and it is not kept."""
    source, cache = FaultyStore(SOURCE), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    await read_through(store, "1")
    error = LibraryError(500, retry=False)
    cache.plan = lambda *_: OSError(errno.EIO, "the cache")
    source.plan = lambda *_: error
    works: list[Callable[[], Awaitable[object]]] = [
        lambda: read(store, "1"),
        lambda: read(store, "2", REQUESTS[1]),
        lambda: store.set("1", buf(b"new")),
        lambda: store.delete("1"),
        lambda: store.delete_dir("d"),
        store.clear,
    ]
    for work in works:
        with pytest.raises(LibraryError) as caught:
            await work()
        assert caught.value is error
    source.plan = cache.plan = lambda *_: None
    pause.advance(1000)
    await check_same(store, source, cache)


# ---------------------------------------------------------------------- leaving it alone


async def test_hit_that_cannot_be_read_now_is_a_miss_and_stays_cached() -> None:
    source, cache = (StoreDouble(MemoryStore()) for _ in range(2))
    await source.inner.set("k", buf(b"value"))
    clock = FakeClock()
    store = CacheStore(source, cache_store=cache, clock=clock)
    assert await read_through(store, "k") == b"value"
    cache.fail("get", TimeoutError("late"), times=1)
    source.take()
    assert await read(store, "k") == b"value"
    assert source.take()["get"] == 1
    assert (store.cache_stats()["hits"], store.cache_stats()["misses"]) == (0, 2)
    assert [entry.key for entry in entries(store)] == ["k"]
    # Once the circuit breaker lets one through.
    clock.advance(60)
    assert await read(store, "k") == b"value"
    assert source.take()["get"] == 0
    await check_quiet(store)


async def test_circuit_breaker_logs_repeated_failures_once(
    pause: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk takes a value whenever another has gone."""
    caplog.set_level(logging.INFO, logger="zcache")
    cache = FaultyStore()
    store = CacheStore(DictStore(SOURCE), cache_store=cache, clock=pause)
    for at in range(10):
        cache.plan = lambda *_: OSError(errno.ENOSPC, "full")
        for _ in range(FAILURES_TO_OPEN):
            await all_read(store)
        cache.plan = lambda *_: None
        pause.advance(5)
        await store.clear_cache()
        await all_read(store)
        said = [record.levelno for record in logged(caplog)]
        assert said == [logging.WARNING, logging.INFO], at


async def test_circuit_breaker_opens_on_repeated_failures_and_probes(
    pause: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="zcache")
    source, cache = DictStore(SOURCE), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    cache.plan = lambda *_: OSError(errno.EIO, "gone: s3://me:hush@bucket/k?sig=hush")

    def warnings() -> int:
        return sum(record.levelno == logging.WARNING for record in logged(caplog))

    async def attempts() -> int:
        before = cache.counts.total()
        for _ in range(3):
            await all_read(store)
        return cache.counts.total() - before

    assert 0 < await attempts() < 3 * len(SOURCE)
    assert warnings() == 1
    assert "the cache store FaultyStore failed: " in logged(caplog)[0].getMessage()
    assert "gone: s3://bucket/k" in caplog.text
    assert "hush" not in caplog.text
    # Now it is left alone, then tried again; each time it fails it is left alone for longer.
    for pauses in (1, 2, 4, 8, 16, 32, 60, 60):
        assert await attempts() == 0
        pause.advance(pauses - 0.01)
        assert await attempts() == 0
        pause.advance(0.02)
        assert 0 < await attempts() <= FAILURES_TO_OPEN
    stats = store.cache_stats()
    assert FAILURES_TO_OPEN < stats["cache_failures"] <= cache.faults
    assert stats["cache_skips"] > 0
    assert stats["hits"] == 0
    assert warnings() == 1
    # It works again: that is said, and the next time it fails as well.
    cache.plan = lambda *_: None
    pause.advance(61)
    assert await attempts() > 0
    assert store.cache_stats()["hits"] > 0
    assert logged(caplog)[-1].levelno == logging.INFO
    cache.plan = lambda *_: OSError(errno.EIO, "gone again")
    await attempts()
    assert warnings() == 2
    for record in logged(caplog):
        assert record.name == "zcache"


@pytest.mark.parametrize("operation", ["get", "set", "delete"])
async def test_circuit_breaker_opens_for_one_kind_of_operation(
    operation: str, pause: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full, or that cannot be read: what still works is still used."""
    source, cache = SyncDictStore(SOURCE), FaultyStore()
    max_size = 4 * 13 if operation == "delete" else 1000
    store = CacheStore(source, cache_store=cache, max_size=max_size, clock=pause)
    for key in list(SOURCE)[: 8 if operation == "get" else 4]:
        await read_through(store, key)
    cache.plan = lambda at, *_: OSError(errno.ENOSPC, "no") if at == operation else None
    attempts = []
    for _ in range(6):
        before = cache.counts[operation]
        for _ in range(4):
            await all_read(store)
        attempts.append(cache.counts[operation] - before)
    assert sum(attempts[1:]) == 0 < attempts[0] < 20
    assert sum(record.levelno == logging.WARNING for record in logged(caplog)) == 1
    assert store.cache_stats()["cache_skips"] > 0
    hits = store.cache_stats()["hits"]
    await all_read(store)
    if operation == "set":
        assert store.cache_stats()["hits"] > hits
    cache.plan = lambda *_: None
    pause.advance(100)
    await check_same(store, source, cache)
    before = store.cache_stats()["hits"]
    await read_through(store, "3")
    await read_through(store, "3")
    assert store.cache_stats()["hits"] > before


async def test_circuit_breaker_stays_closed_when_every_key_is_refused(
    pause: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors of keys say nothing about others, however many there are."""
    source, cache = DictStore({str(n): b"x" for n in range(500)}), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    cache.plan = lambda *_: ValueError("whatever it is")
    for key in source.values:
        assert await read_through(store, key) == b"x"
    assert store.cache_stats()["cache_skips"] == 0
    assert sum(record.levelno == logging.WARNING for record in logged(caplog)) <= 1
    cache.plan = lambda *_: None
    pause.advance(100)
    await check_same(store, source, cache)


async def test_circuit_breaker_counts_a_burst_of_failures_once(pause: FakeClock) -> None:
    """What was under way when the pause began is no news about the store."""
    source, cache = DictStore({f"{n}": b"x" for n in range(200)}), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    down = asyncio.Event()

    async def before(operation: str, key: str) -> None:
        await down.wait()
        raise TimeoutError

    cache.before = before  # type: ignore[method-assign]
    reads = [asyncio.create_task(read(store, key)) for key in source.values]
    await until(lambda: cache.counts.total() > FAILURES_TO_OPEN)
    down.set()
    assert await asyncio.gather(*reads) == [b"x"] * 200
    await drained(store)
    del cache.before
    pause.advance(1.01)
    await read_through(store, "0")
    assert store.cache_info()["cached_keys"] > 0


async def test_circuit_breaker_stays_closed_for_errors_of_one_key(pause: FakeClock) -> None:
    source, cache = DictStore(SOURCE), FaultyStore()
    store = CacheStore(source, cache_store=cache, clock=pause)
    error = OSError(errno.ENAMETOOLONG, "too long")
    cache.plan = lambda at, key, _: error if at == "set" and key.startswith("d/") else None
    for _ in range(5):
        await all_read(store)
    stats = store.cache_stats()
    assert stats["cache_skips"] == 0
    assert stats["hits"] == 4 * 4
    # A value that was refused is not tried at each read.
    assert 0 < stats["cache_failures"] <= FAILURES_TO_OPEN
    assert cache.total == store.cache_info()["current_size"]


# -------------------------------------------------------------------- file systems

NAMES = {
    "long_name": "n" * 300,
    "long_for_a_suffix": "n" * 240,
    "long_path": "/".join(["d" * 100] * 60),
    "many_parts": "d/" * 500_000 + "x",
    "parent": "../escape",
    "parent_inside": "x/../../escape",
    "only_parent": "..",
    "dot": ".",
    "empty": "",
    "absolute": "{outside}/escape",
    "twice": "//escape",
    "trailing": "x/",
    "nul": "x\0y",
    "surrogate": "x\udcff",
    "reserved": ".zcache/escape",
    "reserved_stamp": ".zcache/stamp.json",
    "reserved_itself": ".zcache",
}


INTERNAL = (".zcache/stamp", ".zcache/index", ".zcache/tmp")


def tree(path: Path) -> Iterator[tuple[str, bytes]]:
    for found in sorted(path.rglob("*")):
        if found.is_file():
            yield found.relative_to(path).as_posix(), found.read_bytes()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
async def test_key_that_a_directory_cannot_hold_is_never_cached(name: str, tmp_path: Path) -> None:
    name = name.format(outside=tmp_path)
    source, root = DictStore({name: b"old", "plain": b"p"}), tmp_path / "inside" / "cache"
    store = CacheStore(source, cache_store=LocalStore(root))
    assert await read_through(store, "plain") == b"p"
    stamp = dict(tree(root)).get(".zcache/stamp.json")
    for value in (b"old", b"new"):
        for request in (*REQUESTS, *REQUESTS):
            expected = await read(source, name, request)
            assert await read_through(store, name, request) == expected
        [found] = await store.get_partial_values(PROTOTYPE, [(name, None)])
        assert found is not None
        assert found.to_bytes() == value
        await write(store, name, b"new")
        assert source.values[name] == b"new"
    assert store.cache_stats()["cache_skips"] == 0
    assert await read_through(store, "plain") == b"p"
    # What is not there takes no room.
    held = sum(len(value) for path, value in tree(root) if not path.startswith(INTERNAL))
    assert store.cache_info()["current_size"] == held
    await store.delete(name)
    assert await read_through(store, name) is None
    await store.delete_dir(name)
    # Nothing is left of it, and nothing lies outside.
    files = dict(tree(tmp_path))
    assert all(path.startswith("inside/cache/") for path in files), files
    assert not [path for path in files if "escape" in path], files
    assert b"new" not in files.values()
    assert dict(tree(root)).get(".zcache/stamp.json") == stamp
    assert await read_through(store, "plain") == (b"p" if "plain" in source.values else None)


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "d" * 250 + f"/{'d' * 250}" * 17, "plain/below", "\udcff"],
    ids=["long", "path", "below", "text"],
)
async def test_key_that_a_store_cannot_hold_takes_no_room(name: str, tmp_path: Path) -> None:
    """What can never have been written takes no room for ever."""
    source = DictStore({"plain": b"p", name: b"value"})
    cache = WrapperStore(LocalStore(tmp_path))
    store = CacheStore(source, cache_store=cache, max_size=10, source_id="s")
    await drained(store)  # It has to be listed before it takes anything in.
    for _ in range(3):
        for key, value in source.values.items():
            assert await read_through(store, key) == value
    assert store.cache_info()["current_size"] == store.cache_info()["cached_keys"] == 1
    assert store.cache_stats()["cache_skips"] == 0


@pytest.mark.parametrize("kind", ["dict", "store", "directory", "pool", "pool_in_memory"])
@pytest.mark.parametrize("length", [4001, 1_000_001], ids=["limit", "far"])
async def test_key_that_is_longer_than_any_path_is_never_cached(
    kind: str, length: int, tmp_path: Path
) -> None:
    key = "d/" * (length // 2) + "x"
    source = DictStore({"plain": b"p", key: b"value"})
    cache_store = {
        "dict": lambda: None,
        "store": DictStore,
        "directory": lambda: LocalStore(tmp_path),
        "pool": lambda: CachePool(tmp_path),
        "pool_in_memory": lambda: CachePool(max_size=2**20),
    }[kind]()
    store = CacheStore(source, cache_store=cache_store, source_id="s", cache_missing=True)
    await drained(store)
    assert await read_through(store, "plain") == b"p"
    for value in (b"value", b"new"):
        for request in (*REQUESTS, *REQUESTS):
            assert await read_through(store, key, request) == await read(source, key, request)
        [found] = await store.get_partial_values(PROTOTYPE, [(key, None)])
        assert found is not None
        assert found.to_bytes() == value
        assert await store.exists(key)
        assert [name async for name in store.list_dir(key[:-2])] == ["x"]
        assert [name async for name in store.list_prefix(key[:-1])] == [key]
        await write(store, key, b"new")
    assert await store.invalidate(key[:-2]) == 0
    await store.delete(key)
    assert await read_through(store, key) is None
    await write(store, key, b"again")
    await store.delete_dir(key[:-2])
    assert source.values.keys() == {"plain"}
    await drained(store)
    assert list(store.cached_keys()) == ["plain"]
    await check_invariants_async(store)


async def test_key_of_the_longest_length_is_served_with_its_ranges(tmp_path: Path) -> None:
    key = "d/" * 1999 + "xy"
    source = DictStore({key: b"value"})
    store = CacheStore(source, cache_store=LocalStore(tmp_path), source_id="s")
    ranges = [RangeByteRequest(0, 4), RangeByteRequest(1_000_000_000, 2_000_000_000), None]
    for request in ranges:
        assert await read_through(store, key, request) == await read(source, key, request)
    asked = source.counts["get"]
    for request in (ranges[0], ranges[2]):
        assert await read(store, key, request) == (b"value"[:4] if request else b"value")
    assert source.counts["get"] == asked
    assert store.cache_stats()["cache_failures"] == 0
    assert await store.invalidate() >= 2


@pytest.mark.parametrize("order", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a")])
async def test_key_that_is_also_a_directory_is_read_right(
    order: tuple[str, str], tmp_path: Path
) -> None:
    source = DictStore({key: key.encode() * 5 for key in order})
    store = CacheStore(source, cache_store=LocalStore(tmp_path))
    for key in (*order, *order):
        for request in REQUESTS:
            assert await read_through(store, key, request) == await read(source, key, request)
    for key in order:
        await write(store, key, b"new " + key.encode())
        for other in order:
            assert await read_through(store, other) == source.values[other]
    assert store.cache_info()["cached_keys"] >= 1
    assert store.cache_stats()["cache_skips"] == 0
    await store.delete(order[0])
    for _ in range(2):
        assert await read_through(store, order[1]) == source.values[order[1]]
    await check_invariants_async(store)


async def test_directory_write_that_ends_half_way_leaves_nothing(
    tmp_path: Path, pause: FakeClock
) -> None:
    source = DictStore(SOURCE)
    store = CacheStore(source, cache_store=LocalStore(tmp_path), max_size=1000, clock=pause)
    await read_through(store, "1")
    with largest_file(6):
        for key in (*SOURCE, *SOURCE):
            assert await read_through(store, key) == SOURCE[key]
        await write(store, "2", b"written")
        assert await read_through(store, "2") == b"written"
    assert store.cache_stats()["cache_failures"] > 0
    values = {key for key, _ in tree(tmp_path) if not key.startswith(".zcache/index")}
    assert values == {"1", ".zcache/stamp.json"}
    assert store.cache_info()["current_size"] == len(SOURCE["1"])
    pause.advance(1000)
    assert await read_through(store, "3") == SOURCE["3"]
    assert (tmp_path / "3").read_bytes() == SOURCE["3"]
    await check_quiet(store)


@pytest.mark.parametrize("damage", ["all", "values", "directories", "files"])
async def test_directory_damaged_by_others_is_read_right(damage: str, tmp_path: Path) -> None:
    source, root = DictStore(SOURCE), tmp_path / "cache"
    store = CacheStore(source, cache_store=LocalStore(root), max_size=1000)
    for key in SOURCE:
        await read_through(store, key)
    if damage == "all":
        shutil.rmtree(root)
    elif damage == "values":
        for key in SOURCE:
            (root / key).unlink()
    else:
        for key in SOURCE:
            (root / key).unlink()
            if damage == "directories":
                (root / key).mkdir()
            elif not key.startswith("d/"):
                (root / key).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"not ours")
    for _ in range(3):
        await all_read(store)
        await write(store, "1", SOURCE["1"])
    assert (tmp_path / "elsewhere").read_bytes() == b"not ours"
    await check_invariants_async(store)
