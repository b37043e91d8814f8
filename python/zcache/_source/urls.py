"""URLs without what is secret in them."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from zcache._source.answers import UnnamedError

_URL: Final = re.compile(
    r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<rest>[^\s'"<>`]*)""", re.IGNORECASE
)
_QUERY: Final = re.compile(r"[?#].*", re.DOTALL)
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
    return _URL.sub(lambda url: url["scheme"] + _without_user(_QUERY.sub("", url["rest"])), text)


def _without_user(rest: str) -> str:
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    if at:
        return host + slash + path
    # A password may have an unescaped slash; what comes before it is no port then.
    port = authority.rpartition(":")[2] if ":" in authority else ""
    if "@" in path and port and not port.isdigit() and not authority.endswith("]"):
        return path.rpartition("@")[2]
    return rest


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
