"""Make the environments below `.venvs/` and the wheel below `dist/` that the Makefile runs.

    python3 scripts/envs.py TARGET...

    build   maturin and zig, nothing else, on the interpreter that runs this script
    wheel   one abi3 wheel, built by `build`; on Linux for glibc 2.17 and later
    base    every extra and the wheel, on the interpreter that runs this script
    newest  the same on the newest CPython found; a link to `base` where that is as new
    demo    the extra `demo` alone and the wheel, on the newest CPython: shows that it is complete
    torch   the extras `test` and `torch` (5 GB) and the wheel, on the newest CPython
    dev     every extra, maturin and an editable build, on the newest CPython: for daily work

A target that is up to date costs nothing. Content decides whether a target is stale, not time
stamps: a fresh clone, a `git switch` or a touched file changes times without changing a byte. An
environment is made anew when the interpreter, its path or a requirement in pyproject.toml changes;
the wheel when one of its input files changes; the editable build when its Rust code does.

Needs the standard library only. It starts on any Python 3.8+: where `python3` is too old, it takes a
newer one or says what is missing, instead of failing with a syntax error.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
DIST = ROOT / "dist"

OLDEST = (3, 11)
# Not "whatever is newest": numpy and its like publish wheels months after a new CPython, and until
# then pip would try to compile them here. Raise it with the classifiers in pyproject.toml.
NEWEST = (3, 14)

# What decides the bytes of the wheel. Directories stand for all files below them.
WHEEL_INPUTS = (
    "rust",
    "python",
    ".cargo",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "rust-toolchain.toml",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)

# What decides the bytes of the extension module of an editable build.
EDITABLE_INPUTS = tuple(
    name for name in WHEEL_INPUTS if name not in {"python", "README.md", "LICENSE"}
)

# The wheel is linked by zig, which knows the symbols of each glibc, so that it runs on systems much older than this one.
ZIG = "ziglang>=0.17,<0.18"
USES_ZIG = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

EXTRAS = {
    "base": ("test", "lint", "bench", "demo", "examples", "clients", "plot"),
    "demo": ("demo",),
    "torch": ("test", "torch"),
}
EXTRAS["newest"] = EXTRAS["dev"] = EXTRAS["base"]

# Printed by a candidate interpreter about itself: its path is the real one behind a pyenv shim or a
# virtual environment. Debian ships ensurepip apart, and without it no environment can be made.
PROBE = """
import importlib.util, json, platform, sys, sysconfig
print(json.dumps({
    "path": getattr(sys, "_base_executable", None) or sys.executable,
    "version": list(sys.version_info[:3]),
    "usable": platform.python_implementation() == "CPython"
        and sys.version_info.releaselevel == "final"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and all(importlib.util.find_spec(m) for m in ("venv", "ensurepip")),
}))
"""


class EnvsError(Exception):
    """Something that the user can act on; shown without a traceback."""


def say(text: str) -> None:
    print(f"envs: {text}", flush=True)


class Interpreter:
    def __init__(self, path: str, version: tuple[int, ...], usable: bool) -> None:
        self.path = path
        self.version = version
        self.usable = usable and version >= OLDEST

    def __str__(self) -> str:
        return f"CPython {'.'.join(map(str, self.version))}"


def probe(executable: str | Path) -> Interpreter | None:
    """Ask an interpreter what it is; None when it does not run, like an inactive pyenv shim."""
    try:
        done = subprocess.run(
            [str(executable), "-I", "-c", PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Interpreter(found["path"], tuple(found["version"]), found["usable"])


def newest(base: Interpreter | None) -> Interpreter | None:
    """Find the newest usable CPython; `base` wins a tie, for another patch level tests nothing."""
    names = [f"python3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    places = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    candidates = [place / name for place in places for name in names]
    roots = {Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")}
    pyenv = shutil.which("pyenv")
    if pyenv:
        asked = subprocess.run(
            [pyenv, "root"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if asked.returncode == 0:
            roots.add(Path(asked.stdout.strip()))
    for root in sorted(roots):
        candidates += sorted(root.glob("versions/3.*/bin/python"))

    best = base if base and base.usable else None
    for candidate in candidates:
        if not candidate.is_file():
            continue
        found = probe(candidate)
        if found is None or not found.usable or found.version[:2] > NEWEST:
            continue
        if (
            best is None
            or found.version[:2] > best.version[:2]
            or (best is not base and found.version > best.version)
        ):
            best = found
    return best


def run(*command: str | Path, **environ: str) -> None:
    # Not check=True: the tool has printed its own error, and a traceback below would only hide it.
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environ},
        check=False,
    )
    if done.returncode != 0:
        raise EnvsError(f"exit status {done.returncode} from: {' '.join(map(str, command))}")


def read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def requirements(role: str) -> list[str]:
    # Not at the top: it came with 3.11, and this file has to start on less.
    import tomllib

    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    maturin = list(config["build-system"]["requires"])
    if role == "build":
        return [*maturin, ZIG] if USES_ZIG else maturin
    project = config["project"]
    wanted = list(project["dependencies"])
    if role == "dev":
        wanted += maturin
    for extra in EXTRAS[role]:
        wanted += project["optional-dependencies"][extra]
    return sorted(set(wanted))


def remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def environment(role: str, interpreter: Interpreter) -> Path:
    """Make `.venvs/<role>` unless it is there and current; return its python."""
    home = VENVS / role
    python = home / "bin" / "python"
    wanted = requirements(role)
    key = json.dumps([str(home), interpreter.path, list(interpreter.version), wanted], indent=1)
    # Written last, so that an interrupted installation counts as none.
    stamp = home / "zcache-key.json"
    if not home.is_symlink() and python.exists() and read(stamp) == key:
        return python
    say(f".venvs/{role}: {interpreter}, installing {len(wanted)} requirements and what they need")
    began = time.monotonic()
    remove(home)
    run(interpreter.path, "-m", "venv", home)
    # --no-compile: an import compiles what it needs; all of botocore and sympy takes half a minute.
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-compile", *wanted)
    stamp.write_text(key, encoding="utf-8")
    say(f".venvs/{role}: ready after {time.monotonic() - began:.0f} s")
    return python


def digest(inputs: tuple[str, ...]) -> str:
    """Hash the names and bytes of all input files, so that a removed file counts too."""
    total = hashlib.sha256()
    for name in inputs:
        top = ROOT / name
        files = sorted(top.rglob("*")) if top.is_dir() else [top]
        for path in files:
            if not path.is_file() or "__pycache__" in path.parts or path.suffix in {".pyc", ".so"}:
                continue
            total.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()


def need_cargo() -> None:
    for tool in ("cargo", "rustc"):
        if not shutil.which(tool):
            raise EnvsError(f"no {tool} on PATH; zcache needs a Rust toolchain to build")


def output(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def copy_unwinder() -> str:
    """Copy the unwinder of the system below target/, where it has one name in each folder; return that.

    zig would link one of its own. At the end of the interpreter CPython 3.13 and older end a daemon thread by
    `pthread_exit`, which unwinds its stack by the unwinder of the system; where that meets frames of Rust whose
    functions expect another one, the process ends with SIGSEGV.
    """
    # dlopen knows where it is, whatever the distribution.
    ctypes.CDLL("libgcc_s.so.1")
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    found = next(line.split()[-1] for line in maps.splitlines() if "/libgcc_s" in line)
    copied = ROOT / "target" / "libgcc_s.so.1"
    copied.parent.mkdir(exist_ok=True)
    shutil.copyfile(found, copied)
    return str(copied.relative_to(ROOT))


def wheel_settings() -> tuple[list[str], dict[str, str]]:
    """Arguments of maturin, and variables, with which one commit gives the same bytes in each folder."""
    rustc = dict(
        line.split(": ", 1) for line in output("rustc", "-vV").splitlines() if ": " in line
    )
    arguments = ["--release", "--locked"]
    if USES_ZIG:
        # With --target the flags below are not those of build scripts, which run here.
        target = ("--target", rustc["host"])
        arguments += ["--zig", "--compatibility", "manylinux2014", *target]
    cargo = os.environ.get("CARGO_HOME") or Path.home() / ".cargo"
    library = f"{output('rustc', '--print', 'sysroot')}/lib/rustlib/src/rust"
    shown = {ROOT: "zcache-source", cargo: "cargo-home", library: f"/rustc/{rustc['commit-hash']}"}
    flags = [f"--remap-path-prefix={path}={name}" for path, name in shown.items()]
    if USES_ZIG:
        # Of the extension alone: some crates make a library of their own as well, from another folder.
        arguments += ["--", f"-Clink-arg={copy_unwinder()}"]
    # Of the last commit that changes it; where there is no git, the first date that a zip file can have.
    epoch = output("git", "log", "-1", "--format=%ct", "--", *WHEEL_INPUTS) or "315532800"
    return arguments, {
        # In this form a flag may have spaces.
        "CARGO_ENCODED_RUSTFLAGS": "\x1f".join(flags),
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH") or epoch,
    }


def wheel(base: Interpreter) -> tuple[Path, str]:
    """Build the wheel unless `dist/` has it from the same bytes; return it and their digest."""
    need_cargo()
    # Before the digest: cargo writes Cargo.lock where there is none, and that file is an input.
    if not (ROOT / "Cargo.lock").exists():
        run("cargo", "generate-lockfile")
    arguments, environ = wheel_settings()
    wanted = "\n".join([digest(WHEEL_INPUTS), *arguments, environ["SOURCE_DATE_EPOCH"]])
    stamp = DIST / "wheel-key"
    built = sorted(DIST.glob("zarr_zcache-*.whl"))
    if len(built) != 1 or read(stamp) != wanted:
        python = environment("build", base)
        say("dist: building the wheel (release profile)")
        for old in (*built, stamp):
            old.unlink(missing_ok=True)
        environ["CARGO_ZIGBUILD_PYTHON_PATH"] = str(python)
        maturin = python.with_name("maturin")
        run(maturin, "build", "--out", DIST, "--interpreter", python, *arguments, **environ)
        built = sorted(DIST.glob("zarr_zcache-*.whl"))
        if len(built) != 1 or "-abi3-" not in built[0].name:
            raise EnvsError(f"wanted one abi3 wheel, maturin made {[path.name for path in built]}")
        stamp.write_text(wanted, encoding="utf-8")
    return built[0], wanted


def install(role: str, python: Path, base: Interpreter) -> None:
    """Put the current wheel into an environment."""
    built, wanted = wheel(base)
    stamp = VENVS / role / "zcache-wheel"
    if read(stamp) == wanted:
        return
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    # --force-reinstall: the version seldom changes between two builds, the content does.
    run(*pip, "install", "--quiet", "--no-deps", "--force-reinstall", built)
    # The requirements came from pyproject.toml; this reads the ones that the wheel states.
    run(*pip, "check")
    # -I: neither the working directory nor PYTHONPATH may stand in for the installed package.
    run(
        python,
        "-I",
        "-c",
        "import pathlib, sys, zcache, zcache._core, zarr;"
        "assert pathlib.Path(zcache.__file__).is_relative_to(sys.prefix), zcache.__file__;"
        f"print('envs: .venvs/{role}: has {built.name} beside zarr', zarr.__version__)",
    )
    stamp.write_text(wanted, encoding="utf-8")


def editable(python: Path) -> None:
    """Build the extension beside the sources, and let `.venvs/dev` import them from there.

    The Cargo profile is `editable`: it builds in a fraction of the time of `release`, and its tests
    run as fast as those of the wheel.
    """
    need_cargo()
    wanted = digest(EDITABLE_INPUTS)
    stamp = VENVS / "dev" / "zcache-editable"
    if read(stamp) == wanted and any((ROOT / "python" / "zcache").glob("_core.*.so")):
        return
    say(".venvs/dev: building the extension (profile editable)")
    run(
        python.with_name("maturin"),
        "develop",
        "--quiet",
        "--profile",
        "editable",
        VIRTUAL_ENV=str(VENVS / "dev"),
        PIP_QUIET="1",
    )
    run(python, "-I", "-c", "import zcache, zcache._core; print('envs:', zcache.__file__)")
    stamp.write_text(wanted, encoding="utf-8")


def main(targets: list[str]) -> None:
    known = ("build", "wheel", "base", "newest", "demo", "torch", "dev")
    if not targets or not set(targets) <= set(known):
        raise EnvsError(f"usage: envs.py TARGET..., where a target is one of {', '.join(known)}")
    here = probe(sys.executable)
    if here is None or not here.usable:
        other = newest(None)
        if other is None:
            raise EnvsError(
                f"{sys.executable} is no CPython 3.11+ with the GIL, venv and ensurepip, and "
                "neither PATH nor pyenv has one; install one, or name it with make PYTHON=..."
            )
        say(f"{sys.executable} cannot be used (needs CPython 3.11+ with venv): taking {other.path}")
        os.execv(other.path, [other.path, str(Path(__file__).resolve()), *targets])

    top = None
    for target in targets:
        if target in {"newest", "demo", "torch", "dev"}:
            top = top or newest(here) or here
        if target == "build":
            environment("build", here)
        elif target == "wheel":
            wheel(here)
        elif target == "dev":
            editable(environment("dev", top or here))
        elif target == "newest" and top is not None and top.version[:2] == here.version[:2]:
            install("base", environment("base", here), here)
            link = VENVS / "newest"
            if not link.is_symlink():
                remove(link)
                link.symlink_to("base")
        else:
            chosen = here if target == "base" or top is None else top
            install(target, environment(target, chosen), here)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except EnvsError as error:
        sys.exit(f"envs: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
