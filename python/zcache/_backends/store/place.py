"""What all stores over one place share, beside its index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zcache._backends.store.filler import StoreFiller
from zcache._backends.store.listing import Listing
from zcache._core import Index

if TYPE_CHECKING:
    from zcache._index.handle import IndexHandle


class StorePlace:
    """The filler of a place, and its listing where there is one.

    Attributes
    ----------
    filler : StoreFiller
        Carries out fills.
    listing : Listing or None
        Finds out what the store holds; None where that is known.
    """

    def __init__(self, handle: IndexHandle, listing: Listing | None) -> None:
        self.handle = handle
        self.listing = listing
        self.filler = StoreFiller()

    @classmethod
    def of(cls, handle: IndexHandle, source: str, *, adopt: bool, listed: bool) -> StorePlace:
        """A place with a store that has to be listed, or not."""
        return cls(handle, Listing(handle, source, adopt=adopt) if listed else None)

    def after_fork(self) -> None:
        """Start over in a forked child."""
        handle = self.handle
        handle.after_fork(None)
        self.filler.after_fork()
        if self.listing is None:
            if not handle.index.after_fork():
                handle.index = Index(**handle.limits)
            return
        # What is there by now is the parent's, so it is ours.
        handle.index = Index(**handle.limits, complete=False)
        self.listing = self.listing.again()
