"""What a cache that outlives its process must not take in again: dropped, torn, or another cache's."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
from zarr.abc.store import RangeByteRequest
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from directory_support import open_store, reads, tree
from support import buf, check_books, read
from zcache import CacheStore
from zcache._marks import DROPPED, WRITING, key_of, mark, marked

if TYPE_CHECKING:
    from pathlib import Path


def lose_index(where: Path) -> None:
    """As after a reboot: all that is left are the files."""
    gc.collect()
    (where / "cache/.zcache/index/head").write_bytes(b"")


def marks_of(where: Path, kind: str) -> set[str]:
    return {name for name in tree(where / "cache") if name.startswith(kind)}


def test_names() -> None:
    names = ["a", "a/b", ".zcache/ranges/a/b@3-5", "\udcff"]
    assert [key_of(name) for name in names] == ["a", "a/b", "a/b", "\udcff"]
    assert len({mark(DROPPED, name) for name in names}) == len(names)
    assert marked([mark(DROPPED, "a/b"), mark(WRITING, "a")], names) == ["a", "a/b"]
    assert marked([], names) == []


# ------------------------------------------------------------------- directories


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names in cache directories that cannot be deleted."""
    from zcache import _files, _ports

    names: set[str] = set()
    remove, remove_below = _files.remove, _files.remove_below

    def refuse(name: str) -> None:
        if any(name.endswith(one) for one in names):
            raise PermissionError(1, "immutable", name)

    def below(root: str, name: str) -> None:
        refuse(name)
        remove_below(root, name)

    def one(path: str) -> bool:
        refuse(path)
        return remove(path)

    monkeypatch.setattr(_files, "remove_below", below)
    monkeypatch.setattr(_files, "remove", one)
    # Deletes by threads of Python's, so that they can fail.
    monkeypatch.setattr(_ports, "counter", lambda _: None)
    return names


@pytest.mark.parametrize("still", [True, False])
async def test_what_could_not_be_deleted_does_not_come_back(
    tmp_path: Path, stuck: set[str], still: bool
) -> None:
    store = open_store(tmp_path, cache_set_data=False)
    for key in ("k", "r", "other"):
        await store.set(key, buf(b"0123456789"))
        await read(store, key, RangeByteRequest(2, 4) if key == "r" else None)
    stuck |= {"/k", "k", "r@2-4"}
    for key in ("k", "r"):
        await store.set(key, buf(b"ABCDEFGHIJ"))
    assert await read(store, "k") == b"ABCDEFGHIJ"
    assert store.cache_info()["current_size"] == 22
    assert len(marks_of(tmp_path, DROPPED)) == 2
    del store
    lose_index(tmp_path)
    if not still:
        stuck.clear()

    store = open_store(tmp_path, cache_set_data=False)
    # Nobody has deleted them meanwhile: they count, and are not served.
    assert store.cache_info()["current_size"] == (22 if still else 10)
    assert await read(store, "k") == b"ABCDEFGHIJ"
    assert await read(store, "r", RangeByteRequest(2, 4)) == b"CD"
    assert reads(store) == 2
    assert await read(store, "other") == b"0123456789"
    assert reads(store) == 0
    assert len(marks_of(tmp_path, DROPPED)) == (2 if still else 0)
    stuck.clear()
    del store
    lose_index(tmp_path)
    store = open_store(tmp_path)
    assert marks_of(tmp_path, DROPPED) == set()
    assert await read(store, "k") == b"ABCDEFGHIJ"
    check_books(store)


async def test_deletes_of_what_is_overwritten_are_never_left_out(
    tmp_path: Path, stuck: set[str]
) -> None:
    """Though others have failed: of values that are not valid any more none may be left behind."""
    store = open_store(tmp_path)
    others = [f"o{number}" for number in range(8)]
    for key in ("k", *others):
        await store.set(key, buf(b"old"))
    stuck |= {*others, *(f"/{key}" for key in others)}
    for key in others:
        await store.set(key, buf(b"new"))
    assert not store._engine.breaker.allows("delete")
    await store.set("k", buf(b"new"))
    # And since that went well, deletes are trusted again, and the new value is cached.
    assert (tmp_path / "cache/k").read_bytes() == b"new"
    assert await read(store, "k") == b"new"


def test_a_cache_directory_below_is_not_adopted(tmp_path: Path) -> None:
    inner = tmp_path / "cache/within"
    CacheStore(LocalStore(tmp_path / "one"), cache_store=LocalStore(inner)).cache_info()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"holds another cache directory, .*within"):
        open_store(tmp_path, adopt=True)
    assert tree(tmp_path) >= before


# ---------------------------------------------------------------- listed stores


class Stubborn(WrapperStore[Any]):
    """A store that deletes nothing any more once it is told so."""

    refuses = False

    async def delete(self, key: str) -> None:
        if self.refuses:
            # One that nobody logs, for a record would keep the frames, and they the store.
            raise OSError(22, "no deletes", key)
        await super().delete(key)


