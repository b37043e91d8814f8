"""A short run of `soak.py`, so that it cannot rot; `make soak` runs it for as long as you like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import soak


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("kind", soak.KINDS)
def test_soak_short_finds_no_mismatch(kind: str) -> None:
    command = [sys.executable, str(Path(soak.__file__))]
    ended = subprocess.run(
        [*command, "--seconds", "4", "--round", "2", "--seed", "1", "--kind", kind],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-8000:]
    assert "mismatches: 0" in ended.stdout
