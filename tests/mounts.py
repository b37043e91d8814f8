"""File systems that a test mounts, where the machine lets it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_MEMORY = Path("/dev/shm")


def kind_of(path: Path) -> str:
    """The kind of the file system that a path is on."""
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, check=False, text=True
    )
    return done.stdout.strip()


MAKERS = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
"""Commands that make a file system in an image, by its kind."""


@contextlib.contextmanager
def formatted(
    where: Path, block_size: int | None = None, size: int = 2**26, kind: str = "ext4"
) -> Iterator[Path]:
    """An empty directory on a file system of its own; `where` is an empty directory.

    Of an ext4 the blocks can have this size. Skips the test, with the reason, where it cannot be mounted.
    """
    image, target = where / "image", where / "on"
    target.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    for command in (
        [*MAKERS[kind], *(["-b", str(block_size)] if block_size else []), image],
        ["mount", "-o", "loop", image, target],
    ):
        try:
            done = subprocess.run(command, capture_output=True, check=False, text=True)
        except FileNotFoundError:
            pytest.skip(f"no {command[0]} here")
        if done.returncode:
            pytest.skip(f"no {kind} here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", target], check=True)


@contextlib.contextmanager
def mounted(kind: str, where: Path) -> Iterator[Path]:
    """An empty directory on a file system of this kind, tmpfs or overlayfs; `where` is an empty directory.

    Skips the test, with the reason, where it can neither be mounted nor is there already.
    """
    options, target = [], where / "on"
    target.mkdir()
    if kind == "overlayfs":
        for name in ("lower", "upper", "work"):
            (where / name).mkdir()
        layers = f"lowerdir={where}/lower,upperdir={where}/upper,workdir={where}/work"
        options = ["-o", layers]
    name = "overlay" if kind == "overlayfs" else kind
    try:
        command = ["mount", "-t", name, *options, name, str(target)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        refusal = done.stderr.strip() if done.returncode else None
    except FileNotFoundError:
        refusal = "there is no mount command"
    if refusal is None:
        try:
            yield target
        finally:
            subprocess.run(["umount", "-l", target], check=True)
        return
    for there in (where, SHARED_MEMORY):
        if kind_of(there) == kind:
            path = Path(tempfile.mkdtemp(dir=there))
            try:
                yield path
            finally:
                shutil.rmtree(path)
            return
    pytest.skip(f"no {kind} here: {refusal}")


@contextlib.contextmanager
def mounted_read_only(where: Path) -> Iterator[None]:
    """A read-only bind mount of a directory on itself."""
    for arguments in (["--bind", where, where], ["-o", "remount,ro,bind", where]):
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
        if done.returncode:
            subprocess.run(["umount", "-l", where], capture_output=True, check=False)
            pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", where], check=True)
