"""Options of a `CacheStore`: sizes and ages as people write them, and the errors for bad input."""

from __future__ import annotations

import math
import operator
import os
import re
import threading
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from zarr.abc.store import Store
from zarr.storage import LocalStore

from zcache._byte_ranges import is_encodable, is_plain
from zcache._core import MINIMISED, POLICIES
from zcache._runtime.capacity import memory, volume
from zcache._source.describe import describe
from zcache._source.identity import EPHEMERAL, UNNAMED
from zcache._source.location import innermost, outlives_process, overlaps
from zcache._source.paths import absolute, expand_home
from zcache._source.urls import redact
from zcache.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from zcache._types import Age, Revalidate

MAX_BYTES: Final = 2**64 - 1
VERIFIES: Final = ("first", "always", "never")

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SHARE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", re.ASCII)
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(
    value: object,
    name: str = "max_size",
    whole: Callable[[], int] | None = None,
    none: str = "no bound",
) -> int | None:
    """Convert a size to bytes.

    Parameters
    ----------
    value : int, float, str or None
        Bytes from 0 to 2**64 - 1, also as a float without a fraction, such as ``1e9``; or a number and a unit, such as ``"256MB"`` (10**6 bytes each) or
        ``"2 GiB"`` (2**30 bytes each), in any case; or, with `whole`, a share such as ``"25%"``; or None.
    name : str
        How the caller calls it, for the error.
    whole : callable, optional
        Bytes of what shares are of; asked for a share only. Default is None: shares are refused.
    none : str, optional
        What None means, for the error; empty where the caller takes no None. Default is "no bound".

    Raises
    ------
    TypeError
        For anything else, bool and floats with a fraction among them.
    ValueError
        For a negative number, one beyond 64 bits, an unknown unit, or part of a byte.
    """
    if value is None:
        return None
    message = _size_message(name, value, takes_shares=whole is not None, none=none)
    size: int
    if isinstance(value, str):
        share = None if whole is None else _SHARE.fullmatch(value)
        if share is not None and whole is not None:
            size = _parse_share(share[1], whole, message)
        else:
            size = _parse_size_text(value, message)
    else:
        if isinstance(value, bool):
            raise OptionTypeError(message)
        if isinstance(value, (float, np.floating)) and float(value).is_integer():
            value = int(value)
        try:
            size = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise OptionTypeError(message) from None
    if not 0 <= size <= MAX_BYTES:
        raise OptionValueError(message)
    return size


