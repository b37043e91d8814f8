"""Fills of one source of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zcache._backends.directory.filler import DirectoryFiller
from zcache._core import DirectoryFills

if TYPE_CHECKING:
    from collections.abc import Callable

    from zcache._backends.pool.layout import PoolLayout
    from zcache._core import Index


class PoolFiller(DirectoryFiller):
    """Hands values of one source to the core, which appends them to segments.

    Parameters
    ----------
    layout : PoolLayout
        The pool.
    label : str
        Of the source.
    clock : callable
        Seconds since 1970.
    on_idle : callable
        Called when fills have ended.
    """

    def __init__(
        self,
        layout: PoolLayout,
        label: str,
        clock: Callable[[], float],
        on_idle: Callable[[], object],
    ) -> None:
        super().__init__(layout, clock, on_idle)
        self._pool = layout
        self._folder = f"{label}/"

    def start(self, index: Index) -> None:
        layout = self._pool
        self._fills = DirectoryFills(
            index,
            layout.root,
            layout.temporary.path,
            on_idle=self._on_idle,
            marked=None if index.shared else layout.lock_path,
            segments=layout.scanner.files,
        )

    def _name(self, key: str) -> str:
        return self._folder + key
