"""A cache directory outlives its process: what survives, whose it is, and what is left alone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import LocalStore, MemoryStore

from support import CountingStore, FaultyStore, buf, check_books, fill, held, read
from zcache import CacheStore, _books, _files
from zcache._directory import Directory

if TYPE_CHECKING:
    from zarr.abc.store import Store

pytestmark = pytest.mark.filterwarnings("error")


def open_store(where: Path, source: Store | None = None, **options: Any) -> CacheStore:
    source = source or LocalStore(where / "source")
    return CacheStore(CountingStore(source), cache_store=LocalStore(where / "cache"), **options)


def reads(store: CacheStore) -> int:
    """How many reads reached the source since the last time."""
    assert isinstance(store._store, CountingStore)
    return store._store.take()["get"]


def tree(where: Path) -> set[str]:
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


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


# --------------------------------------------------------------------------- ownership


async def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"adopt=True") as caught:
        open_store(tmp_path)
    for words in (str(tmp_path / "cache"), "thesis.tex", str(tmp_path / "source"), "empty"):
        assert words in str(caught.value)
    assert tree(tmp_path / "cache") == {"thesis.tex"}


async def test_ranges_without_a_stamp_are_refused_too(tmp_path: Path) -> None:
    store = open_store(tmp_path, cache_set_data=False)
    await fill(store, a=b"0123")
    await read(store, "a", RangeByteRequest(1, 2))
    del store
    (tmp_path / "cache/.zcache/stamp.json").unlink()
    with pytest.raises(ValueError, match=r"adopt=True"):
        open_store(tmp_path)


async def test_adopt(tmp_path: Path) -> None:
    await LocalStore(tmp_path / "source").set("a/c/0", buf(b"1"))
    shutil.copytree(tmp_path / "source", tmp_path / "cache")
    store = open_store(tmp_path, adopt=True, max_size=10)
    assert await read(store, "a/c/0") == b"1"
    assert reads(store) == 0
    check_books(store)
    del store
    # Stamped by now, and what it holds is evicted like anything else.
    store = open_store(tmp_path, max_size=10)
    await store.set("b", buf(bytes(10)))
    assert held(store._cache) == {"b": 10}


async def test_another_source_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await fill(store, a=b"1")
    del store
    other = LocalStore(tmp_path / "other")
    with pytest.raises(ValueError, match=r"source_id=") as caught:
        open_store(tmp_path, other)
    for words in ("cache", "source", "other"):
        assert str(tmp_path / words) in str(caught.value)
    # Taking over what is there is not what adopt=True says.
    with pytest.raises(ValueError, match=r"source_id="):
        open_store(tmp_path, other, adopt=True)
    given = re.search(r"source_id='([^']+)'", str(caught.value))
    assert given
    store = open_store(tmp_path, other, source_id=given[1])
    assert await read(store, "a") == b"1"


async def test_source_id(tmp_path: Path) -> None:
    """The same data under two names, and data without a name."""
    for _ in range(2):
        store = open_store(tmp_path, MemoryStore(), source_id="runs of 2024")
        if not await store.exists("a"):
            await fill(store, a=b"1")
    assert await read(store, "a") == b"1"
    assert reads(store) == 0
    with pytest.raises(ValueError, match="'runs of 2024'"):
        open_store(tmp_path)


async def test_a_source_without_a_name_starts_cold(tmp_path: Path) -> None:
    store = open_store(tmp_path, MemoryStore())
    await fill(store, a=b"1", b=b"2")
    (tmp_path / "cache/mine").write_bytes(b"mine")
    del store
    store = open_store(tmp_path, MemoryStore())
    assert store.cache_info()["current_size"] == 0
    assert await read(store, "a") is None
    assert tree(tmp_path / "cache") >= {"mine"}
    assert tree(tmp_path / "cache").isdisjoint({"a", "b"})
    # As long as it is in use, nobody else gets it, with a name or without.
    for source in (MemoryStore(), None):
        with pytest.raises(ValueError, match="in use for another source"):
            open_store(tmp_path, source)
    await fill(store, c=b"3")
    assert await read(store, "c") == b"3"
    del store
    store = open_store(tmp_path)
    assert held(store._cache) == {"mine": 4}
    assert store.cache_info()["current_size"] == 0


async def test_a_take_over_that_dies_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one source has left is never another's, whenever the process ends."""
    store = open_store(tmp_path, MemoryStore())
    await fill(store, a=b"old")
    del store
    source = LocalStore(tmp_path / "source")
    await source.set("a", buf(b"new"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "restamp", die)
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(_files, "remove", die)
    # And one that dies before it has removed anything.
    (tmp_path / "cache/a").write_bytes(b"old")
    _files.sign(str(tmp_path / "cache/a"), (tmp_path / "cache/a").lstat())
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path)
    monkeypatch.undo()
    store = open_store(tmp_path)
    assert await read(store, "a") == b"new"
    assert reads(store) == 1


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"source": "x"}', "\0" * 64])
async def test_a_stamp_that_cannot_be_read(tmp_path: Path, stamp: str) -> None:
    await fill(open_store(tmp_path), a=b"1")
    (tmp_path / "cache/.zcache/stamp.json").write_text(stamp)
    with pytest.raises(ValueError, match=r"cannot be read.*adopt=True"):
        open_store(tmp_path)
    store = open_store(tmp_path, adopt=True)
    assert await read(store, "a") == b"1"


