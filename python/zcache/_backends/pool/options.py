"""What a pool is opened with."""

from __future__ import annotations

from typing import NamedTuple


class PoolOptions(NamedTuple):
    """The options of a pool.

    Attributes
    ----------
    max_size : int or None
        Bytes that it holds at most; None for no bound.
    min_free_space : int or None
        Bytes of the volume that stay free; None for the default.
    mode : int
        Permissions of its directory, if it is made.
    eviction, minimise : str or None
        Its policy; None for that of the stores over it.
    """

    max_size: int | None = None
    min_free_space: int | None = None
    mode: int = 0o700
    eviction: str | None = None
    minimise: str | None = None
