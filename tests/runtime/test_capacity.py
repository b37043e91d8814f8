"""How large memory and volumes are said to be."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from zcache._runtime.capacity import memory, volume

if TYPE_CHECKING:
    from pathlib import Path

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        # Version 2: the least of the group and those above it.
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a/b\n", {"a/b/memory.max": "500", "a/memory.max": "1000"}, 500),
        # In a container, which sees its own group as the root.
        ("0::/\n", {"memory.max": "700"}, 700),
        ("0::/../../a\n", {"memory.max": "700"}, 700),
        # Version 1, with a path that is that of the host.
        ("9:cpu,cpuacct:/x\n4:memory:/x\n", {"memory/memory.limit_in_bytes": "800"}, 800),
        (
            "9:cpu:/x\n4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": str(2**63 - 4096)},
            PHYSICAL,
        ),
        ("0::/a\n", {"a/memory.max": "max\n"}, PHYSICAL),
        ("0::/a\n", {"a/memory.max": ""}, PHYSICAL),
        ("nonsense\n\n", {}, PHYSICAL),
        (None, {}, PHYSICAL),
    ],
)
def test_memory_is_the_least_of_what_limits_it(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int
) -> None:
    if groups is not None:
        put(tmp_path / "cgroup", groups)
    for name, text in limits.items():
        put(tmp_path / "mount" / name, text)
    assert memory(tmp_path / "cgroup", tmp_path / "mount") == expected


def test_volume_of_a_path_that_is_not_there_is_the_one_above(tmp_path: Path) -> None:
    assert volume(tmp_path / "a" / "b") == volume(tmp_path) > 0


@pytest.mark.parametrize("below", ["loop/a", "x" * 300, "a/" * 2500])
def test_volume_of_a_path_that_cannot_be_reached_is_the_one_above(
    tmp_path: Path, below: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert volume(tmp_path / below) == volume(tmp_path)
