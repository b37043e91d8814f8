"""URLs without what is secret in them, and servers that are always written alike."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zcache._source.answers import UnnamedError
from zcache._source.urls import hide, redact, secrets_in, server, without_query, without_user


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
        ("zip://a::https://me:hush@node/x.zip", "zip://a::https://node/x.zip"),
        ("zip://a?hush::s3://me:hush@b/a#hush::file", "zip://a"),
        ("zip://a::s3://me:hush@b/a#hush::file", "zip://a::s3://b/a"),
        ("https://a/p?to=/https://b/y&token=hush x", "https://a/p x"),
        ("https://a/x?u=c::https://b/y&sig=hush", "https://a/x"),
        ("https://a/x#f::s3://b/y&sig=hush, s3://me:hush@b", "https://a/x s3://b"),
        (
            "none of http://me:hush@[fe80::1]:1,http://me:hush@b",
            "none of http://[fe80::1]:1,http://b",
        ),
        ("http://me:hu?sh@a/x::s3://me:hu?sh@b/y?hush", "http://a/x::s3://b/y"),
        ("http://me:hu?sh@a/http://me:hu?sh@b/y?hush", "http://a/http://b/y"),
        ("s3://me:hu::sh@b/a", "s3://b/a"),
        ("zip://a/x::me:hush@b/a", "zip://a/x::b/a"),
        ("http://me:hu?sh@node/a?hush and http://me:hu#sh@node", "http://node/a and http://node"),
        ("http://node/a?mail=me@hush http://node?hush@b", "http://node/a http://node"),
        ("https://proxy/https://me:hush@node/a", "https://proxy/https://node/a"),
        ("/data/s3:/me:hush@b/a", "/data/s3:/b/a"),
        ("at 'https://me:hu sh hush@a/x?hush' b@c", "at 'https://a/x' b@c"),
        ("https://me:hu'sh@a/x, https://me:12'sh@b", "https://a/x, https://b"),
        ('https://me:hu"$sh@a/x?hush', "https://a/x"),
        (
            "https://me:hu`sh@a/x and s3://me:hu<sh@b/a s3://me:hu>sh@b",
            "https://a/x and s3://b/a s3://b",
        ),
        ("https://me:hu/s'h <hush@a/x?hush and b@c", "https://a/x and b@c"),
        ("https://a/it's?hush b@c", "https://a/it's b@c"),
        ("https://a/x?sig=hu'sh'", "https://a/x'"),
        ("Fs(me:hu'sh@b)", "Fs(b)"),
        ('a://Store("https://me:hush@b/x")', 'a://Store("https://b/x")'),
        ("a://'https://hush@b/x?hush'", "a://'https://b/x'"),
        ('http://p:"https://me:hush@b/x"', 'http://p:"https://b/x"'),
        ('https://a/x"https://me:hush@b/y', 'https://a/x"https://b/y'),
        ('a=http://x"b=http://me:hush@b/"', 'a=http://x"b=http://b/"'),
        ("http://a|http://me:hush@b http://a)http://hush@b", "http://a|http://b http://a)http://b"),
        ("http://a=http://me:hu sh@b&http://me:hush@b", "http://a=http://b&http://b"),
        ("https://a/x?to=https://me:hu sh@b", "https://a/x"),
        ("http://'me':'hush'@b http://me:/hush@b/x", "http://b http://b/x"),
        ("http://me@a:hu sh@b, http://me:a://hush@b", "http://b, http://b"),
        ("http://me:hush" + "x" * 20_000 + "@b", "http://..."),
        ("s3://me:a/b@hush/c@b/x s3://me:a?b@hush/c@b/x", "s3://b/x s3://b/x"),
        ("http://me:a/b@hush?c@node/x http://me:a b@hush#c@node", "http:// http://"),
        # What is none, nor a password.
        (
            text := 'a://S3Store(bucket="blue:data", prefix="run@5/a")',
            text,
        ),
        ("'http://node:80' failed, write to me@here", "'http://node:80' failed, write to me@here"),
        (
            "(see http://node:80), me@here http://node:80: b@c",
            "(see http://node:80), me@here http://node:80: b@c",
        ),
        ('<a href="http://node:80">me@here</a>', '<a href="http://node:80">me@here</a>'),
        ('{"url":"https://a?hush","mail":"me@here"}', '{"url":"https://a","mail":"me@here"}'),
        ("file://c:\\a\\b for me@here, s3://b/a b@c", "file://c:\\a\\b for me@here, s3://b/a b@c"),
        ("http://node:port/x\nme@here", "http://node:port/x\nme@here"),
        ("file://c:/a@b/x for me@here", "file://c:/a@b/x for me@here"),
        ("<Url>https://a/x?hush</Url><Key>k@b</Key>", "<Url>https://a/x</Url><Key>k@b</Key>"),
    ],
)
def test_redact_strips_what_may_be_secret(text: str, shown: str) -> None:
    assert redact(text) == shown


_USERS = st.sampled_from(
    ["", "hush@", "me:hush@", "me:hu/sh@", "me:hu?sh@", "me:hu#sh@", "me:hu::sh@"]
)
_PLACES = st.sampled_from(["node", "node:80", "[::1]:80", "", "a/b", "node/x.zip", "/a"])
_QUERIES = st.sampled_from(["", "?hush", "?sig=hush&se=1", "#hush", "?a=hush@hush#hush"])
_SCHEMES = st.sampled_from(["zip", "s3", "https", "HTTP", "git+ssh"])
_LINKS = st.one_of(
    st.tuples(_SCHEMES, st.just("://"), _USERS, _PLACES, _QUERIES),
    st.tuples(st.sampled_from(["simplecache", "zip"])),
)


@given(st.lists(_LINKS, max_size=4), st.tuples(_SCHEMES, st.just("://"), _USERS, _PLACES, _QUERIES))
def test_redact_strips_each_link_of_a_chain(
    links: list[tuple[str, ...]], last: tuple[str, ...]
) -> None:
    links = [*links, last]
    users, queries = ("".join(link[n] for link in links if len(link) > n) for n in (2, 4))
    # Behind a password with a slash or the like, the ``@`` of a query may be its end.
    assume("@" not in queries or not set("/?#") & set(users))
    url = "::".join("".join(link) for link in links)
    # What follows a query may be a part of it.
    last_shown = next((n for n, link in enumerate(links) if any(link[4:])), len(links))
    shown = "::".join("".join(link[:2] + link[3:4]) for link in links[: last_shown + 1])
    assert redact(url) == shown
    assert redact(f"OSError('at {url}')") == f"OSError('at {shown}')"
    secrets = {link[2].removesuffix("@") for link in links if len(link) > 1}
    assert secrets - {""} <= {*secrets_in(url)}


_AROUND = st.lists(
    st.sampled_from(
        [
            *" \n'\"`<>()[]{}=,;|&:.@/?#%-",
            *("://", "::", "->", "a", "80", "me@here", "x:y", "\\", "HTTPStore(bucket="),
            *("http://node", "https://node:80/a", "zip://a::", "s3://b/a@1?x=1"),
        ]
    ),
    max_size=6,
).map("".join)
_SIGNS = st.text("ab1:;,.-+=&|()[]{}%$!~", max_size=4)
_ODD_SIGNS = st.text("ab1:;,.-+=&|()[]{}%$!~ '\"`<>/?#\\", max_size=4)
_PASSWORDS = st.one_of(
    st.tuples(_ODD_SIGNS, st.just("hush"), _ODD_SIGNS),
    st.tuples(_SIGNS, st.sampled_from(["hush", "@hush@", "hush@x"]), _SIGNS),
    # What has a slash or the like before its first ``@`` goes up to the last one.
    st.tuples(
        st.sampled_from(["/", "?b", "#", "<"]),
        st.sampled_from(["@hush", "x@hush@"]),
        st.text("ab1:;,.-+=&|()[]{}%$!~'\"`<>/?#\\", max_size=4).filter(lambda s: "://" not in s),
    ),
).map("".join)


@given(st.lists(st.tuples(_AROUND, _SCHEMES, _PASSWORDS), min_size=1, max_size=3), _AROUND)
def test_redact_shows_no_password_whatever_is_around_it(
    urls: list[tuple[str, str, str]], end: str
) -> None:
    text = "".join(f"{around}{scheme}://me:a{said}@node/a" for around, scheme, said in urls)
    assert "hush" not in redact(text + end)


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


@pytest.mark.parametrize("query", ["?set=1", "?sig=hush", "?", "#f", "#", "?sig=hush#f"])
def test_server_with_a_query_or_a_fragment_is_refused(query: str) -> None:
    """What is asked for would be a part of it."""
    for place in ("http://node", "http://node/", "http://node/a"):
        with pytest.raises(UnnamedError):
            server(f"{place}{query}")


@pytest.mark.parametrize("url", [None, "", "node:9000", "ftp://node", "http://"])
def test_server_that_is_no_url_is_refused(url: object) -> None:
    with pytest.raises(UnnamedError):
        server(url)


@pytest.mark.parametrize("query", ["", "?", "#f", "?token=hush", "?sv=1&sig=hush#f", "#?set=1"])
def test_query_with_credentials_and_fragment_are_left_out(query: str) -> None:
    assert without_query(f"https://node/a/{query}") == "https://node/a/"


@pytest.mark.parametrize("query", ["?set=1", "?sv=1", "?token=hush&set=1", "?set"])
def test_query_that_may_say_what_is_asked_for_is_refused(query: str) -> None:
    with pytest.raises(UnnamedError):
        without_query(f"https://node/a{query}")


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


@pytest.mark.parametrize(
    "text",
    [
        "http://[fe80::0]:1/x,",
        "http://u:x?@:x",
        "?@:x",
        "a.",
        "::",
        "zip://a::",
        "a::b:c@",
        " b:c@",
        "'a",
    ],
)
def test_redact_takes_any_text(text: str) -> None:
    """Also where there is no end of it: it is for errors of others."""
    for many in (text * 20_000, "http://u:x" + text * 20_000):
        assert len(redact(many)) < 20_000
        list(secrets_in(many))


def test_secrets_behind_a_query_are_found() -> None:
    assert "hush" in {*secrets_in("https://a/x?u=c::https://b/y&sig=hush")}


def test_secrets_in_a_chain_are_found_as_they_are_written_and_read() -> None:
    found = {*secrets_in("zip://a::s3://me:hu%2Fsh@b/a?sig=hu%20sh&se=1")}
    assert {"hu%2Fsh", "hu/sh", "hu sh"} <= found
    assert not found & {"me", "b"}


def test_hide_leaves_words_alone_that_hold_a_short_secret() -> None:
    secrets = ["", "b", ".", "hush", "hush-hush"]
    assert hide("a hush-hush of b, about hushing.", secrets) == "a ... of ..., about ...ing."
    assert hide("b", []) == "b"
