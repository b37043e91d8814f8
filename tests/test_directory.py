"""A cache directory outlives its process: what survives, and how full its volume gets."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from directory_support import open_store, reads, tree
from support import CountingStore, FaultyStore, buf, check_books, fill, held, read
from zcache import CacheStore, _books, _files, _ports
from zcache._directory import Directory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import Store

pytestmark = pytest.mark.filterwarnings("error")

# -------------------------------------------------------------------------- restarts


async def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """Values, ranges, sizes, checksums, and who goes first."""
    store = open_store(tmp_path, cache_set_data=False)
    values = {f"a/c/{number}": bytes([number]) * 10 for number in range(6)}
    for key, value in values.items():
        await store.set(key, buf(value))
    for key in values:
        await read(store, key)
    await store.set("b", buf(b"0123456789"))
    for request in (RangeByteRequest(2, 4), OffsetByteRequest(7), SuffixByteRequest(1)):
        await read(store, "b", request)
    await read(store, "a/c/0")
    recency = store._engine.index.recency()
    info = store.cache_info()
    del store

    store = open_store(tmp_path)
    assert store._engine.index.recency() == recency
    assert store.cache_info() | {"cache_set_data": False} == info
    for key, value in values.items():
        assert await read(store, key) == value
    assert await read(store, "b", RangeByteRequest(2, 4)) == b"23"
    assert await read(store, "b", OffsetByteRequest(7)) == b"789"
    assert await read(store, "b", SuffixByteRequest(1)) == b"9"
    assert reads(store) == 0
    check_books(store)
    for key in ("a/c/0", "a/c/2"):
        await read(store, key)
    del store

    store = open_store(tmp_path, max_size=24)
    # Less than there is: that is enforced before anything new is written.
    await store.set("new", buf(bytes(4)))
    assert held(store._cache) == {"a/c/0": 10, "a/c/2": 10, "new": 4}
    check_books(store)


async def test_the_cache_can_be_read_as_zarr(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.set("a/zarr.json", buf(b"{}"))
    assert await read(LocalStore(tmp_path / "cache"), "a/zarr.json") == b"{}"


async def test_ages_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over restarts, rebuilt indexes and steps of the clock."""
    now = 1_700_000_000.0
    monkeypatch.setattr(_books.time, "time", lambda: now)
    store = open_store(tmp_path, max_age_seconds=100)
    await fill(store, a=b"1")
    now += 60
    await fill(store, b=b"2")
    for rebuilt in (False, True):
        del store
        if rebuilt:
            shutil.rmtree(tmp_path / "cache/.zcache/index")
        store = open_store(tmp_path, max_age_seconds=100)
        assert await store.getsize("a") == 1
        assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
        assert reads(store) == 0
    now += 40  # 100 for one, 40 for the other
    assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(store) == 1
    now -= 5000
    del store
    store = open_store(tmp_path, max_age_seconds=100)
    # From a future that never was: nobody knows how old they are.
    assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(store) == 2
    assert [await read(store, key) for key in "ab"] == [b"1", b"2"]
    assert reads(store) == 0
    check_books(store)


