"""Where a store keeps its values."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, ZipStore

from zcache._source import client_options, endpoints
from zcache._source.answers import UnnamedError, ask
from zcache._source.folders import folders_overlap
from zcache._source.sessions import number_of
from zcache._source.urls import web_address, without_query, without_user

if TYPE_CHECKING:
    from collections.abc import Hashable

_TRANSPARENT: Final = frozenset(
    {
        ("zarr.storage._wrapper", "WrapperStore"),
        ("zarr.storage._logging", "LoggingStore"),
        ("zarr.testing.store", "LatencyStore"),
        ("zarr.experimental.cache_store", "CacheStore"),
        ("zcache.store", "CacheStore"),
    }
)
"""Wrappers that show what they wrap, by the same names. A subclass may be anything."""
_FILESYSTEMS: Final = {
    ("fsspec.implementations.local", "LocalFileSystem"): "file",
    ("fsspec.implementations.memory", "MemoryFileSystem"): "memory",
    ("fsspec.implementations.dirfs", "DirFileSystem"): "dir",
    ("fsspec.implementations.http", "HTTPFileSystem"): "http",
    ("s3fs.core", "S3FileSystem"): "s3",
    ("gcsfs.core", "GCSFileSystem"): "gs",
    ("gcsfs.extended_gcsfs", "ExtendedGcsFileSystem"): "gs",
    ("adlfs.spec", "AzureBlobFileSystem"): "az",
}
_ASYNC_WRAPPER: Final = ("fsspec.implementations.asyn_wrapper", "AsyncFileSystemWrapper")
_OBSTORE: Final = frozenset({"obstore.store", "obstore._store"})
_WHOLE: Final = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "http", "https", "memory"}
)
"""Protocols of stores of objects, which show a value as a whole or not at all."""


class Location(NamedTuple):
    """Where a store keeps its values.

    Attributes
    ----------
    root : str
        What kind of place it is, such as ``s3://``.
    path : str
        Where below the root. Names of values follow after a slash.
    endpoint : str, optional
        The server or account that is asked. None is the only one, or the one that all ask by default.
    """

    root: str
    path: str
    endpoint: str | None = None

    def __str__(self) -> str:
        if self.root == "file://":
            return f"{self.root}{self.path}"
        # So that no path looks like another one with an endpoint.
        path = self.path.replace("%", "%25").replace(" ", "%20")
        return f"{self.root}{path}" + (f" at {self.endpoint}" if self.endpoint else "")

    @classmethod
    def parse(cls, text: str) -> Location | None:
        """The one that is shown so, or None."""
        root, mark, path = text.partition("://")
        if not mark:
            return None
        if root == "file":
            return cls("file://", path) if path.startswith("/") else None
        path, _, endpoint = path.partition(" at ")
        return cls(f"{root}://", path.replace("%20", " ").replace("%25", "%"), endpoint or None)

    def overlaps(self, other: Location) -> bool:
        """Whether both are the same place, or one of them is inside the other, as their paths say; see `places_overlap`."""
        if (self.root, self.endpoint) != (other.root, other.endpoint):
            return False
        mine, theirs = self.below(), other.below()
        return mine.startswith(theirs) or theirs.startswith(mine)

    def below(self, name: str = "") -> str:
        """What paths below a name in this place begin with: the path of that and a slash; nothing at the root."""
        path = f"{self.path}/{name}".strip("/")
        return f"{path}/" if path else ""


# ------------------------------------------------------------------------------- wrappers


def innermost(store: Any) -> Any:
    """The store below all wrappers and caches."""
    return layers(store)[-1]


def unwrapped(store: Any) -> Any:
    """The store below those wrappers and caches that certainly show what they wrap."""
    found = layers(store)
    return next((layer for layer in found if not is_transparent(layer)), found[-1])


def is_transparent(wrapper: Any) -> bool:
    """Whether a wrapper certainly shows what it wraps."""
    return kind_of(wrapper) in _TRANSPARENT


def layers(store: Any) -> list[Any]:
    """A store, what it wraps, and so on."""
    found = [store]
    # Nothing forbids a wrapper to wrap itself.
    while (inner := _wrapped(found[-1])) is not None and not any(inner is one for one in found):
        found.append(inner)
    return found


def _wrapped(store: Any) -> Store | None:
    inner = ask(lambda: getattr(store, "_store", None))
    return inner if isinstance(inner, Store) else None


def kind_of(thing: object) -> tuple[str, str]:
    """Module and name of the exact class of a thing."""
    kind = type(thing)
    return kind.__module__, kind.__qualname__


# ------------------------------------------------------------------------------- locations


def location_of(store: Any, *, asks: bool = True) -> Location | None:
    """Where a store keeps its values, wrapped or not; None where that is not certain.

    Parameters
    ----------
    store : Store
        Any store. Of wrappers that change names it is the place of all that they can show.
    asks : bool, optional
        Whether the volume is asked where links lead, and waited for. Default is True.
    """
    return ask(lambda: _settled(_location(innermost(store)), asks))


def naming_location(store: Any) -> Location | None:
    """The location of a store, if nothing else selects which data it shows; see `client_options`."""
    return location_of(store) if ask(lambda: _check_options(innermost(store))) else None


def _check_options(store: Any) -> bool:
    if isinstance(store, FsspecStore):
        filesystem, _ = _below_folders(store.fs, store.path)
        client_options.check_filesystem(protocol_of(filesystem), filesystem)
    elif (bucket := bucket_of(store)) is not None:
        client_options.check_bucket(bucket)
    return True


def _settled(location: Location | None, asks: bool) -> Location | None:
    if location is None or location.root != "file://":
        return location
    settle = os.path.realpath if asks else os.path.abspath
    return location._replace(path=settle(location.path))


def _location(store: Any) -> Location | None:
    """Where a store says that it keeps its values."""
    if isinstance(store, LocalStore):
        return _directory(store.root)
    if isinstance(store, ZipStore):
        # One over an open file has no path.
        path: Any = store.path
        return None if path is None else _directory(path)
    if isinstance(store, FsspecStore):
        return _in_filesystem(store.fs, store.path)
    if (bucket := bucket_of(store)) is not None:
        return _in_bucket(bucket)
    return None


def _directory(path: object) -> Location:
    return Location("file://", str(path))


def protocol_of(filesystem: Any) -> str | None:
    """What is known of a file system, by its exact class; None of those of others."""
    return _FILESYSTEMS.get(kind_of(synchronous(filesystem)))


def synchronous(filesystem: Any) -> Any:
    """The file system itself, without what gives it coroutines."""
    return filesystem.sync_fs if kind_of(filesystem) == _ASYNC_WRAPPER else filesystem


def _below_folders(filesystem: Any, path: str) -> tuple[Any, str]:
    """The file system below those that only show a folder of it, and what it calls a path."""
    filesystem = synchronous(filesystem)
    while protocol_of(filesystem) == "dir":
        path = f"{filesystem.path}/{path}".rstrip("/")
        filesystem = synchronous(filesystem.fs)
    return filesystem, path


def protocol_below(store: Any) -> str | None:
    """What is known of the file system that a store of fsspec reads, below those that only show a folder of it."""
    return protocol_of(_below_folders(store.fs, store.path)[0])


def _in_filesystem(filesystem: Any, path: str) -> Location | None:
    filesystem, path = _below_folders(filesystem, path)
    protocol = protocol_of(filesystem)
    if protocol == "file":
        # It may begin with a tilde.
        return _directory(filesystem._strip_protocol(path))
    if protocol == "http":
        return _web(path.rstrip("/"))
    if protocol == "s3":
        return Location("s3://", _key(path), endpoints.of_s3fs(filesystem))
    if protocol == "gs":
        return Location("gs://", _key(path), endpoints.of_gcsfs(filesystem))
    if protocol == "az":
        return Location("az://", _key(path), endpoints.of_adlfs(filesystem))
    return None


def _key(path: str) -> str:
    """A path within a store of objects, of which the first part is the bucket."""
    key = path.strip("/")
    # These may be part of a key, or the version of an object: there is no telling.
    if not key or any(mark in key for mark in ("://", "?", "#")):
        raise UnnamedError
    # The client asks for all of it, and a name holds no secret.
    if without_user(key) != key:
        raise UnnamedError
    return key


def _web(url: object) -> Location:
    scheme, place = web_address(url)
    return Location(f"{scheme}://", place)


def bucket_of(store: Any) -> Any:
    """The object of obstore that a store reads from, or None."""
    if not isinstance(store, ObjectStore):
        return None
    inner = store.store
    return inner if type(inner).__module__ in _OBSTORE else None


def _in_bucket(bucket: Any) -> Location | None:
    kind = type(bucket).__name__
    if kind == "LocalStore":
        return _directory(bucket.prefix or "/")
    if kind == "HTTPStore":
        # A slash at the end stays, and another one follows.
        return _web(without_query(bucket.url))
    if kind not in ("S3Store", "GCSStore", "AzureStore"):
        return None
    made = endpoints.settings(bucket)
    if kind == "S3Store":
        root, endpoint = "s3://", endpoints.of_obstore_s3(made)
        name = endpoints.setting(made, "bucket", "AWS_BUCKET", "AWS_BUCKET_NAME")
    elif kind == "GCSStore":
        root, endpoint = "gs://", endpoints.of_obstore_google(made)
        name = endpoints.setting(made, "bucket", "GOOGLE_BUCKET", "GOOGLE_BUCKET_NAME")
    else:
        root, endpoint = "az://", endpoints.of_obstore_azure(made)
        name = endpoints.setting(made, "container_name", "AZURE_CONTAINER_NAME")
    return Location(root, _key(f"{name or ''}/{bucket.prefix or ''}"), endpoint) if name else None


# ------------------------------------------------------------------------------- in this process


def held_by(store: Any) -> tuple[Hashable, ...]:
    """What two stores have in common if they hold the same values, as long as one of them lives.

    Parameters
    ----------
    store : Store
        A store without wrappers; see `unwrapped`.
    """
    return ask(lambda: _held(store)) or ("store", id(store))


def _held(store: Any) -> tuple[Hashable, ...]:
    module, name = kind_of(store)
    if module.startswith("zarr.storage."):
        if isinstance(store, MemoryStore):
            # Copies of one with another setting share the dict.
            return "dict", id(store._store_dict), _path_in(store)
        if name == "ObjectStore":
            return "bucket", id(store.store)
        if name == "FsspecStore":
            filesystem, path = _below_folders(store.fs, store.path)
            if protocol_of(filesystem) == "memory":
                return "dict", id(filesystem.store), filesystem._strip_protocol(path).strip("/")
            if protocol_of(filesystem) == "file":
                path = os.path.realpath(filesystem._strip_protocol(path))
            return "filesystem", id(filesystem), path.rstrip("/")
    if (module, name) == ("icechunk.store", "IcechunkStore"):
        return "session", number_of(store)
    return "store", id(store)


def values_of(store: Any) -> tuple[Hashable, ...] | None:
    """What holds the values of a store that go along with its pickle, here; None where a copy reads what all others read.

    A dict, or a session of icechunk that can be written: what is done to the one is not seen in copies elsewhere.
    """
    return ask(lambda: _values_of(innermost(store)))


def _values_of(store: Any) -> tuple[Hashable, ...] | None:
    if isinstance(store, MemoryStore):
        return "dict", id(store._store_dict)
    is_session = kind_of(store) == ("icechunk.store", "IcechunkStore")
    return held_by(store) if is_session and not store.session.read_only else None


def _path_in(store: Any) -> str:
    """Where in its dict a store in memory keeps its values."""
    path = getattr(store, "path", "")
    return path if isinstance(path, str) else ""


def place_in_process(store: Any) -> tuple[Hashable, ...]:
    """What two stores that keep their values in the same place, by the same names, have in common here.

    Parameters
    ----------
    store : Store
        Any store.

    Returns
    -------
    tuple
        Equal to that of another store for certain only while both live: it may hold the address of one.
    """
    if type(store) is LocalStore:
        return "file", os.path.realpath(str(store.root))
    if (memory := memory_store_of(store)) is not None:
        return "dict", id(memory._store_dict), ""
    inner = unwrapped(store)
    if type(inner).__module__.startswith("zarr.storage."):
        if isinstance(inner, ZipStore):
            # Its values are in the file, not below a directory of that name.
            path = zip_path(inner)
            return ("store", id(inner)) if path is None else ("zip", path)
        if (location := naming_location(inner)) is not None:
            return "location", *location
    return held_by(inner)


def zip_path(store: Any) -> str | None:
    """The real path of an archive; None of one over an open file."""
    return None if store.path is None else os.path.realpath(str(store.path))


def overlaps(one: Any, other: Any) -> bool:
    """Whether two stores keep their values in the same place, or one inside the other's."""
    if one is other:
        return True
    return places_overlap(location_here(one), location_here(other))


