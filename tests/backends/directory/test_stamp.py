"""The stamp of a directory, written, read, refused and taken over."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING

import pytest

from zcache._backends.directory.stamp import Stamp
from zcache._core import PENDING
from zcache._source.identity import EPHEMERAL
from zcache.exceptions import CacheOwnershipError

if TYPE_CHECKING:
    from pathlib import Path


def open_stamp(where: Path, source: str = "one", *, adopt: bool = False) -> Stamp:
    return Stamp(str(where), str(where / ".zcache"), source, adopt=adopt)


def source_in(where: Path) -> str:
    stamp = json.loads((where / ".zcache/stamp.json").read_text())
    assert set(stamp) == {"zcache", "source"}
    return str(stamp["source"])


def names_in(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir())


def test_stamp_new_directory_is_made_and_claimed(tmp_path: Path) -> None:
    where = tmp_path / "deep/cache"
    assert not open_stamp(where).is_foreign
    assert source_in(where) == "one"
    assert names_in(where / ".zcache") == ["index", "stamp.json"]
    assert names_in(where / ".zcache/index") == ["stamp.json"]
    assert not open_stamp(where).is_foreign


def test_stamp_of_another_source_is_refused_and_names_the_way_out(tmp_path: Path) -> None:
    open_stamp(tmp_path)
    with pytest.raises(CacheOwnershipError, match="source_id='one'"):
        open_stamp(tmp_path, "two")
    with pytest.raises(ValueError, match="source_id='one'"):
        open_stamp(tmp_path, "two", adopt=True)
    assert source_in(tmp_path) == "one"


def test_stamp_missing_in_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with pytest.raises(CacheOwnershipError, match="adopt=True"):
        open_stamp(tmp_path)
    assert names_in(tmp_path) == ["a"]


def test_stamp_adopt_takes_over_what_is_there_but_not_what_was_never_committed(
    tmp_path: Path,
) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    os.utime(tmp_path / "b", ns=(10**18 + PENDING,) * 2)
    open_stamp(tmp_path, adopt=True)
    assert source_in(tmp_path) == "one"
    assert names_in(tmp_path) == [".zcache", "a"]


def test_stamp_adopt_refuses_what_holds_another_cache(tmp_path: Path) -> None:
    open_stamp(tmp_path / "a/cache")
    with pytest.raises(CacheOwnershipError, match="another cache directory"):
        open_stamp(tmp_path, adopt=True)


def test_stamp_inside_another_cache_is_refused(tmp_path: Path) -> None:
    open_stamp(tmp_path)
    with pytest.raises(CacheOwnershipError, match="lies inside the cache directory"):
        open_stamp(tmp_path / "a/cache")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"zcache": 99, "source": "one"}'])
def test_stamp_that_cannot_be_read_is_refused_unless_adopted(tmp_path: Path, text: bytes) -> None:
    open_stamp(tmp_path)
    path = tmp_path / ".zcache/stamp.json"
    path.write_bytes(text)
    # Each is a copy of the other one.
    (tmp_path / ".zcache/index/stamp.json").write_bytes(text)
    with pytest.raises(CacheOwnershipError):
        open_stamp(tmp_path)
    assert path.read_bytes() == text


def test_stamp_of_a_source_that_ended_is_taken_over(tmp_path: Path) -> None:
    open_stamp(tmp_path, f"{EPHEMERAL}1")
    stamp = open_stamp(tmp_path, "two")
    assert stamp.is_foreign
    stamp.take_over()
    # A process that dies here leaves the values to neither of the two.
    assert source_in(tmp_path).startswith(EPHEMERAL)
    assert source_in(tmp_path) != f"{EPHEMERAL}1"
    stamp.restamp()
    assert source_in(tmp_path) == "two"
    assert not stamp.is_foreign


def test_stamp_claimed_by_many_at_once_has_one_owner(tmp_path: Path) -> None:
    where, owners, errors = tmp_path / "cache", list[str](), list[Exception]()
    begin = threading.Barrier(8)

    def claim(source: str) -> None:
        begin.wait()
        try:
            open_stamp(where, source)
            owners.append(source)
        except CacheOwnershipError as error:
            errors.append(error)

    threads = [threading.Thread(target=claim, args=(f"{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owners == [source_in(where)]
    assert len(errors) == 7
    assert names_in(where / ".zcache") == ["index", "stamp.json"]
    assert names_in(where / ".zcache/index") == ["stamp.json"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_stamp_copy_that_cannot_be_read_is_written_anew(tmp_path: Path, text: bytes) -> None:
    open_stamp(tmp_path)
    copy = tmp_path / ".zcache/index/stamp.json"
    whole = copy.read_bytes()
    copy.write_bytes(text)
    open_stamp(tmp_path)
    assert copy.read_bytes() == whole
    (tmp_path / ".zcache/stamp.json").write_bytes(text)
    open_stamp(tmp_path)
    assert source_in(tmp_path) == "one"
