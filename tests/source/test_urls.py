"""URLs without what is secret in them, and servers that are always written alike."""

from __future__ import annotations

import pytest

from zcache._source.answers import UnnamedError
from zcache._source.urls import redact, secrets_in, server, without_user


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<Store https://me:hush@node:1/a?sig=hush#f>", "<Store https://node:1/a>"),
        ("at 's3://b/a?X-Amz-Signature=hush' and abfs://c@acc/x", "at 's3://b/a' and abfs://acc/x"),
        ("http://me:hu/sh@node/a", "http://node/a"),
        ("http://node:80/a@b and http://[::1]/a@b", "http://node:80/a@b and http://[::1]/a@b"),
        ("no URL? me@here", "no URL? me@here"),
        ("bucket 'me:hush@b/a@1', Fs(me:hu/sh@b)", "bucket 'b/a@1', Fs(b)"),
        ("zip::file:///a:b@c 127.0.0.1:9000/a@b", "zip::file:///a:b@c 127.0.0.1:9000/a@b"),
    ],
)
def test_redact_strips_what_may_be_secret(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("HTTP://me:hush@Node:80/", "http://node"),
        ("https://node:443/a/", "https://node/a"),
        ("https://node:80", "https://node:80"),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_server_is_written_in_one_way(url: str, shown: str) -> None:
    assert server(url) == shown


@pytest.mark.parametrize(
    "url", [None, "", "node:9000", "ftp://node", "http://", "http://node/?set=1"]
)
def test_server_that_is_no_url_or_says_more_is_refused(url: object) -> None:
    with pytest.raises(UnnamedError):
        server(url)


def test_server_with_credentials_in_its_query_is_named_without_them() -> None:
    assert server("https://node/?anything=hush", signed=True) == "https://node"


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("me:hush@b/a@1", "b/a@1"),
        ("hush@b", "b"),
        ("me:hu/sh@b/a", "b/a"),
        ("b/a:1@2", "b/a:1@2"),
        (name := "arn:aws:s3:us-west-2:123456789012:accesspoint/b/a@1", name),
    ],
)
def test_without_user_leaves_keys_as_they_are(place: str, shown: str) -> None:
    assert without_user(place) == shown


def test_secrets_in_a_chain_are_found_as_they_are_written_and_read() -> None:
    found = {*secrets_in("zip://a::s3://me:hu%2Fsh@b/a?sig=hu%20sh&se=1")}
    assert {"hu%2Fsh", "hu/sh", "hu sh"} <= found
    assert not found & {"me", "1", "b", ""}
