"""Places of repositories, as the serialized form of a session tells them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from zcache._source.answers import UnnamedError
from zcache._source.icechunk import place_of, unpack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of AWS, which is not there yet."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path / "config"


def s3(region: str | None, url: str | None, **changes: Any) -> dict[str, Any]:
    told = {"type": "S3Storage", "config": [region, url, False], "bucket": "data", "prefix": "p"}
    return {**told, "credentials": ["static", "me", "hush"], "extra_read_headers": [], **changes}


@pytest.mark.usefixtures("config")
def test_place_of_s3_names_server_and_bucket() -> None:
    assert place_of(s3("eu-west-1", None)) == "s3://data/p"
    assert place_of(s3("cn-north-1", None)) == "s3://data/p at aws-cn"
    assert place_of(s3(None, "http://me:hush@node:9000")) == "s3://data/p at http://node:9000"
    assert place_of(s3("x", "http://node", prefix=None)) == "s3://data at http://node"


def test_place_of_s3_that_environment_or_profile_may_redirect_is_unknown(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text("[profile a]\nregion = x\n")
    assert place_of(s3("eu-west-1", None)) == "s3://data/p"
    config.write_text("[profile a]\nendpoint_url = http://a\n")
    with pytest.raises(UnnamedError):
        place_of(s3("eu-west-1", None))
    config.unlink()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://a")
    with pytest.raises(UnnamedError):
        place_of(s3("eu-west-1", None))


@pytest.mark.usefixtures("config")
@pytest.mark.parametrize(
    "told",
    [
        s3(None, None),
        s3("x", "http://node", extra_read_headers=[["set", "1"]]),
        s3("x", "http://node", key_layout="Other"),
        {"type": "Redirect", "url": "http://node"},
        {"type": "ObjectStorage", "backend": {"object_store_provider_type": "in_memory"}},
    ],
)
def test_place_of_what_is_not_known_is_unknown(told: dict[str, Any]) -> None:
    with pytest.raises(UnnamedError):
        place_of(told)


def test_unpack_reads_every_kind_of_value() -> None:
    for data, value in [
        (b"\xc0", None),
        (b"\x92\xc2\xc3", [False, True]),
        (b"\x7f", 127),
        (b"\xff", -1),
        (b"\xcd" + struct.pack(">H", 4096), 4096),
        (b"\xd2" + struct.pack(">i", -70000), -70000),
        (b"\xcb" + struct.pack(">d", 0.5), 0.5),
        (b"\xa2ab", "ab"),
        (b"\xd9\x03abc", "abc"),
        (b"\xc4\x02\x00\xff", b"\x00\xff"),
        (b"\x81\xa1a\x01", {"a": 1}),
        (b"\xde\x00\x01\xa1a\xdc\x00\x01\xc0", {"a": [None]}),
    ]:
        assert unpack(data) == value


@pytest.mark.parametrize("data", [b"\xa2a", b"\x92\xc0", b"\xc1", b"\xd4\x01\x00", b""])
def test_unpack_of_what_is_cut_short_or_unknown_is_refused(data: bytes) -> None:
    with pytest.raises((UnnamedError, ValueError)):
        unpack(data)
