"""How large the memory is that this process may use, and the volume of a path."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from zcache._core import volume_space

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIMITS: Final = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""Files with the limit of a control group, by controller: of version 2, which names none, and of version 1."""


def memory(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory: physical, or what the control groups of this process leave of it.

    Parameters
    ----------
    groups : Path
        Where the system tells the control groups of this process.
    mount : Path
        Where their hierarchies are mounted.

    Raises
    ------
    OSError, ValueError
        If the system does not tell.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if physical <= 0:
        raise OSError("the size of the memory is not known")
    return min([physical, *_limits(groups, mount)])


def _limits(groups: Path, mount: Path) -> Iterator[int]:
    try:
        lines = groups.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            if (name := _LIMITS.get(controller)) is None:
                continue
            # In a container its own group may be the root of what is mounted.
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                with contextlib.suppress(OSError, ValueError):  # "max", for instance
                    yield int((mount / controller / group / name).read_text())


def volume(path: str | os.PathLike[str]) -> int:
    """Bytes of the whole volume that a path is on, or would be on.

    Where a folder cannot be reached it is that of the next one above it which can.

    Raises
    ------
    OSError
        If the system does not tell.
    """
    found = Path(os.path.realpath(path))
    while True:
        try:
            return volume_space(str(found))[1]
        except OSError:
            if found == found.parent:
                raise
            found = found.parent