async def test_a_stamp_of_another_format(tmp_path: Path) -> None:
    open_store(tmp_path)
    stamp = tmp_path / "cache/.zcache/stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"zcache": 99}))
    with pytest.raises(ValueError, match="format 99"):
        open_store(tmp_path, adopt=True)


async def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    """Not by eviction, overwriting, `clear_cache`, a rebuild, nor where they are in the way."""
    store = open_store(tmp_path, max_size=30)
    cache = tmp_path / "cache"
    foreign = {"a/c/0": b"in the way", "notes.txt": b"mine", ".zcache/ranges/b@0-1": b"odd"}
    for name, text in foreign.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(text)
    (cache / "link").symlink_to(cache / "notes.txt")
    await store.set("a/c/0", buf(b"value"))
    assert await read(store, "a/c/0") == b"value"
    assert await read(store, "notes.txt") is None
    for number in range(1, 9):
        await store.set(f"a/c/{number}", buf(bytes(10)))
    await store.set("b", buf(b"0123456789"))
    await store.clear_cache()
    await store.delete("a/c/0")
    await store.delete_dir("")
    assert store.cache_info()["current_size"] == 0
    del store
    shutil.rmtree(cache / ".zcache/index")
    store = open_store(tmp_path, max_size=30)
    assert store.cache_info()["current_size"] == 0
    for name, text in foreign.items():
        assert (cache / name).read_bytes() == text
    assert (cache / "link").is_symlink()


async def test_files_that_somebody_replaced(tmp_path: Path) -> None:
    """Such a file is not ours any more, whatever the index says."""
    store = open_store(tmp_path, max_size=30)
    await store.set("a", buf(bytes(10)))
    file = tmp_path / "cache/a"
    file.unlink()
    file.write_bytes(b"somebody's")
    await store.clear_cache()
    assert file.read_bytes() == b"somebody's"
    assert store.cache_info()["current_size"] == 0


async def test_a_directory_inside_that_leads_elsewhere(tmp_path: Path) -> None:
    """Nothing is written there, for no walk would find it, and nothing is removed."""
    store = open_store(tmp_path, max_size=100)
    elsewhere = tmp_path / "elsewhere"
    await fill(CacheStore(MemoryStore(), cache_store=LocalStore(elsewhere)), x=b"another's")
    (tmp_path / "cache/link").symlink_to(elsewhere)
    for key in ("link/x", "link/y", "link/z/0"):
        await store.set(key, buf(b"value"))
        assert await read(store, key) == b"value"
    assert tree(elsewhere) >= {"x"}
    assert tree(elsewhere).isdisjoint({"y", "z/0"})
    for _ in range(2):
        store = open_store(tmp_path, max_size=100)
        assert store.cache_info()["current_size"] == 0
        await store.delete("link/x")
        await store.delete_dir("link")
        await store.clear_cache()
        directory = store._engine.books.directory
        assert directory
        for key in ("link", "link/x", "link/z"):
            directory.remove_below(key)
        assert (elsewhere / "x").read_bytes() == b"another's"
        del store
        shutil.rmtree(tmp_path / "cache/.zcache/index")


