"""The example with worker processes runs, ends, and shows what it is there to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples/workers.py"


@pytest.mark.slow
def test_one_cache_for_all_reads_the_source_once(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--quick"],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    reads = {}
    for line in ended.stdout.splitlines():
        label, *cells = line.split(" | ")
        if found := [int(cell.split()[0]) for cell in cells if re.match(r" *\d+ +[\d.]+ s", cell)]:
            reads[label.strip()] = found
    assert list(reads) == ["no cache", "a cache for each worker", "one shared cache"]
    samples = 24
    # Each epoch of the first kind reads everything; who shares a cache reads it once.
    assert all(count >= samples for count in reads["no cache"])
    first, second = reads["one shared cache"]
    assert first >= samples
    assert second == 0
    assert 0 < reads["a cache for each worker"][1] <= samples
    assert list(tmp_path.iterdir()) == []


def test_wrong_options() -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), "--workers", "0"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert "--workers must be at least 1" in ended.stderr
