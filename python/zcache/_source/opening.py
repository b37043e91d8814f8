"""The store that a URL or a path stands for."""

from __future__ import annotations

import importlib
import os
import re
import stat
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, ObjectStore, StorePath, ZipStore

from zcache._source.answers import ask
from zcache._source.location import kind_of
from zcache._source.paths import absolute, expand_home
from zcache._source.settled import real_path
from zcache._source.urls import hide, links, redact, scheme_of, secrets_in
from zcache.exceptions import (
    MissingClientError,
    NoSuchSourceError,
    OptionTypeError,
    OptionValueError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*(://|::)", re.IGNORECASE)
"""How a URL begins, or a chain of them as fsspec writes it. Everything else is a path."""
_FILE: Final = re.compile(r"(file|local):(//)?", re.IGNORECASE)
_ZIP: Final = re.compile(r"zip:(//|:|//::)(?=[^:])")
_CLIENTS: Final = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}
"""The packages by which fsspec reads what obstore can read as well."""


def open_source(
    url: object,
    storage_options: object = None,
    *,
    read_only: bool | None = None,
    must_exist: bool = True,
) -> Store:
    """Make the store that a URL or a path stands for; no event loop is needed. Only of archives, and of references, is anything read yet.

    Parameters
    ----------
    url : str, PathLike or Store
        What zarr can open: a URL of fsspec or a chain of them, a local path with or without ``file://``, a zip
        file on a local disk; or a store, which is returned as it is, an `FSMap`, or a `StorePath` without a path. What lies on a local disk is a `LocalStore` or
        a `ZipStore`. Else fsspec's client is used where it is installed, and obstore where that is missing.
    storage_options : mapping of str, optional
        Options of that client. Default is None: none.
    read_only : bool, optional
        What the user asks for; the store itself is made as zarr makes it. Default is None: anything.
    must_exist : bool, optional
        Whether a path that does not exist is an error. Default is True.

    Raises
    ------
    OptionTypeError, OptionValueError
        `url` or `storage_options` cannot be what they are; no error shows a value of the options.
    NoSuchSourceError
        There is nothing at the path.
    MissingClientError
        The package is not installed that reads such URLs.
    """
    if _is_universal(url):
        path: Any = url
        options = {**path.storage_options, **_check_storage_options(storage_options)}
        storage_options, url = options, str(path)
        if "::" in url and _local_path(url, is_given=bool(options)) is None:
            return _open_remote(url, options, lambda: _open_chained(path, options))
    options = _check_storage_options(storage_options)
    url = _store_in(url)
    if isinstance(url, Store):
        _refuse_options(options, type(url).__name__)
        return url
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text:
        kind = OptionValueError if isinstance(text, str) else OptionTypeError
        raise kind(
            f'invalid url: {plain(text)}. Give a URL such as "s3://bucket/key", a path as text or PathLike, or a '
            "zarr.abc.store.Store."
        )
    path = _local_path(text, is_given=bool(options))
    if path is None:
        return _open_remote(text, options)
    _refuse_options(options, "a local path")
    return _open_path(path, read_only=read_only, must_exist=must_exist)


def _store_in(url: object) -> object:
    """The store that some objects of zarr and fsspec stand for; anything else as it is."""
    if kind_of(url) == ("fsspec.mapping", "FSMap"):
        return FsspecStore.from_mapper(url)
    if not isinstance(url, StorePath):
        return url
    if url.path:
        raise OptionValueError(
            f"invalid url: a StorePath to {url.path!r}. Give its store, as zcache.open(url.store), and the path to "
            "zarr or xarray, such as zarr.open(store, path=...)."
        )
    return url.store


def _local_path(text: str, *, is_given: bool) -> str | None:
    """The path on a local disk that a URL names, if it names one; with it a whole archive, as `ZipStore` writes it.

    Parameters
    ----------
    text : str
        The URL, or the path itself.
    is_given : bool
        Whether there are options, which may say where an archive is.
    """
    archive = None if is_given else _ZIP.match(text)
    path = _FILE.sub("", text[archive.end() :] if archive else text, count=1)
    is_chain = _URL.match(path) or (archive and "::" in path)
    return None if is_chain else path


def _is_universal(url: object) -> bool:
    """Whether it is a path of universal_pathlib, which brings its options along."""
    return isinstance(getattr(url, "storage_options", None), Mapping) and hasattr(url, "protocol")


def _check_storage_options(options: object) -> dict[str, Any]:
    if options is None:
        return {}
    if isinstance(options, Mapping) and all(isinstance(name, str) for name in options):
        return dict(options)
    # Not what it holds, which may be secret.
    raise OptionTypeError(
        f"invalid storage_options: {plain(options)}. Give a dict from the names of options of the "
        'client to their values, such as {"anon": True}, or None.'
    )


def plain(value: object) -> str:
    """What was given instead of something else: a value that can have no secrets, or only its type."""
    is_short = (
        value is None
        or isinstance(value, (bool, int, float))
        or (isinstance(value, str) and not value)
    )
    return repr(value) if is_short else type(value).__name__


def _refuse_options(options: dict[str, Any], what: str) -> None:
    if options:
        raise OptionTypeError(
            f"invalid storage_options: {_names(options)} for {what}, which has no client that could use them. "
            "Leave them out, or give a URL such as s3://bucket/key."
        )


def _names(options: dict[str, Any]) -> str:
    return ", ".join(map(repr, options))


# ------------------------------------------------------------------------------- on a local disk


def _open_path(path: str, *, read_only: bool | None, must_exist: bool) -> Store:
    path = absolute(expand_home(path, "url"), "url")
    # A URL that is misspelt is a path as well.
    shown = redact(path)
    # Once for all: a link may lead elsewhere as soon as it is opened.
    path = ask(lambda: real_path(path)) or path
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise OptionValueError(
            f"invalid url: {shown!r} ({error}). Give a path that the system knows."
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        if must_exist:
            raise NoSuchSourceError(
                f"invalid url: there is nothing at {shown!r}. Give the path of a Zarr store, a URL with its scheme, "
                "such as s3://bucket/key, or read_only=False to write a new store there."
            ) from None
        is_archive = path.lower().endswith(".zip") and read_only is not False
        return ZipStore(path, mode="r") if is_archive else LocalStore(path)
    except OSError as error:
        error.filename = shown
        raise
    if stat.S_ISDIR(mode):
        return LocalStore(path)
    if not stat.S_ISREG(mode) or not _is_archive(path):
        raise OptionValueError(
            f"invalid url: {shown!r} is neither a directory nor a zip file. Give the directory of the Zarr store "
            "that it belongs to, or a zip file."
        )
    if read_only is False:
        raise OptionValueError(
            f"invalid read_only: False, but {shown!r} is a zip file, which is opened for reading. Leave read_only out, "
            'or give zarr.storage.ZipStore(path, mode="a").'
        )
    return _open_archive(path)


def _is_archive(path: str) -> bool:
    # Of a path it says no as well where it may not be read.
    with open(path, "rb") as file:
        return zipfile.is_zipfile(file)


def _open_archive(path: str) -> ZipStore:
    store = ZipStore(path, mode="r")
    try:
        # One of zarr 3.1 cannot be read from before, nor be opened by two threads at once.
        store._sync_open()
    except zipfile.BadZipFile as error:
        raise OptionValueError(
            f"invalid url: the zip file {path!r} is damaged ({error}). Give one that is complete."
        ) from None
    return store


# ------------------------------------------------------------------------------- by a client


def _open_chained(path: Any, options: dict[str, Any]) -> Store:
    """What a path of universal_pathlib stands for that is a chain, of which its options say the rest."""
    fsspec = importlib.import_module("fsspec")
    return FsspecStore.from_mapper(
        fsspec.filesystem(path.protocol, **options).get_mapper(path.path)
    )


def _open_remote(
    url: str, options: dict[str, Any], make: Callable[[], Store] | None = None
) -> Store:
    try:
        return FsspecStore.from_url(url, storage_options=options) if make is None else make()
    except ImportError as error:
        return _open_with_obstore(url, options, error)
    except Exception as error:  # noqa: BLE001 - a chain is read from here, by any library
        known = _known_schemes()
        unknown = next((scheme for scheme in _schemes(url) if scheme not in known), None)
        if unknown is not None and isinstance(error, (TypeError, ValueError)):
            raise OptionValueError(
                f"invalid url: {redact(url)!r} has the unknown scheme {unknown!r}. Give a URL that fsspec knows, such "
                "as s3://, gs://, az:// or https://, or a local path."
            ) from None
        raise _clean(url, options, error) from None


def _schemes(url: str) -> Iterator[str]:
    """The schemes of a chain of URLs."""
    for link in links(url):
        if (scheme := scheme_of(link)) is not None:
            yield scheme


def _known_schemes() -> set[str]:
    fsspec = importlib.import_module("fsspec")
    return {*fsspec.available_protocols(), *fsspec.registry}


def _open_with_obstore(url: str, options: dict[str, Any], missing: ImportError) -> Store:
    client = None if "::" in url else _CLIENTS.get(next(_schemes(url), ""))
    try:
        if client is None:
            raise missing
        stores: Any = importlib.import_module("obstore.store")
        errors: Any = importlib.import_module("obstore.exceptions")
    except ImportError:
        needed = [client] if client else []
        if (missing.name or "").partition(".")[0] == "fsspec":
            needed = ["fsspec", *needed]
        # fsspec says of each of its clients what it needs.
        advice = f"Install {' and '.join(needed)}" if needed else redact(str(missing)).rstrip(".")
        other = ", or obstore" if client else ""
        raise MissingClientError(
            f"cannot open {redact(url)!r}: the client for such URLs is not installed. {advice}{other}."
        ) from None
    try:
        bucket = stores.from_url(re.sub("^gcs:", "gs:", url), **options)
    except (TypeError, ValueError, errors.BaseError) as error:
        raise _refusal(url, options, error, f"obstore (as {client} is not installed)") from None
    return ObjectStore(bucket)


def _clean(url: str, options: dict[str, Any], error: Exception) -> Exception:
    """What fsspec raises for a URL, without what is secret in it: an error of the system stays one of its kind."""
    if not isinstance(error, OSError) or isinstance(error, ValueError):
        return _refusal(url, options, error)
    message = f"cannot open {redact(url)!r}: {_said(url, options, error)}."
    if isinstance(error, FileNotFoundError):
        return NoSuchSourceError(message)
    # A class of a library's own may be made of anything.
    kind: type[OSError] = next(k for k in type(error).__mro__ if k.__module__ == "builtins")
    return kind(message)


def _refusal(
    url: str, options: dict[str, Any], error: Exception, client: str = "fsspec"
) -> OptionValueError:
    """What a client says against a URL or its options, without what is secret in them."""
    given = f" with storage_options {_names(options)}" if options else ""
    return OptionValueError(
        f"cannot open {redact(url)!r}{given}: {_said(url, options, error)}. Give a URL and options that {client} knows."
    )


def _said(url: str, options: dict[str, Any], error: Exception) -> str:
    said = redact((str(error) or type(error).__name__).splitlines()[0])
    return hide(said, [*_texts(options), *secrets_in(url)]).rstrip(".")


def _texts(value: object) -> Iterator[str]:
    """All that an option holds, as it would be shown."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for one in value:
            yield from _texts(one)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
