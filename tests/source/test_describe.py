"""Texts of stores without what is secret."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, WrapperStore

from zcache._source.describe import describe, show, show_address

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


@pytest.mark.filterwarnings("ignore:fs .* was not created with")
@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hush@b/a",
        "s3://me:hu/sh@b/a?versionId=hush",
        "simplecache::s3://me:hush@b/a",
        "filecache::https://me:hush@b/a?sig=hush",
    ],
)
def test_texts_of_a_store_show_no_secret_of_a_path_without_scheme(url: str) -> None:
    pytest.importorskip("s3fs")
    pytest.importorskip("aiohttp")
    store = FsspecStore.from_url(url)
    for text in (describe(store), show(store), show_address(store)):
        assert "sh" not in text.replace("https", "")
        assert "me" not in text.replace("simplecache", "").replace("FileCacheFileSystem", "")
        assert "b/a" in text


def test_describe_asks_no_library_that_panics(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stores = pytest.importorskip("obstore.store")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    store = ObjectStore(stores.AzureStore("c"))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    assert describe(store) == "ObjectStore(AzureStore)"
    assert "panicked" not in capfd.readouterr().err
