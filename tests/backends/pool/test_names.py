"""Names of the sources of a pool."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore, MemoryStore

import zcache
from directories import closed
from pools import source_of
from support import buf, files_below, read, read_through
from zcache import CachePool, CacheStore, OptionValueError
from zcache._backends.pool import register as pool_register
from zcache._backends.pool.register import Register, label_of, note_of
from zcache._source.identity import identify
from zcache.testing import check_invariants, set_block_size

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


def test_names_of_many_sources_count_towards_the_bound(tmp_path: Path) -> None:
    set_block_size(None)
    bound, path = 400 * PAGE, tmp_path / "pool"
    pool = CachePool(path, max_size=bound)
    names = [f"{n} {'x' * 4000}" for n in range(60)]
    for name in names:
        store = CacheStore(source_of(k=bytes(5 * PAGE)), cache_store=pool, source_id=name)
        assert asyncio.run(read_through(store, "k")) is not None
        folders = [path, *(path / ".zcache" / name for name in ("", "tmp", "segments"))]
        held = {*folders, *(file for folder in folders for file in folder.iterdir())}
        held.discard(path / ".zcache/index")
        blocks = sum(512 * file.stat().st_blocks for file in held)
        assert blocks <= pool.cache_info()["current_size"] <= bound
    assert {info.name for info in pool.sources()} == set(names)


async def test_names_that_are_longer_than_the_pool_take_no_room_from_its_values(
    tmp_path: Path,
) -> None:
    set_block_size(None)
    bound = 2**18
    pool = CachePool(tmp_path / "pool", max_size=bound)
    names = [f"{'x' * length}{n}" for length in (2**20, 2**14, 9) for n in range(8)]
    for name in names:
        source = MemoryStore({"a": buf(name[-9:].encode())})
        store = CacheStore(source, cache_store=pool, source_id=name)
        for _ in range(2):
            assert await read_through(store, "a") == name[-9:].encode()
        assert store.is_cached("a")
        held = [*files_below(tmp_path / "pool/.zcache/segments"), *_beside(tmp_path / "pool")]
        blocks = sum(512 * file.stat().st_blocks for file in held)
        assert blocks <= pool.cache_info()["current_size"] <= bound
    del store
    gc.collect()
    # Those that were used last, and that there is room for.
    assert {name for name in names if len(name) < 100} <= {info.name for info in pool.sources()}
    assert len(pool.sources()) == len(names)
    pool.forget(names[0])
    pool.forget(names[-1])
    assert len(pool.sources()) == len(names) - 2
    assert names[-1] not in {info.name for info in pool.sources()}


def _beside(pool: Path) -> list[Path]:
    """The folder of zcache's files, and those in it."""
    reserved = pool / ".zcache"
    return [reserved, *(path for path in reserved.iterdir() if path.name != "index")]


def test_names_that_many_note_at_once_are_all_kept(tmp_path: Path) -> None:
    register = Register(str(tmp_path))
    names = [f"{n} {'x' * 100}" for n in range(40)]

    def note(name: str) -> None:
        for _ in range(5):
            register.add(note_of(name))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(note, names))
    assert {found["name"] for found in register.names().values()} == set(names)
    # Most of what was added is out of date.
    assert (tmp_path / "sources").stat().st_size < 2 * 16384 + 40 * 200
    register.forget(names[0])
    assert [found["name"] for found in register.names().values() if found["forgotten"]] == names[:1]
    # Half a line, of a process that was stopped.
    with (tmp_path / "sources").open("a") as file:
        file.write('{"name": "ha')
    register.add(note_of("more"))
    assert {found["name"] for found in register.names().values()} == {*names, "more"}
    register.add(note_of(names[0]))
    assert not any(found["forgotten"] for found in register.names().values())


def test_names_are_written_anew_whatever_has_the_unfinished_name(tmp_path: Path) -> None:
    register = Register(str(tmp_path))
    theirs, unfinished = tmp_path / "theirs", tmp_path / "sources.new"
    theirs.write_text("mine")
    unfinished.hardlink_to(theirs)
    for name in ("a", "b"):
        register.add(note_of(name))
    register.drop(["a"])
    assert [found["name"] for found in register.names().values()] == ["b"]
    assert not unfinished.exists()
    assert theirs.read_text() == "mine"


def test_names_that_were_forgotten_are_the_first_to_go(tmp_path: Path) -> None:
    register = Register(str(tmp_path), max_size=16 * PAGE)
    names = [f"{n} {'x' * 1000}" for n in range(9)]
    for age, name in enumerate(names):
        register.add(note_of(name, used=float(age)))
    for name in names[2:]:
        register.forget(name)
    kept = {found["name"] for found in register.names().values()}
    assert set(names[:2]) < kept < set(names)


