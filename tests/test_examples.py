"""The demo, run as a user runs it, small and fast."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[1] / "examples" / "s3_demo.py"
# What `examples/s3_demo.py` itself asks for; the extra `demo` brings all of them.
MISSING = [
    name
    for name in ("aiobotocore", "aiohttp", "flask", "fsspec", "moto", "s3fs", "xarray")
    if importlib.util.find_spec(name) is None
]
TIMEOUT_SECONDS = 150

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the extra `demo` is not installed: no {', '.join(MISSING)}"
    ),
]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def requests_by_row(output: str) -> dict[tuple[str, str, str], list[int]]:
    """Return requests without a cache, through zarr's class and through zcache, for each row.

    A row is named by its table (`whole` or `parts`), its reader and its phase.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}
    name = ""
    for line in output.splitlines():
        if line.startswith("Whole reads"):
            name = "whole"
        elif line.startswith("Partial reads"):
            name = "parts"
        label, *cells = line.split(" | ")
        if len(cells) == 3 and label.strip():
            reader, phase = label.split(maxsplit=1)
            counts = [int(cell.split()[0].rstrip("!")) for cell in cells]
            rows[name, reader, phase.strip()] = counts
    return rows


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    if Path("/proc/self").exists():
        # Where nobody collects the ended orphans, a signal would still find them.
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def server_pid(output: str) -> int:
    """Return the process id of the S3 server that the demo says it started."""
    found = re.search(r"S3 server \(moto\): process (\d+)", output)
    assert found is not None, output
    return int(found.group(1))


def assert_ends(pid: int) -> None:
    """Wait a few seconds for a process to end."""
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)


def test_demo_tables() -> None:
    done = run_demo("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = requests_by_row(done.stdout)
    phases = ("cold", "warm", "after a write", "past max_size")
    assert set(rows) == {
        *(("whole", reader, phase) for reader in ("zarr", "xarray") for phase in phases),
        *(("parts", "zarr", phase) for phase in (*phases[:3], "after full read")),
    }
    for (table, reader, phase), (plain, _, cached) in rows.items():
        row = f"{table}, {reader}, {phase}"
        assert plain > 0, row
        if phase in ("warm", "after full read"):
            assert cached == 0, row
        else:
            # Fewer is good: a cold read of parts that overlap need not ask twice.
            assert cached <= plain, row
    assert rows["whole", "zarr", "cold"][2] == rows["whole", "zarr", "cold"][0]
    assert re.search(
        r"^zcache: [1-9]\d* values verified, all as expected$", done.stdout, re.MULTILINE
    )
    assert re.search(
        r"^no cache: [1-9]\d* values verified, all as expected$", done.stdout, re.MULTILINE
    )
    assert "past max_size: zcache" in done.stderr, "no progress was shown"
    assert not is_running(server_pid(done.stdout))


def test_caches_on_disk_leave_nothing_behind(tmp_path: Path) -> None:
    done = run_demo("--quick", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert requests_by_row(done.stdout)["whole", "zarr", "warm"][2] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_a_demo_that_is_stopped(number: signal.Signals) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--quick", "--latency-ms", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Unbuffered, as the line is wanted before the pipe is full.
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    try:
        pid = server_pid(process.stdout.readline())
        assert is_running(pid)
        process.send_signal(number)
        code = process.wait(30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert_ends(pid)


def test_own_dataset_is_only_read(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "own.zarr"
    group = zarr.create_group(path).create_group("measured")
    for name, shards in (("plain", None), ("sharded", (4, 8))):
        array = group.create_array(
            name, shape=(8, 8), chunks=(2, 4), shards=shards, dtype="i4", dimension_names=("y", "x")
        )
        array[:] = 7
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    for source in (str(path), path.as_uri()):
        done = run_demo("--source", source, "--path", "measured", "--max-size", "1kB")
        assert done.returncode == 0, done.stdout + done.stderr
        rows = requests_by_row(done.stdout)
        assert rows["whole", "zarr", "warm"][2] == 0
        assert rows["parts", "zarr", "warm"][2] == 0
        assert not any(phase == "after a write" for _, _, phase in rows)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-size", "lots"), ("'lots'", "256MB")),
        (("--max-size", "0"), ("'0'", "1 or more")),
        (("--latency-ms", "-1"), ("'-1'", "0 to 10000")),
        (("--cache-dir", "/no/such/place"), ("'/no/such/place'", "in memory")),
        (("--source", "/no/such/data.zarr"), ("'/no/such/data.zarr'", "s3://")),
        (("--source", "nope://x/y"), ("'nope://x/y'", "Check the URL")),
        (("--source", str(DEMO.parent)), (repr(str(DEMO.parent)), "--path")),
        (("--source", "x", "--storage-options", "[1]"), ("'[1]'", "JSON object")),
        (("--path", "x"), ("--path", "--source")),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = run_demo(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
