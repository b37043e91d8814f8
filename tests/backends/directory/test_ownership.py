"""To which source a cache directory belongs, who may use it, and what is left alone."""

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
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import LocalStore, MemoryStore

from directories import closed, tree
from pools import CACHES, ON_DISK
from support import TESTS, buf, check_quiet, fill, logged, read, read_through, until, write
from zcache import CachePool, CacheStore
from zcache._backends.directory import files
from zcache._backends.directory.stamp import Stamp
from zcache._core import make_folder, open_own, write_tombstone
from zcache.exceptions import CacheOwnershipError
from zcache.testing import without_shared_index

if TYPE_CHECKING:
    from zarr.abc.store import Store

pytestmark = pytest.mark.filterwarnings("error")


def open_store(where: Path, source: Store | None = None, **options: Any) -> CacheStore:
    """A store on the directory ``cache``."""
    source = source or LocalStore(where / "source")
    return CacheStore(source, cache_store=LocalStore(where / "cache"), **options)


def held(where: Path) -> dict[str, int]:
    """Sizes of the values in the directory, of any writer."""
    names = (name for name in tree(where / "cache") if not name.startswith(".zcache/"))
    return {name: (where / "cache" / name).stat().st_size for name in names}


# --------------------------------------------------------------------------- ownership


async def test_directory_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"adopt=True") as caught:
        open_store(tmp_path)
    for words in (str(tmp_path / "cache"), "thesis.tex", str(tmp_path / "source"), "empty"):
        assert words in str(caught.value)
    assert tree(tmp_path / "cache") == {"thesis.tex"}


async def test_directory_of_ranges_without_a_stamp_is_taken_up_again(tmp_path: Path) -> None:
    store = open_store(tmp_path, cache_set_data=False)
    await fill(store, a=b"0123")
    await read_through(store, "a", RangeByteRequest(1, 2))
    del store
    (tmp_path / "cache/.zcache/stamp.json").unlink()
    store = open_store(tmp_path)
    assert await read(store, "a", RangeByteRequest(1, 2)) == b"1"
    assert store.cache_stats()["hits"] == 1


async def test_directory_with_adopt_is_taken_over(tmp_path: Path) -> None:
    await LocalStore(tmp_path / "source").set("a/c/0", buf(b"1"))
    shutil.copytree(tmp_path / "source", tmp_path / "cache")
    store = open_store(tmp_path, adopt=True, max_size=10)
    assert await read_through(store, "a/c/0") == b"1"
    assert store.cache_stats()["misses"] == 0
    await check_quiet(store)
    del store
    # Stamped by now, and what it holds is evicted like anything else.
    store = open_store(tmp_path, max_size=10)
    await write(store, "b", bytes(10))
    assert held(tmp_path) == {"b": 10}


async def test_directory_of_another_source_is_refused(tmp_path: Path) -> None:
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
    assert await read_through(store, "a") == b"1"


async def test_directory_with_source_id_belongs_to_that_source(tmp_path: Path) -> None:
    """The same data under two names, and data without a name."""
    for _ in range(2):
        store = open_store(tmp_path, MemoryStore(), source_id="runs of 2024")
        if not await store.exists("a"):
            await fill(store, a=b"1")
    assert await read_through(store, "a") == b"1"
    assert store.cache_stats()["misses"] == 0
    with pytest.raises(ValueError, match=r"holds the cache of '?runs of 2024"):
        open_store(tmp_path)


async def test_directory_source_without_a_name_starts_cold(tmp_path: Path) -> None:
    store = open_store(tmp_path, MemoryStore())
    await fill(store, a=b"1", b=b"2")
    (tmp_path / "cache/mine").write_bytes(b"mine")
    del store
    store = open_store(tmp_path, MemoryStore())
    await opened(store)
    assert store.cache_info()["current_size"] == 0
    assert await read_through(store, "a") is None
    assert tree(tmp_path / "cache") >= {"mine"}
    assert tree(tmp_path / "cache").isdisjoint({"a", "b"})
    # As long as it is in use, it is not used for any other source, with a name or without.
    for source in (MemoryStore(), None):
        other = open_store(tmp_path, source)
        await write(other, "d", b"another's")
        assert await read_through(other, "d") == b"another's"
        assert other.cache_info()["cached_keys"] == 0
        assert tree(tmp_path / "cache").isdisjoint({"d"})
        del other
    await fill(store, c=b"3")
    assert await read_through(store, "c") == b"3"
    del store
    store = open_store(tmp_path)
    await opened(store)
    assert held(tmp_path) == {"mine": 4}
    assert store.cache_info()["current_size"] == 0


