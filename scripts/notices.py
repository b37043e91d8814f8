"""Write THIRD_PARTY_LICENSES: the licenses of the crates that are compiled into the wheel.

`--check` says whether the file is the one for Cargo.lock, and writes nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "THIRD_PARTY_LICENSES"
# Always these two, so that the file is the same on each machine.
PLATFORMS = ("x86_64-unknown-linux-gnu", "aarch64-apple-darwin")
HEAD = """\
zcache itself is under the license in LICENSE. Its extension module has these crates compiled in, and the Rust standard
library (MIT OR Apache-2.0, Copyright (c) The Rust Project Contributors). Where there is a choice, it is MIT.

Written by scripts/notices.py.
"""


def compiled_in(platform: str) -> dict[str, dict[str, Any]]:
    """The crates that the extension is linked from, by name and version."""
    command = [
        *(os.environ.get("CARGO", "cargo"), "metadata", "--locked", "--format-version", "1"),
        *("--features", "python", "--filter-platform", platform),
    ]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    packages = {package["id"]: package for package in found["packages"]}
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    root = found["resolve"]["root"]
    seen, waiting = {root}, [root]
    while waiting:
        for needed in nodes[waiting.pop()]["deps"]:
            package = packages[needed["pkg"]]
            # What runs in the compiler only is no part of what it makes.
            is_macro = any("proc-macro" in target["kind"] for target in package["targets"])
            is_linked = any(kind["kind"] is None for kind in needed["dep_kinds"])
            if is_linked and not is_macro and package["id"] not in seen:
                seen.add(package["id"])
                waiting.append(package["id"])
    seen.remove(root)
    return {f"{packages[one]['name']} {packages[one]['version']}": packages[one] for one in seen}


def texts_of(package: dict[str, Any]) -> list[str]:
    """The license files of a crate: that of MIT alone, where there is one to choose."""
    folder = Path(package["manifest_path"]).parent
    names = sorted(
        path for path in folder.iterdir() if path.name.upper().startswith(("LICEN", "COPYING"))
    )
    of_mit = [path for path in names if path.name.upper().startswith("LICENSE-MIT")]
    if not names:
        sys.exit(f"{package['name']} has no license file: see what it asks for, and name it here")
    return [path.read_text("utf-8").replace("\r\n", "\n").strip() for path in of_mit or names]


def notices() -> str:
    packages: dict[str, dict[str, Any]] = {}
    for platform in PLATFORMS:
        packages |= compiled_in(platform)
    users: dict[str, list[str]] = {}
    for name, package in sorted(packages.items()):
        for text in texts_of(package):
            users.setdefault(text, []).append(f"{name} ({package['license']})")
    parts = [HEAD]
    for text, names in users.items():
        lines = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append("\n".join(["-" * 80, *names, "", lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    text = notices()
    if "--check" not in sys.argv[1:]:
        FILE.write_text(text, "utf-8")
    elif not FILE.exists() or FILE.read_text("utf-8") != text:
        sys.exit(f"{FILE.name} is not that of Cargo.lock: run `python3 scripts/notices.py`")
