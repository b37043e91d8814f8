"""Where stores keep their values: asked of real libraries, their profiles and their environments."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zarr.storage
from zarr.abc.store import Store
from zarr.storage import (
    FsspecStore,
    LocalStore,
    LoggingStore,
    MemoryStore,
    ObjectStore,
    WrapperStore,
    ZipStore,
)

from zcache._source.location import (
    Location,
    innermost,
    location_of,
    memory_store_of,
    naming_location,
    outlives_process,
    overlaps,
    place_in_process,
    places_overlap,
    shows_partial_values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PANIC = "panic"
KEYS = {"key": "AKIAhush", "secret": "hush"}
AZURITE = (
    "DefaultEndpointsProtocol=http;AccountName=acc;AccountKey=aHVzaA==;"
    "BlobEndpoint=http://127.0.0.1:10000/acc;"
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment may name accounts of the person who runs the tests."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def s3(path: str = "bucket/a", **options: Any) -> FsspecStore:
    pytest.importorskip("s3fs")
    return FsspecStore.from_url(
        f"s3://{path}", storage_options={**KEYS, "skip_instance_cache": True, **options}
    )


def azure(path: str = "container/a", **options: Any) -> FsspecStore:
    adlfs = pytest.importorskip("adlfs")
    filesystem = adlfs.AzureBlobFileSystem(skip_instance_cache=True, **options)
    # Made with a loop all the same, for it wants one when the process ends.
    filesystem.asynchronous = True
    return FsspecStore(filesystem, path=path)


def obstore(kind: str, *args: Any, **options: Any) -> Any:
    stores = pytest.importorskip("obstore.store")
    return ObjectStore(getattr(stores, kind)(*args, **options))


def fsspec_file(path: Path) -> FsspecStore:
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(f"file://{path}")


# ------------------------------------------------------------------------------- directories


def test_location_of_directories_is_their_real_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    stores: list[Store] = [
        LocalStore(tmp_path / "data"),
        LocalStore("data"),
        LocalStore(tmp_path / "link", read_only=True),
        WrapperStore(LocalStore(tmp_path / "data")),
        fsspec_file(tmp_path / "link"),
        obstore("LocalStore", tmp_path / "link"),
    ]
    expected = Location("file://", os.path.realpath(tmp_path / "data"))
    assert [location_of(store) for store in stores] == [expected] * len(stores)
    assert str(expected) == f"file://{expected.path}"


def test_location_of_an_open_file_is_unknown() -> None:
    try:
        store = ZipStore(io.BytesIO(), mode="w")  # type: ignore[arg-type]
    except (TypeError, AssertionError):
        pytest.skip("zarr before 3.4 takes no open files")
    assert location_of(store) is None
    assert not overlaps(store, LocalStore(Path.cwd() / "None" / "cache"))


def test_location_of_a_directory_file_system_is_inside_the_other(tmp_path: Path) -> None:
    dirfs = pytest.importorskip("fsspec.implementations.dirfs")
    wrapper = pytest.importorskip("fsspec.implementations.asyn_wrapper")
    files = pytest.importorskip("fsspec").filesystem("file")
    inner = dirfs.DirFileSystem(path=str(tmp_path), fs=files)
    store = FsspecStore(wrapper.AsyncFileSystemWrapper(inner, asynchronous=True), path="a")
    assert location_of(store) == location_of(LocalStore(tmp_path / "a"))
    assert overlaps(store, LocalStore(tmp_path))


# ------------------------------------------------------------------------------- S3


def test_location_s3_without_endpoint_is_the_bucket() -> None:
    expected = Location("s3://", "bucket/a")
    assert location_of(s3()) == location_of(s3("bucket/a/", anon=True)) == expected
    assert location_of(s3(client_kwargs={"region_name": "eu-west-1"})) == expected
    assert location_of(obstore("S3Store", "bucket", prefix="a/", region="eu-west-1")) == expected
    assert str(expected) == "s3://bucket/a"


@pytest.mark.parametrize(
    "options",
    [
        {"endpoint_url": "http://node:9000"},
        {"endpoint_url": "HTTP://me:hush@Node:9000/"},
        {"client_kwargs": {"endpoint_url": "http://node:9000"}},
    ],
)
def test_location_s3_with_endpoint_option_names_the_server(options: dict[str, Any]) -> None:
    expected = Location("s3://", "bucket/a", "http://node:9000")
    assert location_of(s3(**options)) == expected
    assert location_of(obstore("S3Store", "bucket", prefix="a", endpoint="http://node:9000")) == (
        expected
    )


def test_location_s3_with_two_endpoint_options_is_unknown() -> None:
    store = s3(endpoint_url="http://a", client_kwargs={"endpoint_url": "http://b"})
    assert location_of(store) is None


@pytest.mark.parametrize("key", ["b/a?versionId=1", "b/a#1", ""])
def test_location_s3_with_a_path_that_says_more_is_unknown(key: str) -> None:
    assert location_of(FsspecStore(s3().fs, path=key)) is None


@pytest.mark.parametrize("path", ["blue:b/run@5/a", "me:hush@b/a", "me:hu/sh@b/a", "hush@b/a"])
def test_location_s3_with_what_may_be_a_user_is_unknown(path: str) -> None:
    """The client takes all of it for the bucket, so it may be one of another tenant; and a name shows no secret."""
    bucket, _, prefix = path.partition("/")
    stores = [s3(path), obstore("S3Store", bucket, prefix=prefix, region="eu-west-1")]
    assert [location_of(store) for store in stores] == [None, None]


def test_location_s3_with_signs_of_a_user_in_a_key_is_known() -> None:
    for path in ("b/run@5/a:1@2", "blue:b/a"):
        assert location_of(s3(path)) == Location("s3://", path)


def test_location_azure_with_an_account_in_its_path_is_unknown() -> None:
    """Its client takes what is before the sign for the container, and the rest for nothing."""
    for path in ("one@acc.dfs.core.windows.net/a", "two@acc.dfs.core.windows.net/a"):
        assert location_of(azure(path, account_name="acc")) is None


PROFILES = """
[default]
region = us-east-1
[profile site-a]
region = us-east-1
endpoint_url = http://site-a:9000
[profile site-b]
region = us-east-1
endpoint_url = http://site-b:9000
[profile of-service]
region = us-east-1
endpoint_url = http://all:9000
services = mine
[profile ignoring]
region = us-east-1
endpoint_url = http://all:9000
ignore_configured_endpoint_urls = true
[profile broken]
services = none
[profile china]
region = cn-north-1
[services mine]
s3 =
  endpoint_url = http://of-s3:9000