async def test_a_rebuild_knows_the_order_of_the_fetches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    for number in (2, 0, 1):
        await store.set(f"a/c/{number}", buf(bytes(10)))
        await asyncio.sleep(0.002)
    await read(store, "a/c/2", None)
    await store.set("b", buf(b"0123456789"))
    del store
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    store = open_store(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "4 values, 40 bytes" in caplog.text
    assert [key for key, _ in store._engine.index.recency()] == ["a/c/2", "a/c/0", "a/c/1", "b"]
    assert await read(store, "a/c/1") == bytes(10)
    assert reads(store) == 0
    check_books(store)


async def change(store: CacheStore, what: str, keys: Iterable[str]) -> None:
    if what == "clear_cache":
        await store.clear_cache()
    for key in () if what == "clear_cache" else keys:
        if what == "set":
            await store.set(key, buf(b"new!"))
        else:
            await (store.delete(key) if what == "delete" else store.delete_dir(key.split("/")[0]))


@pytest.mark.parametrize("what", ["set", "delete", "delete_dir", "clear_cache"])
async def test_what_changes_while_an_index_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The walk has found a value and its ranges; they go before they are entered."""
    store = open_store(tmp_path)
    source = LocalStore(tmp_path / "source")
    await source.set("b/c/0", buf(b"0123"))
    keys = ["a/c/0", "a/c/1", "d"]
    for key in keys:
        await store.set(key, buf(b"old"))
    for request in (RangeByteRequest(0, 2), RangeByteRequest(1, 3)):
        await read(store, "b/c/0", request)
    go, walked = threading.Event(), threading.Event()
    walk = _files.walk

    def slow(root: str, pending: Any, below: str | None = None) -> Any:
        found = list(walk(root, pending, below))
        if below is None:
            walked.set()
            assert go.wait(60)
        return found

    monkeypatch.setattr(_files, "walk", slow)
    store._engine.books.doubt()
    assert await asyncio.to_thread(walked.wait, 60)
    await change(store, what, ["a/c/0", "b/c/0"])
    go.set()
    for _ in range(5000):
        if store._engine.index.is_complete:
            break
        await asyncio.sleep(0.001)
    for key in [*keys, "b/c/0"]:
        assert await read(store, key) == await read(source, key)
    # What the walk had found of them counts until it is seen that it is gone, at later writes.
    await store.set("e", buf(b""))
    await store.set("f", buf(b""))
    check_books(store)


async def test_the_index_is_small_when_it_is_empty(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    files = (tmp_path / "cache/.zcache/index").iterdir()
    assert sum(path.stat().st_blocks * 512 for path in files) < 512 * 1024
    before = (tmp_path / "cache/.zcache/index/cells").stat().st_size
    other = open_store(tmp_path)
    for number in range(3000):
        await store.set(f"a/c/{number}", buf(b""))
    assert (tmp_path / "cache/.zcache/index/cells").stat().st_size > before
    # It has grown while the other has it mapped.
    assert other.cache_info()["cached_keys"] == 3000
    assert await read(other, "a/c/2999") == b""
    check_books(other)


async def test_unfinished_files_are_swept(tmp_path: Path) -> None:
    open_store(tmp_path)
    left = tmp_path / "cache/.zcache/tmp/p7-123-0"
    left.write_bytes(bytes(100))
    (tmp_path / "cache/.zcache/index/p7").write_bytes(b"")
    open_store(tmp_path)
    assert not left.exists()


async def test_names_that_file_systems_treat_specially(tmp_path: Path) -> None:
    where = tmp_path / "naïve dir %41 'quoted'"
    where.mkdir()
    keys = ["ü/c/0", "sp ace/%2F", "a@1-2", "c/0", "dot.ted/.zgroup", "-", "~", "x" * 255]
    source = MemoryStore()
    for _ in range(2):
        store = open_store(where, source)
        for key in keys:
            assert (await read(store, key)) in (None, key.encode())
            await store.set(key, buf(key.encode()))
            assert await read(store, key, RangeByteRequest(0, 1)) == key.encode()[:1]
        check_books(store)
    assert store.cache_info()["cached_keys"] == len(keys)


async def test_a_relative_path_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = CacheStore(CountingStore(MemoryStore()), cache_store=LocalStore("cache"))
    await fill(store, a=b"1")
    monkeypatch.chdir("/")
    assert await read(store, "a") == b"1"
    assert reads(store) == 0


# ---------------------------------------------------------------------------- the volume


async def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1000
    monkeypatch.setattr(
        Directory,
        "free_space",
        lambda self: (free - sum(held(LocalStore(self.root)).values()), 10_000),
    )
    store = open_store(tmp_path, min_free_space=900)
    for number in range(20):
        await store.set(f"a/{number}", buf(bytes(20)))
    # It evicts before it writes.
    assert held(store._cache) == {f"a/{number}": 20 for number in range(15, 20)}
    free = 899  # Somebody else has taken it: nothing helps.
    await store.set("b", buf(bytes(20)))
    assert held(store._cache) == {}
    assert await read(store, "b") == bytes(20)
    check_books(store)
    # The default is a twentieth of a small volume.
    store = open_store(tmp_path)
    free = 519
    await store.set("b", buf(bytes(20)))
    assert held(store._cache) == {}
    free = 520
    await store.set("b", buf(bytes(20)))
    assert held(store._cache) == {"b": 20}


FULL = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from zarr.storage import LocalStore
from support import buf, check_books, held, read
from zcache import CacheStore

where = Path(sys.argv[1])
store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "small/cache"),
                   min_free_space=int(sys.argv[3]))

async def main():
    for key in range(60):
        name = f"a/c/{key}"
        await LocalStore(where / "source").set(name, buf(os.urandom(100_000)))
    for _ in range(2):
        for key in range(60):
            name = f"a/c/{key}"
            assert await read(store, name) == (where / "source" / name).read_bytes()
    # The index grows as well, on a volume without room.
    for key in range(3000):
        await store.set(f"b/c/{key}", buf(b""))
    check_books(store)
    print(len(held(store._cache)))

asyncio.run(main())
"""


@pytest.mark.parametrize("min_free_space", [0, 300_000])
def test_a_full_volume(tmp_path: Path, min_free_space: int) -> None:
    """A real one, where the machine lets us mount it: reads go on, the books hold, nobody crashes."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes a privilege that this machine does not give")
    try:
        command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent)]
        done = subprocess.run(
            [*command, str(min_free_space)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 3
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


async def test_a_write_that_the_volume_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_ports, "counter", lambda _: None)
    monkeypatch.setattr(_files, "_write", _files.write_in_steps)
    monkeypatch.setattr(_files, "_publish", full)
    await fill(store, a=b"1")
    assert await read(store, "a") == b"1"
    assert tree(tmp_path / "cache/.zcache/tmp") == set()
    assert store.cache_info()["current_size"] == 0
    monkeypatch.undo()
    assert await read(store, "a") == b"1"
    assert held(store._cache) == {"a": 1}
    check_books(store)


async def test_a_file_system_that_does_not_keep_times(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What could not be told from other files, and so never be removed, is not written."""
    long_ago = -3_000_000_000
    probe = tmp_path / "probe"
    probe.touch()
    os.utime(probe, ns=(long_ago * 10**9 + 1,) * 2)
    if probe.stat().st_mtime_ns == long_ago * 10**9 + 1:
        pytest.skip("this file system keeps every time")
    store = open_store(tmp_path, max_size=100)
    store._engine.books.now = lambda: long_ago
    for number in range(30):
        await store.set(f"a/c/{number}", buf(bytes(10)))
        assert await read(store, f"a/c/{number}") == bytes(10)
    assert held(store._cache) == {}
    assert tree(tmp_path / "cache/.zcache/tmp") == set()
    assert store.cache_info()["current_size"] == 0
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "nanosecond" in caplog.text


# ------------------------------------------------------ cache stores that are no directories


class Elsewhere(LocalStore):
    """A store of a sort that zcache does not know."""


def elsewhere(where: Path, source: Store | None = None, **options: Any) -> CacheStore:
    cache = CountingStore(Elsewhere(where / "elsewhere"))
    source = CountingStore(source or LocalStore(where / "source"))
    return CacheStore(source, cache_store=cache, **options)


async def test_other_stores_are_listed_at_the_first_use(tmp_path: Path) -> None:
    store = elsewhere(tmp_path, cache_set_data=False)
    await store.set("a", buf(b"0123456789"))
    await read(store, "a", RangeByteRequest(1, 4))
    await store.set("b", buf(b"22"))
    await read(store, "b")
    del store
    store = elsewhere(tmp_path, max_size=10)
    cache = store._cache
    assert isinstance(cache, CountingStore)
    assert cache.take() == {}  # The constructor asks nothing.
    assert store.cache_info()["cached_keys"] == 0
    found = await asyncio.gather(*[read(store, "b") for _ in range(10)])
    assert found == [b"22"] * 10
    calls = cache.take()
    assert (calls["list"], calls["getsize"]) == (1, 2)
    assert await read(store, "a", RangeByteRequest(1, 4)) == b"123"
    assert reads(store) == 0
    assert store.cache_info()["current_size"] == 5
    await store.set("c", buf(bytes(7)))
    await read(store, "c")
    assert store.cache_info()["current_size"] <= 10
    check_books_of(store)


def check_books_of(store: CacheStore) -> None:
    store._engine.index.validate()
    values = held(store._cache)
    assert store.cache_info()["current_size"] == sum(values.values())


async def test_what_cannot_be_dated_is_stale(tmp_path: Path) -> None:
    await fill(elsewhere(tmp_path), a=b"1")
    store = elsewhere(tmp_path, max_age_seconds=1e6)
    for _ in range(2):
        assert await read(store, "a") == b"1"
    assert reads(store) == 1
    check_books_of(store)


async def test_other_stores_have_a_stamp(tmp_path: Path) -> None:
    await fill(elsewhere(tmp_path), a=b"1")
    stamp = json.loads((tmp_path / "elsewhere/.zcache/stamp.json").read_text())
    assert str(tmp_path / "source") in stamp["source"]
    other = LocalStore(tmp_path / "other")
    store = elsewhere(tmp_path, other)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"source_id='file:"):
            await read(store, "a")
    with pytest.raises(ValueError, match=r"source_id='file:"):
        await store.set("a", buf(b"2"))
    store = elsewhere(tmp_path, other, source_id=stamp["source"])
    assert await read(store, "a") == b"1"
    (tmp_path / "elsewhere/.zcache/stamp.json").unlink()
    del store  # Else the index that it knows would be shared.
    gc.collect()
    with pytest.raises(ValueError, match=r"adopt=True"):
        await read(elsewhere(tmp_path), "a")
    store = elsewhere(tmp_path, adopt=True)
    assert await read(store, "a") == b"1"
    assert reads(store) == 0


