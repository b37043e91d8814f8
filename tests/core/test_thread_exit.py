"""Threads that are in the core when the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

WITH_DAEMONS = """
import sys, threading
from zcache._core import file_holds

path, size = sys.argv[1], int(sys.argv[2])

def work(has_begun):
    while True:
        file_holds(path, size, 0)
        has_begun.set()

events = [threading.Event() for _ in range(4)]
for event in events:
    threading.Thread(target=work, args=(event,), daemon=True).start()
for event in events:
    event.wait()
"""
IN_A_SUBINTERPRETER = """
try:
    import _interpreters as interpreters
    here = interpreters.create("legacy")
except ImportError:
    import _xxsubinterpreters as interpreters
    here = interpreters.create(isolated=False)
interpreters.run_string(here, "import zcache")
print("imported")
"""


def test_daemon_threads_in_the_core_the_interpreter_ends_without_a_signal(tmp_path: Path) -> None:
    """Each wants the interpreter back, and is ended by an unwinding of its stack, frames of the core among it."""
    path, size = tmp_path / "value", 200_000
    path.write_bytes(bytes(size))
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", WITH_DAEMONS, str(path), str(size)],
            env={"PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.slow
def test_subinterpreter_that_has_imported_it_lets_the_process_end() -> None:
    """It ends with the process: on Python 3.11 a thread that lets others go on there gets no turn again."""
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_SUBINTERPRETER],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, b"imported\n"), ended.stderr
