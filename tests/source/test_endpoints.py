"""Servers of S3 that are one, and those that are not."""

from __future__ import annotations

import pytest

from zcache._source.answers import UnnamedError
from zcache._source.endpoints import amazon, amazon_of


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
