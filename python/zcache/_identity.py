"""Which source a cache belongs to, and whether two stores keep their values in the same place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, ZipStore

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSIENT: Final = "process:"
"""Beginning of the name of a source that ends with its process."""

# Reentrant, for inside it the garbage collector may forget a store.
_lock = threading.RLock()
_names: dict[int, tuple[str, set[int]]] = {}

_BY_PATH: Final = frozenset({"s3", "s3a", "gs", "gcs", "http", "https"})
"""Protocols whose path names the place. Of others the host, the archive or the list of references is
among the options of the file system."""
_LOCAL: Final = frozenset({"file", "local"})
_SECRET: Final = re.compile(
    "key|secret|token|passw|passphrase|credential|auth|sas|signature", re.IGNORECASE
)
_IN_MEMORY: Final = re.compile('"(target_|remote_)?protocol": *"memory"')
# Lists of references may be long.
_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_AZURE: Final = frozenset({"abfs", "abfss", "az", "adl"})
_WHOLE: Final = _BY_PATH | _AZURE | {"memory"}
"""Protocols of stores of objects, which show a value as a whole or not at all."""


class Place(NamedTuple):
    """Where a store keeps its values: at a path below a root, and perhaps of one server among many."""

    root: str
    path: str
    endpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.root}{self.path}" + (f" at {self.endpoint}" if self.endpoint else "")

    def overlaps(self, other: Place) -> bool:
        """Whether both are the same place, or one of them is inside the other."""
        if (self.root, self.endpoint) != (other.root, other.endpoint):
            return False
        mine, theirs = f"{self.path.rstrip('/')}/", f"{other.path.rstrip('/')}/"
        return mine.startswith(theirs) or theirs.startswith(mine)


def innermost(store: Any) -> Any:
    """The store below all wrappers and caches."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    return store


def outlives_process(store: Any) -> bool:
    """Whether what a store holds, one without wrappers, may be there in the next process."""
    # Of a user's own nobody knows.
    return any(base.__module__.startswith("zarr.storage.") for base in type(store).__mro__)


def shows_halves(store: Any) -> bool:
    """Whether a value that is being written, or never was to the end, is seen like another."""
    return _is_fsspec(store) and _protocol(store.fs) not in _WHOLE


def identify(store: Any) -> str | None:
    """Name a source, or None where its contents do not outlive the process, or nobody can tell.

    The name holds no credentials: everybody may read it, and they may change.
    """
    name = next(_said(store), None) or _name(innermost(store))
    return None if name is None else _without_credentials(name)