"""


@pytest.mark.parametrize(
    ("profile", "environment", "endpoint"),
    [
        (None, {}, None),
        ("site-a", {}, "http://site-a:9000"),
        (None, {"AWS_PROFILE": "site-b"}, "http://site-b:9000"),
        ("site-a", {"AWS_PROFILE": "site-b"}, "http://site-a:9000"),
        ("of-service", {}, "http://of-s3:9000"),
        ("site-a", {"AWS_ENDPOINT_URL": "http://env:1"}, "http://env:1"),
        (
            "of-service",
            {"AWS_ENDPOINT_URL": "http://env:1", "AWS_ENDPOINT_URL_S3": "http://s3:2"},
            "http://s3:2",
        ),
        ("ignoring", {}, None),
        ("site-a", {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
        ("china", {}, "aws-cn"),
    ],
)
async def test_location_s3_with_profiles_names_the_server_that_is_used(
    profile: str | None,
    environment: dict[str, str],
    endpoint: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "aws-config").write_text(PROFILES)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = s3(**({"profile": profile} if profile else {}))
    expected = Location("s3://", "bucket/a", endpoint)
    assert location_of(store) == expected
    # The client itself is of the same opinion.
    client = await store.fs.set_session()
    assert not endpoint or endpoint.startswith("aws-") or client.meta.endpoint_url == endpoint
    assert location_of(store) == expected
    await store.fs._s3creator.__aexit__(None, None, None)


async def test_location_s3_that_is_connected_asks_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the environment says later changes nothing for it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://then:1")
    store = s3()
    await store.fs.set_session()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://now:1")
    assert location_of(store) == Location("s3://", "bucket/a", "http://then:1")
    await store.fs._s3creator.__aexit__(None, None, None)


@pytest.mark.parametrize("profile", ["broken", "missing"])
def test_location_s3_with_a_profile_that_fails_is_unknown(profile: str, tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text(PROFILES)
    assert location_of(s3(profile=profile)) is None


def test_location_s3_with_a_session_of_the_users_own_asks_it(tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text(PROFILES)
    session = pytest.importorskip("aiobotocore.session").AioSession(profile="site-a")
    assert location_of(s3(session=session)) == Location("s3://", "bucket/a", "http://site-a:9000")


def test_location_s3_of_obstore_with_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env:1")
    assert location_of(obstore("S3Store", "b")) == Location("s3://", "b", "http://env:1")
    given = obstore("S3Store", "b", endpoint="http://given:1")
    assert location_of(given) == Location("s3://", "b", "http://given:1")
    monkeypatch.setenv("AWS_ENDPOINT", "http://other:1")
    # Which of them wins depends on their order.
    assert location_of(obstore("S3Store", "b")) is None


# ------------------------------------------------------------------------------- Google, Azure, HTTP


def test_location_google_names_emulators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")

    def gcs(**options: Any) -> FsspecStore:
        options = {"token": "anon", "project": "p", "skip_instance_cache": True, **options}
        return FsspecStore.from_url("gs://bucket/a", storage_options=options)

    assert location_of(gcs()) == Location("gs://", "bucket/a")
    assert location_of(gcs(endpoint_url="http://node:1")) == (
        Location("gs://", "bucket/a", "http://node:1")
    )
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "emulator:2")
    assert location_of(gcs()) == Location("gs://", "bucket/a", "http://emulator:2")


def test_location_google_of_obstore_reads_the_service_account(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert location_of(obstore("GCSStore", "b", prefix="a")) == Location("gs://", "b/a")
    account = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
    file = tmp_path / "account.json"
    file.write_text(json.dumps({**account, "gcs_base_url": "http://node:1"}))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(file))
    store = obstore("GCSStore", "b", prefix="a")
    assert location_of(store) == Location("gs://", "b/a", "http://node:1")
    file.unlink()
    assert location_of(store) is None


@pytest.mark.parametrize(
    ("options", "environment", "endpoint"),
    [
        ({"account_name": "acc"}, {}, "https://acc.blob.core.windows.net"),
        ({"account_name": "acc", "sas_token": "sv=1&sig=hush"}, {}, None),
        ({"account_name": "acc", "account_key": "aHVzaA=="}, {}, None),
        ({"connection_string": AZURITE}, {}, "http://127.0.0.1:10000/acc"),
        ({}, {"AZURE_STORAGE_CONNECTION_STRING": AZURITE}, "http://127.0.0.1:10000/acc"),
        ({}, {"AZURE_STORAGE_ACCOUNT_NAME": "acc"}, None),
        (
            {"account_name": "acc", "account_host": "acc.blob.core.cn"},
            {},
            "https://acc.blob.core.cn",
        ),
    ],
)
def test_location_azure_names_the_account(
    options: dict[str, Any],
    environment: dict[str, str],
    endpoint: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = endpoint or "https://acc.blob.core.windows.net"
    assert location_of(azure(**options)) == Location("az://", "container/a", expected)


def test_location_azure_of_obstore_names_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Location("az://", "c/a", "https://acc.blob.core.windows.net")
    assert location_of(obstore("AzureStore", "c", prefix="a", account_name="acc")) == expected
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    assert location_of(obstore("AzureStore", "c", prefix="a")) == expected
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    assert location_of(obstore("AzureStore", "c", prefix="a")) is None


def test_location_of_obstore_with_a_provider_that_disagrees_is_unknown() -> None:
    class Provider:
        def __init__(self, **config: str) -> None:
            self.config = config

        def __call__(self) -> dict[str, Any]:
            return {"access_key_id": "", "secret_access_key": "hush", "expires_at": None}

    agrees = obstore("S3Store", "b", credential_provider=Provider(bucket="b", endpoint="http://n"))
    assert location_of(agrees) == Location("s3://", "b", "http://n")
    differs = obstore("S3Store", "b", credential_provider=Provider(bucket="c"))
    assert location_of(differs) is None


def http(url: str, **options: Any) -> FsspecStore:
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    return FsspecStore.from_url(url, storage_options={"skip_instance_cache": True, **options})


SIGNED = "X-Amz-Algorithm=AWS4&X-Amz-Credential=me&X-Amz-Signature=hush"


@pytest.mark.parametrize(
    ("url", "options", "place"),
    [
        ("https://node/a.zarr", {}, "node/a.zarr"),
        ("https://me:hush@Node:443/a.zarr/", {}, "node/a.zarr"),
        ("https://node/a@2.zarr", {}, "node/a@2.zarr"),
        ("https://node/", {}, "node"),
        ("https://node/a", {"headers": {"Authorization": "hush"}}, "node/a"),
        # Keys are appended to these.
        ("https://node/a?set=1", {}, None),
        (f"https://node/a?{SIGNED}", {}, None),
        ("https://node/a?", {}, None),
        ("https://node/a#mode=zarr", {}, None),
        ("https://node/a#", {}, None),
    ],
)
def test_location_http_is_the_url_without_secrets(
    url: str, options: dict[str, Any], place: str | None
) -> None:
    expected = None if place is None else Location("https://", place)
    assert location_of(http(url, **options)) == expected


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://me:hush@Node:443/a.zarr", "node/a.zarr"),
        ("https://node/", "node"),
        # It asks for `a.zarr//zarr.json`.
        ("https://node/a.zarr/", "node/a.zarr/"),
        (f"https://node/a?{SIGNED}", "node/a"),
        ("https://node/a?sv=2024&st=x&se=y&sr=c&sp=r&sig=hush", "node/a"),
        ("https://node/a#mode=zarr", "node/a"),
        # These may say what is read.
        ("https://node/a?set=1", None),
        ("https://node/a?st=1", None),
    ],
)
def test_location_http_of_obstore_is_the_url_without_secrets(url: str, place: str | None) -> None:
    expected = None if place is None else Location("https://", place)
    assert location_of(obstore("HTTPStore", url)) == expected


@pytest.mark.parametrize("query", ["?sig=hush", "?", "#f"])
def test_location_with_an_endpoint_to_which_keys_are_appended_is_unknown(query: str) -> None:
    url = f"http://node:1/a{query}"
    assert location_of(s3(endpoint_url=url)) is None
    assert location_of(obstore("S3Store", "b", endpoint=url)) is None
    assert location_of(obstore("GCSStore", "b", config={"base_url": url})) is None
    pytest.importorskip("gcsfs")
    options = {"token": "anon", "endpoint_url": url, "skip_instance_cache": True}
    assert location_of(FsspecStore.from_url("gs://bucket/a", storage_options=options)) is None


# ------------------------------------------------------------------------------- options


def google(**options: Any) -> FsspecStore:
    pytest.importorskip("gcsfs")
    options = {"token": "anon", "project": "p", "skip_instance_cache": True, **options}
    return FsspecStore.from_url("gs://bucket/a", storage_options=options)


def header(**headers: str) -> dict[str, Any]:
    return {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}


def client(**headers: str) -> dict[str, Any]:
    return {"client_options": {"default_headers": header(**headers)["headers"], "timeout": "3s"}}


def check_naming(make: Callable[[], Store], *, is_named: bool) -> None:
    """Either its location is its name, or it is another place each time."""
    one, other = make(), make()
    location = location_of(one)
    assert location is not None
    assert naming_location(one) == (location if is_named else None)
    assert (place_in_process(one) == place_in_process(other)) is is_named
    # Evicting would delete what is there all the same.
    assert overlaps(one, other)


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        (header(Authorization="hush", User_Agent="me", accept_encoding="identity"), True),
        ({"client_kwargs": header(X_Token="hush")}, True),
        ({"block_size": 1, "proxy": "http://node", "client_kwargs": {"trust_env": True}}, True),
        # They follow the whole URL.
        ({"params": {"sig": "hush", "se": "x"}}, True),
        ({"params": {"set": "1"}}, False),
        (header(Host="one"), False),
        (header(x_dataset="one"), False),
        (header(Accept="*/*"), True),
        (header(Accept="text/html"), False),
        (header(Accept_Encoding="gzip"), False),
        ({"client_kwargs": header(Host="one")}, False),
        ({"cookies": {}, "client_kwargs": {"cookies": {}}}, True),
        ({"cookies": {"set": "one"}}, False),
        ({"client_kwargs": {"cookies": {"set": "one"}}}, False),
        ({"client_kwargs": {"connector": None}}, False),
        ({"client_kwargs": {"auto_decompress": False}}, False),
        ({"encoded": True}, False),
        ({"later": 1}, False),
    ],
)
def test_naming_location_http_is_none_with_options_that_may_select(
    options: dict[str, Any], is_named: bool
) -> None:
    check_naming(lambda: http("https://node/a", **options), is_named=is_named)


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        ({"anon": True, "key": None, "secret": None, "use_listings_cache": False}, True),
        ({"requester_pays": True, "default_block_size": 1, "version_aware": True}, True),
        ({"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, True),
        ({"client_kwargs": {"region_name": "eu-west-1", "verify": False}}, True),
        ({"config_kwargs": {"max_pool_connections": 3, "s3": {"addressing_style": "path"}}}, True),
        ({"s3_additional_kwargs": {"VersionId": "one"}}, False),
        ({"s3_additional_kwargs": {"PartNumber": 1}}, False),
        ({"client_kwargs": {"api_version": "2006-03-01"}}, True),
        ({"config_kwargs": {"http_session_cls": object}}, False),
        ({"config_kwargs": {"connector_args": {"resolver": None}}}, False),
        ({"config_kwargs": {"s3": {"later": 1}}}, False),
    ],
)
def test_naming_location_s3_is_none_with_options_that_may_select(
    options: dict[str, Any], is_named: bool
) -> None:
    check_naming(lambda: s3(**options), is_named=is_named)


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        ({"requests_timeout": 3, "requester_pays": True, "access": "read_only"}, True),
        ({"session_kwargs": {"trust_env": True, **header(Authorization="hush")}}, True),
        ({"user_project": "one"}, True),
        ({"session_kwargs": header(X_Dataset="one")}, False),
        ({"later": 1}, False),
    ],
)
def test_naming_location_google_is_none_with_options_that_may_select(
    options: dict[str, Any], is_named: bool
) -> None:
    check_naming(lambda: google(**options), is_named=is_named)


def test_naming_location_google_knows_what_is_given_by_position() -> None:
    gcsfs = pytest.importorskip("gcsfs")

    def make(*args: Any) -> Store:
        made = gcsfs.GCSFileSystem(*args, token="anon", asynchronous=True)
        return FsspecStore(made, path="bucket/a")

    check_naming(lambda: make("p", "read_only"), is_named=True)


@pytest.mark.parametrize(
    ("options", "is_named"),
    [
        ({"sas_token": "sv=2024&sig=hush"}, True),
        ({"account_key": "aHVzaA==", "max_concurrency": 3, "version_aware": True}, True),
        ({"anon": True, "later": 1}, False),
    ],
)
def test_naming_location_azure_is_none_with_options_that_may_select(
    options: dict[str, Any], is_named: bool
) -> None:
    check_naming(lambda: azure(account_name="acc", **options), is_named=is_named)


@pytest.mark.parametrize(
    ("kind", "args", "options", "is_named"),
    [
        ("HTTPStore", ["https://node/a"], client(Authorization="hush", User_Agent="me"), True),
        ("HTTPStore", ["https://node/a"], client(Host="one"), False),
        ("HTTPStore", ["https://node/a"], client(X_Dataset="one"), False),
        ("HTTPStore", ["https://node/a"], client(Accept_Encoding="gzip"), False),
        ("S3Store", ["b"], client(Authorization="hush"), True),
        ("S3Store", ["b"], {"skip_signature": True, "request_payer": True}, True),
        ("S3Store", ["b"], {"virtual_hosted_style_request": True}, True),
        ("S3Store", ["b"], client(Host="one"), False),
        ("GCSStore", ["b"], client(Authorization="hush"), True),
        ("GCSStore", ["b"], client(Host="one"), False),
        ("AzureStore", ["c"], {"account_name": "acc", "sas_key": "sv=2024&sig=hush"}, True),
        ("AzureStore", ["c"], {"account_name": "acc", **client(Host="one")}, False),
        (
            "AzureStore",
            ["c"],
            {"account_name": "acc", "sas_key": "snapshot=2024&sv=2024&sig=hush"},
            False,
        ),
    ],
)
def test_naming_location_of_obstore_is_none_with_options_that_may_select(
    kind: str, args: list[str], options: dict[str, Any], is_named: bool
) -> None:
    check_naming(lambda: obstore(kind, *args, **options), is_named=is_named)


def test_naming_location_of_obstore_is_none_where_an_endpoint_has_the_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one endpoint the two styles ask two servers, or for two paths."""

    def make(**options: Any) -> Store:
        return obstore("S3Store", "b", endpoint="http://b.node", **options)

    check_naming(make, is_named=True)
    check_naming(lambda: make(virtual_hosted_style_request=False), is_named=True)
    check_naming(lambda: make(virtual_hosted_style_request=True), is_named=False)
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    check_naming(make, is_named=False)


