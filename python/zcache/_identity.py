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
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from zarr.abc.store import Store
from zarr.storage import LocalStore, MemoryStore, ZipStore

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSIENT: Final = "process:"
"""Beginning of the name of a source that ends with its process."""

# Reentrant, for inside it the garbage collector may forget a store.
_lock = threading.RLock()
_Nameless: TypeAlias = tuple[int, str, tuple[str, ...]]
_names: dict[_Nameless, tuple[str, set[int]]] = {}

_BY_PATH: Final = frozenset({"s3", "s3a", "gs", "gcs", "http", "https"})
"""Protocols whose path names the place. Of others the host, the archive or the list of references is
among the options of the file system."""
_LOCAL: Final = frozenset({"file", "local"})
_SECRET: Final = re.compile(
    "(^|_)((api|access|account|ssh)?key|secret|token|passw(or)?d|passphrase|credentials?|auth(orization)?"
    "|sas|signature)(_|$)",
    re.IGNORECASE,
)
_IN_MEMORY: Final = re.compile('"(target_|remote_)?protocol": *"memory"')
# By the number of the store.
_first_said: dict[int, str] = {}
# Lists of references may be long.
_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_S3: Final = frozenset({"s3", "s3a"})
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
        mine, theirs = (f"{p}/" if (p := s.path.rstrip("/")) else "" for s in (self, other))
        return mine.startswith(theirs) or theirs.startswith(mine)


def innermost(store: Any) -> Any:
    """The store below all wrappers and caches."""
    while isinstance(inner := getattr(store, "_store", None), Store):
        store = inner
    return store


def outlives_process(store: Any) -> bool:
    """Whether what a store holds, one without wrappers, may be there in the next process."""
    # Of a user's own nobody knows.
    known = any(base.__module__.startswith("zarr.storage.") for base in type(store).__mro__)
    return known and not isinstance(store, MemoryStore)


def in_memory(store: Any) -> MemoryStore | None:
    """The store in memory whose dict has the keys of this one, wrapped or not."""
    kept = innermost(store)
    if not isinstance(kept, MemoryStore) or _path_in(kept):
        return None
    said = (view for view in _views(store) if view is not kept and _has_text(type(view)))
    return None if any(said) else kept


def shows_halves(store: Any) -> bool:
    """Whether a value that is being written, or never was to the end, is seen like another."""
    return _is_fsspec(store) and _protocol(store.fs) not in _WHOLE


def identify(store: Any) -> str | None:
    """Name a source, or None where its contents do not outlive the process, or nobody can tell.

    The name holds no credentials: everybody may read it, and they may change.
    """
    inner = innermost(store)
    # One that only compares may show anything.
    said: list[str | None] = [
        _stable(view) if _has_text(type(view)) else None for view in _views(store)
    ]
    said.append(_name(inner))
    # The same text twice is that of a store of the user's own.
    parts = [part for part in dict.fromkeys(said) if part is not None]
    return None if None in said else _without_credentials(" of ".join(parts))


