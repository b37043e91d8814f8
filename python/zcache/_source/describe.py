"""A text for a store without what is secret: in errors, logs and `repr`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from zarr.storage import FsspecStore

from zcache._runtime.printable import printable
from zcache._source.answers import ask
from zcache._source.location import bucket_of, innermost, layers, location_of
from zcache._source.urls import redact

if TYPE_CHECKING:
    from collections.abc import Callable


def describe(store: Any) -> str:
    """Classes of a store and of what it wraps, and where the innermost keeps its values.

    Parameters
    ----------
    store : Any
        A store; anything else is told by its class. Its own text is not asked for: that may fail, panic, take
        long, or show a secret.

    Examples
    --------
    >>> from zarr.storage import LocalStore, WrapperStore
    >>> describe(WrapperStore(LocalStore("/data/a.zarr")))
    'WrapperStore(LocalStore(file:///data/a.zarr))'
    """
    kinds = [type(layer).__qualname__ for layer in layers(store)]
    inner = innermost(store)
    text = str(location_of(inner) or ask(lambda: _rest(inner)) or "")
    for kind in reversed(kinds):
        text = f"{kind}({text})" if text else kind
    return printable(text)


def _rest(store: Any) -> str | None:
    """What can be told of a place that is not certain."""
    if (bucket := bucket_of(store)) is not None:
        return type(bucket).__name__
    if not isinstance(store, FsspecStore):
        return None
    protocol = store.fs.protocol if isinstance(store.fs.protocol, str) else store.fs.protocol[0]
    path = str(store.path)
    return redact(path if "://" in path else f"{protocol}://{path}")


_KNOWN: Final = frozenset({"zarr", "zcache"})
"""Packages of which the texts of stores show no secret, but what is in a URL. What those of others show is not known."""


def show(store: Any) -> str:
    """The text of a store of zarr's as its users know it, without secrets; of any other its description."""
    return _shown(store, repr)


def show_address(store: Any) -> str:
    """The same of the address of a store."""
    return _shown(store, str)


def _shown(store: Any, show: Callable[[Any], str]) -> str:
    is_known = all(_has_known_text(type(layer)) for layer in layers(store))
    text = ask(lambda: show(store)) if is_known else None
    return _without_secrets(text, store) if isinstance(text, str) else describe(store)


def _has_known_text(kind: type) -> bool:
    for name in ("__repr__", "__str__"):
        method = getattr(kind, name)
        # That of `object` has no module, and shows an address or what `repr` shows.
        package = getattr(method, "__module__", "").partition(".")[0]
        if package not in _KNOWN and method is not getattr(object, name):
            return False
    return True


def _without_secrets(text: str, store: Any) -> str:
    inner = innermost(store)
    if isinstance(inner, FsspecStore):
        # It has no scheme, and may have anything else of a URL.
        path = str(inner.path)
        shown = redact(path) if "://" in path else redact(f"any://{path}").removeprefix("any://")
        text = text.replace(path, shown) if path else text
    return printable(redact(text))
