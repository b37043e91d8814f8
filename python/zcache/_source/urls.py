"""URLs without what is secret in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from zcache._source.answers import UnnamedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_RUN: Final = "[a-z0-9+.-]"
_SCHEME: Final = "[a-z][a-z0-9+.-]*"
_LINK: Final = rf"::(?={_SCHEME}(?:://|::))"
"""What is between two links of a chain; one elsewhere is of an address or a password."""
_NEXT: Final = re.compile(rf"{_LINK}|[/,;](?={_SCHEME}://)", re.IGNORECASE)
"""Where another URL begins in what follows a scheme: the next one of a chain, of a proxy's, or of a list."""
_SPLIT: Final = re.compile(rf"::|[/,;](?={_SCHEME}://)", re.IGNORECASE)
"""Where another one may begin."""
_QUOTE: Final = r"""['"`](?=[a-z0-9%])"""
"""A quotation mark that ends nothing: one that does is not followed by a word."""
_URL: Final = re.compile(
    rf"""(?P<scheme>(?<!{_RUN}){_RUN}+://)(?P<rest>(?:(?!{_LINK}|[/,;]{_SCHEME}://)(?:[^\s'"<>`?#]|{_QUOTE}))*"""
    rf"""(?:[?#](?:[^\s'"<>`]|{_QUOTE})*)?)"""
    r"""|(?P<place>(?<![^\s'"<>`@:/(\[{,=])[^\s'"<>`@:/(\[{,=]+:[^\s'"<>`@:/]"""
    rf"""(?:[^\s'"<>`@:]|{_QUOTE})*@(?:[^\s'"<>`]|{_QUOTE})*)""",
    re.IGNORECASE,
)
"""A URL, with all that follows its query, or up to the next one; or what some clients make of one with a password: it without its scheme."""
_REST_OF_PASSWORD: Final = re.compile(r"(?:(?!://)[^\n@])*@")
"""What follows a part of a password that seems to be all of a URL."""
_PORT: Final = re.compile(r"[0-9]*[^\w%]*|\\.*", re.DOTALL)
"""What follows the first colon in a URL without a password: a port, and perhaps the end of a sentence; or a path of Windows."""
_MOST: Final = 16_384
"""Characters of a text that are looked at; what is longer is cut off."""
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)
_SHORTEST: Final = 4
"""Characters of a secret that is left out of words as well."""
_PORTS: Final = {"http": 80, "https": 443}

_SIGNATURE: Final = re.compile(
    "x-(amz|goog)-.*|signature|expires|policy|key-pair-id|awsaccesskeyid|googleaccessid"
    "|(access_?|auth_?|sas_?)?token|api_?key",
    re.IGNORECASE,
)
"""Parameters of a query that say who asks, not what is asked for."""
_SAS: Final = re.compile("s(ig|v|r|t|e|p|s|rt|pr|ip|dd|es|kt|ke|ks|kv|koid|ktid|aoid|uoid|cid)")
"""The same of a shared access signature of Azure; alone each of them may mean anything."""


def redact(text: str) -> str:
    """Strip user information, query and fragment of every URL in a text, and all that follows these two in it.

    Parameters
    ----------
    text : str
        What is to be shown, such as an error of a library.
    """
    shown, text = [], text if len(text) <= _MOST else f"{text[:_MOST]}..."
    while (url := _URL.search(text)) is not None:
        shown.append(text[: url.start()])
        text = text[url.end() :]
        if url["scheme"] is None:
            shown.append(without_user(url["place"]))
            continue
        if _has_part_of_password(url["rest"]) and (more := _REST_OF_PASSWORD.match(text)):
            text = url["scheme"] + text[more.end() :]
            continue
        _, place, query = _parts(url["rest"])
        shown.append(url["scheme"])
        if _NEXT.search(place):
            # The query is that of another URL.
            place += query
        # What has no scheme is a path for a client, and so may be anything.
        split = _SPLIT.search(place)
        end = len(place) if split is None else split.end()
        shown.append(place[:end])
        text = place[end:] + text
    return "".join([*shown, text])


