"""Names of sources: the same in every process, different for different data, and without secrets."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore

from zcache._identity import identify, same_place, transient

if TYPE_CHECKING:
    from pathlib import Path


def test_local_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    names = {
        identify(store)
        for store in (
            LocalStore(tmp_path / "data"),
            LocalStore("data"),
            LocalStore(tmp_path / "link", read_only=True),
            WrapperStore(LocalStore(tmp_path / "data")),
        )
    }
    assert names == {f"file://{os.path.realpath(tmp_path / 'data')}"}
    assert identify(ZipStore(tmp_path / "a.zip", mode="w")) == f"zip://{tmp_path / 'a.zip'}"


def remote(protocol: Any, path: str, **options: Any) -> Any:
    """What `identify` asks of an `FsspecStore`."""
    return SimpleNamespace(
        fs=SimpleNamespace(protocol=protocol, storage_options=options), path=path
    )


@pytest.mark.parametrize(
    ("store", "name"),
    [
        (remote(("s3", "s3a"), "bucket/a.zarr"), "s3://bucket/a.zarr"),
        (remote("s3", "bucket/a.zarr", key="me", secret="hush"), "s3://bucket/a.zarr"),
        (remote("s3", "b/a", endpoint_url="http://node:9000"), "s3://b/a at http://node:9000"),
        (
            remote("s3", "b/a", client_kwargs={"endpoint_url": "http://me:hush@node:9000"}),
            "s3://b/a at http://node:9000",
        ),
        (remote("https", "https://me:hush@node/a.zarr"), "https://node/a.zarr"),
        (remote("https", "https://node/a@2.zarr"), "https://node/a@2.zarr"),
        (remote("memory", "/a"), None),
    ],
)
def test_remote_sources(store: Any, name: str | None) -> None:
    assert identify(store) == name


def test_fsspec(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url(f"file://{tmp_path}/a", read_only=True)
    two = FsspecStore.from_url(f"file://{tmp_path}/b", read_only=True)
    assert identify(one) == f"file://{tmp_path}/a"
    assert identify(one) != identify(two)


def test_obstore() -> None:
    stores = pytest.importorskip("obstore.store")
    storage = pytest.importorskip("zarr.storage").ObjectStore
    options = {"access_key_id": "me", "secret_access_key": "hush", "region": "x"}
    one = identify(storage(stores.S3Store("bucket", prefix="a", **options)))
    assert one is not None
    assert "bucket" in one
    assert "hush" not in one
    assert one == identify(storage(stores.S3Store("bucket", prefix="a", **options)))
    for other in (
        stores.S3Store("bucket", prefix="b", **options),
        stores.S3Store("other", prefix="a", **options),
        stores.S3Store("bucket", prefix="a", endpoint="http://node:9000", **options),
    ):
        assert identify(storage(other)) not in (one, None)
    assert identify(storage(stores.MemoryStore())) is None


class Unnamed(MemoryStore):
    """A store without a name."""


class Numbered:
    """A store whose text is another one in each process."""

    def __str__(self) -> str:
        return f"<{id(self):#x}>"


def test_sources_without_a_name() -> None:
    assert identify(Unnamed()) is None
    assert identify(Numbered()) is None
    values: dict[str, Any] = {}
    one = MemoryStore(values)
    assert transient(one) == transient(MemoryStore(values))
    assert transient(one) != transient(MemoryStore())


def test_same_place(tmp_path: Path) -> None:
    one = LocalStore(tmp_path / "a")
    assert same_place(one, WrapperStore(LocalStore(tmp_path / "a/b")))
    assert not same_place(one, LocalStore(tmp_path / "ab"))
    assert not same_place(MemoryStore(), MemoryStore())