async def opened(store: CacheStore) -> None:
    """Wait until a directory is taken over, which goes on in the background after a second."""
    await until(lambda: store._cache.shared.handle.is_open)


async def test_take_over_cut_off_is_finished_by_the_next(
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

    # The caller hears of it as long as he waits for the opening.
    monkeypatch.setattr("zcache._backends.directory.index.REBUILD_PATIENCE", 60)
    with monkeypatch.context() as patched:
        patched.setattr(Stamp, "restamp", die)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path)
    # And one that dies before it has removed anything.
    (tmp_path / "cache/a").write_bytes(b"old")
    files.sign(str(tmp_path / "cache"), "a", (tmp_path / "cache/a").lstat())
    shutil.rmtree(tmp_path / "cache/.zcache/index")
    with monkeypatch.context() as patched:
        patched.setattr(files, "remove_value", die)
        with pytest.raises(KeyboardInterrupt):
            open_store(tmp_path)
    store = open_store(tmp_path)
    assert await read_through(store, "a") == b"new"
    assert store.cache_stats()["misses"] == 1


@pytest.mark.parametrize("stamp", ["", "{", "[]", '{"source": "x"}', "\0" * 64])
async def test_stamp_unreadable_is_refused(tmp_path: Path, stamp: str) -> None:
    await fill(open_store(tmp_path), a=b"1")
    # Each is a copy of the other one.
    for name in ("stamp.json", "index/stamp.json"):
        (tmp_path / "cache/.zcache" / name).write_text(stamp)
    with pytest.raises(ValueError, match=r"cannot be read.*adopt=True"):
        open_store(tmp_path)
    store = open_store(tmp_path, adopt=True)
    assert await read_through(store, "a") == b"1"


async def test_stamp_of_another_format_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path)
    stamp = tmp_path / "cache/.zcache/stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"zcache": 99}))
    with pytest.raises(ValueError, match="format 99"):
        open_store(tmp_path, adopt=True)


async def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    """Not by eviction, overwriting, `clear_cache`, a rebuild, nor where they are in the way."""
    store = open_store(tmp_path, max_size=30)
    cache = tmp_path / "cache"
    foreign = {"a/c/0": b"in the way", "notes.txt": b"mine", ".zcache/ranges/b@0-1": b"odd"}
    for name, text in foreign.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(text)
    (cache / "link").symlink_to(cache / "notes.txt")
    await write(store, "a/c/0", b"value")
    assert await read_through(store, "a/c/0") == b"value"
    assert await read_through(store, "notes.txt") is None
    for number in range(1, 9):
        await write(store, f"a/c/{number}", bytes(10))
    await write(store, "b", b"0123456789")
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


async def test_files_replaced_by_others_are_not_removed(tmp_path: Path) -> None:
    """Such a file is not ours any more, whatever the index says."""
    store = open_store(tmp_path, max_size=30)
    await write(store, "a", bytes(10))
    file = tmp_path / "cache/a"
    file.unlink()
    file.write_bytes(b"another's")
    await store.clear_cache()
    assert file.read_bytes() == b"another's"
    # It stays, so its bytes stay counted.
    assert store.cache_info()["current_size"] == 10