def test_names_are_read_once_each_and_anew_where_others_have_changed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = CachePool(tmp_path)
    stores = [CacheStore(source_of(), cache_store=pool, source_id=f"{n}") for n in range(100)]
    file = tmp_path / ".zcache/index/sources"
    others = Register(str(file.parent))
    pool.sources()
    parsed: list[bytes] = []
    parse = pool_register._parse

    def noted(line: bytes) -> object:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(pool_register, "_parse", noted)
    for name in ("0", "1"):
        pool.forget(name)
    known = {str(n) for n in range(2, 100)}
    assert {info.name for info in pool.sources()} == known
    # What was added.
    assert len([line for line in parsed if line]) == 2
    others.add(note_of("theirs"))
    assert {info.name for info in pool.sources()} == {*known, "theirs"}
    others.drop(["theirs"])
    assert {info.name for info in pool.sources()} == known
    # In place, of the same length.
    with file.open("r+b") as lines:
        lines.write(file.read_bytes().replace(b'"name": "2",', b'"name": "x",'))
    assert "x" in {info.name for info in pool.sources()}
    del stores


async def test_source_that_is_filled_anew_after_it_was_forgotten_has_its_name_for_all(
    tmp_path: Path,
) -> None:
    pool = CachePool(tmp_path)
    store = CacheStore(source_of(k=b"1"), cache_store=pool, source_id="era5")
    await read_through(store, "k")
    (before,) = pool.sources()
    pool.forget("era5")
    assert pool.sources() == []
    await read_through(store, "k")
    # Who reads only knows what he finds, as the next process does.
    for seen in (pool, CachePool(tmp_path, read_only=True)):
        assert seen.sources() == [before]


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_source_is_told_without_secrets(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    pool = CachePool(tmp_path / "pool" if kind == "directory" else None)
    url = "https://user:hush@example.org/era5.zarr"
    signed = FsspecStore.from_url(f"{url}?token=hush")
    stores = [
        CacheStore(LocalStore(tmp_path / "here"), cache_store=pool),
        CacheStore(FsspecStore.from_url(url), cache_store=pool),
        CacheStore(signed, cache_store=pool),
        CacheStore(MemoryStore(), cache_store=pool, source_id="mine"),
    ]
    infos = {info.name: info.source for info in pool.sources()}
    assert "hush" not in str(infos)
    assert infos == {
        f"file://{tmp_path}/here": f"LocalStore(file://{tmp_path}/here)",
        "https://example.org/era5.zarr": "FsspecStore(https://example.org/era5.zarr)",
        identify(signed).name: "FsspecStore(https://example.org/era5.zarr)",
        "mine": "MemoryStore",
    }
    del stores


@pytest.mark.parametrize("scheme", ["s3", "https"])
def test_sources_with_credentials_in_their_urls_show_none(tmp_path: Path, scheme: str) -> None:
    """A client of HTTP takes them for that; to one of S3 they are a part of the bucket, so it reads another one."""
    pytest.importorskip("s3fs")
    urls = [f"{scheme}://{user}place/era5.zarr" for user in ("user:hush@", "")]
    stores = [zcache.open(url, cache=tmp_path / "pool", max_size="1MB") for url in urls]
    infos = CachePool(tmp_path / "pool").sources()
    assert len(infos) == (2 if scheme == "s3" else 1)
    assert urls[1] in [info.name for info in infos]
    assert {info.source for info in infos} == {f"FsspecStore({urls[1]})"}
    assert "hush" not in str(infos)
    assert "hush" not in repr(stores) + "".join(map(str, stores))
    files = [path for path in (tmp_path / "pool").rglob("*") if path.is_file()]
    assert files
    assert not any(b"hush" in path.read_bytes() for path in files)


DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "nested": b"[" * 200_000 + b"\n",
    "nested in a name": b'{"name": ' + b"[" * 200_000 + b"\n",
    "blanks": bytes(50_000),
    "lines": b"\n" * 2**22,
    "one line": b'{"name": "' + b"x" * 2**22,
    "types": b'5\nnull\n"a"\n[]\n{"name": 5}\n{"name": [], "used": 1}\n{"used": 3}\n',
    "times": b"".join(
        b'{"name": "q", "used": %s}\n' % used
        for used in (b"[1]", b'"x"', b"{}", b"1e999", b"NaN", b"1" * 400, b"1" * 5000)
    ),
}
"""What may be in the file of the names."""


@pytest.mark.parametrize("damage", [*DAMAGE, "pipe", "folder", "link", "sparse"])
def test_names_that_are_damaged_are_passed_by(tmp_path: Path, damage: str) -> None:
    pool = CachePool(tmp_path, max_size="64 MiB")
    names = tmp_path / ".zcache/index/sources"
    names.unlink(missing_ok=True)
    if damage == "pipe":
        os.mkfifo(names)
    elif damage == "folder":
        names.mkdir()
    elif damage == "link":
        names.symlink_to(tmp_path / "elsewhere")
    else:
        names.write_bytes(DAMAGE.get(damage, b""))
    if damage == "sparse":
        os.truncate(names, 2**40)
    stores = []
    # With a name as long as this the file is looked through.
    for name in ("q", "x" * 2**15):
        stores.append(CacheStore(source_of(k=b"1"), cache_store=pool, source_id=name))
        assert asyncio.run(read_through(stores[-1], "k")) == b"1"
        assert all(info.last_used is None or info.last_used < math.inf for info in pool.sources())
    held = {info.name: info.entries for info in pool.sources()}
    assert held == {"q": 1, "x" * 2**15: 1}
    assert not (tmp_path / "elsewhere").exists()
    assert pool.cache_info()["current_size"] < 2**20
    check_invariants(stores[-1])
    pool.forget("q")


