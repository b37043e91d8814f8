"""`zcache.open` over servers that speak S3: warm restarts, servers apart, no secrets on disk."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zarr

from support import everything, files_below

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MISSING = [
    name for name in ("flask", "moto", "obstore", "s3fs") if importlib.util.find_spec(name) is None
]
URL = "s3://demo/data.zarr"
SECRET = "hush-hush-hush"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SCRIPT = """
import json, sys
cache, client, url, options = sys.argv[1:]
if client == "obstore":
    sys.modules["s3fs"] = None
import zarr, zcache
store = zcache.open(url, cache=cache, max_size="64MB", storage_options=json.loads(options))
total = int(zarr.open_group(store, mode="r")["x"][:].sum())
assert store.drain_sync()
print(json.dumps([total, type(store._store).__name__, repr(store), str(store)]))
"""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Two servers with different data under one URL."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from _s3_server import S3Server

    with S3Server() as one, S3Server() as other:
        for server, value in ((one, 1), (other, 2)):
            local = zarr.storage.LocalStore(tmp_path / f"data of {value}")
            group = zarr.create_group(local)
            group.create_array("x", shape=(8,), chunks=(1,), dtype="i4")[:] = value
            server.upload("data.zarr", dict(everything(local)))
        yield one, other


def options_of(server: Any, client: str) -> dict[str, Any]:
    """The same for s3fs and for obstore."""
    if client == "s3fs":
        return {
            "key": "me",
            "secret": SECRET,
            "client_kwargs": {"endpoint_url": server.url, "region_name": "eu-central-1"},
        }
    return {
        "access_key_id": "me",
        "secret_access_key": SECRET,
        "endpoint": server.url,
        "region": "eu-central-1",
        "client_options": {"allow_http": True},
    }


def run(cache: Path, server: Any, client: str) -> tuple[list[Any], int]:
    """Sum up an array in a process of its own; what it printed, and the requests that reached the server."""
    before = server.requests()
    options = json.dumps(options_of(server, client))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cache), client, URL, options],
        capture_output=True,
        check=False,
        text=True,
        timeout=100,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    return json.loads(done.stdout), server.requests() - before


def test_second_process_is_warm_by_either_client_and_servers_are_apart(
    servers: tuple[Any, Any], tmp_path: Path
) -> None:
    one, other = servers
    cache = tmp_path / "cache"
    (total, kind, *_), cold = run(cache, one, "s3fs")
    assert (total, kind) == (8, "FsspecStore")
    assert cold >= 8
    (total, kind, *_), warm = run(cache, one, "s3fs")
    assert (total, kind, warm) == (8, "FsspecStore", 0)
    (total, kind, *_), warm = run(cache, one, "obstore")
    assert (total, kind, warm) == (8, "ObjectStore", 0)
    (total, kind, *_), cold = run(cache, other, "obstore")
    assert (total, kind) == (16, "ObjectStore")
    assert cold >= 8
    (total, *_), warm = run(cache, other, "s3fs")
    assert (total, warm) == (16, 0)
    for path in files_below(cache):
        assert SECRET.encode() not in path.read_bytes(), path
