"""Which source a cache belongs to: a name that says the same in every process."""

from __future__ import annotations

import os
import re
import threading
import uuid
import weakref
from pathlib import Path
from typing import Any, Final

from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, ZipStore

TRANSIENT: Final = "process:"
"""Beginning of the name of a source that ends with its process."""

# Reentrant, for inside it the garbage collector may forget a store.
_lock = threading.RLock()
_names: dict[int, tuple[str, set[int]]] = {}


def innermost(store: Any) -> Any:
    """The store below all wrappers and caches."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    return store


def identify(store: Any) -> str | None:
    """Name a source, or None where its contents do not outlive the process, or nobody can tell.

    The name holds no credentials: everybody may read it, and they may change.
    """
    name = _name(store)
    return None if name is None else re.sub(r"://[^/@\s]*@", "://", name)


def _name(store: Any) -> str | None:
    store = innermost(store)
    if isinstance(store, MemoryStore):
        return None
    if isinstance(store, LocalStore):
        return f"file://{os.path.realpath(store.root)}"
    if isinstance(store, ZipStore):
        return f"zip://{os.path.realpath(str(store.path))}"
    if hasattr(store, "fs") and hasattr(store, "path"):
        return _identify_fsspec(store)
    inner = getattr(store, "store", None)
    if type(inner).__module__.partition(".")[0] == "obstore":
        return _identify_obstore(inner)
    text = str(store)
    # The address of an object, or its number, is not the same twice.
    return None if re.search(r"0x[0-9a-f]{6,}|\d{9,}", text) else f"{type(store).__name__}:{text}"


def transient(store: Any) -> str:
    """Name a source that has no name outside its process: the same for the same data."""
    store = innermost(store)
    # Copies of a MemoryStore with another setting share the dict, which knows no weak references:
    # its name is good as long as one of the stores lives.
    number = id(store._store_dict if isinstance(store, MemoryStore) else store)
    with _lock:
        name, holders = _names.setdefault(number, (f"{TRANSIENT}{uuid.uuid4().hex}", set()))
        if id(store) not in holders:
            holders.add(id(store))
            weakref.finalize(store, _forget, number, id(store))
        return name


def _forget(number: int, holder: int) -> None:
    with _lock:
        _, holders = _names.get(number, ("", set()))
        holders.discard(holder)
        if not holders:
            _names.pop(number, None)


def after_fork() -> None:
    """Start with a lock of our own."""
    global _lock
    _lock = threading.RLock()


def _identify_fsspec(store: Any) -> str | None:
    filesystem = store.fs
    protocol = filesystem.protocol
    protocol = protocol if isinstance(protocol, str) else protocol[0]
    if protocol == "memory":
        return None
    options = dict(getattr(filesystem, "storage_options", None) or {})
    options.update(options.get("client_kwargs") or {})
    endpoint = options.get("endpoint_url") or getattr(filesystem, "endpoint_url", None)
    path = str(store.path).removeprefix(f"{protocol}://")
    return f"{protocol}://{path}" + (f" at {endpoint}" if endpoint else "")


def _identify_obstore(inner: Any) -> str | None:
    if type(inner).__name__ == "MemoryStore":
        return None
    config = getattr(inner, "config", None) or {}
    endpoint = config.get("endpoint") if hasattr(config, "get") else None
    return f"{inner!r}" + (f" at {endpoint}" if endpoint else "")


def same_place(one: Any, other: Any) -> bool:
    """Whether two stores keep their values in the same place, or one inside the other's."""
    one, other = innermost(one), innermost(other)
    if one is other:
        return True
    if isinstance(one, MemoryStore) and isinstance(other, MemoryStore):
        return one._store_dict is other._store_dict
    if isinstance(one, LocalStore) and isinstance(other, LocalStore):
        mine, theirs = (Path(os.path.realpath(store.root)) for store in (one, other))
        return mine.is_relative_to(theirs) or theirs.is_relative_to(mine)
    return type(one) is type(other) and bool(one == other)
