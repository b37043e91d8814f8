"""The demo, run as a user runs it, small and fast."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from zarr.abc.store import Store

DEMO = Path(__file__).resolve().parents[2] / "examples" / "s3_demo.py"
MISSING = [
    name
    for name in ("aiobotocore", "flask", "moto", "s3fs", "xarray")
    if importlib.util.find_spec(name) is None
]
TIMEOUT_SECONDS = 150

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the extra `demo` is not installed: no {', '.join(MISSING)}"
    ),
]

PHASES = [
    "cold",
    "warm",
    "second process",
    "after a write",
    "after another's write",
    "parts of shards, cold",
    "parts of shards, warm",
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


def requests_by_phase(output: str) -> dict[str, list[int]]:
    """Return requests without a cache, through zarr's class and through zcache, for each row."""
    rows: dict[str, list[int]] = {}
    for line in output.splitlines():
        label, *cells = line.split(" | ")
        if len(cells) == 3 and label.strip():
            rows[label.strip()] = [int(cell.split()[0]) for cell in cells]
    return rows


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    if Path("/proc/self").exists():
        # An ended orphan that is not reaped could still be signalled.
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


@pytest.mark.once
def test_demo_prints_fewer_requests_where_cache_is_warm(tmp_path: Path) -> None:
    done = run_demo("--quick", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = requests_by_phase(done.stdout)
    assert list(rows) == PHASES
    for phase, (plain, _, cached) in rows.items():
        if phase.endswith("cold"):
            assert 0 < cached <= plain, phase
        else:
            # Questions after objects that do not exist remain.
            assert cached < plain / 2, phase
    for setup in ("no cache", "zcache"):
        assert re.search(
            rf"^{setup}: [1-9]\d* values verified, all as expected$", done.stdout, re.MULTILINE
        )
    assert not is_running(server_pid(done.stdout))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_demo_stopped_by_signal_stops_server(number: signal.Signals, tmp_path: Path) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--quick", "--latency-ms", "200", "--cache-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Unbuffered: the line is read before the pipe is full.
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
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


class NoServer:
    """A server for stores in memory, which send no requests."""

    url = ""

    def requests(self) -> int:
        return 0


@pytest.mark.parametrize(("wrong", "right"), [("zcache", False), ("zarr CacheStore", True)])
def test_demo_wrong_value_is_shown_and_fails_only_for_zcache(
    wrong: str,
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(DEMO.parent)
    demo: Any = importlib.import_module("s3_demo")
    objects = demo.generate_dataset(small=True)
    stores = {setup: demo.memory_store(objects) for setup in demo.SETUPS}

    def open_store(setup: str, *_: str) -> Store:
        return stores[setup]

    def in_another_process(setup: str, url: str, directory: str, write: int | None) -> Any:
        if write is not None and setup != wrong:
            demo.write_chunks(stores[setup], write)
        return demo.Result(demo.read_all(stores[setup]), 0.0)

    monkeypatch.setattr(demo, "open_store", open_store)
    monkeypatch.setattr(demo, "open_source", open_store)
    monkeypatch.setattr(demo, "in_another_process", in_another_process)
    truth = demo.memory_store(objects)
    assert demo.Demo(NoServer(), truth, str(tmp_path)).run() is right
    output = capsys.readouterr().out
    assert "  ! after another's write: wrong values in temperature" in output
    assert re.search(rf"^{wrong}: \d+ values verified, problems: \d+$", output, re.MULTILINE)
    assert output.count("problems: ") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--latency-ms", "-1"), ("'-1'", "0 to 10000")),
        (("--cache-dir", "/no/such/place"), ("'/no/such/place'", "make it")),
    ],
)
def test_demo_bad_argument_says_what_to_do(
    arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = run_demo(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