def test_naming_location_of_obstore_with_unknown_settings_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a later version may have them."""
    monkeypatch.setattr(
        "zcache._source.endpoints._config", lambda _: {"bucket": "b", "later": "true"}
    )
    check_naming(lambda: obstore("S3Store", "b"), is_named=False)


# ------------------------------------------------------------------------------- what fails


class Odd(MemoryStore):
    """A store of which nothing can be asked."""

    def __str__(self) -> str:
        raise RuntimeError(PANIC)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError(PANIC)

    __hash__ = None  # type: ignore[assignment]


class OddWrapper(WrapperStore[Store]):
    """A wrapper of which nothing can be asked."""

    __str__ = Odd.__str__
    __repr__ = Odd.__str__
    __eq__ = Odd.__eq__
    __hash__ = None  # type: ignore[assignment]


def test_location_of_stores_that_fail_is_unknown(tmp_path: Path) -> None:
    for store in (Odd(), OddWrapper(MemoryStore())):
        assert location_of(store) is None
        assert not overlaps(store, MemoryStore())
        assert overlaps(store, store)
        assert place_in_process(store) == place_in_process(store)
    assert location_of(OddWrapper(LocalStore(tmp_path))) is not None


class Panic(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_location_of_a_library_that_fails_is_unknown(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error(PANIC)

    store = s3()
    monkeypatch.setattr("botocore.session.Session.get_scoped_config", fail)
    assert location_of(store) is None


def test_location_of_a_library_that_is_interrupted_passes_it_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    store = s3()
    monkeypatch.setattr("botocore.session.Session.get_scoped_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        location_of(store)


def test_location_of_obstore_that_panics_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The text of this one ends in a panic, for its account is not among its options."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    store = obstore("AzureStore", "c")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    assert location_of(store) is None
    assert place_in_process(store)[0] == "bucket"
    assert not overlaps(store, MemoryStore())
    assert "panicked" not in capfd.readouterr().err


def test_location_of_obstore_that_panics_is_asked_for_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its options cannot be read where one of its client is among its arguments."""
    store = obstore("S3Store", "b", allow_http=True)
    for _ in range(3):
        assert location_of(store) is naming_location(store) is None
    assert capfd.readouterr().err.count("panicked") <= 1