def remote(where: Path) -> FsspecStore:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{where / 'cache'}", storage_options={"auto_mkdir": True})


def over(where: Path, cache: Any) -> CacheStore:
    return CacheStore(LocalStore(where / "source"), cache_store=cache)


async def test_what_a_listed_store_could_not_delete_does_not_come_back(tmp_path: Path) -> None:
    cache = Stubborn(remote(tmp_path))
    store = over(tmp_path, cache)
    for key in ("k", "other"):
        await store.set(key, buf(b"old"))
    cache.refuses = True
    await store.set("k", buf(b"new"))
    assert await read(store, "k") == b"new"
    assert (tmp_path / "cache/k").read_bytes() == b"old"
    assert marks_of(tmp_path, DROPPED) == {mark(DROPPED, "k")}
    del store
    gc.collect()

    store = over(tmp_path, remote(tmp_path))
    assert await read(store, "k") == b"new"
    (tmp_path / "source/other").write_bytes(b"changed")  # Behind the back of the cache.
    assert await read(store, "other") == b"old"
    assert marks_of(tmp_path, DROPPED) == set()


async def test_who_is_cancelled_while_a_mark_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be deleted is tried again, and its room comes back."""
    cache = Stubborn(remote(tmp_path))
    store = over(tmp_path, cache)
    await store.set("k", buf(b"0123456789"))
    begun = asyncio.Event()

    async def slowly(*_: object) -> None:
        begun.set()
        await asyncio.sleep(30)

    monkeypatch.setattr(store._engine.port, "remember", slowly)
    cache.refuses = True
    task = asyncio.ensure_future(store.set("k", buf(b"new")))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cache.refuses = False
    await store.set("other", buf(b"12345"))
    assert store.cache_info()["current_size"] == 5
    assert not (tmp_path / "cache/k").exists()


async def test_what_still_cannot_be_deleted_holds_nobody_up(tmp_path: Path) -> None:
    cache = Stubborn(remote(tmp_path))
    store = over(tmp_path, cache)
    await store.set("k", buf(b"old"))
    cache.refuses = True
    await store.set("k", buf(b"new"))
    del store
    gc.collect()
    store = over(tmp_path, cache)
    assert await read(store, "k") == b"new"
    assert marks_of(tmp_path, DROPPED) == {mark(DROPPED, "k")}
    # It counts, and all else is cached as ever.
    assert store.cache_info()["current_size"] == 3
    cache.refuses = False
    await store.set("other", buf(b"12345"))
    assert await read(store, "other") == b"12345"
    assert store.cache_stats()["hits"] == 1
    assert not (tmp_path / "cache/k").exists()
    assert await read(store, "k") == b"new"
    assert store.cache_info()["current_size"] == 8


async def test_a_value_that_was_never_written_to_its_end(tmp_path: Path) -> None:
    """A store of files shows half of it; whoever is killed meanwhile deletes nothing."""
    store = over(tmp_path, remote(tmp_path))
    for key in ("k", "other"):
        await store.set(key, buf(b"0123456789"))
    assert marks_of(tmp_path, WRITING) == set()
    del store
    gc.collect()
    (tmp_path / "cache/k").write_bytes(b"01234")
    unfinished = tmp_path / "cache" / mark(WRITING, "k")
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(b"k")

    store = over(tmp_path, remote(tmp_path))
    assert await read(store, "k") == b"0123456789"
    assert marks_of(tmp_path, WRITING) == set()
    assert (tmp_path / "cache/k").read_bytes() == b"0123456789"


async def test_it_is_marked_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    cache = remote(tmp_path)
    put = type(cache).set

    async def watched(self: Any, key: str, value: Any, *rest: Any) -> None:
        if key == "k":
            seen.append(marks_of(tmp_path, WRITING))
        await put(self, key, value, *rest)

    monkeypatch.setattr(type(cache), "set", watched)
    await over(tmp_path, cache).set("k", buf(b"1"))
    assert seen == [{mark(WRITING, "k")}]


# --------------------------------------------------------------- sorts of caches


async def test_a_directory_is_not_listed_beside_its_index(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    await store.set("k", buf(b"1"))
    for cache in (WrapperStore(LocalStore(tmp_path / "cache")), remote(tmp_path)):
        with pytest.raises(ValueError, match=r"made through a zarr\.storage\.LocalStore itself"):
            await read(over(tmp_path, cache), "k")
    assert await read(store, "k") == b"1"


async def test_a_listed_store_is_no_directory(tmp_path: Path) -> None:
    await over(tmp_path, remote(tmp_path)).set("k", buf(b"1"))
    stamp = json.loads((tmp_path / "cache/.zcache/stamp.json").read_text())
    assert stamp["listed"] is True
    with pytest.raises(ValueError, match=r"made through a store of another class"):
        open_store(tmp_path)
    assert not (tmp_path / "cache/.zcache/index").exists()
