"""URLs without what is secret in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from zcache._source.answers import UnnamedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SCHEME: Final = "[a-z][a-z0-9+.-]*"
_LINK: Final = rf"::(?={_SCHEME}(?:://|::))"
"""What is between two links of a chain; one elsewhere is of an address or a password."""
_QUOTE: Final = r"""['"`](?=:?['"`]?[a-z0-9%@])"""
"""A quotation mark that ends nothing: one that does is not followed by a word."""
_END_OF_HOST: Final = (
    rf"""//|(?<=//[a-z]:)\\|(?<=file://[a-z]:)/|[0-9]+[/?#]|[0-9]*(?!{_QUOTE})['"`]"""
    rf"""|[0-9]*[^\w\s%@'"`]*(?!{_QUOTE})(?:\s|['"`]|$)|[0-9]*[^\w\s%@]+{_SCHEME}(?:://|::)"""
)
"""What follows the first colon of a URL without a user: a port, the end of a word, another URL, or a path of Windows."""
_MORE_OF_IT: Final = r"(?:(?:(?!://)[^\s@?#])*@)*(?:(?:(?!://)[^\s@])*@(?:(?!://)\S)*)?"
"""What may be the rest of a password with a slash or the like: up to the last ``@`` of the word; if that is in its query, all of it."""
_USER: Final = re.compile(
    rf"""(?:(?:[^\s/'"<>`?#]|{_QUOTE})*@"""
    rf"""|(?!\[|arn:)[^\s/?#@:(]*:(?!{_END_OF_HOST})(?:[^@\s/?#<>'"`]*@|[^@\n]*@{_MORE_OF_IT}))+""",
    re.IGNORECASE,
)
"""User information: up to the last ``@`` before a slash; after a user, and what is no port, up to the next one in the line."""
_USERS: Final = re.compile(f"(?<=://){_USER.pattern}", re.IGNORECASE)
_URL: Final = re.compile(
    r"""(?P<url>(?<![a-z0-9+.-])[a-z0-9+.-]+://(?:\[[0-9a-f:.]*\])?"""
    rf"""(?:(?!::)(?:[^\s'"<>`?#]|{_QUOTE}))*)(?:[?#](?:[^\s'"<>`]|{_QUOTE})*)?"""
    r"""|(?<![^\s'"<>`@:/(\[{,=])(?P<place>[^\s'"<>`@:/(\[{,=]+:[^\s'"<>`@:/]"""
    rf"""(?:[^\s'"<>`@:]|{_QUOTE})*@(?:[^\s'"<>`]|{_QUOTE})*)""",
    re.IGNORECASE,
)
"""A URL up to the next link of its chain, and its query; or what some clients make of one with a password: it without its scheme."""
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

    Wherever a text has ``://``, all that may be user information goes (see `_USER`), whatever is around the URL.

    Parameters
    ----------
    text : str
        What is to be shown, such as an error of a library.
    """
    if len(text) > _MOST:
        # What is cut off may have the end of a password.
        return f"{_redact(f'{text[:_MOST]}@').removesuffix('@')}..."
    return _redact(text)


def _redact(text: str) -> str:
    shown = _USERS.sub("", text) if "@" in text else text
    return _URL.sub(lambda found: found["url"] or without_user(found["place"]), shown)


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
    """What follows the scheme of a URL, without user information: to be shown, for a client may ask for all of it."""
    return _USER.sub("", rest, count=1) if _USER.match(rest) else rest


def secrets_in(url: str) -> Iterator[str]:
    """What of a URL, or a chain of them, no text may show: as it is written, and as a client reads it."""
    # What follows a query is a part of it for some clients, and another link for others.
    for link in dict.fromkeys([*links(url), url]):
        rest = link.partition("://")[2] or link
        place = without_user(rest)
        user = rest.removesuffix(place).removesuffix("@")
        for secret in (user, user.partition(":")[2]):
            yield from (secret, unquote(secret))
        query = _QUERY.search(place)
        for value in re.split("[?&=#]", query[0])[2:] if query else ():
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
