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
        If it leads through ``/proc``, where a link may lead to files that no path of this process names, or
        by ``..`` out of a folder that is not there.
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
            # Above what is not there is nothing either, to the system.
            if not os.path.isdir(here):
                raise UnnamedError
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
        Any store. Only a `LocalStore`, or a local `FsspecStore`, of which the path is not as it should be is replaced:
        it has nothing but its path. An archive has an open file, which is to have one writer, and a store of obstore
        stays where its path has led when it was made.
    """
    return ask(lambda: _settled(store)) or store


def is_settled(store: Store) -> bool:
    """Whether what a store without wrappers reads is where its path leads now; true of one without a path.

    Raises
    ------
    Exception
        If that cannot be told.
    """
    path = _path_of(store)
    if path is None:
        return True
    real = real_path(path)
    if isinstance(store, ZipStore):
        # One that is open reads what the path led to when it was opened.
        file = _open_file(store)
        return file is None or os.path.samestat(os.fstat(file), os.stat(path))
    return isinstance(store, ObjectStore) or real == path


def _settled(store: Any) -> Any:
    found = layers(store)
    inner = found[-1]
    path = _path_of(inner)
    if path is None or not all(is_transparent(wrapper) for wrapper in found[:-1]):
        return None
    if type(inner) is LocalStore:
        real = real_path(path)
        changed: dict[str, Any] = {"root": Path(real)}
    elif type(inner) is FsspecStore:
        real = real_path(inner.fs._strip_protocol(path))
        changed = {"path": real}
    else:
        return None
    if real == path:
        return None
    inner = _like(inner, changed)
    for wrapper in reversed(found[:-1]):
        inner = _like(wrapper, {"_store": inner})
    return inner


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
