"""Which store a URL or a path stands for, and what is said where it stands for none."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import (
    FsspecStore,
    LocalStore,
    MemoryStore,
    ObjectStore,
    StorePath,
    ZipStore,
)

from support import read
from zcache import MissingClientError, NoSuchSourceError, OptionTypeError, OptionValueError
from zcache._source.identity import identify
from zcache._source.opening import open_source

if TYPE_CHECKING:
    from pathlib import Path

HUSH = "hush-hush"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with one value."""
    (tmp_path / "data.zarr").mkdir()
    (tmp_path / "data.zarr" / "k").write_bytes(b"value")
    return tmp_path / "data.zarr"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A zip file with one value."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("k", b"value")
    return tmp_path / "data.zip"


def refuse(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Have packages be missing, whether or not they are installed."""
    pytest.importorskip("fsspec")
    for package in packages:
        found = [name for name in sys.modules if name.startswith(f"{package}.")]
        for name in (package, *found):
            monkeypatch.setitem(sys.modules, name, None)
    # It remembers which clients there are.
    known = importlib.import_module("fsspec.registry")._registry
    for scheme in list(known):
        monkeypatch.delitem(known, scheme)


# ------------------------------------------------------------------------- on a local disk


@pytest.mark.parametrize("prefix", ["", "file://", "file:", "local://"])
async def test_directory_is_a_local_store(folder: Path, prefix: str) -> None:
    store = open_source(f"{prefix}{folder}")
    assert type(store) is LocalStore
    assert not store.read_only
    assert await read(store, "k") == b"value"


async def test_path_may_be_an_object_or_relative_or_below_home(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    stores = [open_source(url) for url in (folder, "data.zarr", "./data.zarr/", "~/data.zarr")]
    # Wherever the process goes later.
    monkeypatch.chdir("/")
    for store in stores:
        assert await read(store, "k") == b"value"
        assert identify(store) == identify(LocalStore(folder))


@pytest.mark.parametrize("name", ["with space.zarr", "100%.zarr", "a#b?c", "ü.zarr", "x::y/z.zarr"])
@pytest.mark.parametrize("prefix", ["", "file://"])
async def test_path_is_taken_as_it_is_written(tmp_path: Path, prefix: str, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "k").write_bytes(b"value")
    assert await read(open_source(f"{prefix}{tmp_path / name}"), "k") == b"value"


@pytest.mark.parametrize(
    "prefix", ["", "file://", "zip://", "zip::", "zip::file://", "zip://::file://", "zip://::"]
)
async def test_zip_file_is_read_by_zip_store(archive: Path, prefix: str) -> None:
    store = open_source(f"{prefix}{archive}")
    assert type(store) is ZipStore
    assert store.read_only
    assert await read(store, "k") == b"value"
    assert identify(store) == identify(ZipStore(archive))
    assert type(open_source(archive, read_only=True)) is ZipStore


async def test_folder_in_a_zip_file_is_read_by_fsspec(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("in/k", b"value")
    store = open_source(f"zip://in::file://{tmp_path / 'data.zip'}")
    assert type(store) is FsspecStore
    assert await read(store, "k") == b"value"
    by_option = open_source("zip://in", {"fo": str(tmp_path / "data.zip")})
    assert await read(by_option, "k") == b"value"


def test_zip_file_is_not_written_to(archive: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(OptionValueError, match=r"invalid read_only: False, .*data\.zip.*ZipStore"):
        open_source(archive, read_only=False)
    assert archive.read_bytes() == before


@pytest.mark.parametrize("name", ["none", "k/none", "none.zip"])
def test_path_without_anything_is_named(folder: Path, name: str) -> None:
    with pytest.raises(
        NoSuchSourceError, match=r"there is nothing at .*none.*read_only=False"
    ) as it:
        open_source(folder / name)
    assert isinstance(it.value, FileNotFoundError)
    assert isinstance(it.value, ValueError)
    assert not (folder / name).exists()
    with pytest.raises(NoSuchSourceError):
        open_source(f"zip://{folder / name}")


def test_path_need_not_exist_for_who_writes_or_is_offline(tmp_path: Path) -> None:
    new = open_source(tmp_path / "new.zip", read_only=False, must_exist=False)
    assert type(new) is LocalStore
    away = open_source(tmp_path / "away.zip", must_exist=False)
    assert type(away) is ZipStore
    assert type(open_source(tmp_path / "away", must_exist=False)) is LocalStore
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_archive_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for name in ("k", "pipe"):
        for options in ({}, {"must_exist": False}, {"must_exist": False, "read_only": False}):
            with pytest.raises(
                OptionValueError, match=rf"invalid url: .*{name}.* Give the directory"
            ):
                open_source(folder / name, **options)


def test_archive_that_is_damaged_is_refused(archive: Path) -> None:
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"PK\x01\x02", b"PK\x00\x00"))
    with pytest.raises(OptionValueError, match=r"the zip file .*data\.zip.* is damaged"):
        open_source(archive)


def test_path_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(OptionValueError, match=r"invalid url: '.*a\\x00b'"):
        open_source("a\0b")


def test_what_is_neither_url_nor_path_nor_store_is_refused() -> None:
    cases: dict[Any, str] = {5: "5", None: "None", b"s3://b": "bytes", True: "True"}
    for url, shown in cases.items():
        with pytest.raises(OptionTypeError, match=f"invalid url: {shown}. Give a URL"):
            open_source(url)
    with pytest.raises(OptionTypeError, match="invalid url: dict"):
        open_source({"k": HUSH})
    with pytest.raises(OptionValueError, match="invalid url: ''"):
        open_source("")


def test_store_is_taken_as_it_is(folder: Path) -> None:
    for store in (MemoryStore(), LocalStore(folder, read_only=True)):
        assert open_source(store) is store
        assert open_source(store, {}) is store


# ------------------------------------------------------------------------------- by a client


async def test_what_stands_for_a_store_is_that_store(folder: Path) -> None:
    store = LocalStore(folder)
    assert open_source(StorePath(store)) is store
    with pytest.raises(OptionValueError, match="a StorePath to 'sub/array'"):
        open_source(StorePath(store, "sub/array"))
    mapping = importlib.import_module("fsspec").get_mapper(f"file://{folder}")
    assert await read(open_source(mapping), "k") == b"value"


async def test_url_of_memory_is_what_zarr_finds_there() -> None:
    pytest.importorskip("fsspec")
    written = FsspecStore.from_url("memory://test_opening/a")
    found = open_source("memory://test_opening/a")
    assert identify(found) == identify(written)
    assert identify(found).is_ephemeral


@pytest.mark.parametrize(
    "url", ["s3://bucket/a.zarr", "s3://bucket/a.zarr/", "s3a://bucket/a.zarr"]
)
def test_url_is_read_by_the_client_of_fsspec(url: str) -> None:
    pytest.importorskip("s3fs")
    store = open_source(url, {"anon": True})
    assert isinstance(store, FsspecStore)
    assert store.fs.anon
    assert identify(store).name == "s3://bucket/a.zarr"


def test_endpoint_is_part_of_the_name_and_credentials_are_not() -> None:
    pytest.importorskip("s3fs")

    def name(**options: Any) -> str:
        return identify(open_source("s3://bucket/a", options)).name

    one = name(endpoint_url="http://one:9000", key=HUSH, secret=HUSH)
    other = name(client_kwargs={"endpoint_url": "http://other:9000"}, key=HUSH, secret=HUSH)
    assert one == "s3://bucket/a at http://one:9000"
    assert other == "s3://bucket/a at http://other:9000"
    assert one == name(endpoint_url=f"http://me:{HUSH}@one:9000/", key="other", secret="other")


@pytest.mark.parametrize(
    ("url", "package", "options"),
    [
        ("s3://bucket/a", "s3fs", {"skip_signature": True}),
        ("gs://bucket/a", "gcsfs", {}),
        ("gcs://bucket/a", "gcsfs", {}),
        ("az://bucket/a", "adlfs", {"account_name": "me"}),
        ("https://node/a", "aiohttp", {}),
    ],
)
def test_url_is_read_by_obstore_where_the_client_is_missing(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, options: dict[str, Any]
) -> None:
    pytest.importorskip("obstore")
    refuse(monkeypatch, package, "fsspec.implementations.http")
    store = open_source(url, options)
    assert type(store) is ObjectStore
    assert identify(store).name.startswith(url.replace("gcs", "gs"))


def test_names_of_both_clients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has cached, the other is served."""
    pytest.importorskip("s3fs")
    pytest.importorskip("obstore")
    first = identify(open_source("s3://bucket/a", {"endpoint_url": "http://one:9000"}))
    refuse(monkeypatch, "s3fs")
    assert first == identify(open_source("s3://bucket/a", {"endpoint": "http://one:9000"}))


@pytest.mark.parametrize(
    ("url", "packages", "advice"),
    [
        ("s3://bucket/a", ("s3fs", "obstore"), "Install s3fs, or obstore."),
        ("gs://bucket/a", ("gcsfs", "obstore"), "Install gcsfs, or obstore."),
        ("zip::s3://bucket/a.zip", ("s3fs",), "Install s3fs to access S3."),
        ("sftp://node/a", ("paramiko",), "paramiko"),
    ],
)
def test_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, packages: tuple[str, ...], advice: str
) -> None:
    refuse(monkeypatch, *packages)
    with pytest.raises(MissingClientError) as it:
        open_source(url)
    assert isinstance(it.value, ImportError)
    assert repr(url) in str(it.value)
    assert advice in str(it.value)