async def test_link_inside_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Nothing is written there, for no walk would find it, and nothing is removed."""
    store = open_store(tmp_path, max_size=100)
    elsewhere = tmp_path / "elsewhere"
    await fill(CacheStore(MemoryStore(), cache_store=LocalStore(elsewhere)), x=b"another's")
    (tmp_path / "cache/link").symlink_to(elsewhere)
    for key in ("link/x", "link/y", "link/z/0"):
        await store.set(key, buf(b"value"))
        assert await read_through(store, key) == b"value"
    assert tree(elsewhere) >= {"x"}
    assert tree(elsewhere).isdisjoint({"y", "z/0"})
    for _ in range(2):
        store = open_store(tmp_path, max_size=100)
        assert store.cache_info()["current_size"] == 0
        await store.delete("link/x")
        await store.delete_dir("link")
        await store.clear_cache()
        assert (elsewhere / "x").read_bytes() == b"another's"
        del store
        shutil.rmtree(tmp_path / "cache/.zcache/index")


@pytest.mark.parametrize("name", ["head", "table", "cells", "texts", "lock", "owner", "s0"])
async def test_link_in_place_of_the_index_is_not_followed(tmp_path: Path, name: str) -> None:
    """On a shared node others may put one there: it goes, and the file that it leads to stays as it is."""
    open_store(tmp_path)
    precious = tmp_path / "precious"
    precious.write_bytes(b"years of work" * 10_000)
    path = tmp_path / "cache/.zcache/index" / name
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    store = open_store(tmp_path)
    await fill(store, a=b"1")
    assert await read_through(store, "a") == b"1"
    assert precious.read_bytes() == b"years of work" * 10_000
    assert not path.is_symlink()


# ------------------------------------------------------------------- users and permissions


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
async def test_files_new_have_the_umask_of_the_process(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        # One that zcache makes is for its user alone; below one that is there its permissions count.
        (tmp_path / "cache").mkdir()
        store = open_store(tmp_path)
        await fill(store, a=b"1")
    finally:
        os.umask(before)
    for name in ("a", ".zcache/stamp.json", ".zcache/index/cells", ".zcache/index/lock"):
        assert stat.S_IMODE((tmp_path / "cache" / name).stat().st_mode) == mode
    assert (tmp_path / "cache/.zcache").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("mode", [None, 0o700, 0o750, 0o755])
async def test_files_have_no_permissions_that_their_directory_has_not(
    tmp_path: Path, umask: int, mode: int | None
) -> None:
    before = os.umask(umask)
    try:
        # One that zcache makes is for its user alone.
        if mode is not None:
            (tmp_path / "cache").mkdir()
            (tmp_path / "cache").chmod(mode)
        store = open_store(tmp_path)
        await fill(store, **{"a/b": b"1"})
        assert [key async for key in store.list_dir("a")] == ["b"]
        # What cannot be deleted has a file that says so.
        write_tombstone(str(tmp_path / "cache"), "a/b")
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"):
        given = stat.S_IMODE(path.stat().st_mode)
        allowed = 0o700 if mode is None else mode
        allowed_here = allowed | stat.S_ISGID if path.is_dir() else allowed & 0o666
        assert given & ~allowed_here == 0, path
    stamp = (tmp_path / "cache/.zcache/stamp.json").stat()
    assert stat.S_IMODE(stamp.st_mode) == allowed & 0o666


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("mode", [0o777, 0o1777])
async def test_cache_of_another_user_in_a_directory_of_roots_is_refused(
    tmp_path: Path, kind: str, mode: int
) -> None:
    where = tmp_path / "cache"
    where.mkdir()
    where.chmod(mode)
    store = CacheStore(MemoryStore(), cache_store=CACHES[kind](where), source_id="s")
    await fill(store, a=b"1")
    reserved = where / ".zcache"
    # Where none may touch what is another's, none may write into it either, nor may the group.
    assert reserved.stat().st_mode & 0o777 == (0o755 if mode & stat.S_ISVTX else 0o777)
    del store
    await closed(tmp_path)
    os.chown(reserved, 50001, -1)
    again = partial(CacheStore, MemoryStore(), source_id="s")
    with pytest.raises(CacheOwnershipError, match=r"\.zcache is another user's \(uid 50001\)"):
        again(cache_store=CACHES[kind](where))
    maker: Any = CachePool if kind == "pool" else LocalStore
    assert await read(again(cache_store=maker(where, read_only=True)), "a") == b"1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("group", "mode", "expected"), [(0, 0o773, 0o2733), (0, 0o757, 0o2777), (50001, 0o775, 0o2775)]
)
def test_folder_of_one_who_is_not_of_the_group_gives_his_group_what_others_have(
    group: int, mode: int, expected: int
) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        os.chown(place, 0, group)
        place.chmod(mode)
        if not (child := os.fork()):
            try:
                os.umask(0o077)
                os.setgroups([])
                os.setgid(50001)
                os.setuid(50001)
                make_folder(str(place / "made"))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert stat.S_IMODE((place / "made").stat().st_mode) == expected
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("umask", [0o777, 0o477, 0o400, 0o100])
def test_folder_and_file_are_their_owners_under_a_umask_that_shuts_him_out(umask: int) -> None:
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o777)
        if not (child := os.fork()):
            try:
                os.umask(umask)
                os.setgroups([])
                os.setgid(50001)
                os.setuid(50001)
                make_folder(str(place / "made"), 0o700)
                make_folder(str(place / "made/below"))
                open_own(str(place / "made/below/file"), os.O_RDWR)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        for path, expected in (("made", 0o700), ("made/below", 0o700), ("made/below/file", 0o600)):
            assert stat.S_IMODE((place / path).stat().st_mode) == expected
        assert len(list(place.rglob("*"))) == 3
    finally:
        shutil.rmtree(place)


def test_folder_in_place_of_which_there_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError) as caught:
        make_folder(str(path))
    error = caught.value
    assert (error.errno, error.strerror, error.filename) == (17, "File exists", str(path))
    with pytest.raises(
        FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '.*/no/file'$"
    ):
        open_own(str(tmp_path / "no/file"), os.O_RDWR)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("group_writes", "expected"), [(False, 0o755), (True, 0o775)])
def test_folder_in_a_sticky_one_is_its_owners_to_write(
    tmp_path: Path, group_writes: bool, expected: int
) -> None:
    tmp_path.chmod(0o3777)
    make_folder(str(tmp_path / "made"), group_writes=group_writes)
    make_folder(str(tmp_path / "made/below"))
    for folder in (tmp_path / "made", tmp_path / "made/below"):
        assert folder.stat().st_mode & 0o777 == expected


async def test_what_is_made_later_is_for_all_of_the_directory(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o770)
    before = os.umask(0o077)
    try:
        store = open_store(tmp_path)
        # A purge takes what is empty.
        (cache / ".zcache/tmp").rmdir()
        await fill(store, **{"a/b": b"0123", "a/c": b"0123"})
        await store.invalidate("a/b")
        await read_through(store, "a/b", RangeByteRequest(1, 2))
        write_tombstone(str(cache), "a/b")
    finally:
        os.umask(before)
    for name in ("tmp", "ranges", "ranges/a", "dropped"):
        assert (cache / ".zcache" / name).stat().st_mode & 0o777 == 0o770, name
    (note,) = (cache / ".zcache/dropped").iterdir()
    assert note.stat().st_mode & 0o777 == 0o660


SQUASHED = """
import ctypes, os, sys
from zarr.storage import LocalStore, MemoryStore
from support import buf, value_sync
from zcache import CachePool, CacheStore