@pytest.mark.parametrize("name", ["head", "table", "cells", "lock", "p0"])
async def test_a_link_in_the_place_of_the_index(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """On a shared node others may put one there: the file that it leads to stays as it is."""
    open_store(tmp_path)
    precious = tmp_path / "precious"
    precious.write_bytes(b"years of work" * 10_000)
    path = tmp_path / "cache/.zcache/index" / name
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    store = open_store(tmp_path)
    await fill(store, a=b"1")
    assert await read(store, "a") == b"1"
    assert precious.read_bytes() == b"years of work" * 10_000
    assert len(caplog.records) == 1


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


# ------------------------------------------------------------------- users and permissions


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
async def test_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        store = open_store(tmp_path)
        await fill(store, a=b"1")
    finally:
        os.umask(before)
    for name in ("a", ".zcache/stamp.json", ".zcache/index/cells", ".zcache/index/lock"):
        assert stat.S_IMODE((tmp_path / "cache" / name).stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "cache/.zcache").stat().st_mode) == 0o777 & ~umask


NOBODY = """
import asyncio, logging, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from zarr.storage import LocalStore
from support import buf, read
from zcache import CacheStore
logging.basicConfig(format="LOG %(levelname)s %(message)s", stream=sys.stdout)
os.setgid(65534)
os.setuid(65534)
where = Path(sys.argv[1])

async def main():
    store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"))
    for _ in range(3):
        assert await read(store, "a") == b"1"
        assert await read(store, "empty") == b""
    stats = store.cache_stats()
    print("DONE", stats["hits"], stats["cache_failures"], store._engine.index.shared)

asyncio.run(main())
"""


def as_nobody(where: Path) -> tuple[list[str], list[str]]:
    if os.geteuid():
        pytest.skip("only root can become another user")
    for path in [where, *where.parents]:
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(where), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [line for line in lines if line.startswith("LOG")], lines[-1].split()[1:]


async def test_a_directory_of_another_user(tmp_path: Path) -> None:
    """It is used if it can be; else the reads go to the source, with one warning."""
    source = LocalStore(tmp_path / "source")
    await fill(CacheStore(source, cache_store=MemoryStore()), a=b"1", empty=b"")
    store = open_store(tmp_path)
    await fill(store, a=b"1")
    log, (hits, failures, shared) = as_nobody(tmp_path)
    assert len(log) == 1, log
    assert "WARNING" in log[0]
    assert str(tmp_path / "cache") in log[0]
    for words in ("goes to the source", "other processes", "do not see what is written"):
        assert words in log[0]
    assert (hits, failures, shared) == ("0", "0", "False")
    assert tree(tmp_path / "cache").isdisjoint({"empty"})
    # A directory that all may write to.
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    log, (hits, failures, shared) = as_nobody(tmp_path)
    assert log == []
    assert (int(hits) >= 5, failures, shared) == (True, "0", "True")
    assert await read(store, "empty") == b""
    assert (tmp_path / "cache/empty").stat().st_uid == 65534
    check_books(store)


def test_a_directory_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    store = open_store(tmp_path)
    asyncio.run(fill(store, a=b"1", empty=b""))
    assert asyncio.run(read(store, "a")) == b"1"
    assert asyncio.run(read(store, "empty")) == b""
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert (tmp_path / "cache").read_bytes() == b"a file"


async def test_a_file_system_that_cannot_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(open_store(tmp_path), a=b"1")

    def unsuitable(*_: object) -> None:
        raise OSError("the file system (NFS) does not share locks")

    monkeypatch.setattr(_books.Books, "_attach", unsuitable)
    store = open_store(tmp_path)
    assert "cannot be shared" in caplog.text
    for lost in ("NFS", "bound", "writes", "ends with it"):
        assert lost in caplog.text
    assert await read(store, "a") == b"1"
    assert reads(store) == 0
    await fill(store, b=b"2")
    assert held(store._cache) == {"a": 1, "b": 1}
    check_books(store)


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