class Cycle(WrapperStore[Store]):
    """A wrapper of itself."""

    def __init__(self) -> None:
        self._store = self


def test_innermost_of_a_cycle_ends() -> None:
    store = Cycle()
    assert innermost(store) is store
    plain = WrapperStore(MemoryStore())
    plain._store = plain  # type: ignore[assignment]
    assert memory_store_of(plain) is None


# ------------------------------------------------------------------------------- overlaps


def test_overlaps_of_directories(tmp_path: Path) -> None:
    one = LocalStore(tmp_path / "a")
    for other, expected in [
        (LocalStore(tmp_path / "a"), True),
        (WrapperStore(LocalStore(tmp_path / "a/b")), True),
        (LocalStore(tmp_path), True),
        (LocalStore(tmp_path / "ab"), False),
        (fsspec_file(tmp_path / "a/cache"), True),
        (fsspec_file(tmp_path / "ab"), False),
        (obstore("LocalStore", tmp_path), True),
        (MemoryStore(), False),
    ]:
        assert overlaps(one, other) is overlaps(other, one) is expected, other


def test_overlaps_of_stores_in_memory() -> None:
    values: dict[str, Any] = {}
    assert overlaps(MemoryStore(values), MemoryStore(values, read_only=True))
    assert not overlaps(MemoryStore(), MemoryStore())
    bucket = obstore("MemoryStore")
    assert overlaps(bucket, ObjectStore(bucket.store, read_only=True))
    assert not overlaps(bucket, obstore("MemoryStore"))


