"""Where the path of a source leads, found out once: what a store is named by is what it reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zarr.storage import FsspecStore, LocalStore, ObjectStore, ZipStore

from zcache._source.answers import UnnamedError, ask
from zcache._source.location import bucket_of, is_transparent, layers, protocol_of

if TYPE_CHECKING:
    from zarr.abc.store import Store

_MOST_LINKS: Final = 40
"""Links that a path may lead through, as the system counts them."""


def real_path(path: str) -> str:
    """The path without links to which another one leads; it need not exist.

    Raises
    ------
    UnnamedError
        If it leads through ``/proc``, where a link may lead to files that no path of this process names.
    """
    here, links = "/", 0
    rest = (
        os.path.join(os.getcwd(), path).split("/") if not path.startswith("/") else path.split("/")
    )
    rest.reverse()
    while rest:
        name = rest.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = os.path.dirname(here)
            continue
        below = os.path.join(here, name)
        if below == "/proc":
            raise UnnamedError
        try:
            target = os.readlink(below)
        except OSError:  # It is no link, or not there.
            here = below
            continue
        links += 1
        if links > _MOST_LINKS:
            raise UnnamedError
        if target.startswith("/"):
            here = "/"
        rest += reversed(target.split("/"))
    return here


def settled(store: Any) -> Any:
    """The same store, or one like it that goes by the path to which that of this one leads now.

    A link may lead elsewhere later, and the process may go to another folder.

    Parameters
    ----------
    store : Store
        Any store. Those of which the path is as it should be, or cannot be changed, are returned themselves.
    """
    return ask(lambda: _settled(store)) or store


def is_settled(store: Store) -> bool:
    """Whether what a store without wrappers reads is where its path leads, wherever that leads later; true of one without a path.

    Raises
    ------
    Exception
        If that cannot be told.
    """
    path = _path_of(store)
    if path is None:
        return True
    if isinstance(store, ZipStore) and (file := _open_file(store)) is not None:
        # One that is open reads what the path led to when it was opened.
        return os.path.samestat(os.fstat(file), os.stat(path))
    return real_path(path) == path


def _settled(store: Any) -> Any:
    found = layers(store)
    inner = found[-1]
    path = _path_of(inner)
    if path is None or not all(is_transparent(wrapper) for wrapper in found[:-1]):
        return None
    fsspec = isinstance(inner, FsspecStore)
    real = real_path(inner.fs._strip_protocol(path) if fsspec else path)
    if real == path or (changed := _by(inner, real)) is None:
        return None
    inner = _like(inner, changed)
    for wrapper in reversed(found[:-1]):
        inner = _like(wrapper, {"_store": inner})
    return inner


def _by(store: Any, path: str) -> dict[str, Any] | None:
    """The attributes of a store without wrappers that goes by another path; None where it cannot."""
    kind = type(store)
    if kind is LocalStore:
        return {"root": Path(path)}
    if kind is ZipStore:
        return {"path": Path(path)} if _open_file(store) is None else None
    if kind is FsspecStore:
        return {"path": path}
    if kind is ObjectStore:
        # It stays where its path has led when it was made, and does not tell where that is.
        _, options = store.store.__getnewargs_ex__()
        return {"store": type(store.store)(path, **options)}
    return None


def _path_of(store: Any) -> str | None:
    """The path on a local disk by which a store without wrappers goes, as it is."""
    if isinstance(store, LocalStore):
        return str(store.root)
    if isinstance(store, ZipStore):
        path: Any = store.path
        return None if path is None else str(path)
    if isinstance(store, FsspecStore):
        return str(store.path).rstrip("/") or "/" if protocol_of(store.fs) == "file" else None
    if isinstance(store, ObjectStore) and type(bucket := bucket_of(store)).__name__ == "LocalStore":
        return str(bucket.prefix or "/")
    return None


def _open_file(store: Any) -> int | None:
    """The open file of an archive; None while it has none."""
    file = getattr(getattr(store, "_zf", None), "fp", None) if store._is_open else None
    return None if file is None else int(file.fileno())


def _like(store: Any, changed: dict[str, Any]) -> Any:
    """A store that shares all with this one but what is changed."""
    found = object.__new__(type(store))
    vars(found).update({**vars(store), **changed})
    return found
