"""Processes that die, or are stopped, wherever they are: right bytes, no more than the bound, nothing lost.

What happens in the processes is in `crashes.py`; how they are stopped is in `tracing.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import tracing
from crashes import play

if TYPE_CHECKING:
    from pathlib import Path

# Hundreds of processes one after the other: on a machine that is busy with others that takes minutes.
pytestmark = pytest.mark.timeout(540)

# What a fill of a pool does of itself: its header and bytes, its mark, and a hole for what it evicts.
POOL_FILL = {"pwritev", "pwrite64", "fallocate"}
# What a fill does of itself: a file of its own, its bytes, its times, and a file that it evicts; it gets its name by one of two.
FILL = {"open", "write", "utimensat", "unlinkat"}
NAMING = {"renameat2", "linkat"}


@pytest.mark.once
@pytest.mark.slow
def test_directory_process_killed_at_each_system_call_stays_right(tmp_path: Path) -> None:
    if (why := tracing.why_not()) is not None:
        pytest.skip(why)
    deaths = play("calls", tmp_path)["deaths"]
    assert {*FILL, "flock", "fstat", "mkdirat"} <= {"open", *deaths}
    assert NAMING & deaths.keys()
    assert sum(deaths.values()) > 150


@pytest.mark.once
@pytest.mark.slow
def test_pool_process_killed_at_each_system_call_stays_right(tmp_path: Path) -> None:
    if (why := tracing.why_not()) is not None:
        pytest.skip(why)
    deaths = play("calls", tmp_path, pool=True)["deaths"]
    assert {*POOL_FILL, "flock", "fstat", "mkdirat"} <= deaths.keys()
    assert sum(deaths.values()) > 150


@pytest.mark.once
@pytest.mark.slow
def test_pool_process_killed_at_each_system_call_of_fills_together_stays_right(
    tmp_path: Path,
) -> None:
    if (why := tracing.why_not()) is not None:
        pytest.skip(why)
    met: set[str] = set()
    # The calls of two threads come in another order each time, so one of them may be missed.
    for again in range(4):
        place = tmp_path / str(again)
        place.mkdir()
        met |= play("together", place, pool=True)["deaths"].keys()
        if met >= POOL_FILL:
            break
    assert met >= POOL_FILL


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_directory_process_killed_after_each_index_step_stays_right(
    tmp_path: Path, pool: bool
) -> None:
    """Also on machines where no process may be traced."""
    assert play("steps", tmp_path, pool=pool)["deaths"] > 20


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_directory_process_stopped_at_each_system_call_holds_up_no_read(
    tmp_path: Path, pool: bool
) -> None:
    """Its neighbours read and write on, within the bound, and after its death all is right."""
    if (why := tracing.why_not()) is not None:
        pytest.skip(why)
    assert sum(play("stops", tmp_path, pool=pool)["deaths"].values()) > 30


@pytest.mark.slow
@pytest.mark.parametrize("pool", [False, True])
def test_directory_processes_killed_at_random_stay_right(tmp_path: Path, pool: bool) -> None:
    found = play("random", tmp_path, 200, 60, pool=pool)
    assert found["killed"] >= 100
    assert found["written"] > 100
