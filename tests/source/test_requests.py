"""Stores with equal names ask for the same: by whatever client, and whatever follows the path of its URL."""

from __future__ import annotations

import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from zarr.core.sync import sync
from zarr.storage import FsspecStore, ObjectStore

import zcache
from support import read
from zcache import CachePool
from zcache._source.identity import identify
from zcache._source.location import held_by

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.abc.store import Store

URLS = (
    *("", "/", "//", "?", "#", "#mode=zarr", "?token=hush", "?token=other"),
    *("?sv=1&sig=hush", "?sv=1&sig=other", "?set=1", "?set=2", "?token=hush#mode=zarr"),
)
"""What may follow the path of a URL."""


class Echo(BaseHTTPRequestHandler):
    """Answers with what it is asked for."""

    def do_GET(self) -> None:
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A data set of a server that has every value: what was asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/a.zarr"
    server.shutdown()
    server.server_close()
    thread.join()


def by_fsspec(url: str) -> Store:
    pytest.importorskip("aiohttp")
    return FsspecStore.from_url(url)


def by_obstore(url: str) -> Store:
    stores = pytest.importorskip("obstore.store")
    return ObjectStore(stores.HTTPStore(url, client_options={"allow_http": True}))


def test_equal_names_ask_for_the_same(url: str) -> None:
    asked = defaultdict(set)
    for make in (by_fsspec, by_obstore):
        for more in URLS:
            store = make(f"{url}{more}")
            request = sync(read(store, "c/0"))
            assert request is not None
            # Credentials may follow the whole path.
            path = request.partition(b"?")[0] if isinstance(store, ObjectStore) else request
            asked[identify(store).name].add(path)
    assert {name: paths for name, paths in asked.items() if len(paths) > 1} == {}
    assert asked[url] == {b"/a.zarr/c/0"}
    assert "hush" not in f"{list(asked)}"


def test_one_source_in_this_process_has_one_url(url: str) -> None:
    stores = [by_fsspec(f"{url}{more}") for more in URLS if more.strip("/")]
    names = {identify(store).name for store in stores}
    assert len(names) == len({held_by(store) for store in stores}) == len(stores)
    again = [by_fsspec(f"{url}{more}") for more in URLS if more.strip("/")]
    assert {identify(store).name for store in again} == names


@pytest.mark.parametrize(
    "more", ["#mode=zarr", "?token=hush", "?X-Amz-Signature=hush", "?sig=hush"]
)
def test_pool_gives_each_url_its_own_values(
    url: str, more: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("aiohttp")
    pool = CachePool(max_size=100_000)
    urls = (f"{url}{more}", url, f"{url}{more}2")
    for _ in range(2):
        found = []
        for each in urls:
            store = zcache.open(each, cache=pool)
            found.append(sync(read(store, "c/0")))
            assert store.drain_sync()
        assert found == [sync(read(FsspecStore.from_url(each), "c/0")) for each in urls]
    infos = pool.sources()
    assert sum(info.name == url for info in infos) == 1
    assert "hush" not in f"{infos} {caplog.text}"