# As a server does that knows no root: what is made is another user's.
ctypes.CDLL(None).setfsuid(50001)
cache = {"directory": LocalStore, "pool": CachePool}[sys.argv[2]](sys.argv[1])
store = CacheStore(MemoryStore({"a": buf(b"1")}), cache_store=cache, source_id="s")
assert value_sync(store, "a") == b"1"
assert store.drain_sync()
value_sync(store, "a")
print(store.cache_stats()["hits"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize("kind", ON_DISK)
def test_directory_where_files_become_another_users_is_used(kind: str) -> None:
    where = Path(tempfile.mkdtemp())
    try:
        where.chmod(0o777)
        done = subprocess.run(
            [sys.executable, "-c", SQUASHED, str(where / "cache"), kind],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout == "1\n", done.stderr
        assert (where / "cache/.zcache").stat().st_uid == 50001
    finally:
        shutil.rmtree(where)


OTHER_USER = """
import asyncio, logging, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from zarr.storage import LocalStore
from support import buf, read_through
from zcache import CacheStore
from zcache.testing import index_slot
logging.basicConfig(format="LOG %(levelname)s %(message)s", stream=sys.stdout)
os.setgid(65534)
os.setuid(65534)
where = Path(sys.argv[1])

async def main():
    store = CacheStore(LocalStore(where / "source"), cache_store=LocalStore(where / "cache"))
    for _ in range(3):
        assert await read_through(store, "a") == b"1"
        assert await read_through(store, "empty") == b""
    stats = store.cache_stats()
    print("DONE", stats["hits"], stats["cache_failures"], index_slot(store) is not None)

asyncio.run(main())
"""


def as_another_user(where: Path) -> tuple[list[str], list[str]]:
    if os.geteuid():
        pytest.skip("only root can become another user")
    for path in [where, *where.parents]:
        if path == Path("/tmp"):
            break
        path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER, str(where), str(Path(__file__).parents[2])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [line for line in lines if line.startswith("LOG")], lines[-1].split()[1:]


async def test_directory_of_another_user_is_used_where_possible(tmp_path: Path) -> None:
    """It is used if it can be; else the reads go to the source, with one warning."""
    source = LocalStore(tmp_path / "source")
    await fill(CacheStore(source, cache_store=MemoryStore()), a=b"1", empty=b"")
    store = open_store(tmp_path)
    await fill(store, a=b"1")
    log, (hits, failures, shared) = as_another_user(tmp_path)
    assert len(log) == 1, log
    assert "WARNING" in log[0]
    assert str(tmp_path / "cache") in log[0]
    for words in ("The source serves every read", "other processes", "what is written is removed"):
        assert words in log[0]
    assert (hits, failures, shared) == ("0", "0", "False")
    assert tree(tmp_path / "cache").isdisjoint({"empty"})
    # A directory that all may write to.
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    log, (hits, failures, shared) = as_another_user(tmp_path)
    assert log == []
    assert (int(hits) >= 5, failures, shared) == (True, "0", "True")
    assert await read_through(store, "empty") == b""
    assert (tmp_path / "cache/empty").stat().st_uid == 65534
    await check_quiet(store)


def test_directory_cannot_be_made_the_source_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    store = open_store(tmp_path)
    asyncio.run(fill(store, a=b"1", empty=b""))
    assert asyncio.run(read(store, "a")) == b"1"
    assert asyncio.run(read(store, "empty")) == b""
    assert [record.levelno for record in logged(caplog)] == [logging.WARNING]
    assert (tmp_path / "cache").read_bytes() == b"a file"


async def test_file_system_without_locks_has_an_index_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(open_store(tmp_path), a=b"1")

    with without_shared_index(OSError("the file system (NFS) does not share locks")):
        store = open_store(tmp_path)
    assert "cannot be shared" in caplog.text
    for lost in ("NFS", "bound", "writes", "ends with it"):
        assert lost in caplog.text
    assert await read_through(store, "a") == b"1"
    assert store.cache_stats()["misses"] == 0
    await fill(store, b=b"2")
    assert await read_through(store, "b") == b"2"
    assert held(tmp_path) == {"a": 1, "b": 1}
    await check_quiet(store)


def test_directory_inside_a_cache_is_refused(tmp_path: Path) -> None:
    """A rebuild of the outer one would take its values for its own."""
    CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path / "outer"))
    (tmp_path / "link").symlink_to(tmp_path / "outer")
    for inner in ("outer/a", "outer/a/b", "link/a"):
        with pytest.raises(ValueError, match=r"lies inside the cache directory .*outer"):
            CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path / inner))
        assert not (tmp_path / "outer" / "a").exists()
    CacheStore(MemoryStore(), cache_store=LocalStore(tmp_path / "beside"))
