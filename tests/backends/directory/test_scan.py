"""The scan of a directory: which files are values, which are left alone, and which go."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import RangeByteRequest

from directories import INDEX, closed, open_store, reads, tree
from support import buf, check_quiet, drained, fill, read, read_through, write
from zcache._backends.directory.files import Finder, owner
from zcache._backends.directory.scan import Scanner
from zcache._core import PENDING, SIGNATURE

if TYPE_CHECKING:
    from pathlib import Path


def make(
    path: Path, size: int, *, signature: int = SIGNATURE, milli: int = 1_700_000_000_000
) -> None:
    """Write a file as zcache does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, ns=(milli * 1_000_000 + signature,) * 2)


def test_walk_finds_values_and_ranges_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "a/c/0", 3)
    make(tmp_path / ".zcache/ranges/a/c/0@0-2", 2)
    make(tmp_path / ".zcache/index/cells", 7)
    make(tmp_path / ".zcache/tmp/s0-1-0", 7)
    make(tmp_path / "of-another", 7, signature=5)
    make(tmp_path / "b", 1, signature=PENDING)
    (tmp_path / "link").symlink_to(tmp_path / "a/c/0")
    (tmp_path / "folder").symlink_to(tmp_path / "a", target_is_directory=True)
    assert owner(str(tmp_path / "b")) == "pending"
    finder = Finder(str(tmp_path), bytes(8))
    found = {name: (milli, size) for milli, size, name in finder.find()}
    assert found == {
        "a/c/0": (1_700_000_000_000, 3),
        ".zcache/ranges/a/c/0@0-2": (1_700_000_000_000, 2),
    }
    assert not (tmp_path / "b").exists()
    assert owner(str(tmp_path / "a/c/0")) == "ours"
    assert owner(str(tmp_path / "of-another")) == "foreign"


@pytest.mark.parametrize("signature", [5, SIGNATURE, PENDING])
def test_walk_name_that_is_no_text_is_of_others(tmp_path: Path, signature: int) -> None:
    for name in (b"name\xe9", b"a/name\xe9/0"):
        try:
            make(tmp_path / os.fsdecode(name), 3, signature=signature)
        except OSError as error:
            pytest.skip(f"no such names here: {error}")
    finder = Finder(str(tmp_path), bytes(8))
    finder.formerly = pytest.fail
    assert list(finder.find()) == []
    assert finder.foreign == 2
    assert (tmp_path / os.fsdecode(b"name\xe9")).exists()


@pytest.mark.parametrize("name", [b"name\xe9", b"a/name\xe9", b".zcache/ranges/name\xe9"])
async def test_rebuild_beside_a_name_that_is_no_text_takes_all_values_in(
    tmp_path: Path, name: bytes
) -> None:
    await fill(open_store(tmp_path)[0], **{"a/0": b"1", "b": b"2"})
    await closed(tmp_path)
    path = tmp_path / "cache" / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text("theirs")
    except OSError as error:
        pytest.skip(f"no such names here: {error}")
    shutil.rmtree(tmp_path / "cache" / INDEX)
    store, source = open_store(tmp_path)
    assert [await read(store, key) for key in ("a/0", "b")] == [b"1", b"2"]
    assert reads(source) == 0
    await store.delete_dir("a")
    await store.clear_cache()
    assert path.read_text() == "theirs"
    await check_quiet(store)


def test_walk_below_a_prefix_finds_only_what_is_below(tmp_path: Path) -> None:
    for name in ("a/c/0", "a/c/1", "ab/c/0"):
        make(tmp_path / name, 1)
    assert sorted(name for *_, name in Finder(str(tmp_path), bytes(8)).find("a/")) == [
        "a/c/0",
        "a/c/1",
    ]


def test_walk_below_a_link_that_leads_outside_finds_nothing(tmp_path: Path) -> None:
    make(tmp_path / "outside/c/0", 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/a").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert list(Finder(str(tmp_path / "cache"), bytes(8)).find("a/")) == []


@pytest.mark.parametrize(
    ("prefix", "left"),
    [
        ("a", {"ab/c/0", ".zcache/ranges/ab@0-1", "a/of-another"}),
        ("a/c/0", {"a/c/1", "ab/c/0", ".zcache/ranges/ab@0-1", "a/of-another"}),
        ("", {"a/of-another"}),
    ],
)
def test_remove_below_removes_values_and_ranges_of_zcache_alone(
    tmp_path: Path, prefix: str, left: set[str]
) -> None:
    for name in ("a/c/0", "a/c/1", "ab/c/0", ".zcache/ranges/a/c/0@0-1", ".zcache/ranges/ab@0-1"):
        make(tmp_path / name, 1)
    (tmp_path / "a/of-another").write_bytes(b"1")
    Scanner(str(tmp_path), str(tmp_path / ".zcache")).remove_below(prefix)
    assert tree(tmp_path) == left


def test_bury_names_are_kept_as_tombstones(tmp_path: Path) -> None:
    Scanner(str(tmp_path), str(tmp_path / ".zcache")).add_tombstones(
        ["a/c/0", ".zcache/ranges/b@0-1"]
    )
    assert len(tree(tmp_path / ".zcache/dropped")) == 2


async def test_rebuild_takes_no_value_that_has_a_tombstone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, source = open_store(tmp_path)
    await fill(store, a=b"old", b=b"2")
    await source.inner.set("c", buf(b"0123"))
    await read_through(store, "c", RangeByteRequest(0, 2))
    await drained(store)
    del store
    await closed(tmp_path)
    # As after a process that could not delete, and then lost its index.
    Scanner(str(tmp_path / "cache"), str(tmp_path / "cache/.zcache")).add_tombstones(["a"])
    await source.inner.set("a", buf(b"new"))
    shutil.rmtree(tmp_path / "cache" / INDEX)
    store, source = open_store(tmp_path)
    assert "2 values" in caplog.text
    assert await read_through(store, "a") == b"new"
    assert await read(store, "b") == b"2"
    assert await read(store, "c", RangeByteRequest(0, 2)) == b"01"
    assert reads(source) == 1
    assert tree(tmp_path / "cache/.zcache/dropped") == set()
    await check_quiet(store)


async def test_rebuild_leaves_files_of_others_where_they_are(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path, max_size=10)
    await write(store, "a", b"1")
    del store
    await closed(tmp_path)
    (tmp_path / "cache/of-another").write_bytes(bytes(1000))
    shutil.rmtree(tmp_path / "cache" / INDEX)
    store, source = open_store(tmp_path, max_size=10)
    assert await read(store, "a") == b"1"
    assert reads(source) == 0
    assert store.cache_info()["current_size"] == 1
    await write(store, "b", bytes(10))
    assert (tmp_path / "cache/of-another").stat().st_size == 1000
    await check_quiet(store)
