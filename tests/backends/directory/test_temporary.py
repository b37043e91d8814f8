"""Unfinished files are removed once their process is gone, and never while it lives."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from agent import Agent
from directories import closed, open_store, tree
from support import check_quiet, write
from zcache._backends.directory.temporary import TemporaryFiles
from zcache.testing import index_slot

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> TemporaryFiles:
    (tmp_path / ".zcache/index").mkdir(parents=True)
    (tmp_path / ".zcache/tmp").mkdir()
    return TemporaryFiles(str(tmp_path / ".zcache"), str(tmp_path / ".zcache/index"))


def leave(tmp_path: Path, *names: str) -> None:
    for name in names:
        (tmp_path / ".zcache/tmp" / name).write_bytes(bytes(100))


def test_sweep_slot_that_is_free_removes_its_files(tmp_path: Path, folder: TemporaryFiles) -> None:
    (tmp_path / ".zcache/index/s7").touch()
    leave(tmp_path, "s7-123-0", "s7-123-1")
    folder.sweep()
    assert tree(tmp_path / ".zcache/tmp") == set()


def test_sweep_slot_in_use_keeps_its_files(tmp_path: Path, folder: TemporaryFiles) -> None:
    import fcntl

    leave(tmp_path, "s7-123-0")
    with (tmp_path / ".zcache/index/s7").open("w") as slot:
        fcntl.flock(slot, fcntl.LOCK_EX)
        folder.sweep()
        assert tree(tmp_path / ".zcache/tmp") == {"s7-123-0"}
    folder.sweep()
    assert tree(tmp_path / ".zcache/tmp") == set()


def test_sweep_own_slot_removes_what_its_last_process_has_left(
    tmp_path: Path, folder: TemporaryFiles
) -> None:
    leave(tmp_path, "s3-1-0", "s30-1-0")
    folder.sweep(own=3)
    assert tree(tmp_path / ".zcache/tmp") == {"s30-1-0"}


def test_sweep_process_without_a_slot_removes_what_is_too_old(
    tmp_path: Path, folder: TemporaryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, "own-1-0")
    folder.sweep()
    assert tree(tmp_path / ".zcache/tmp") == {"own-1-0"}
    later = (tmp_path / ".zcache/tmp/own-1-0").stat().st_ctime + 3601
    monkeypatch.setattr("zcache._backends.directory.temporary.time.time", lambda: later)
    folder.sweep()
    assert tree(tmp_path / ".zcache/tmp") == set()


async def test_open_removes_what_a_process_that_is_gone_has_left(tmp_path: Path) -> None:
    open_store(tmp_path)
    await closed(tmp_path)
    left = tmp_path / "cache/.zcache/tmp/s7-123-0"
    left.write_bytes(bytes(100))
    (tmp_path / "cache/.zcache/index/s7").write_bytes(b"")
    open_store(tmp_path)
    assert not left.exists()


@pytest.mark.slow
async def test_open_keeps_what_a_live_process_is_writing(tmp_path: Path) -> None:
    with Agent(tmp_path):
        writing = tmp_path / "cache/.zcache/tmp/s0-1-0"
        writing.write_bytes(bytes(100))
        store, _ = open_store(tmp_path)
        assert index_slot(store) == 1
        await write(store, "a", b"1")
        assert writing.exists()
    # Noticed by reads, at most once a second.
    while writing.exists():
        await store.get("unknown")
        os.sched_yield()
    await check_quiet(store)
