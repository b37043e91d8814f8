"""What writes do about answers to `list_dir` that a cache store on a disk remembers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import LocalStore

from pools import CACHES, ON_DISK, one_of
from support import buf, listed
from zcache import CachePool, CacheStore, OfflineError
from zcache._backends.listings import DirectoryListings
from zcache._backends.pool.listings import SourceListings, remove_listings
from zcache._backends.pool.register import label_of
from zcache._core import open_cached

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zarr.abc.store import Store

VALUE = b"value"

cache = one_of({kind: CACHES[kind] for kind in ON_DISK})


@pytest.fixture(autouse=True)
def _absence_is_known(tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    path.unlink(missing_ok=True)
    try:
        open_cached(str(path))
    except FileNotFoundError:
        return
    except OSError:
        pytest.skip("the system does not tell without waiting what is absent")


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys for which answers were forgotten, in a thread."""
    keys: list[str] = []
    forget = DirectoryListings.forget

    def recorded(listings: DirectoryListings, key: str) -> None:
        keys.append(key)
        forget(listings, key)

    monkeypatch.setattr(DirectoryListings, "forget", recorded)
    return keys


def opened(path: Path, cache: Store | CachePool, **options: Any) -> CacheStore:
    source = LocalStore(path / "source")
    return CacheStore(source, cache_store=cache, source_id="source", **options)


async def test_write_where_nothing_was_listed_needs_no_thread(
    cache: Store | CachePool, tmp_path: Path, forgotten: list[str]
) -> None:
    store = opened(tmp_path, cache)
    await store.set("a/b/0", buf(VALUE))
    forgotten.clear()
    for key in ("a/b/1", "a/c/0", "x/y/z", "k"):
        await store.set(key, buf(VALUE))
        await store.delete(key)
    assert forgotten == []


async def test_write_beside_what_was_listed_needs_no_thread(
    cache: Store | CachePool, tmp_path: Path, forgotten: list[str]
) -> None:
    store = opened(tmp_path, cache)
    await store.set("a/0", buf(VALUE))
    assert await listed(store.list_dir("a")) == ["0"]
    # From then on it is known that there is no answer for its folder.
    await store.set("b/0", buf(VALUE))
    forgotten.clear()
    for n in range(5):
        await store.set(f"b/{n}", buf(VALUE))
    assert forgotten == []
    await store.set("a/1", buf(VALUE))
    assert forgotten == ["a/1"]
    with pytest.raises(OfflineError):
        await listed(opened(tmp_path, cache, offline=True).list_dir("a"))


LISTER = """
import asyncio, sys
from pathlib import Path
from zarr.storage import LocalStore
from zcache import CachePool, CacheStore

async def main(path, kind):
    cache = (CachePool if kind == "pool" else LocalStore)(path / "cache")
    store = CacheStore(LocalStore(path / "source"), cache_store=cache, source_id="source")
    assert [name async for name in store.list_dir("b")]

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


async def test_write_forgets_what_another_process_has_listed_meanwhile(
    cache: Store | CachePool, tmp_path: Path, forgotten: list[str]
) -> None:
    kind = "pool" if isinstance(cache, CachePool) else "directory"
    store, offline = opened(tmp_path, cache), opened(tmp_path, cache, offline=True)
    for _ in range(2):
        await store.set("b/0", buf(VALUE))
        await store.set("b/0", buf(VALUE))
        forgotten.clear()
        await store.set("b/0", buf(VALUE))
        assert forgotten == []
        subprocess.run([sys.executable, "-c", LISTER, tmp_path, kind], check=True, timeout=60)  # noqa: ASYNC221
        assert await listed(offline.list_dir("b")) == ["0"]
        await store.set("b/0", buf(VALUE))
        with pytest.raises(OfflineError):
            await listed(offline.list_dir("b"))


def forget_all(folder: Path, listings: DirectoryListings) -> None:
    listings.forget_below("")


def forget_source(folder: Path, listings: DirectoryListings) -> None:
    remove_listings(str(folder), label_of("source"))


@pytest.mark.parametrize(
    ("make", "forget"),
    [
        (DirectoryListings, forget_all),
        (SourceListings, forget_all),
        (SourceListings, forget_source),
    ],
)
def test_answer_that_could_not_be_removed_is_still_seen(
    make: type[DirectoryListings],
    forget: Callable[[Path, DirectoryListings], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who removes them may end before the last one is gone."""
    listings = make(str(tmp_path), "source")
    keep = listings.begin("a")
    assert keep is not None
    keep(["x"])
    del keep
    unlink = os.unlink

    def refuse(path: Any, **options: Any) -> None:
        if "listing-" in os.fspath(path):
            raise OSError(errno.EIO, "refused")
        unlink(path, **options)

    with monkeypatch.context() as refusing:
        refusing.setattr(os, "unlink", refuse)
        forget(tmp_path, listings)
    assert listings.get("a") == ["x"]
    for _ in range(2):
        assert not listings.has_none()
        assert not listings.has_none_of("a/x")
        listings.forget("b/x")
    assert listings.has_none_of("b/x")
    listings.forget("a/x")
    assert listings.has_none_of("a/x")