def _parse_size_text(text: str, message: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise OptionValueError(message)
    whole, _, fraction = match[1].partition(".")
    unit = _UNITS[match[2].lower()]
    # Whole numbers throughout: a float would round a bound of petabytes.
    scale: int = 10 ** len(fraction)
    try:
        size, rest = divmod(int(whole + fraction) * unit, scale)
    except ValueError:  # Python reads no number of thousands of digits.
        raise OptionValueError(message) from None
    if rest and unit == 1:
        raise OptionValueError(message)
    return size


def _parse_share(number: str, whole: Callable[[], int], message: str) -> int:
    percent = float(number)
    if percent > 100:
        raise OptionValueError(message)
    try:
        return int(whole() * percent / 100)
    except OSError as error:
        invalid = message.partition(" Give ")[0]
        raise OptionValueError(
            f'{invalid} What it is a share of cannot be told ({error}). Give bytes, or text such as "2 GiB".'
        ) from error


def _size_message(name: str, value: object, *, takes_shares: bool, none: str) -> str:
    forms = ["a whole number of bytes from 0 to 2**64 - 1", 'text such as "256MB" or "2 GiB"']
    forms += ['a share such as "25%"'] if takes_shares else []
    forms += [f"None for {none}"] if none else []
    no_shares = "" if takes_shares else ' Shares such as "25%" are not taken here.'
    return f"invalid {name}: {value!r}. Give {', '.join(forms[:-1])}, or {forms[-1]}.{no_shares}"


def capacity_of(cache: Store) -> int:
    """Bytes that shares of a cache store are of: the whole volume of a directory, or the memory.

    Raises
    ------
    OSError
        If it has neither, or the system does not tell.
    """
    inner = innermost(cache)
    if isinstance(inner, LocalStore):
        return volume(inner.root)
    if outlives_process(inner):
        raise OSError(f"{describe(cache)} is no local directory")
    return memory()


def parse_ages(
    value: object,
) -> Age | dict[str, Age]:
    """Convert a maximum age, or a mapping from glob patterns to ages; see `parse_age`.

    Raises
    ------
    TypeError
        For a pattern that is no text.
    ValueError
        For a pattern with a part that no key has: an empty one, ``.`` or ``..``. Whether one matches anything is not asked.
    """
    if not isinstance(value, Mapping):
        return parse_age(value)
    ages: dict[str, Age] = {}
    for pattern, age in value.items():
        kind = OptionValueError if isinstance(pattern, str) else OptionTypeError
        if kind is OptionTypeError or not (is_plain(pattern) and is_encodable(pattern)):
            raise kind(
                f"invalid pattern in max_age_seconds: {pattern!r}. Give a glob pattern over whole keys, such "
                'as "**/zarr.json" or "forecast/**" (`**` is any number of parts, `*` is within one part), '
                'or "**" for all keys.'
            )
        ages[str(pattern)] = parse_age(age, f"max_age_seconds of {pattern!r}")
    return ages


def parse_age(value: object, name: str = "max_age_seconds", none: str = "") -> Age:
    """Convert a maximum age to seconds, or to "infinity".

    Parameters
    ----------
    value : float, int, str or None
        Seconds from 0 on, fractions allowed; or ``"infinity"``, None or ``float("inf")``, which all
        mean that nothing ever expires.
    name : str
        How the caller calls it, for the error.
    none : str, optional
        What None means, for the error, where that is something else and the caller takes it. Default is empty.

    Raises
    ------
    TypeError
        For anything else, bool among them.
    ValueError
        For a negative number, NaN, or any other text.
    """
    if value is None or (isinstance(value, str) and value == "infinity"):
        return "infinity"
    message = _age_message(name, value, none)
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise OptionTypeError(message)
    number: Any = value
    try:
        age = math.nan if isinstance(number, str) else float(number)
    except TypeError:  # numpy's time spans call themselves integers
        raise OptionTypeError(message) from None
    except OverflowError:
        raise OptionValueError(message) from None
    if math.isnan(age) or age < 0:
        raise OptionValueError(message)
    if math.isinf(age):
        return "infinity"
    # Without what a class of a user's own makes of comparisons.
    return int(number) if isinstance(number, int) else age


def parse_seconds(value: object, name: str) -> float:
    """Convert a number of seconds, which "infinity" is as well; see `parse_age`."""
    message = f'invalid {name}: {value!r}. Give seconds as a number from 0 on, or "infinity".'
    if value is None:
        raise OptionTypeError(message)
    try:
        seconds = parse_age(value)
    except (OptionTypeError, OptionValueError) as error:
        raise type(error)(message) from None
    return math.inf if seconds == "infinity" else seconds


def parse_timeout(value: object) -> float:
    """Convert how many seconds a call may take, to what the system can wait; see `parse_seconds`."""
    return min(parse_seconds(value, "timeout"), threading.TIMEOUT_MAX)


def _age_message(name: str, value: object, none: str) -> str:
    by_key = ""
    if name == "max_age_seconds":
        by_key = ' For ages by kind of key give a mapping, such as {"**/zarr.json": 60}.'
    never = f'"infinity" for entries that never expire, or None for {none}'
    if not none:
        never = 'or "infinity" or None for entries that never expire'
    return (
        f"invalid {name}: {value!r}. Give seconds as a number from 0 on (0 keeps nothing fresh), "
        f"{never}.{by_key}"
    )


def check_verify(verify: object) -> str:
    return _check_choice("verify", verify, VERIFIES)


def check_eviction(eviction: object) -> str:
    return _check_choice("eviction", eviction, POLICIES)


def check_minimise(minimise: object) -> str:
    return _check_choice("minimise", minimise, MINIMISED)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in choices:
        return value
    kind = OptionValueError if isinstance(value, str) else OptionTypeError
    raise kind(f"invalid {name}: {value!r}. Give {listed(choices, 'or')}.")


def listed(choices: tuple[str, ...], last: str) -> str:
    """What a user may give, for an error: the last one after this word."""
    *others, final = [f'"{choice}"' for choice in choices]
    return f"{', '.join(others)} {last} {final}"


def check_source_id(source_id: object) -> str | None:
    if source_id is None:
        return None
    if isinstance(source_id, str) and source_id and not source_id.startswith((EPHEMERAL, UNNAMED)):
        return source_id
    kind = OptionValueError if isinstance(source_id, str) else OptionTypeError
    raise kind(
        f"invalid source_id: {source_id!r}. Give text that names the source, such as its URL, and does not "
        f"begin with {EPHEMERAL!r} or {UNNAMED!r}; or None."
    )


def check_clock(clock: Any) -> Any:
    if clock is not None and not callable(clock):
        raise OptionTypeError(
            f"invalid clock: {clock!r}. Give a function that returns seconds, or None."
        )
    return clock


def check_revalidate(value: object) -> Revalidate:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value == "metadata":
        return "metadata"
    kind = OptionValueError if isinstance(value, str) else OptionTypeError
    raise kind(f'invalid revalidate: {value!r}. Give True, False or "metadata".')


def parse_offline(value: object) -> bool:
    """Whether a store is offline: as it is told, or as the environment says now."""
    if value is None:
        return os.environ.get("ZCACHE_OFFLINE", "0") not in ("", "0")
    check_flag("offline", value, none="what ZCACHE_OFFLINE says")
    return bool(value)


def check_flag(name: str, value: object, none: str = "") -> None:
    if not isinstance(value, bool):
        forms = f"True, False, or None for {none}" if none else "True or False"
        raise OptionTypeError(f"invalid {name}: {value!r}. Give {forms}.")


def parse_mode(value: object) -> int:
    """Convert the permissions of a directory; None is 0o700.

    Raises
    ------
    OptionTypeError, OptionValueError
        If it is none, or its owner could not use the directory.
    """
    if value is None:
        return 0o700
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionTypeError(
            f"invalid mode: {value!r}. Give permissions such as 0o770, or None for 0o700."
        )
    if not 0 <= value <= 0o7777 or value & 0o700 != 0o700:
        raise OptionValueError(
            f"invalid mode: {value:#o}. Give permissions that leave its owner all rights, such as 0o770."
        )
    return value


def path_of_cache_store(path: object, name: str = "cache_store") -> str:
    """The path from the root on of a directory to keep values in, which need not exist yet.

    Parameters
    ----------
    path : str or PathLike
        The path, in which a ``~`` at the beginning is the home of a user.
    name : str, optional
        How the caller calls it, for the error.

    Raises
    ------
    OptionTypeError, OptionValueError
        If there cannot be a directory.
    """
    elsewhere = ""
    if name == "cache_store":
        elsewhere = ", or a zarr.abc.store.Store for values that are kept elsewhere"
    advice = f"Give the path of a local directory{elsewhere}."
    text: object = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise OptionTypeError(f"invalid {name}: {text!r}. {advice}")
    if not text or "://" in text or "\0" in text or not _has_encoding(text):
        raise OptionValueError(f"invalid {name}: {redact(text)!r}. {advice}")
    path = absolute(expand_home(text, name), name)
    existing = os.path.abspath(path)
    while not os.path.lexists(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    if os.path.exists(existing) and not os.path.isdir(existing):
        where = "" if existing == os.path.abspath(path) else f", for {existing!r}"
        raise OptionValueError(
            f"invalid {name}: {text!r}{where} is a file. Give the path of a directory, which is made if "
            "need be."
        )
    return path


def _has_encoding(path: str) -> bool:
    """Whether the system can be told a path."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


_INSTEAD: Final = {
    "store": "such as zarr.storage.LocalStore(path) or zarr.storage.FsspecStore.from_url(url), or give the URL or path "
    "to zcache.open",
    "cache_store": "such as zarr.storage.LocalStore(path) or zarr.storage.MemoryStore(), the path of a directory, or a "
    "zcache.CachePool",
}


def check_store(name: str, store: object, instead: str = "") -> Store:
    if not isinstance(store, Store):
        text = os.fspath(store) if isinstance(store, os.PathLike) else store
        shown = repr(redact(text)) if isinstance(text, str) else type(store).__name__
        instead = instead or _INSTEAD[name]
        raise OptionTypeError(f"invalid {name}: {shown}. Give a zarr.abc.store.Store, {instead}.")
    return store


def check_cache_store(source: Store, cache: object, given: str | None = None) -> Store:
    """See that a store can be the cache store of a source; `given` is the option and its value as the user knows them."""
    what = f"invalid {given or f'cache_store: {describe(cache)}'}"
    # A directory that is warm can be read from all the same.
    reads_only = isinstance(cache, LocalStore) and cache.read_only
    if not reads_only and not getattr(cache, "supports_deletes", True):
        raise OptionValueError(
            f"{what} does not support deletes, so it cannot make room. Give a store that can delete, "
            "such as MemoryStore or LocalStore."
        )
    cache = check_store("cache_store", cache)
    if not reads_only and (cache.read_only or not cache.supports_writes):
        raise OptionValueError(
            f"{what} does not support writes. Open it with read_only=False, or give another store to "
            "keep the cache in."
        )
    if overlaps(source, cache):
        raise OptionValueError(
            f"{what} is the source itself, or one of them is inside the other: evicting from it would "
            "delete your data. Give another store to keep the cache in."
        )
    if _is_cached_in(source, cache):
        raise OptionValueError(
            f"{what} holds the cache of the source {describe(source)} already. Use that as it is, or "
            "give another store to keep a second cache in."
        )
    return cache


def check_export(target: object, pool: Store) -> None:
    """See that a store can take what a pool holds, and that this does not land in the pool."""
    check_store("store", target, "such as zarr.storage.LocalStore(path)")
    if overlaps(target, pool) or _is_cached_in(target, pool):
        raise OptionValueError(
            f"invalid store: {describe(target)} is that of the pool {describe(pool)}, or is read through it, or one "
            "of them is inside the other: what is exported would be beyond its bound. Give another store."
        )


def _is_cached_in(source: object, cache: Store) -> bool:
    """Whether a source, or a store inside it, is a cache that keeps its values here."""
    while isinstance(source, Store):
        held = getattr(source, "_cache_store", None)
        if isinstance(held, Store) and overlaps(held, cache):
            return True
        source = getattr(source, "_store", None)
    return False