def _without_credentials(name: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", name)


def _views(store: Any) -> list[Any]:
    """What the user's own classes, wrappers or not, say that they show, outermost first.

    Those that say nothing of their own are taken to show what they wrap.
    """
    views = []
    while isinstance(store, Store):
        if _has_text(type(store)) or not _inherits(type(store), "__eq__"):
            views.append(store)
        store = getattr(store, "_store", None)
    return views


def _has_text(kind: type) -> bool:
    """Whether the text of such a store is one that the user has given it."""
    if not _inherits(kind, "__str__"):
        return True
    plain: object = kind.__str__
    return plain is object.__str__ and not _inherits(kind, "__repr__")


def _texts(store: Any) -> tuple[str, ...]:
    """What they say, in this process. One that only compares is like no other."""
    return tuple(
        _text(view) if _has_text(type(view)) else _first(view, lambda: uuid.uuid4().hex)
        for view in _views(store)
    )


def _text(view: Any) -> str:
    kind = type(view)
    return f"{kind.__module__}.{kind.__qualname__}:{_said(view) if _has_text(kind) else ''}"


def _said(store: Any) -> str:
    """The text of a store, as it was when it was first asked: it may tell its state, a count say."""
    return _first(store, lambda: str(store))


def _first(store: Any, say: Callable[[], str]) -> str:
    """What was said of a store first; its number alone may be another one's once it is gone."""
    number = id(store)
    with _lock:
        if (known := _first_said.get(number)) is not None:
            return known
    text = ""
    with contextlib.suppress(Exception):  # Whatever it raises, it says nothing.
        text = say()
    with _lock, contextlib.suppress(TypeError):  # One that knows no weak references is asked anew.
        weakref.finalize(store, _first_said.pop, number, None).atexit = False
        _first_said[number] = text
    return text


def _inherits(kind: type, method: str) -> bool:
    """Whether this method is one of zarr's wrappers, or of any object."""
    module = getattr(getattr(kind, method), "__module__", None) or "builtins"
    return module.partition(".")[0] in ("builtins", "zarr", "zcache")


def _stable(store: Any) -> str | None:
    text, kind = _said(store), type(store).__name__
    # The address of an object, or its number, is not the same twice; and its class alone says nothing.
    if re.search(r"0x[0-9a-f]{6,}|\d{9,}", text) or not re.search(r"\w", text.replace(kind, "")):
        return None
    return f"{kind}:{text}"


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
        path = _path_of(store)
        return None if path is None else f"zip://{os.path.realpath(path)}"
    if (place := _place(store)) is not None:
        return str(place)
    if _is_fsspec(store):
        return _digest(store)
    inner = _obstore(store)
    return None if inner is None or type(inner).__name__ == "MemoryStore" else _repr_of(inner)


def _path_of(archive: Any) -> str | None:
    # One over an open file has none.
    return None if archive.path is None else str(archive.path)


def _place(store: Any) -> Place | None:
    """Where a store keeps its values, where that can be told."""
    if isinstance(store, LocalStore):
        return _directory(store.root)
    if isinstance(store, ZipStore):
        path = _path_of(store)
        return None if path is None else _directory(path)
    if _is_fsspec(store):
        filesystem, within = store.fs, str(store.path)
        while _protocol(filesystem) == "dir":
            filesystem = getattr(filesystem, "sync_fs", filesystem)
            within, filesystem = f"{filesystem.path}/{within}", filesystem.fs
        protocol = _protocol(filesystem)
        if protocol in _LOCAL:
            return _directory(within)
        options = dict(getattr(filesystem, "storage_options", None) or {})
        options.update(options.get("client_kwargs") or {})
        if protocol in _AZURE:
            endpoint = options.get("account_name")
        elif protocol in _BY_PATH:
            endpoint = options.get("endpoint_url") or getattr(filesystem, "endpoint_url", None)
            if protocol in _S3:
                endpoint = endpoint or _s3_endpoint()
        else:
            return None
        if protocol in _AZURE and not endpoint:
            return None
        path = _without_credentials(within).removeprefix(f"{protocol}://").rstrip("/")
        return Place(f"{protocol}://", path, endpoint and _without_credentials(str(endpoint)))
    inner = _obstore(store)
    if type(inner).__name__ == "LocalStore":
        return _directory(inner.prefix or "/")
    config: Any = getattr(inner, "config", None)
    if type(inner).__name__ == "S3Store" and hasattr(config, "get") and config.get("bucket"):
        path = f"{config['bucket']}/{inner.prefix or ''}".rstrip("/")
        endpoint = config.get("endpoint") or os.environ.get("AWS_ENDPOINT") or _s3_endpoint()
        return Place("s3://", path, endpoint and _without_credentials(str(endpoint)))
    return None


def _s3_endpoint() -> str | None:
    """The server that is asked where none is given."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


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
    inner = innermost(store)
    # Copies of a MemoryStore with another setting share the dict, which knows no weak references:
    # its name is good as long as one of the stores lives.
    number = id(inner._store_dict if isinstance(inner, MemoryStore) else inner)
    key = (number, _path_in(inner), _texts(store))
    with _lock:
        name, holders = _names.setdefault(key, (f"{TRANSIENT}{uuid.uuid4().hex}", set()))
        if id(inner) not in holders:
            holders.add(id(inner))
            weakref.finalize(inner, _forget, key, id(inner))
        return name


def _path_in(store: Any) -> str:
    """Where in its dict a store in memory keeps its values."""
    path = getattr(store, "path", "") if isinstance(store, MemoryStore) else ""
    return path if isinstance(path, str) else ""


def _forget(key: _Nameless, holder: int) -> None:
    with _lock:
        _, holders = _names.get(key, ("", set()))
        holders.discard(holder)
        if not holders:
            _names.pop(key, None)


def after_fork() -> None:
    """Start with a lock of our own."""
    global _lock
    _lock = threading.RLock()


def overlap(one: Any, other: Any) -> bool:
    """Whether two stores keep their values in the same place, or one inside the other's."""
    one, other = innermost(one), innermost(other)
    mine, theirs = _place_here(one), _place_here(other)
    if mine is not None and theirs is not None:
        return mine.overlaps(theirs)
    return _same(one, other)


def _place_here(store: Any) -> Place | None:
    """Where a store without wrappers keeps its values, in this process."""
    if isinstance(store, MemoryStore):
        return Place(f"dict {id(store._store_dict)}:", _path_in(store))
    if _is_fsspec(store) and _protocol(store.fs) == "memory":
        return Place("memory://", str(store.fs._strip_protocol(store.path)))
    inner = _obstore(store)
    if type(inner).__name__ == "MemoryStore":
        return Place(f"obstore {id(inner)}:", "")
    return _place(store)


class Named(NamedTuple):
    """A source, its name, and whether the user has given it that."""

    store: Any
    name: str
    given: bool


def same_source(one: Named, other: Named) -> bool:
    """Whether two sources show the same values."""
    same_name = one.name == other.name
    if same_name and (one.given or other.given):
        return True
    if one.given and other.given:
        return False
    mine, theirs = _views(one.store), _views(other.store)
    if len(mine) != len(theirs) or not all(map(_alike, mine, theirs)):
        return False
    return same_name or _same(innermost(one.store), innermost(other.store))


def _alike(one: Any, other: Any) -> bool:
    """Whether two stores of the user's own say the same of what they show."""
    if one is other:
        return True
    if _inherits(type(one), "__eq__"):
        return _text(one) == _text(other)
    return type(one) is type(other) and _equal(one, other)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    # Not whether they are equal: one that is read only differs from one that is not.
    mine, theirs = _place_of(one), _place_of(other)
    if mine is not None or theirs is not None:
        return mine == theirs
    return type(one) is type(other) and _equal(one, other)


def _place_of(store: Any) -> str | None:
    place = _place_here(store)
    return name_of_place(store) if place is None else str(place)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - of stores that cannot be compared nobody knows that they are one
        return False


def place_in_process(store: Any) -> tuple[str | int, ...]:
    """What two stores that keep their values in the same place, by the same names, have in common here."""
    kept = innermost(store)
    place = _place_of(kept)
    if place is None and (inner := _obstore(kept)) is not None:
        place = f"obstore {id(inner)}"
    views = (view for view in _views(store) if view is not kept)
    said = tuple(_text(view) for view in views if _has_text(type(view)))
    return (id(kept) if place is None else place, *said)