async def test_other_stores_start_cold_for_a_source_without_a_name(tmp_path: Path) -> None:
    await fill(elsewhere(tmp_path, MemoryStore()), a=b"1")
    store = elsewhere(tmp_path, MemoryStore())
    assert await read(store, "a") is None
    assert held(store._cache) == {}


async def test_a_store_that_cannot_be_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FaultyStore(Elsewhere(tmp_path / "elsewhere"))
    cache.faults["list"] = OSError("no")
    store = CacheStore(CountingStore(MemoryStore()), cache_store=cache)
    await fill(store, a=b"1")
    assert await read(store, "a") == b"1"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_a_store_in_memory_has_no_stamp() -> None:
    inner = MemoryStore()
    store = CacheStore(MemoryStore(), cache_store=CountingStore(inner))
    await fill(store, a=b"1")
    assert set(inner._store_dict) == {"a"}
    with pytest.raises(ValueError, match=r"holds the cache of"):
        await read(CacheStore(MemoryStore(), cache_store=CountingStore(inner)), "a")


def test_the_first_use_without_an_event_loop(tmp_path: Path) -> None:
    cache: Any = Elsewhere(tmp_path / "elsewhere")
    for _ in range(2):
        store = CacheStore(LocalStore(tmp_path / "source"), cache_store=cache)
        if not store._supports_sync_io:
            pytest.skip("this zarr reads only from event loops")
        store.set_sync("a", buf(b"1"))
        found = store.get_sync("a")
        assert found is not None
        assert found.to_bytes() == b"1"
        assert store.cache_info()["cached_keys"] == 1
