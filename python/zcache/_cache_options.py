"""The options of a `CacheStore`, as its copies share them and a pickle carries them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from zcache._ages import MISSING_MAX_AGE, MaxAges
from zcache._core import DEFAULT_MINIMISED, DEFAULT_POLICY
from zcache._options import (
    check_clock,
    check_eviction,
    check_flag,
    check_minimise,
    check_revalidate,
    check_source_id,
    check_verify,
    parse_age,
    parse_ages,
    parse_offline,
    parse_seconds,
    parse_size,
)
from zcache._runtime.capacity import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zcache._types import Age, Minimised, Policy, Revalidate, Verify


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a user may choose, checked and converted; `CacheStore` says what each is.

    Sizes are bytes. Two are equal where stores with them serve the same. A new option is a field here, a parser
    in `_PARSERS`, a parameter of `CacheStore`, and where users may ask for it a property of that.
    """

    max_size: int | None = None
    max_age_seconds: Age | Mapping[str, Age] = "infinity"
    metadata_max_age_seconds: Age | None = None
    stale_if_error: float = 0.0
    offline: bool = False
    cache_missing: bool = True
    missing_max_age_seconds: Age = MISSING_MAX_AGE
    revalidate: Revalidate = False
    verify: Verify = field(default="first", compare=False)
    eviction: Policy = field(default=DEFAULT_POLICY, compare=False)
    minimise: Minimised = field(default=DEFAULT_MINIMISED, compare=False)
    adopt: bool = field(default=False, compare=False)
    source_id: str | None = field(default=None, compare=False)
    min_free_space: int | None = field(default=None, compare=False)
    max_pending_size: int | None = field(default=None, compare=False)
    decoded_size: int | None = field(default=None, compare=False)
    sampling: bool = field(default=True, compare=False)
    clock: Callable[[], float] | None = field(default=None, compare=False)

    @property
    def ages(self) -> MaxAges:
        """How old a value may be that is served without asking the source."""
        if self.offline:
            return MaxAges("infinity")
        return MaxAges(self.max_age_seconds, self.metadata_max_age_seconds)

    @property
    def missing_age(self) -> float:
        """Seconds for which a key that the source does not have is remembered."""
        if not self.cache_missing:
            return 0.0
        age = "infinity" if self.offline else self.missing_max_age_seconds
        return math.inf if age == "infinity" else float(age)

    @property
    def longest_use(self) -> float | None:
        """Seconds for which a value is of use; None for always."""
        longest = None if self.revalidate else self.ages.longest
        return None if longest is None else longest + self.stale_if_error


def _age(name: str, none: str) -> Callable[[object], Age]:
    return partial(parse_age, name=name, none=none)


def _flag(name: str, none: str = "") -> Callable[[object], object]:
    def parse(value: object) -> object:
        check_flag(name, value, none)
        return value

    return parse


def _or_none(
    parse: Callable[[object], object], default: object = None
) -> Callable[[object], object]:
    return lambda value: default if value is None else parse(value)


_PARSERS: Final[dict[str, Callable[[object], object]]] = {
    "max_age_seconds": parse_ages,
    "metadata_max_age_seconds": _or_none(_age("metadata_max_age_seconds", "max_age_seconds")),
    "stale_if_error": partial(parse_seconds, name="stale_if_error"),
    "offline": parse_offline,
    "missing_max_age_seconds": _or_none(
        _age("missing_max_age_seconds", "the default"), MISSING_MAX_AGE
    ),
    "revalidate": check_revalidate,
    "verify": check_verify,
    "eviction": _or_none(check_eviction),
    "minimise": _or_none(check_minimise),
    "source_id": check_source_id,
    "clock": check_clock,
    "read_only": _or_none(_flag("read_only", "the mode of the source")),
    **{name: _flag(name) for name in ("adopt", "cache_missing", "cache_set_data", "sampling")},
}
_OF_CACHE_STORE: Final = {"max_size": "no bound", "min_free_space": "the default"}
_OF_MEMORY: Final = {"max_pending_size": "the default", "decoded_size": "no decoded chunks"}
"""Sizes of which shares are of the cache store, and of memory; and what None means."""


def parse_options(whole: Callable[[], int], **given: Any) -> dict[str, Any]:
    """Check and convert options of a `CacheStore`, any of them.

    Parameters
    ----------
    whole : callable
        Bytes of what shares of the cache store are of.
    **given
        The options.

    Raises
    ------
    OptionTypeError, OptionValueError
        If one is of the wrong type, or has no meaning.
    """
    parsers = dict(_PARSERS)
    for sizes, of in ((_OF_CACHE_STORE, whole), (_OF_MEMORY, memory)):
        for name, none in sizes.items():
            parsers[name] = partial(parse_size, name=name, whole=of, none=none)
    parsed = {}
    # No comprehension: in Python 3.11 its frame keeps what it refers to, also once an error is cleared.
    for name, value in given.items():
        parsed[name] = parsers[name](value)
    return parsed
