"""How old a cached value may be, by the kind of its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from zcache import _core
from zcache._core import Ages

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._types import Age

MISSING_MAX_AGE: Final = 300
"""Seconds for which a key is remembered as missing, unless `missing_max_age_seconds` says otherwise."""

METADATA: Final = _core.METADATA
"""Last parts of the keys of metadata documents."""
NODES: Final = _core.NODES
"""Those of them without which there is no node."""


class MaxAges:
    """Maximum ages of the values of one store.

    Parameters
    ----------
    given : float, "infinity" or mapping of str to these
        Seconds for every key; or by glob patterns, of which the first that matches holds, and "infinity"
        for keys that none matches.
    metadata : float or "infinity", optional
        Seconds for metadata documents, whatever `given` says. Default is None: as `given` says.

    Attributes
    ----------
    given, metadata
        The parameters.
    single : float or None
        Seconds for every key where `by_key` is None; None for any age.
    by_key : callable or None
        The seconds for a key, where they differ.
    patterns : Ages or None
        The same for the index.
    longest : float or None
        Seconds after which no value is fresh; None where some always are.
    """

    def __init__(self, given: Age | Mapping[str, Age], metadata: Age | None = None) -> None:
        self.given = given
        self.metadata = metadata
        rules = (
            [] if metadata is None else [(f"**/{name}", _seconds(metadata)) for name in METADATA]
        )
        if isinstance(given, Mapping):
            rules += [(pattern, _seconds(age)) for pattern, age in given.items()]
            default = None
        else:
            default = _seconds(given)
        ages = {default, *(age for _, age in rules)}
        self.single = default
        self.by_key: Callable[[str], float | None] | None = None
        self.patterns: Ages | None = None
        if len(ages) > 1:
            self.patterns = Ages(rules, default)
            self.by_key = self.patterns.of
        self.longest = None if None in ages else max(age for age in ages if age is not None)

    @property
    def is_ageless(self) -> bool:
        """Whether nothing ever expires."""
        return self.by_key is None and self.single is None

    def of(self, key: str) -> float | None:
        """Seconds for the value of a key; None for any age."""
        return self.single if self.by_key is None else self.by_key(key)


def _seconds(age: Age) -> float | None:
    # A float: the index takes it faster than a whole number.
    return None if age == "infinity" else float(age)
