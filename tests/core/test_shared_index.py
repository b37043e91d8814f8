"""The index of a directory, by itself: what its participants say to each other outlives its files."""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from directories import INDEX_FILES
from zcache._core import CorruptIndexError, Granted, Index, Rejected

VOID = "overtaken by a write"


def outcome_of_fill(index: Index, key: str) -> str:
    """What becomes of a fill: `granted`, or why not."""
    ticket = index.join(key, None, object(), 2.0, False)
    assert isinstance(ticket, int)
    try:
        answer = index.reserve(key, None, 3, ticket, 2.0)
        if isinstance(answer, Rejected):
            return answer.reason
        assert isinstance(answer, Granted)
        index.commit(answer.reservation, None, 2.0)
        return "granted"
    finally:
        index.complete_flight(key, ticket)


def open_index(where: Path) -> Index:
    index, fresh = Index.open(str(where))
    if fresh:
        index.finish_rebuild()
    return index


@pytest.mark.parametrize("how", ["damaged", "removed"])
@pytest.mark.parametrize("end", ["ends", "dies"])
def test_restart_knows_what_others_are_writing(tmp_path: Path, how: str, end: str) -> None:
    """Nothing is kept of what is being written, though its writer takes no step meanwhile."""
    one = open_index(tmp_path)
    other = open_index(tmp_path)
    one.begin_write("a/k")
    one.invalidate("b", True)
    if how == "removed":
        # The first that finds that opens new files, which the writer hears of at its next step.
        for name in INDEX_FILES:
            (tmp_path / name).unlink()
        assert one.restart(1)
        one.finish_rebuild()
        assert not other.restart(2)
    else:
        with (tmp_path / "head").open("r+b") as head:
            head.seek(8)
            head.write(struct.pack("=I", 3))
        with pytest.raises(CorruptIndexError):
            other.lookup("a/k")
        assert other.restart(1)
        other.finish_rebuild()
    found = [outcome_of_fill(other, key) for key in ("a/k", "b/c/0", "a/j")]
    assert found == [VOID, VOID, "granted"]
    if end == "ends":
        one.end_write("a/k", True)
        one.invalidate("b", False)
    else:
        del one
        gc.collect()
        other.reclaim_dead()
    assert [outcome_of_fill(other, key) for key in ("a/k", "b/c/0")] == ["granted", "granted"]
    other.validate()


def test_restart_files_removed_the_first_to_open_new_ones_fills_them(tmp_path: Path) -> None:
    """Though another has the lock at once: what is being written is said before that."""
    one = open_index(tmp_path)
    one.begin_write("a/k")
    for name in (*INDEX_FILES, "lock"):
        (tmp_path / name).unlink()
    with (tmp_path / "lock").open("w"):
        assert one.restart(1)
        other, fresh = Index.open(str(tmp_path))
        assert not fresh
        one.finish_rebuild()
        assert outcome_of_fill(other, "a/k") == VOID
        assert outcome_of_fill(other, "a/j") == "granted"


FORKS = """
import fcntl, os, sys, threading
from zcache._core import Index, IndexBusyError

root = sys.argv[1]
alive, free = (os.open(os.path.join(root, name), os.O_RDWR | os.O_CREAT) for name in ("p3", "p4"))
fcntl.flock(alive, fcntl.LOCK_EX)
ends = threading.Event()

def look():
    while not ends.is_set():
        try:
            Index.open(root, timeout=0)
        except IndexBusyError:
            pass

looks = threading.Thread(target=look)
looks.start()
goes_on, end = os.pipe()
for _ in range(40):
    if not os.fork():
        os.close(end)
        os.read(goes_on, 1)
        os._exit(0)
ends.set()
looks.join()
for name in ("lock", "p4"):
    # Fails where a child has it locked.
    fcntl.flock(os.open(os.path.join(root, name), os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_child_that_is_forked_while_locks_are_tried_keeps_none(tmp_path: Path) -> None:
    """They belong to open files, which a child has as well, and closes never."""
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], check=True, timeout=120)


OPENS = """
import os, sys
from zcache._core import Index
os.setgid(54321)
os.setuid(54321)
index, is_new = Index.open(sys.argv[1], timeout=20)
print(index.slot, is_new)
index.finish_rebuild()
"""
DIES = """
import os, sys
from zcache._core import HeldLock
held = HeldLock(sys.argv[1])
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_slot_of_another_user_that_is_dead_keeps_no_participant_out() -> None:
    def run(script: str, root: Path) -> str:
        command = [sys.executable, "-c", script, str(root)]
        return subprocess.run(
            command, check=True, timeout=120, stdout=subprocess.PIPE, text=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 54321, 54321)
        root = Path(folder)
        assert run(OPENS, root) == "0 True\n"
        # The other user can read its file, and not write to it.
        (root / "s0").unlink()
        run(DIES, root)
        (root / "s0").chmod(0o644)
        assert run(OPENS, root) == "1 True\n"
        assert run(OPENS, root) == "1 False\n"
