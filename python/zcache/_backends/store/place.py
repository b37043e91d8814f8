"""What all stores over one place share, beside its index."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from zcache._backends.store.bound import StoreBound, evict_from
from zcache._backends.store.filler import StoreFiller
from zcache._backends.store.listing import Listing
from zcache._core import Index
from zcache._index.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.core.buffer import Buffer

    from zcache._backends.base import Backend
    from zcache._index.handle import IndexHandle
    from zcache._runtime.io import IO


class StorePlace(Place):
    """The filler of a place, and its listing where there is one.

    Attributes
    ----------
    filler : StoreFiller
        Carries out fills.
    listing : Listing or None
        Finds out what the store holds; None where that is known.
    bound : StoreBound
        Evicts what is above the bound, but for that of a dict.
    values : dict or None
        The dict that has the values as they are; None where only the methods of a store tell them.
    """

    def __init__(
        self,
        handle: IndexHandle,
        clock: Callable[[], float],
        listing: Listing | None = None,
        values: dict[str, Buffer] | None = None,
    ) -> None:
        self.handle = handle
        self.listing = listing
        self.filler = StoreFiller()
        self.bound = StoreBound(handle, clock)
        self._clock = clock
        self.values = values
        # More than was asked for may be found.
        self.bound.is_due = listing is not None

    @classmethod
    def of(
        cls,
        handle: IndexHandle,
        clock: Callable[[], float],
        source: str,
        *,
        adopt: bool,
        listed: bool,
    ) -> StorePlace:
        """A place with a store that has to be listed, or not."""
        return cls(handle, clock, Listing(handle, source, adopt=adopt) if listed else None)

    def enforce_bound(self) -> None:
        # docstring inherited. Of a dict at once, else from the next operation on.
        if self.values is None:
            self.bound.is_due = True
        else:
            evict_from(self.values, self.handle, self._clock)

    def keep_bound(self, io: IO, backend: Backend) -> None:
        """Evict in the background what is above the bound, once it is known what there is."""
        if self.bound.is_due and (self.listing is None or self.listing.has_ended()):
            self.bound.begin(io, backend)

    async def settle(self, io: IO, backend: Backend, until: float) -> bool:
        # docstring inherited
        listing = self.listing
        if listing is not None and listing.done is not None:
            if not await io.until(listing.done, max(0.0, until - time.monotonic())):
                return False
            if listing.refusal is not None:
                raise listing.refusal
            # For what it has found.
            self.keep_bound(io, backend)
        evicting = self.bound.under_way
        return evicting is None or await io.until(evicting, max(0.0, until - time.monotonic()))

    def rename(self, name: str) -> None:
        # docstring inherited
        if self.listing is not None:
            self.listing.rename(name)

    def after_fork(self) -> None:
        # docstring inherited
        super().after_fork()
        handle = self.handle
        handle.after_fork(None)
        self.filler.after_fork()
        self.bound.after_fork()
        if self.listing is None:
            if not handle.index.after_fork():
                handle.index = Index(**handle.limits)
            return
        # What is there by now is the parent's, so it is ours.
        handle.index = Index(**handle.limits, complete=False)
        self.listing = self.listing.again()
        self.bound.is_due = True