@pytest.mark.slow
def test_without_fsspec_paths_and_obstore_go_on() -> None:
    """In a process that never had it."""
    pytest.importorskip("obstore")
    script = """
import sys
for name in ("fsspec", "upath", "obstore" if sys.argv[1] == "neither" else "s3fs"):
    sys.modules[name] = None
from zcache._source.opening import open_source
print(type(open_source(".")).__name__)
try:
    print(type(open_source("s3://bucket/a")).__name__)
except ImportError as error:
    print(error)
"""
    error = (
        "cannot open 's3://bucket/a': the client for such URLs is not installed. "
        "Install fsspec and s3fs, or obstore."
    )
    for which, expected in (("obstore", "ObjectStore"), ("neither", error)):
        done = subprocess.run(
            [sys.executable, "-c", script, which],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.splitlines() == ["LocalStore", expected]


@pytest.mark.parametrize("url", ["foo://bucket/a", "simplecache::foo://bucket/a", "foo::s3://b/a"])
def test_unknown_scheme_is_named(url: str) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(OptionValueError, match=r"has the unknown scheme 'foo'. Give a URL that"):
        open_source(url)


# --------------------------------------------------------------------------- secrets, options


@pytest.mark.parametrize(
    "url",
    [
        f"foo://me:{HUSH}@node/a?token={HUSH}",
        f"sftp://me:{HUSH}@node/a",
        f"simplecache::foo://me:{HUSH}@node/a",
        f"zip://a::foo://me:{HUSH}@node/a",
        f"zip://a::me:{HUSH}@node",
        f" s3://me:{HUSH}@bucket/a",
        f"s3:/me:{HUSH}@bucket/a",
        f" s3://me:{HUSH}@bucket/{256 * 'a'}",
    ],
)
def test_secrets_of_a_url_are_in_no_error(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    refuse(monkeypatch, "paramiko")
    with pytest.raises((OptionValueError, MissingClientError, OSError)) as it:
        open_source(url)
    assert HUSH not in str(it.value)
    assert it.value.__cause__ is None
    assert it.value.__suppress_context__ or it.value.__context__ is None


def test_secrets_of_a_chain_that_cannot_be_read_are_in_no_error() -> None:
    pytest.importorskip("aiohttp")
    # Nothing listens there. That is all that fsspec tells of it.
    url = f"zip::http://me:{HUSH}@127.0.0.1:1/a.zip?token={HUSH}"
    with pytest.raises(
        NoSuchSourceError, match=r"cannot open 'zip::http://127.0.0.1:1/a.zip': "
    ) as it:
        open_source(url)
    assert HUSH not in repr(it.value)
    assert it.value.__suppress_context__


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (PermissionError(13, f"no {HUSH}"), PermissionError),
        (type("Refused", (ConnectionError,), {})(f"http://me:{HUSH}@node"), ConnectionError),
        (type("Invalid", (Exception,), {})(f'no bucket "me:{HUSH}@b"'), OptionValueError),
    ],
)
def test_errors_of_a_client_are_of_their_kind_and_show_no_secret(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(FsspecStore, "from_url", fail)
    with pytest.raises(kind, match=r"cannot open 'zip::s3://b/a.zip'") as it:
        open_source(f"zip::s3://me:{HUSH}@b/a.zip")
    assert type(it.value) is kind
    assert HUSH not in repr(it.value)


def test_secrets_of_options_are_in_no_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pytest.importorskip("obstore")
    refuse(monkeypatch, "s3fs")
    cases: list[tuple[Any, Any, str]] = [
        ("s3://bucket/a", {"key": HUSH}, "'key'.*obstore .as s3fs is not installed. knows"),
        ("s3://bucket/a", {"skip_signature": HUSH}, "'skip_signature'.*Give a URL and options"),
        ("s3://bucket/a", {"client_options": {"timeout": HUSH}}, "'client_options'"),
        (folder, {"key": HUSH}, "invalid storage_options: 'key' for a local path"),
        (MemoryStore(), {"key": HUSH}, "invalid storage_options: 'key' for MemoryStore"),
        ("s3://bucket/a", HUSH, "invalid storage_options: str. Give a dict"),
        ("s3://bucket/a", {5: HUSH}, "invalid storage_options: dict. Give a dict"),
        ("s3://bucket/a", [("key", HUSH)], "invalid storage_options: list"),
    ]
    for url, options, message in cases:
        with pytest.raises((OptionValueError, OptionTypeError), match=message) as it:
            open_source(url, options)
        assert HUSH not in str(it.value)
        assert it.value.__suppress_context__ or it.value.__context__ is None


@pytest.mark.parametrize("secret", ["", "e", "r", "111", "ref"])
def test_error_with_a_short_option_or_password_can_be_read(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    pytest.importorskip("fsspec")

    def refuse_it(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError(f"Connection refused of {secret!r}, error 2111")

    monkeypatch.setattr(FsspecStore, "from_url", refuse_it)
    shown = "Connection refused of '" + ("..." if secret else "") + "', error 2111"
    for url, options in [
        ("ftp://node/a", {"username": secret}),
        (f"ftp://me:{secret}@node/a", {}),
        (f"ftp://node/a?token={secret}", None),
    ]:
        with pytest.raises(ConnectionRefusedError) as it:
            open_source(url, options)
        assert str(it.value) == f"cannot open 'ftp://node/a': {shown}."


def test_options_are_not_changed() -> None:
    pytest.importorskip("s3fs")
    options = {"client_kwargs": {"endpoint_url": "http://one:9000"}, "anon": True}
    before = repr(options)
    open_source("s3://bucket/a", options)
    assert repr(options) == before


class UniversalPath:
    """What is used of `upath.UPath`."""

    def __init__(self, url: str, **options: Any) -> None:
        self._url = url
        self.protocol = url.partition("://")[0]
        self.storage_options = options

    def __str__(self) -> str:
        return self._url


def test_path_of_universal_pathlib_brings_its_options(folder: Path) -> None:
    pytest.importorskip("s3fs")
    path = UniversalPath("s3://bucket/a", endpoint_url="http://one:9000", anon=True)
    assert identify(open_source(path)).name == "s3://bucket/a at http://one:9000"
    more = open_source(path, {"endpoint_url": "http://other:9000"})
    assert identify(more).name == "s3://bucket/a at http://other:9000"
    for url in (folder, f"{folder.parent}/x::y", f"file://{folder.parent}/x::y"):
        assert type(open_source(UniversalPath(str(url)), must_exist=False)) is LocalStore


@pytest.mark.parametrize("chain", ["simplecache::file://{0}/in", "zip://in::{0}.zip"])
async def test_chained_path_of_universal_pathlib_is_what_it_shows(
    tmp_path: Path, chain: str
) -> None:
    path: Any = pytest.importorskip("upath").UPath(chain.format(tmp_path / "data"))
    (tmp_path / "data" / "in" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "in" / "sub" / "k").write_bytes(b"value")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("in/sub/k", b"value")
    for one, key in [(path, "sub/k"), (path / "sub", "k"), (path.parent, "in/sub/k")]:
        assert await read(open_source(one), key) == b"value"


def test_chained_path_of_universal_pathlib_that_fails_shows_no_secret(tmp_path: Path) -> None:
    path = pytest.importorskip("upath").UPath("zip://in::file:///none.zip", password=HUSH)
    with pytest.raises(NoSuchSourceError, match=r"cannot open 'zip://in::file:///none.zip'") as it:
        open_source(path)
    assert HUSH not in repr(it.value)
