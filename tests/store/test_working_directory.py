"""What needs no working directory works in one that has been removed."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING

import pytest
from zarr.storage import LocalStore, MemoryStore

import zcache
from support import value_sync
from zcache import CachePool, CacheStore, OptionValueError
from zcache.testing import cache_store_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with one value."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "k").write_bytes(b"value")
    return tmp_path / "source"


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Goes to a directory that has been removed."""

    def leave() -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()

    return leave


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_paths_in_full_need_none(
    source: Path, tmp_path: Path, leave: Callable[[], None], prefix: str
) -> None:
    leave()
    pool = CachePool(tmp_path / "pool", max_size="1 MiB")
    stores = [
        zcache.open(f"{prefix}{source}", cache=tmp_path / "pool"),
        zcache.open(LocalStore(source), cache=pool),
        zcache.open(f"{prefix}{source}", cache="memory", max_size="1 MiB"),
        CacheStore(LocalStore(source), cache_store=tmp_path / "directory"),
        CacheStore(LocalStore(source), cache_store=LocalStore(tmp_path / "directory")),
    ]
    for store in stores:
        assert value_sync(store, "k") == b"value"
        assert store.drain_sync()
    for store in pickle.loads(pickle.dumps(stores)):
        assert value_sync(store, "k") == b"value"
    assert pickle.loads(pickle.dumps(pool)) == pool


@pytest.mark.parametrize("url", ["s3://bucket/a", "https://node/a", "memory://a"])
def test_urls_need_none(tmp_path: Path, leave: Callable[[], None], url: str) -> None:
    pytest.importorskip("s3fs")
    leave()
    assert not zcache.open(url, cache=tmp_path / "pool", max_size="1 MiB").cache_info()[
        "cached_keys"
    ]


@pytest.mark.parametrize(
    ("named", "option"),
    [
        (lambda path: zcache.open(path, cache="memory", max_size="1 MiB"), "url"),
        (lambda path: zcache.open(f"file://{path}", cache="memory", max_size="1 MiB"), "url"),
        (lambda path: zcache.open(MemoryStore(), cache=path), "cache"),
        (CachePool, "path"),
        (lambda path: CacheStore(MemoryStore(), cache_store=path), "cache_store"),
        (lambda path: CacheStore(MemoryStore(), cache_store=LocalStore(path)), "cache_store"),
    ],
)
def test_path_below_none_is_named_with_the_way_out(
    leave: Callable[[], None], named: Callable[[str], object], option: str
) -> None:
    leave()
    expected = f"invalid {option}: 'a/b' is relative, but there is no working directory any more"
    with pytest.raises(OptionValueError, match=f"^{re.escape(expected)}.* Give the path in full"):
        named("a/b")


def test_path_of_a_cache_store_is_the_same_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = CacheStore(MemoryStore(), cache_store="cache")
    monkeypatch.chdir("/")
    for one in (store, pickle.loads(pickle.dumps(store))):
        assert str(cache_store_of(one)) == f"file://{tmp_path}/cache"
