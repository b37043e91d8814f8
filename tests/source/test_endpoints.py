"""Servers that are one, and those that are not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from zarr.storage import ObjectStore

from zcache._source.answers import UnnamedError
from zcache._source.endpoints import amazon, amazon_of
from zcache._source.identity import identify

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "host",
    [
        "s3.amazonaws.com",
        "s3.eu-west-1.amazonaws.com",
        "s3-us-west-2.amazonaws.com",
        "s3.dualstack.ap-southeast-2.amazonaws.com",
        "s3-accelerate.amazonaws.com",
        "s3-external-1.amazonaws.com",
    ],
)
def test_amazon_of_every_region_is_one_server(host: str) -> None:
    assert amazon(f"https://{host}") is None


def test_amazon_of_other_partitions_are_others() -> None:
    assert amazon("https://s3.cn-north-1.amazonaws.com.cn") == amazon_of("cn-north-1") == "aws-cn"
    for host in ("s3.us-gov-west-1", "s3-fips.us-gov-west-1"):
        assert amazon(f"https://{host}.amazonaws.com") == amazon_of("us-gov-west-1")
    assert amazon_of("us-gov-west-1") == "aws-us-gov"
    assert amazon_of("eu-west-1") is amazon_of(None) is None


@pytest.mark.parametrize("region", ["us-iso-east-1", "eusc-de-east-1"])
def test_amazon_of_regions_with_a_domain_of_their_own_is_unknown(region: str) -> None:
    with pytest.raises(UnnamedError):
        amazon_of(region)


@pytest.mark.parametrize(
    "url",
    [
        "http://node:9000",
        "https://s3.amazonaws.com.example.org",
        "https://bucket.s3.amazonaws.com",
        "https://s3.eu-west-1.amazonaws.com/path",
        "https://s3-outposts.eu-west-1.amazonaws.com",
    ],
)
def test_amazon_of_any_other_server_is_that_server(url: str) -> None:
    assert amazon(url) == url


@pytest.mark.parametrize(
    ("make", "variable"),
    [
        (lambda stores: stores.S3Store("data", region="us-east-1"), "AWS_endpoint_url"),
        (lambda stores: stores.GCSStore("data"), "GOOGLE_Base_Url"),
        (
            lambda stores: stores.AzureStore("data", account_name="one"),
            "AZURE_STORAGE_endpoint",
        ),
    ],
)
def test_variables_of_obstore_are_read_whatever_the_case_of_their_names(
    make: Callable[[Any], Any], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = pytest.importorskip("obstore.store")
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "https://node")
    assert identify(ObjectStore(make(stores))).name.endswith("://data at https://node")
    # Two that obstore may read, and that say two things.
    monkeypatch.setenv(variable.upper(), "https://other")
    assert identify(ObjectStore(make(stores))).is_ephemeral
    monkeypatch.delenv(variable)
    monkeypatch.delenv(variable.upper())
    # Another prefix is none of a provider.
    monkeypatch.setenv(variable.lower(), "https://node")
    assert "node" not in identify(ObjectStore(make(stores))).name


def test_server_that_obstore_asks_for_keys_without_the_bucket_has_no_name() -> None:
    stores = pytest.importorskip("obstore.store")
    for is_so in (False, True):
        made = stores.S3Store("data", endpoint="https://node", virtual_hosted_style_request=is_so)
        assert identify(ObjectStore(made)).is_ephemeral is is_so
