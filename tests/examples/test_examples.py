"""The short examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from zcache import CacheStore

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMEOUT_SECONDS = 170


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run_example(name: str, *arguments: str | Path, **environ: str) -> str:
    """Run an example to its end; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **environ},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def remove_chunks(array: Path) -> None:
    """Remove all values of an array: a read of the source finds zeros after this."""
    shutil.rmtree(array / "c")


@pytest.fixture
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    from _s3_server import S3Server

    with S3Server() as server:
        yield server


@pytest.mark.once
@needs("moto", "flask", "s3fs", "xarray")
def test_xarray_s3_second_run_reads_values_from_cache(s3_server: Any, tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "weather.zarr")
    for name, data in (("warm", np.arange(96.0)), ("cold", -np.arange(96.0))):
        group.create_array(name, data=data, chunks=(8,), dimension_names=("time",))
    zarr.consolidate_metadata(tmp_path / "weather.zarr")
    files = (path for path in (tmp_path / "weather.zarr").rglob("*") if path.is_file())
    s3_server.upload(
        "weather.zarr",
        {
            path.relative_to(tmp_path / "weather.zarr").as_posix(): path.read_bytes()
            for path in files
        },
    )

    requests = [s3_server.requests()]
    for _ in range(2):
        output = run_example(
            "xarray_s3.py",
            "s3://demo/weather.zarr",
            tmp_path / "cache",
            AWS_ENDPOINT_URL=s3_server.url,
            AWS_ACCESS_KEY_ID="demo",
            AWS_SECRET_ACCESS_KEY="demo",
            AWS_DEFAULT_REGION="eu-central-1",
            AWS_CONFIG_FILE=os.devnull,
            AWS_SHARED_CREDENTIALS_FILE=os.devnull,
            NO_PROXY="127.0.0.1",
        )
        assert "warm: mean 47.5000" in output
        assert "cold: mean -47.5000" in output
        requests.append(s3_server.requests())
    first, second = np.diff(requests)
    chunks = 24
    assert first >= chunks
    assert second <= first - chunks
    hits = re.search(r"(\d+) hits", output)
    assert hits is not None
    assert int(hits[1]) >= chunks


@needs("distributed")
def test_dask_distributed_workers_fill_one_cache(tmp_path: Path) -> None:
    source = tmp_path / "weather.zarr"
    zarr.create_group(source).create_array("t", data=np.arange(96.0), chunks=(8,))
    means = [("1", "47.5000"), ("2", "47.5000")]
    output = run_example("dask_distributed.py", source, "t", tmp_path / "cache")
    assert re.findall(r"pass (\d): mean ([\d.]+)", output) == means
    # Without a value in the source, all that is read comes from the cache that the workers filled.
    remove_chunks(source / "t")
    cache_store = LocalStore(tmp_path / "cache")
    with CacheStore(LocalStore(source, read_only=True), cache_store=cache_store) as store:
        array: Any = zarr.open_array(store, path="t", mode="r")
        np.testing.assert_array_equal(array[:], np.arange(96.0))


def test_pytorch_loader_workers_fill_one_cache(tmp_path: Path) -> None:
    source = tmp_path / "samples.zarr"
    zarr.create_array(source, data=np.arange(96.0).reshape(24, 4), chunks=(1, 4))
    assert run_example("pytorch_loader.py", source, tmp_path / "cache").endswith(" 4560.0\n")
    remove_chunks(source)
    assert run_example("pytorch_loader.py", source, tmp_path / "cache").endswith(" 4560.0\n")


@pytest.mark.once
@pytest.mark.parametrize("example", ["workers.py", "pytorch_epochs.py"])
def test_epochs_adaptive_serves_about_what_fits(example: str, tmp_path: Path) -> None:
    # Beside zcache nothing is installed as a rule.
    (tmp_path / "pytest.py").write_text("raise ImportError('pytest is not installed')")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    printed = run_example(example, PYTHONPATH=path)
    lines = re.findall(r"^(\w+) +(\d+)% +(\w+) +(.*)$", printed, re.MULTILINE)
    epochs = {
        (kind, int(share), policy): [
            float(hits) for hits in re.findall(r"([\d.]+) [\d.]+ s", results)
        ]
        for kind, share, policy, results in lines
    }
    assert len(epochs) == 8
    for (kind, share, policy), hits in epochs.items():
        assert hits[0] == 0
        if policy == "adaptive":
            # What is on its way into a directory takes room of other values meanwhile.
            assert max(hits) > share / 100 - 0.3, kind
        elif kind == "sequential" and share == 50:
            # Workers that are not in step change the order a little, which matters where nearly all fits.
            assert hits[-1] < 0.2
