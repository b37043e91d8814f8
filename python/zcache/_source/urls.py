"""URLs without what is secret in them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from zcache._source.answers import UnnamedError

if TYPE_CHECKING:
    from collections.abc import Iterator

_URL: Final = re.compile(
    r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<rest>[^\s'"<>`]*)"""
    r"""|(?P<place>(?<![^\s'"<>`@:/(\[{,=])[^\s'"<>`@:/(\[{,=]+:[^\s'"<>`@:/][^\s'"<>`@:]*@[^\s'"<>`]*)""",
    re.IGNORECASE,
)
"""A URL; or what some clients make of one with a password: it without its scheme."""
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)
_SHORTEST: Final = 4
"""Characters of a parameter that may be a secret."""
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
    """Strip user information, query and fragment of every URL in a text.

    Parameters
    ----------
    text : str
        What is to be shown, such as an error of a library.
    """

    def shown(url: re.Match[str]) -> str:
        if url["scheme"] is None:
            return without_user(url["place"])
        return url["scheme"] + without_user(_QUERY.sub("", url["rest"]))

    return _URL.sub(shown, text)


def without_user(rest: str) -> str:
    """What follows the scheme of a URL, without user information."""
    return rest[_user_end(rest) :]


def _user_end(rest: str) -> int:
    """How many characters of what follows the scheme of a URL are user information, with its sign."""
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        return authority.rindex("@") + 1
    # A password may have an unescaped slash; what comes before it is no port then, and no name of Amazon's.
    port = authority.rpartition(":")[2] if ":" in authority else ""
    is_user = port and not port.isdigit() and not authority.endswith("]")
    if "@" in path and is_user and not authority.startswith("arn:"):
        return len(authority + slash) + path.rindex("@") + 1
    return 0


def secrets_in(url: str) -> Iterator[str]:
    """What of a URL, or a chain of them, no text may show: as it is written, and as a client reads it."""
    for link in url.split("::"):
        rest = link.partition("://")[2]
        place, _, query = rest.partition("?")
        user = place[: _user_end(place)].removesuffix("@")
        for secret in (user, user.partition(":")[2]):
            yield from {secret, unquote(secret)} - {""}
        for value in re.split("[&=#]", query)[1:]:
            # A shorter one is in many a word.
            yield from {each for each in (value, unquote(value)) if len(each) >= _SHORTEST}


def server(url: object, *, signed: bool = False) -> str:
    """The URL of a server, as every client would write it.

    Parameters
    ----------
    url : object
        The URL as a client tells it.
    signed : bool, optional
        Whether the query holds credentials and nothing else. Default is False.

    Raises
    ------
    UnnamedError
        If it is no URL of HTTP, or has parameters that may say what is read.
    """
    scheme, place = web_address(url, signed=signed)
    return f"{scheme}://{place}"


def web_address(url: object, *, signed: bool = False) -> tuple[str, str]:
    """Scheme of a URL, and host, port and path without user information, query and fragment."""
    if not isinstance(url, str):
        raise UnnamedError
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UnnamedError
    if not signed:
        check_query(parts.query)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
    return parts.scheme, f"{host}{port}{parts.path}".rstrip("/")


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