async def test_source_that_has_lost_its_name_is_known_by_what_stands_for_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pool"
    for name in ("a", "b"):
        pool = CachePool(path)
        store = CacheStore(source_of(k=name.encode()), cache_store=pool, source_id=name)
        await read_through(store, "k")
        del pool, store
        await closed(tmp_path, "pool")
    (path / ".zcache/index/sources").unlink()
    pool = CachePool(path)
    lost = {info.name: info for info in pool.sources()}
    assert [(info.source, info.entries) for info in lost.values()] == [(None, 1), (None, 1)]
    held = {}
    for name in lost:
        target = MemoryStore()
        assert pool.export(name, target) == 1
        held[target._store_dict["k"].to_bytes()] = name
    assert held.keys() == {b"a", b"b"}
    pool.forget(held[b"a"])
    assert [info.name for info in pool.sources()] == [held[b"b"]]
    # Its own name is known again when it is opened.
    store = CacheStore(source_of(k=b"new"), cache_store=pool, source_id="a")
    assert await read_through(store, "k") == b"new"
    assert {info.name for info in pool.sources()} == {"a", held[b"b"]}


NASTY = (
    *("..", ".", "/", "/etc/passwd", "a/../b", "a//b", "./a", "a/", " ", "\0", "a\n{}", "a\0"),
    *("a", "A", "ss", "\u00df", "\u1e9e", "\u00e9", "e\u0301", "\uff41", "\u0131", "I"),
    *("\ud800", "\udc00", "\ud800\udc00", "\U00010000", "a\udfff"),
    *(".zcache", ".zcache/segments/0", ".zcache/ranges/a", "zarr.json", label_of("a")),
    *(f"{label_of('a')}/a", f"../{label_of('A')}/a", f".zcache/ranges/{label_of('a')}/a"),
    *("x" * 2**20, "x" * 2**20 + "y", "x/" * 2**14 + "x", "x" * 128, "x" * 255, "x" * 256),
)
ANY = st.integers(0, len(NASTY) - 1) | st.text(st.characters(), max_size=12)
"""Names of sources, and keys, as hostile as they come; a number stands for one of `NASTY`."""


def named(drawn: list[int | str]) -> list[str]:
    """What was drawn, once each."""
    return list(dict.fromkeys(NASTY[one] if isinstance(one, int) else one for one in drawn))


def value_of(name: str, key: str) -> bytes:
    return hashlib.sha256(repr((name, key)).encode()).digest()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_two_sources_never_see_each_others_values(
    tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """Of whatever names and keys: all examples use one pool, which is small enough to evict."""
    where = tmp_path_factory.mktemp("names") / "pool" if kind == "directory" else None
    # For the names alone that are a megabyte long there has to be room.
    pool = CachePool(where, max_size="64 MiB" if where else 2000)
    used = set()

    @given(
        first=st.lists(ANY, min_size=2, max_size=3),
        second=st.lists(ANY, min_size=1, max_size=6),
        whole=st.booleans(),
    )
    @settings(max_examples=40)
    def check(first: list[int | str], second: list[int | str], whole: bool) -> None:
        names, keys = [name for name in named(first) if name], ["", *named(second)]
        assume(len(names) > 1)
        request = None if whole else RangeByteRequest(3, 9)
        stores = {}
        for name in names:
            values = {key: buf(value_of(name, key)) for key in keys}
            stores[name] = CacheStore(MemoryStore(values), cache_store=pool, source_id=name)
        used.update(names)

        async def use() -> None:
            for _ in range(2):
                for name, store in stores.items():
                    for key in keys:
                        expected = value_of(name, key)
                        found = await read_through(store, key, request)
                        assert found == (expected if whole else expected[3:9])
            await stores[names[0]].delete(keys[0])
            assert await read(stores[names[0]], keys[0]) is None
            assert await read(stores[names[1]], keys[0]) == value_of(names[1], keys[0])

        asyncio.run(use())
        # Its next store has it again.
        stores[names[0]].set_sync(keys[0], buf(value_of(names[0], keys[0])))
        stores[names[0]].drain_sync()

    check()
    gc.collect()
    assert {info.name for info in pool.sources()} == used
    check_invariants(CacheStore(MemoryStore(), cache_store=pool, source_id="last"))


@pytest.mark.parametrize("name", ["", "process:1"])
def test_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(OptionValueError, match="invalid source_id"):
        CacheStore(MemoryStore(), cache_store=CachePool(), source_id=name)
