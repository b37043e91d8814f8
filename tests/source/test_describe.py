"""Texts of stores without what is secret."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from zcache._source.describe import describe

if TYPE_CHECKING:
    from pathlib import Path


class Odd(WrapperStore[Store]):
    """A wrapper without a text."""

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def test_describe_names_classes_and_the_place(tmp_path: Path) -> None:
    place = f"file://{tmp_path.resolve()}"
    assert describe(LocalStore(tmp_path)) == f"LocalStore({place})"
    assert describe(WrapperStore(Odd(LocalStore(tmp_path)))) == (
        f"WrapperStore(Odd(LocalStore({place})))"
    )
    assert describe(MemoryStore()) == "MemoryStore"
    assert describe(Odd(MemoryStore())) == "Odd(MemoryStore)"
    assert describe(json) == "module"


def test_describe_shows_no_secret() -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    for url in ("https://me:hush@node/a?sig=hush", "https://me:hush@node/a?set=hush"):
        assert describe(FsspecStore.from_url(url)) == "FsspecStore(https://node/a)"
    assert describe(FsspecStore.from_url("memory://a")) == "FsspecStore(memory:///a)"


def test_describe_asks_no_library_that_panics(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stores = pytest.importorskip("obstore.store")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    store = ObjectStore(stores.AzureStore("c"))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    assert describe(store) == "ObjectStore(AzureStore)"
    assert "panicked" not in capfd.readouterr().err
