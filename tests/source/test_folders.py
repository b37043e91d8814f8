"""Folders by what they are, not by a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zcache._source.folders import folders_overlap, identity

if TYPE_CHECKING:
    from pathlib import Path


def test_identity_of_a_folder_is_that_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    assert identity(str(tmp_path / "a")) == identity(str(tmp_path / "link"))
    assert identity(str(tmp_path / "a")) != identity(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "/a\0b", "/\ud800"])
def test_identity_of_what_is_not_there_is_none(path: str) -> None:
    assert identity(path) is None


@pytest.mark.parametrize("there", ["", "a", "a/b/c"])
def test_folders_overlap_whether_or_not_they_are_there(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path)
    one = f"{tmp_path}/a"
    for path, expected in [("a", True), ("a/b/c", True), ("", True), ("b/a", False), ("a2", False)]:
        for other in (f"{tmp_path}/{path}", f"{tmp_path}/link/{path}"):
            assert folders_overlap(one, other) is folders_overlap(other, one) is expected
    assert folders_overlap(one, "/")
