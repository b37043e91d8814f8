"""Build the wheel of the last commit twice, from two clones in two folders, and compare the bytes.

Takes two full builds, and needs git. The folders differ in length, the second build has another umask and another
directory of cargo's index and sources.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(repository: Path, folder: Path, **environ: str) -> Path:
    """Clone the last commit into a folder, and build its wheel as `make wheel` does."""
    subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True)
    script = str(folder / "scripts" / "envs.py")
    subprocess.run([sys.executable, script, "wheel"], env={**os.environ, **environ}, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def differences(one: Path, other: Path) -> list[str]:
    with zipfile.ZipFile(one) as first, zipfile.ZipFile(other) as second:
        names = sorted({*first.namelist(), *second.namelist()})
        found = []
        for name in names:
            try:
                entries = [(z.getinfo(name), z.read(name)) for z in (first, second)]
            except KeyError:
                found.append(f"{name}: in one of them only")
                continue
            (a, a_bytes), (b, b_bytes) = entries
            if a_bytes != b_bytes:
                found.append(f"{name}: other bytes")
            elif (a.date_time, a.external_attr) != (b.date_time, b.external_attr):
                found.append(f"{name}: another time or mode")
        return found


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zcache-") as top:
        one, other = Path(top) / "one" / "zcache", Path(top) / "another folder" / "of" / "zcache"
        first = build(ROOT, one)
        cargo = Path(top) / "cargo home"
        cargo.mkdir()
        os.umask(0o077)
        # Of the first one: there may be another commit by now.
        second = build(one, other, CARGO_HOME=str(cargo))
        equal = first.name == second.name and first.read_bytes() == second.read_bytes()
        if not equal:
            print(*differences(first, second), sep="\n")
            sys.exit(f"two builds differ: {first.name} and {second.name}")
        print(f"two builds, the same bytes: {first.name}")
        print("sha256", hashlib.sha256(first.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
