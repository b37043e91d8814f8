"""Pipes, links, devices and files of any length in a cache directory: none stops, fills or leads anywhere."""

from __future__ import annotations

import os
import shutil
import stat
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, MemoryStore

from support import buf, read
from zcache import CacheOwnershipError, CacheStore
from zcache._backends.directory.layout import Layout
from zcache.testing import StoreDouble, stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

VALUES = {f"a/c/{n}": bytes([n]) * 1000 for n in range(10)}


def source() -> StoreDouble:
    return StoreDouble(MemoryStore({key: buf(value) for key, value in VALUES.items()}))


def open_store(where: Path, **options: object) -> CacheStore:
    options = {"source_id": "source", **options}
    return CacheStore(source(), cache_store=LocalStore(where), **options)  # type: ignore[arg-type]


async def check_read(store: CacheStore) -> None:
    for _ in range(2):
        for key, value in VALUES.items():
            assert await read(store, key) == value
        assert store.drain_sync()


async def warmed(where: Path) -> None:
    store = open_store(where)
    await check_read(store)
    assert stored_sizes(store).keys() == VALUES.keys()


def replace(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (path.parent / "elsewhere").write_bytes(b"?" * 1000)
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "long":
        path.write_bytes(b"")
        os.truncate(path, 6 * 2**30)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no devices can be made here")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "long", "device"])
@pytest.mark.parametrize("verify", ["first", "never"])
async def test_anything_in_place_of_a_value(tmp_path: Path, kind: str, verify: str) -> None:
    await warmed(tmp_path)
    replace(tmp_path / "a/c/3", kind)
    store = open_store(tmp_path, verify=verify)
    await check_read(store)
    await store.set("a/c/3", buf(b"new"))
    assert await read(store, "a/c/3") == b"new"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long"])
@pytest.mark.parametrize(
    "name", ["stamp.json", "index/head", "index/cells", "index/lock", "index/owner"]
)
async def test_anything_in_place_of_a_part(tmp_path: Path, kind: str, name: str) -> None:
    await warmed(tmp_path)
    path = tmp_path / ".zcache" / name
    if name == "stamp.json":
        (tmp_path / ".zcache/index/stamp.json").unlink()
    replace(path, kind)
    try:
        store = open_store(tmp_path)
    except CacheOwnershipError:
        assert name == "stamp.json"
        return
    await check_read(store)
    if kind == "long" and path.exists():
        assert path.stat().st_blocks * 512 < 2**30


@pytest.mark.parametrize("name", ["tmp", "index", "ranges", "dropped", ""])
async def test_links_in_place_of_own_folders_lead_nowhere(tmp_path: Path, name: str) -> None:
    where, home = tmp_path / "cache", tmp_path / "home"
    await warmed(where)
    home.mkdir()
    names = ["own-notes", "s0-report", "s7-x", "head", "table", "cells", "texts", "lock", "other"]
    for one in names:
        (home / one).write_text(one)
    path = where / ".zcache" / name
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to(home)
    await check_read(open_store(where))
    assert {path.name: path.read_text() for path in home.iterdir()} == {one: one for one in names}


@pytest.mark.parametrize("name", ["tmp", "ranges", "dropped"])
async def test_links_that_come_while_in_use_lead_nowhere(tmp_path: Path, name: str) -> None:
    where, home = tmp_path / "cache", tmp_path / "home"
    home.mkdir()
    (home / "own-notes").write_text("mine")
    store = open_store(where)
    await read(store, "a/c/0")
    assert store.drain_sync()
    path = where / ".zcache" / name
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to(home)
    await check_read(store)
    await store.clear_cache()
    assert {path.name: path.read_text() for path in home.iterdir()} == {"own-notes": "mine"}


async def test_directory_of_another_user_is_refused_unless_adopted(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user")
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(CacheOwnershipError, match="another user"):
        open_store(tmp_path)
    await check_read(open_store(tmp_path, adopt=True))
    # What a process has adopted it uses again after it could not.
    found = Layout(tmp_path, "source")
    found.claim(adopt=True)
    found.claim(adopt=False)


@pytest.mark.parametrize(("mode", "others"), [(None, 0), (0o700, 0), (0o755, 0o055)])
async def test_others_may_read_what_they_may_read_of_the_directory(
    tmp_path: Path, mode: int | None, others: int
) -> None:
    where = tmp_path / "cache"
    if mode is not None:
        where.mkdir()
        where.chmod(mode)
    await warmed(where)
    for path in (where, where / "a", where / "a/c", where / ".zcache", where / "a/c/1"):
        allowed = others if path.is_dir() else others & 0o044
        assert path.stat().st_mode & 0o077 & ~allowed == 0
        assert path.stat().st_mode & 0o044 == others & 0o044


async def test_names_that_the_volume_does_not_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys that are one file only the folded one is cached."""
    monkeypatch.setattr("zcache._backends.directory.files.folds_names", lambda folder: True)
    behind = StoreDouble(
        MemoryStore(
            {"T/c/0": buf(b"A"), "t/c/0": buf(b"B"), "\u00e9": buf(b"C"), "e\u0301": buf(b"D")}
        )
    )
    store = CacheStore(behind, cache_store=LocalStore(tmp_path), source_id="source")
    for _ in range(3):
        assert [await read(store, key) for key in ("T/c/0", "t/c/0")] == [b"A", b"B"]
        assert [await read(store, key) for key in ("\u00e9", "e\u0301")] == [b"C", b"D"]
        assert store.drain_sync()
    assert stored_sizes(store) == {"t/c/0": 1, "\u00e9": 1}
    assert store.cache_stats()["cache_skips"] == 0
