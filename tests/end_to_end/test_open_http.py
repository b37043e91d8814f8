"""`zcache.open` over nginx: ranges of shards, warm restarts, changes of the source, and a server that has gone.

Skipped where there is no nginx. CI unpacks one; see `.ci/run`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore

import zcache

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from zcache import CacheStore

NGINX = shutil.which("nginx")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.skipif(NGINX is None, reason="not installed: nginx"),
]

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
_CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{}}
http {{
  access_log {folder}/requests;
  {temporary}
  server {{ listen 127.0.0.1:{port}; root {root}; {more} }}
}}
"""
DATA = np.arange(1600).reshape(40, 40)


class Server:
    """nginx on loopback over a folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self._begun = itertools.count()
        with socket.socket() as it:
            it.bind(("127.0.0.1", 0))
            self._port = it.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/data.zarr"

    @contextlib.contextmanager
    def running(self, more: str = "") -> Iterator[None]:
        folder = self._folder / str(next(self._begun))
        folder.mkdir(parents=True)
        self._requests = folder / "requests"
        config = folder / "config"
        temporary = " ".join(f"{name}_temp_path {folder}/{name};" for name in _TEMPORARY)
        config.write_text(
            _CONFIG.format(
                folder=folder, temporary=temporary, port=self._port, root=self._root, more=more
            )
        )
        command = [str(NGINX), "-c", str(config), "-e", f"{folder}/errors"]
        process = subprocess.Popen(command)
        try:
            self._until_it_listens(process)
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)

    def _until_it_listens(self, process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            assert process.poll() is None, "nginx did not start"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port)).close()
                return
            time.sleep(0.05)
        pytest.fail("nginx does not listen")

    def requests(self) -> list[str]:
        """What was asked for by now, as "GET /data.zarr/zarr.json 206"."""
        lines = [line.split('"') for line in self._requests.read_text().splitlines()]
        return [f"{asked.rsplit(' ', 1)[0]} {rest.split()[0]}" for _, asked, rest, *_ in lines]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    pytest.importorskip("aiohttp")
    # Where nginx is started by root it reads as another user.
    root = tmp_path / "root"
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    group = zarr.create_group(root / "data.zarr")
    group.create_array("chunked", data=DATA, chunks=(10, 10))
    group.create_array("sharded", data=DATA, chunks=(5, 5), shards=(20, 20))
    group.create_array("empty", shape=(40, 40), chunks=(10, 10), dtype="i4", fill_value=3)
    return Server(root, tmp_path / "nginx")


def opened(server: Server, cache: Path, **options: Any) -> CacheStore:
    return zcache.open(server.url, cache=cache, max_size="10 MiB", **options)


def check(store: CacheStore, more: int = 0) -> None:
    group: Any = zarr.open_group(store, mode="r")
    assert (group["chunked"][:] == DATA + more).all()
    assert (group["sharded"][3:8, 3:8] == DATA[3:8, 3:8]).all()
    assert (group["empty"][:] == 3).all()
    assert store.drain_sync()


def test_second_opening_asks_for_nothing_and_shards_are_read_by_ranges(
    server: Server, tmp_path: Path
) -> None:
    with server.running():
        store = opened(server, tmp_path / "cache")
        assert isinstance(store._store, FsspecStore)
        check(store)
        asked = server.requests()
        # Without the whole shard: its index, and some of its chunks.
        assert {line for line in asked if "/sharded/c/" in line} == {
            "GET /data.zarr/sharded/c/0/0 206"
        }
        # Chunks that are not there are remembered as well.
        assert sum(line.endswith(" 404") for line in asked) >= 16
        check(opened(server, tmp_path / "cache"))
        assert server.requests() == asked


def test_values_that_changed_are_told_by_their_tags(server: Server, tmp_path: Path) -> None:
    with server.running():
        check(opened(server, tmp_path / "cache", max_age_seconds=0, revalidate=True))
        before = len(server.requests())
        store = opened(server, tmp_path / "cache", max_age_seconds=0, revalidate=True)
        check(store)
        # Headers only: all is as it was.
        asked = server.requests()[before:]
        assert {line.split()[0] for line in asked if not line.endswith(" 404")} == {"HEAD"}
        path = server._root / "data.zarr"
        zarr.open_group(path)["chunked"][:] = DATA + 1
        for file in (path / "chunked" / "c").rglob("*"):
            # nginx tags what it serves with the size and the second of the last change.
            os.utime(file, (1e9, 1e9))
        check(store, more=1)


def test_server_that_has_gone_or_fails_is_told_from_an_absence(
    server: Server, tmp_path: Path
) -> None:
    with server.running():
        check(opened(server, tmp_path / "cache"))
    check(opened(server, tmp_path / "cache", offline=True))
    check(opened(server, tmp_path / "cache", max_age_seconds=0, stale_if_error=60))
    error = pytest.importorskip("aiohttp").ClientError
    with pytest.raises(error):
        zarr.open_group(opened(server, tmp_path / "other"), mode="r")
    busy = "location ~ c/0/1$ { return 503; } location ~ c/1/1$ { return 403; }"
    with server.running(busy):
        array: Any = zarr.open_group(opened(server, tmp_path / "other"), mode="r")["chunked"]
        assert array[0, 0] == DATA[0, 0]
        for _ in range(2):
            with pytest.raises(error, match="503"):
                array[0, 15]
        with pytest.raises(error, match="403"):
            array[15, 15]
    with server.running():
        check(opened(server, tmp_path / "other"))
