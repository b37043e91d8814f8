"""Parts of a cache directory that are removed or moved while it is in use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore

import storm
from storm import KEYS, get, open_store, value
from support import buf, drained_sync
from zcache.testing import entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zcache import CacheStore

PARTS = ["lock", "owner", "head", "table", "cells", "texts", "s0", "s1"]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    source = LocalStore(tmp_path / "source")
    for key in range(KEYS):
        source.set_sync(f"a/c/{key}", buf(value(key)))
    return tmp_path


@pytest.fixture(scope="module")
def crew() -> Iterator[list[subprocess.Popen[str]]]:
    """Three other processes, for one test after the other: each takes a second to start."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(storm.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


class Storm:
    """Three participants in processes of their own, which are at work when it is there."""

    def __init__(self, crew: list[subprocess.Popen[str]], where: Path, max_size: int) -> None:
        self.max_size = max_size
        self.root = where / "cache"
        self.processes = crew
        # One that a test before has ended is no part of this one.
        crew[:] = [process for process in crew if process.poll() is None]
        crew += [start() for _ in range(3 - len(crew))]
        self.tell(json.dumps([str(where), max_size]))
        assert self.answers() == ["ready"] * 3
        self.tell("")

    def tell(self, line: str) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def answers(self) -> list[str]:
        found = []
        for process in self.processes:
            assert process.stdout is not None
            found.append(process.stdout.readline().strip())
            assert found[-1], f"it has ended: {process.wait(60)}"
        return found

    def size(self) -> int:
        """Bytes of all values that are there, at one instant."""
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            return self._size()
        finally:
            for process in self.processes:
                process.send_signal(signal.SIGCONT)

    def _size(self) -> int:
        total = 0
        for above, folders, names in os.walk(self.root):
            if ".zcache" in folders:
                folders.remove(".zcache")
            total += sum((Path(above) / name).lstat().st_size for name in names)
        return total

    def check(self) -> None:
        """Have them go on for a moment, and end."""
        time.sleep(0.3)
        self.tell("")
        for answer in self.answers():
            report = json.loads(answer)
            assert report["wrong"] == report["errors"] == 0, report
            assert report["reads"] > 0
            assert report["writes"] > 0


@pytest.mark.slow
@pytest.mark.xdist_group("storm")
@pytest.mark.parametrize("part", PARTS)
def test_a_file_of_the_index_is_removed_in_use(
    where: Path, crew: list[subprocess.Popen[str]], part: str
) -> None:
    """No process ends, nothing wrong is read, and the bound holds."""
    processes = Storm(crew, where, 8000)
    largest = 0
    for _ in range(20):
        (where / "cache/.zcache/index" / part).unlink(missing_ok=True)
        largest = max(largest, processes.size())
        time.sleep(0.03)
    processes.check()
    assert largest <= processes.max_size


@pytest.mark.slow
@pytest.mark.xdist_group("storm")
@pytest.mark.parametrize("part", ["owner", "head", "table", "cells", "texts"])
def test_a_file_of_the_index_is_truncated_in_use(
    where: Path, crew: list[subprocess.Popen[str]], part: str
) -> None:
    """No process ends by the signal for a page that a mapped file has not any more."""
    processes = Storm(crew, where, 8000)
    for number in range(100):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(where / "cache/.zcache/index" / part, number % 3 * 4096)
        time.sleep(0.005)
    processes.check()


def two(where: Path) -> tuple[CacheStore, subprocess.Popen[str]]:
    """A store here, and one in another process that answers."""
    script = """
import sys
from pathlib import Path
from storm import get, open_store
from support import buf, drained_sync
from zcache.testing import entries

store = open_store(Path(sys.argv[1]))
for line in sys.stdin:
    word, *rest = line.split()
    if word == "get":
        print((get(store, rest[0]) or b"-")[:12].decode(), flush=True)
    elif word == "set":
        store.set_sync(rest[0], buf(rest[1].encode()))
        print("ok", flush=True)
    else:
        drained_sync(store)
        print(len(entries(store)), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(where)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return open_store(where), process


def ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


HOW = {
    "removed": lambda root: shutil.rmtree(root, ignore_errors=True),
    "emptied": lambda root: [
        shutil.rmtree(path, ignore_errors=True) for path in list(root.iterdir())
    ],
    "moved": lambda root: root.rename(root.with_name("elsewhere")),
    "without the index": lambda root: shutil.rmtree(root / ".zcache/index", ignore_errors=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", list(HOW))
def test_a_directory_goes_while_two_processes_use_it(where: Path, how: str) -> None:
    """Both go on with a cache at the same place, and see what the other one writes."""
    here, there = two(where)
    try:
        for key in range(10):
            get(here, f"a/c/{key}")
            drained_sync(here)
            assert ask(there, f"get a/c/{key}") == value(key)[:12].decode()
        HOW[how](where / "cache")
        for number in range(20):
            here.set_sync("a/c/1", buf(b"here %d" % number))
            assert ask(there, "get a/c/1") == f"here {number}"
            assert ask(there, f"set a/c/1 there{number}") == "ok"
            assert get(here, "a/c/1") == b"there%d" % number
            time.sleep(0.1)
        for key in range(10, 20):
            get(here, f"a/c/{key}")
        drained_sync(here)
        # Both have the same index again.
        assert len(entries(here)) >= 10
        assert ask(there, "count") == str(len(entries(here)))
        assert get(open_store(where), "a/c/1") == b"there19"
    finally:
        there.kill()
        there.communicate()