def hide(text: str, secrets: Iterable[str]) -> str:
    """Leave secrets out of a text; short ones only where they are words of their own, as they are in many a word."""
    found = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
    patterns = [
        re.escape(secret) if len(secret) >= _SHORTEST else rf"(?<!\w){re.escape(secret)}(?!\w)"
        for secret in found
    ]
    # All at once, so that none is found in what stands for another one.
    return re.sub("|".join(patterns), "...", text) if patterns else text


def links(url: str) -> list[str]:
    """The URLs of a chain; of them some are schemes only."""
    return re.split(_LINK, url, flags=re.IGNORECASE)


def scheme_of(link: str) -> str | None:
    """The scheme of a URL, if it is one."""
    found = re.match(rf"({_SCHEME})(://|::|$)", link, re.IGNORECASE)
    return None if found is None else found[1]


def without_user(rest: str) -> str:
    """What follows the scheme of a URL, without user information."""
    return rest[_user_end(rest) :]


def _user_end(rest: str) -> int:
    """How many characters of what follows the scheme of a URL are user information, with its sign."""
    authority = rest.partition("/")[0]
    if "@" in authority:
        return authority.rindex("@") + 1
    # A password may have an unescaped slash.
    return rest.rfind("@") + 1 if _is_user(authority) else 0


def _is_user(authority: str) -> bool:
    """Whether what is written as host and port cannot be that, nor a name of Amazon's."""
    port = authority.rpartition(":")[2] if ":" in authority else ""
    is_port = not port or port.isdigit() or authority.endswith("]")
    return not (is_port or authority.startswith("arn:"))


def _has_part_of_password(rest: str) -> bool:
    """Whether what follows the scheme of a URL seems to end within a password, by one of the signs that end a URL."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    _, colon, port = authority.partition(":")
    return "@" not in rest and bool(colon) and _is_user(authority) and _PORT.fullmatch(port) is None


def _parts(rest: str) -> tuple[str, str, str]:
    """User information, place, and query with the fragment, of what follows the scheme of a URL."""
    users = []
    while True:
        place = _QUERY.sub("", rest)
        end = _user_end(place)
        if end or "@" not in rest or not _is_user(place.partition("/")[0]):
            break
        # A password may have their signs.
        user, _, rest = rest.partition("@")
        users.append(user)
    user = "@".join([*users, place[:end].removesuffix("@")]).removesuffix("@")
    return user, place[end:], rest[len(place) :]


def secrets_in(url: str) -> Iterator[str]:
    """What of a URL, or a chain of them, no text may show: as it is written, and as a client reads it."""
    # What follows a query is a part of it for some clients, and another link for others.
    for link in dict.fromkeys([*links(url), url]):
        user, _, query = _parts(link.partition("://")[2] or link)
        for secret in (user, user.partition(":")[2]):
            yield from (secret, unquote(secret))
        for value in re.split("[?&=#]", query)[2:]:
            yield from (value, unquote(value))


def server(url: object) -> str:
    """The URL of a server, as every client would write it; see `web_address`."""
    scheme, place = web_address(url)
    return f"{scheme}://{place}".rstrip("/")


def web_address(url: object) -> tuple[str, str]:
    """Scheme of a URL, and host, port and path without user information.

    Raises
    ------
    UnnamedError
        If it is no URL of HTTP, or has a query or a fragment. Most clients append what they ask for to the URL, so that it
        becomes a part of these, and something else is asked for.
    """
    if not isinstance(url, str) or _QUERY.search(url):
        raise UnnamedError
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UnnamedError
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
    path = "" if parts.path == "/" else parts.path
    return parts.scheme, f"{host}{port}{path}"


def without_query(url: str) -> str:
    """A URL without query and fragment, for a client that appends what it asks for to the path.

    Raises
    ------
    UnnamedError
        If the query may say what is asked for.
    """
    check_query(urlsplit(url).query)
    return _QUERY.sub("", url)


def check_query(query: str) -> None:
    """See that a query holds nothing but who asks.

    Raises
    ------
    UnnamedError
        If it may say what is asked for as well.
    """
    names = [name for name, _ in parse_qsl(query, keep_blank_values=True)]
    shared = "sig" in names
    for name in names:
        if not (_SIGNATURE.fullmatch(name) or (shared and _SAS.fullmatch(name))):
            raise UnnamedError
