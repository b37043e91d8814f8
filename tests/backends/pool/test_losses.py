"""Pools that have lost their index or their segments, or that have damaged bytes."""

from __future__ import annotations

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import MemoryStore

from directories import closed, complete, flip
from pools import KEYS, NEIGHBOURS, check_neighbour, neighbour, pool_with_neighbours, source_of
from support import buf, check_quiet, read, read_through, said
from zcache import CachePool, CacheStore, IndexRebuildTimeout, OptionValueError
from zcache._backends.pool import layout
from zcache._backends.pool.layout import SegmentScanner
from zcache._backends.pool.place import _forget_ended
from zcache._backends.pool.register import label_of, note_of
from zcache._core import Index, SegmentFiles, crc32c
from zcache._source.identity import EPHEMERAL
from zcache.testing import check_invariants, entries, set_block_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
HANGS = 30.0
"""Seconds after which something hangs."""


async def test_index_that_was_lost_is_rebuilt_from_the_headers(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    store = CacheStore(source_of(k=b"0123456789"), cache_store=pool, source_id="mine")
    await read_through(store, "k", RangeByteRequest(2, 5))
    before = {info.name: info.entries for info in pool.sources()}
    assert before == {**dict.fromkeys(NEIGHBOURS, len(KEYS)), "mine": 1}
    del pool, store
    await closed(tmp_path, "pool")
    # With the names of its users: values name their source themselves.
    shutil.rmtree(tmp_path / "pool/.zcache/index")
    pool = CachePool(tmp_path / "pool")
    source = source_of(k=b"0123456789")
    store = CacheStore(source, cache_store=pool, source_id="mine")
    assert await read(store, "k", RangeByteRequest(2, 5)) == b"234"
    assert source.take()["get"] == 0
    for name in NEIGHBOURS:
        empty = CacheStore(source_of(), cache_store=pool, source_id=name)
        await check_neighbour(empty, name)
    assert {info.name: info.entries for info in pool.sources()} == before
    await check_quiet(store)


async def test_value_that_a_rebuild_cannot_take_in_is_deleted(tmp_path: Path) -> None:
    """It would count towards no bound: here one that has a name that zcache gives to none."""
    set_block_size(None)
    size, name = 50 * PAGE, f"{label_of('mine')}/k".encode()
    store = CacheStore(
        source_of(k=bytes(size), other=bytes(size)),
        cache_store=pool_with_neighbours(tmp_path / "pool"),
        source_id="mine",
    )
    for key in ("k", "other"):
        assert await read_through(store, key) == bytes(size)
    del store
    await closed(tmp_path, "pool")
    (segment,) = (tmp_path / "pool/.zcache/segments").iterdir()
    held = segment.stat().st_blocks
    # The name in a header of 512 bytes, which has a checksum of what comes after that.
    at = segment.read_bytes().index(name) - 56
    with segment.open("r+b") as file:
        file.seek(at)
        header = bytearray(file.read(512))
        header[56 : 56 + len(name)] = b".zcache/".ljust(len(name), b"x")
        header[8:12] = crc32c(bytes(header[12:])).to_bytes(4, "little")
        file.seek(at)
        file.write(header)
    shutil.rmtree(tmp_path / "pool/.zcache/index")
    source = source_of()
    store = CacheStore(source, cache_store=CachePool(tmp_path / "pool"), source_id="mine")
    await complete(store)
    assert await read(store, "other") == bytes(size)
    assert await read(store, "k") is None
    assert source.take()["get"] == 1
    assert 512 * (held - segment.stat().st_blocks) >= size
    await check_quiet(store)


async def test_pool_whose_index_is_damaged_in_use_begins_empty(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    store = neighbour(pool, NEIGHBOURS[0])
    flip(tmp_path / "pool/.zcache/index/head", 200, 3)
    await check_neighbour(store, NEIGHBOURS[0])
    await complete(store)
    await check_neighbour(store, NEIGHBOURS[0])
    assert {info.name: info.entries for info in pool.sources()}[NEIGHBOURS[1]] == 0
    await check_quiet(store)


async def test_write_that_damage_hid_a_value_from_is_seen_by_all(tmp_path: Path) -> None:
    keys = [f"k/{number}" for number in range(12)]
    pool = CachePool(tmp_path / "pool")
    sources = {name: source_of(**dict.fromkeys(keys, b"old")) for name in "ABC"}
    stores = {
        name: CacheStore(source, cache_store=pool, source_id=name)
        for name, source in sources.items()
    }
    for store in stores.values():
        for key in keys:
            await read_through(store, key)
    with (tmp_path / "pool/.zcache/index/cells").open("r+b") as cells:
        cells.write(bytes(4096))
    store = stores["A"]
    for key in keys:
        await store.set(key, buf(b"new"))
    assert {await read(store, key) for key in keys} == {b"new"}
    await complete(store)
    assert {await read(store, key) for key in keys} == {b"new"}
    # One that begins anew, by the headers of the values alone.
    del pool, store, stores
    await closed(tmp_path, "pool")
    shutil.rmtree(tmp_path / "pool/.zcache/index")
    store = CacheStore(sources["A"], cache_store=CachePool(tmp_path / "pool"), source_id="A")
    assert {await read_through(store, key) for key in keys} == {b"new"}
    await check_quiet(store)


@pytest.mark.parametrize("name", ["texts", "table", "cells", "places"])
@pytest.mark.parametrize("how", ["forget", "invalidate", "clear_cache"])
async def test_what_is_forgotten_is_gone_though_the_index_is_damaged(
    tmp_path: Path, name: str, how: str
) -> None:
    keys = [f"k/{number}" for number in range(12)]
    pool = CachePool(tmp_path / "pool")
    source = source_of(**dict.fromkeys(keys, b"old"))
    store = CacheStore(source, cache_store=pool, source_id="A")
    for key in keys:
        await read_through(store, key)
    with (tmp_path / "pool/.zcache/index" / name).open("r+b") as file:
        # The table has two numbers of its own before the slots.
        file.seek(8)
        file.write(bytes(4096))
    for key in keys:
        await source.set(key, buf(b"new"))
    if how == "forget":
        pool.forget("A")
    elif how == "invalidate":
        await store.invalidate("")
    else:
        await store.clear_cache()
    assert {await read(store, key) for key in keys} == {b"new"}
    await complete(store)
    await store.drain()
    assert {await read(store, key) for key in keys} == {b"new"}
    await check_quiet(store)


@pytest.mark.parametrize("lost", [False, True])
async def test_value_that_was_damaged_is_read_from_the_source(tmp_path: Path, lost: bool) -> None:
    values = {f"c/{n}": bytes([n + 1]) * 5000 for n in range(6)}
    pool = CachePool(tmp_path / "pool")
    store = CacheStore(source_of(**values), cache_store=pool, source_id="mine")
    for key in values:
        await read_through(store, key)
    del pool, store
    await closed(tmp_path, "pool")
    for segment in (tmp_path / "pool/.zcache/segments").iterdir():
        data = bytearray(segment.read_bytes())
        for at in range(PAGE * 65, len(data), PAGE):
            data[at + 700] ^= 1
        segment.write_bytes(data)
    if lost:
        shutil.rmtree(tmp_path / "pool/.zcache/index")
    source = source_of(**values)
    store = CacheStore(source, cache_store=CachePool(tmp_path / "pool"), source_id="mine")
    for key, value in values.items():
        assert await read_through(store, key) == value
    assert source.take()["get"] == len(values)
    assert store.cache_stats()["damaged"] == len(values)
    await check_quiet(store)


async def test_segments_that_were_removed_cost_a_read_each(tmp_path: Path) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    store = neighbour(pool, NEIGHBOURS[0])
    for segment in (tmp_path / "pool/.zcache/segments").iterdir():
        segment.unlink()
    # A process that has them open goes on; the next one does not.
    pool._pool.directory.layout.scanner.files.close()
    await check_neighbour(store, NEIGHBOURS[0])
    await check_neighbour(store, NEIGHBOURS[0])
    assert store.cache_stats()["cache_failures"] == 0


async def test_copy_whose_holes_were_filled_is_within_the_bound_again(tmp_path: Path) -> None:
    set_block_size(None)
    pool = pool_with_neighbours(tmp_path / "pool", max_size=400 * PAGE)
    del pool
    await closed(tmp_path, "pool")
    segments = tmp_path / "copy/.zcache/segments"
    shutil.copytree(tmp_path / "pool", tmp_path / "copy")
    for segment in segments.iterdir():
        segment.write_bytes(segment.read_bytes())
    pool = CachePool(tmp_path / "copy", max_size=400 * PAGE)
    for name in NEIGHBOURS:
        store = CacheStore(source_of(), cache_store=pool, source_id=name)
        await complete(store)
        await check_neighbour(store, name)
    held = sum(512 * segment.stat().st_blocks for segment in segments.iterdir())
    assert held <= pool.cache_info()["current_size"]
    await check_quiet(store)


async def test_segments_of_an_older_copy_are_no_more_than_the_index_lists(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_block_size(None)
    bound, size = 400 * PAGE, 10 * PAGE
    segments = tmp_path / "pool/.zcache/segments"

    async def use(*keys: int) -> CacheStore:
        pool = CachePool(tmp_path / "pool", max_size=bound)
        source = source_of(**{f"c/{n}": bytes([n]) * size for n in range(60)})
        store = CacheStore(source, cache_store=pool, source_id="mine")
        for n in keys:
            assert await read_through(store, f"c/{n}") == bytes([n]) * size
        return store

    store = await use(*range(30))
    del store
    await closed(tmp_path, "pool")
    shutil.copytree(segments, tmp_path / "old")
    store = await use(*range(30, 60))
    await store.invalidate("c/1")
    del store
    await closed(tmp_path, "pool")
    shutil.rmtree(segments)
    shutil.copytree(tmp_path / "old", segments)
    store = await use()
    assert ["held more than its index lists" in message for message in said(caplog)] == [True]
    held = sum(512 * segment.stat().st_blocks for segment in segments.iterdir())
    assert held <= store.cache_info()["current_size"] <= bound
    for n in range(60):
        # Nothing that was overwritten since has come back.
        expected = bytes([n]) * size
        assert await read_through(store, f"c/{n}") == expected
    assert sum(512 * segment.stat().st_blocks for segment in segments.iterdir()) <= bound
    await check_quiet(store)


@pytest.mark.parametrize("how", ["write", "forget"])
async def test_value_that_cannot_be_deleted_never_comes_back(tmp_path: Path, how: str) -> None:
    pool = pool_with_neighbours(tmp_path / "pool")
    values = {"g/a": b"1" * 5000, "g/b": b"2" * 5000}
    store = CacheStore(
        source_of(**values), cache_store=pool, source_id="mine", cache_set_data=False
    )
    for key, value in values.items():
        assert await read_through(store, key) == value
    # A file system that makes no holes any more, as one that is full.
    scanner = pool._pool.directory.layout.scanner
    scanner.files = SegmentFiles(str(tmp_path / "pool/.zcache/segments"), holes=False)
    if how == "write":
        await store.set("g/a", buf(b"new"))
    else:
        pool.forget("mine")
    states = {entry.key: entry.state for entry in entries(store)}
    assert states["g/a"] == "delete-failed"
    check_invariants(store)
    del pool, store, scanner
    await closed(tmp_path, "pool")
    shutil.rmtree(tmp_path / "pool/.zcache/index")
    pool = CachePool(tmp_path / "pool")
    store = CacheStore(source_of(), cache_store=pool, source_id="mine")
    assert await read(store, "g/a") is None
    for name in NEIGHBOURS:
        await check_neighbour(CacheStore(source_of(), cache_store=pool, source_id=name), name)
    await check_quiet(store)


async def test_value_that_the_index_does_not_know_yet_is_dropped_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, label = pool_with_neighbours(tmp_path / "pool"), label_of("mine")
    store = CacheStore(source_of(**{"g/a": b"value"}), cache_store=pool, source_id="mine")
    assert await read_through(store, "g/a") == b"value"
    call = pool._pool.handle.call_blocking
    files = pool._pool.directory.layout.scanner.files  # type: ignore[union-attr]
    # As while a rebuild goes on.
    victims = call(Index.drop_missing, f"{label}/g/a")
    call(Index.confirm_deletes, [cell for cell, _ in victims], [])
    monkeypatch.setattr("zcache._backends.pool.backend.is_complete", lambda _: False)
    assert files.delete_below(label, True) == 1
    await store.invalidate("g")
    assert files.delete_below(label, True) == 0
    for name in NEIGHBOURS:
        assert files.delete_below(label_of(name), True) == len(KEYS)


async def test_scan_that_is_outdated_leaves_segments_that_others_have_begun(tmp_path: Path) -> None:
    pool = CachePool(tmp_path / "pool")
    store = CacheStore(source_of(a=b"value"), cache_store=pool, source_id="mine")
    assert await read_through(store, "a") == b"value"
    segments = tmp_path / "pool" / ".zcache" / "segments"
    # Begun since an index was complete again, and without a value that is valid yet.
    begun = segments / f"{1:016x}"
    begun.write_bytes(bytes(PAGE))
    # This scan was stopped before it had listed what there is: the index is not its to fill any more.
    outdated = SegmentScanner(str(tmp_path / "pool"), str(segments))
    outdated.rebuild(lambda: pool._pool.handle, "it was stopped")
    assert begun.exists()
    assert await read(store, "a") == b"value"
    assert store.cache_stats()["hits"] == 1


@pytest.fixture(params=["before the scan", "after the scan"])
def held_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The next rebuild stops there until `go` is set."""
    go, at_work = threading.Event(), threading.Event()
    rebuild, last = SegmentScanner.rebuild, 1 + (request.param == "after the scan")

    def hold(self: SegmentScanner, handle_of_now: Callable[[], Any], why: str) -> None:
        looks = 0

        def held() -> Any:
            nonlocal looks
            looks += 1
            if looks == last:
                at_work.set()
                assert go.wait(60)
            return handle_of_now()

        rebuild(self, held, why)

    monkeypatch.setattr(SegmentScanner, "rebuild", hold)
    monkeypatch.setattr("zcache._backends.directory.index.REBUILD_PATIENCE", 0.05)
    yield SimpleNamespace(go=go, at_work=at_work)
    go.set()


async def reopened(path: Path, held_up: Any) -> CachePool:
    """A pool of which the index is being rebuilt."""
    pool = pool_with_neighbours(path)
    del pool
    await closed(path.parent, path.name)
    shutil.rmtree(path / ".zcache/index")
    held_up.go.clear()
    held_up.at_work.clear()
    pool = CachePool(path)
    assert held_up.at_work.wait(60)
    return pool


async def test_sources_that_have_ended_are_not_waited_for_while_a_pool_is_rebuilt(
    tmp_path: Path, held_up: Any
) -> None:
    """It would stay in use after its last store. Who opens it next is rid of them."""
    held_up.go.set()
    place = (await reopened(tmp_path / "pool", held_up))._pool
    register, note = place.directory.register, note_of(f"{EPHEMERAL}1", "a source", 1.0)
    register.add(note)
    thread = threading.Thread(target=_forget_ended, args=(lambda: place,), daemon=True)
    thread.start()
    thread.join(HANGS)
    assert not thread.is_alive()
    assert note in register.names().values()
    held_up.go.set()
    place.while_complete(lambda: None)
    _forget_ended(lambda: place)
    assert note not in register.names().values()


def test_what_needs_all_values_begins_anew_where_a_rebuild_begins_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = CachePool(tmp_path / "pool")._pool
    # Before the first time, after it, and so on.
    answers = iter([True, False, False, True, True])
    monkeypatch.setattr("zcache._backends.pool.place.is_complete", lambda _: next(answers))
    found = iter(["a part", "all"])
    assert place.while_complete(lambda: next(found)) == "all"


def test_who_waits_for_a_rebuild_looks_whether_its_owner_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Any = CachePool(tmp_path / "pool")._pool
    looks: list[None] = []
    monkeypatch.setattr(place.directory.recovery, "reclaim_dead", lambda: looks.append(None))
    monkeypatch.setattr("zcache._backends.pool.place.is_complete", lambda _: bool(looks))
    monkeypatch.setattr("zcache._backends.pool.place.COMPLETE_TIMEOUT", HANGS)
    assert place.while_complete(lambda: "done") == "done"


async def test_forget_sources_and_export_wait_for_a_rebuild(tmp_path: Path, held_up: Any) -> None:
    held_up.go.set()
    pool = await reopened(tmp_path / "pool", held_up)
    gone, kept = NEIGHBOURS
    target = MemoryStore()
    with ThreadPoolExecutor() as workers:
        told = workers.submit(pool.sources)
        written = workers.submit(pool.export, kept, target)
        unknown = workers.submit(pool.forget, "none")
        forgotten = workers.submit(pool.forget, gone)
        calls = told, written, unknown, forgotten
        assert not any(call.done() for call in calls)
        held_up.go.set()
        assert written.result(60) == len(KEYS)
        assert isinstance(unknown.exception(60), OptionValueError)
        forgotten.result(60)
        # Before the one was forgotten or after it; their names were beside the index.
        assert {info.entries for info in told.result(60)} <= {len(KEYS), 0}
        assert any(info.entries for info in told.result())
    assert [info.entries for info in pool.sources()] == [len(KEYS)]
    await check_neighbour(CacheStore(source_of(), cache_store=pool, source_id=kept), kept)
    store = CacheStore(source_of(), cache_store=pool, source_id=gone)
    assert await read(store, KEYS[0]) is None
    await check_quiet(store)
    # Nor by the next one.
    del pool, store, calls, told, written, unknown, forgotten
    await closed(tmp_path, "pool")
    shutil.rmtree(tmp_path / "pool/.zcache/index")
    pool = CachePool(tmp_path / "pool")
    assert [info.entries for info in pool.sources()] == [len(KEYS)]


async def test_forget_sources_and_export_name_a_rebuild_that_takes_too_long(
    tmp_path: Path, held_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up.go.set()
    pool = await reopened(tmp_path / "pool", held_up)
    monkeypatch.setattr("zcache._backends.pool.place.COMPLETE_TIMEOUT", 0.05)
    name = NEIGHBOURS[0]
    for call in (
        pool.sources,
        partial(pool.forget, name),
        partial(pool.export, name, MemoryStore()),
    ):
        with pytest.raises(
            IndexRebuildTimeout, match=r"pool.*being rebuilt after 0\.05 s.*try again"
        ):
            await asyncio.to_thread(call)
    monkeypatch.undo()
    held_up.go.set()
    assert [info.entries for info in pool.sources()] == [len(KEYS)] * 2


def test_scan_leaves_segments_that_were_begun_after_it_was_asked_about(tmp_path: Path) -> None:
    """Then another index may have been made: this scan does not know what it holds."""
    begun = tmp_path / f"{1:016x}"

    class Asked:
        limits: ClassVar[dict[str, int]] = {}

        def call_opened(self, step: object, *_: object, timeout: object) -> bool | None:
            if step is not layout._owns_rebuild:
                return None
            begun.write_bytes(bytes(PAGE))
            return True

    handle: Any = Asked()
    SegmentScanner(str(tmp_path), str(tmp_path)).rebuild(lambda: handle, "it was lost")
    assert begun.exists()