def test_overlaps_of_memory_of_fsspec_by_other_spellings() -> None:
    pytest.importorskip("fsspec")
    one = FsspecStore.from_url("memory://spelled")
    for path in ("spelled", "/spelled"):
        other = FsspecStore(one.fs, path=path)
        assert overlaps(one, other)
        assert place_in_process(one) == place_in_process(other)
    assert overlaps(one, FsspecStore(one.fs, path="/spelled/cache"))
    assert not overlaps(one, FsspecStore(one.fs, path="/spelled2"))


def test_overlaps_of_parts_of_one_memory() -> None:
    managed: Callable[..., Any] | None = getattr(zarr.storage, "ManagedMemoryStore", None)
    if managed is None:
        pytest.skip("not in this zarr")
    whole, one, other = (managed("x", path=path) for path in ("", "a", "a2"))
    assert overlaps(one, whole)
    assert not overlaps(one, other)
    assert memory_store_of(one) is None
    assert memory_store_of(whole) is whole


def test_overlaps_of_buckets() -> None:
    one = s3("bucket/a")
    for other, expected in [
        (s3("bucket/a/cache"), True),
        (s3("bucket"), True),
        (s3("bucket/ab"), False),
        (s3("bucket/a", endpoint_url="http://node:9000"), False),
        (obstore("S3Store", "bucket", prefix="a/cache"), True),
        (obstore("GCSStore", "bucket", prefix="a"), False),
    ]:
        assert overlaps(one, other) is overlaps(other, one) is expected


