"""The types of options, as type checkers know them. What is given is checked all the same, and may be more than they can say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Policy: TypeAlias = Literal["lru", "none", "adaptive"]
Minimised: TypeAlias = Literal["requests", "bytes", "seconds"]
Verify: TypeAlias = Literal["first", "always", "never"]
Revalidate: TypeAlias = Literal[False, True, "metadata"]
Size: TypeAlias = "SupportsIndex | float | str"
"""Bytes, also of numpy and as 1e9; or text."""
Age: TypeAlias = "float | Literal['infinity']"
"""Seconds, or "infinity"."""


class StoreOptions(TypedDict, total=False):
    """The options of `CacheStore` that `zcache.open` hands on."""

    max_age_seconds: Age | Mapping[str, Age | None] | None
    cache_set_data: bool
    eviction: Policy | None
    minimise: Minimised | None
    metadata_max_age_seconds: Age | None
    stale_if_error: Age
    offline: bool | None
    cache_missing: bool
    missing_max_age_seconds: Age | None
    revalidate: Revalidate
    read_only: bool | None
    verify: Verify
    adopt: bool
    source_id: str | None
    min_free_space: Size | None
    max_pending_size: Size | None
    decoded_size: Size | None
    sampling: bool
    clock: Callable[[], float] | None