def places_overlap(one: Location, other: Location) -> bool:
    """Whether two places are the same, or one of them is inside the other, by whatever paths: folders may be mounted twice."""
    if one.overlaps(other):
        return True
    return one.root == other.root == "file://" and folders_overlap(one.path, other.path)


def location_here(store: Any, *, asks: bool = True) -> Location:
    """Where a store keeps its values, be it in the memory of this process; see `location_of`."""
    store = innermost(store)
    if (location := location_of(store, asks=asks)) is not None:
        return location
    if isinstance(store, MemoryStore):
        return Location(f"dict {id(store._store_dict)}:", _path_in(store))
    return location_held(held_by(store))


def location_held(held: tuple[Hashable, ...]) -> Location:
    """Where in this process what `held_by` tells is kept."""
    kind, number, *path = held
    return Location(f"{kind} {number}:", str(path[0]) if path else "")


# ------------------------------------------------------------------------------- kinds of places


def memory_store_of(store: Any) -> MemoryStore | None:
    """The store in memory with the dict that has the keys of this one, wrapped or not."""
    inner = unwrapped(store)
    return inner if isinstance(inner, MemoryStore) and not _path_in(inner) else None


def outlives_process(store: Any) -> bool:
    """Whether what a store holds may be there in the next process; a class of a user's own may do either."""
    inner = innermost(store)
    known = any(base.__module__.startswith("zarr.storage.") for base in type(inner).__mro__)
    return known and not isinstance(inner, MemoryStore)


def shows_partial_values(store: Any) -> bool:
    """Whether a value that is being written, or never was to the end, is seen like another."""
    inner = innermost(store)
    if not isinstance(inner, FsspecStore):
        return False
    protocol = getattr(inner.fs, "protocol", "")
    if not isinstance(protocol, str):
        protocol = next(iter(protocol or ()), "")
    return protocol not in _WHOLE
