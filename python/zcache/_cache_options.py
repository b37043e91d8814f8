"""The options of a `CacheStore`, as its copies share them and a pickle carries them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from zcache._ages import MISSING_MAX_AGE, MaxAges

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from zcache._ages import Age


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What a user may choose, checked and converted; `CacheStore` says what each is.

    Sizes are bytes. Two are equal where stores with them serve the same. A new option is a field here, a parameter of
    `CacheStore`, and where users may ask for it a property of that.
    """

    max_size: int | None = None
    max_age_seconds: Age | Mapping[str, Age] = "infinity"
    metadata_max_age_seconds: Age | None = None
    stale_if_error: float = 0.0
    offline: bool = False
    cache_missing: bool = True
    missing_max_age_seconds: Age = MISSING_MAX_AGE
    revalidate: Literal[False, True, "metadata"] = False
    verify: str = field(default="first", compare=False)
    eviction: str = field(default="lru", compare=False)
    minimise: str = field(default="requests", compare=False)
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