def test_places_overlap_of_folders_that_are_not_there_goes_by_their_names(tmp_path: Path) -> None:
    one = Location("file://", f"{tmp_path}/a")
    for path, expected in [("a/b/c", True), ("", True), ("b/a", False), ("a2", False)]:
        other = Location("file://", f"{tmp_path}/{path}".rstrip("/"))
        assert places_overlap(one, other) is places_overlap(other, one) is expected


@pytest.mark.parametrize(
    "location",
    [
        Location("file://", "/a b%20 at c"),
        Location("s3://", "bucket/a b%20"),
        Location("s3://", "bucket/a at b", "http://node:9000"),
        Location("https://", "host/data"),
    ],
)
def test_location_parse_is_the_inverse_of_its_text(location: Location) -> None:
    assert Location.parse(str(location)) == location


@pytest.mark.parametrize("text", ["", "mine", "process:0123", "file://relative"])
def test_location_parse_of_other_texts_is_none(text: str) -> None:
    assert Location.parse(text) is None


# ------------------------------------------------------------------------------- places


class Below(WrapperStore[Store]):
    """Shows what lies below a prefix."""


class Upper(LocalStore):
    """Shows other bytes than the directory."""


def test_place_in_process_is_one_for_one_place(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    bucket = obstore("MemoryStore")
    for one, other in [
        (LocalStore(tmp_path), LocalStore(tmp_path, read_only=True)),
        (MemoryStore(values), LoggingStore(MemoryStore(values), log_level="ERROR")),
        (bucket, ObjectStore(bucket.store)),
        (s3(), WrapperStore(s3())),
        (fsspec_file(tmp_path), WrapperStore(LocalStore(tmp_path))),
        (ZipStore(tmp_path / "a.zip", mode="w"), ZipStore(tmp_path / "a.zip", mode="w")),
    ]:
        assert place_in_process(one) == place_in_process(other)
        hash(place_in_process(one))
    assert place_in_process(LocalStore(tmp_path)) == ("file", os.path.realpath(tmp_path))


def test_place_in_process_differs_for_classes_of_the_users_own(tmp_path: Path) -> None:
    memory, local = MemoryStore(), LocalStore(tmp_path)
    places = [memory, Below(memory), Below(memory), local, Upper(tmp_path), Upper(tmp_path)]
    assert len({place_in_process(store) for store in places}) == len(places)


def test_memory_store_of_wrappers_that_keep_names() -> None:
    memory = MemoryStore()
    assert memory_store_of(WrapperStore(LoggingStore(memory, log_level="ERROR"))) is memory
    assert memory_store_of(Below(memory)) is None
    assert memory_store_of(obstore("MemoryStore")) is None


def test_outlives_process_of_kinds_of_stores(tmp_path: Path) -> None:
    assert outlives_process(WrapperStore(LocalStore(tmp_path)))
    assert outlives_process(Upper(tmp_path))
    assert outlives_process(s3())
    assert not outlives_process(MemoryStore())
    assert not outlives_process(Odd())


def test_shows_partial_values_of_kinds_of_stores(tmp_path: Path) -> None:
    assert shows_partial_values(fsspec_file(tmp_path))
    assert not shows_partial_values(s3())
    assert not shows_partial_values(LocalStore(tmp_path))


def test_locations_that_differ_never_look_the_same() -> None:
    one, other = Location("s3://", "a at http://b"), Location("s3://", "a", "http://b")
    assert str(one) != str(other) == "s3://a at http://b"