def _without_credentials(name: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", name)


def _said(store: Any) -> Iterator[str]:
    """What wrappers of the user's own say of themselves: they may change keys or bytes."""
    for wrapper in _wrappers(store):
        if not _inherits(type(wrapper), "__str__"):
            text = _stable(wrapper)
            if text is not None:
                yield text


def _wrappers(store: Any) -> Iterator[Any]:
    """The wrappers around a store, without those that show what they wrap."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        if type(store).__module__.partition(".")[0] not in ("zarr", "zcache"):
            yield store
        store = inner


def _inherits(kind: type, method: str) -> bool:
    """Whether this method is one of zarr's wrappers, or of any object."""
    module = getattr(getattr(kind, method), "__module__", None) or "builtins"
    return module.partition(".")[0] in ("builtins", "zarr", "zcache")


def _stable(store: Any) -> str | None:
    try:
        text = str(store)
    except Exception:  # noqa: BLE001 - whatever it raises, it says nothing
        return None
    # The address of an object, or its number, is not the same twice.
    return None if re.search(r"0x[0-9a-f]{6,}|\d{9,}", text) else f"{type(store).__name__}:{text}"


def _name(store: Any) -> str | None:
    name = name_of_place(store)
    if name is None and not (
        isinstance(store, MemoryStore) or _is_fsspec(store) or _obstore(store)
    ):
        name = _stable(store)
    return name


def name_of_place(store: Any) -> str | None:
    """A name that no two places have, of a store without wrappers; None where there is none."""
    if isinstance(store, ZipStore):
        return f"zip://{os.path.realpath(str(store.path))}"
    if (place := _place(store)) is not None:
        return str(place)
    if _is_fsspec(store):
        return _digest(store)
    inner = _obstore(store)
    return None if inner is None or type(inner).__name__ == "MemoryStore" else _repr_of(inner)


def _place(store: Any) -> Place | None:
    """Where a store keeps its values, where that can be told."""
    if isinstance(store, LocalStore):
        return _directory(store.root)
    if isinstance(store, ZipStore):
        return _directory(store.path)
    if _is_fsspec(store):
        protocol = _protocol(store.fs)
        if protocol in _LOCAL:
            return _directory(store.path)
        options = dict(getattr(store.fs, "storage_options", None) or {})
        options.update(options.get("client_kwargs") or {})
        if protocol in _AZURE:
            endpoint = options.get("account_name")
        elif protocol in _BY_PATH:
            endpoint = options.get("endpoint_url") or getattr(store.fs, "endpoint_url", None)
        else:
            return None
        if protocol in _AZURE and not endpoint:
            return None
        path = _without_credentials(str(store.path)).removeprefix(f"{protocol}://").rstrip("/")
        return Place(f"{protocol}://", path, endpoint and _without_credentials(str(endpoint)))
    inner = _obstore(store)
    if type(inner).__name__ == "LocalStore":
        return _directory(inner.prefix or "/")
    config: Any = getattr(inner, "config", None)
    if type(inner).__name__ == "S3Store" and hasattr(config, "get") and config.get("bucket"):
        path = f"{config['bucket']}/{inner.prefix or ''}".rstrip("/")
        endpoint = config.get("endpoint")
        return Place("s3://", path, endpoint and _without_credentials(str(endpoint)))
    return None


def _directory(path: object) -> Place:
    return Place("file://", os.path.realpath(str(path)))


def _is_fsspec(store: Any) -> bool:
    return hasattr(store, "path") and bool(_protocol(getattr(store, "fs", None)))


def _protocol(filesystem: Any) -> str:
    """Name of the protocol of a file system; empty where it has none."""
    protocol = getattr(filesystem, "protocol", "")
    if not isinstance(protocol, str):
        protocol = next(iter(protocol or ()), "")
    return str(protocol)


def _digest(store: Any) -> str | None:
    """Name a file system by all that it was made with, of which anything may matter."""
    protocol = _protocol(store.fs)
    if protocol == "memory":
        return None
    filesystem = getattr(store.fs, "sync_fs", store.fs)
    made = None
    with contextlib.suppress(TypeError):  # One that has no hash is asked each time.
        made = _digests.get(filesystem)
    if made is None:
        try:
            made = _digest_of(filesystem.to_json())
        except Exception:  # noqa: BLE001 - not made of plain values, or whatever it raises: no name
            return None
        with contextlib.suppress(TypeError):
            _digests[filesystem] = made
    path = str(store.path).removeprefix(f"{protocol}://").rstrip("/")
    return f"{protocol}://{path} of {made}" if made else None


def _digest_of(made: str) -> str:
    """A digest of what a file system was made with; empty where that ends with the process."""
    if _IN_MEMORY.search(made):
        return ""
    text = json.dumps(_without_secrets(json.loads(made)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _without_secrets(made: dict[str, Any]) -> dict[str, Any]:
    """What a file system was made with, without what says who asks: that may change from day to day."""
    kept = {name: value for name, value in made.items() if not _SECRET.search(name)}
    # Options of others in it; what else is a dict holds names of values.
    for name, value in kept.items():
        if isinstance(value, dict) and name.endswith(("options", "kwargs", "fs")):
            kept[name] = _without_secrets(value)
    return kept


def _obstore(store: Any) -> Any:
    """The object of obstore that a store reads from, or None."""
    inner = getattr(store, "store", None)
    return inner if type(inner).__module__.partition(".")[0] == "obstore" else None


def _repr_of(inner: Any) -> str:
    # Where it is may be in the configuration, as the server of an emulator is.
    config = dict(getattr(inner, "config", None) or {})
    made = sorted((name, str(value)) for name, value in _without_secrets(config).items())
    return f"{inner!r}" + (f" with {dict(made)}" if made else "")


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


def overlap(one: Any, other: Any) -> bool:
    """Whether two stores keep their values in the same place, or one inside the other's."""
    mine, theirs = _place(innermost(one)), _place(innermost(other))
    if mine is not None and theirs is not None:
        return mine.overlaps(theirs)
    return _same(innermost(one), innermost(other))


class Named(NamedTuple):
    """A source, its name, and whether the user has given it that."""

    store: Any
    name: str
    given: bool


def same_source(one: Named, other: Named) -> bool:
    """Whether two sources show the same values."""
    mine, theirs = one.store, other.store
    if one.name == other.name:
        return one.given or other.given or _same_view(mine, theirs)
    if one.given and other.given:
        return False
    return _same_view(mine, theirs) and _same(innermost(mine), innermost(theirs))


def _same_view(one: Any, other: Any) -> bool:
    for mine, theirs in zip(_wrappers(one), _wrappers(other), strict=False):
        kind = type(mine)
        if kind is type(theirs) and not _inherits(kind, "__eq__") and not _equal(mine, theirs):
            return False
    return True


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, MemoryStore) and isinstance(other, MemoryStore):
        return one._store_dict is other._store_dict
    # Not whether they are equal: one that is read only differs from one that is not.
    if (name := name_of_place(one)) is not None:
        return name == name_of_place(other)
    return type(one) is type(other) and _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - of stores that cannot be compared nobody knows that they are one
        return False


def place_in_process(store: Any) -> str | int:
    """What two stores without wrappers that keep their values in the same place have in common here."""
    if (name := name_of_place(store)) is not None:
        return name
    if (inner := _obstore(store)) is not None:
        return id(inner)
    if _is_fsspec(store) and _protocol(store.fs) == "memory":
        return f"memory://{store.path}"
    return id(store)
