"""Chunks that are kept as a whole: what a read wants of them, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from zcache._decoded.chunk import Decodings
from zcache._decoded.layout import scatter
from zcache._decoded.parts import MISSING, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zcache._decoded.chunk import Decoding
    from zcache._decoded.layout import Array, Coords, Layout
    from zcache._decoded.parts import Output


class WholeChunk(Part):
    """A part of a chunk of this name, and what the wrapped pipeline is asked for: all of the chunk."""

    decodings: Decoding | Decodings | None = None
    # As without decoded chunks, but for pipelines that decode into memory for one call.
    cost = 0

    # Each chunk of a pass makes one of these, and what runs between two decodes runs cold: so it calls little.
    def __init__(self, output: Output, number: int, item: Any, layout: Layout, name: str) -> None:
        self.output = output
        self.number = number
        self.item = item
        self.layout = layout
        self.name = name
        self.selection = layout.whole
        self.followed = {}

    @property
    def part(self) -> WholeChunk:
        """Itself; see `Job`."""
        return self

    @property
    def shape(self) -> Coords:
        """Of the chunk."""
        return self.layout.shape

    def place(self, at: Coords, array: Array) -> None:  # noqa: ARG002 - there is only one
        _, _, selection, place, _ = self.item
        output = self.output
        scatter(output.target, place, array, selection, output.drop_axes)

    def arrived(self, array: Array) -> None:
        """Copy out what is wanted, and end the decode."""
        output, decodings, item = self.output, self.decodings, self.item
        wanted = array[item[2]]
        if output.drop_axes:
            wanted = np.squeeze(wanted, axis=output.drop_axes)
        output.target[item[3]] = wanted
        if decodings is None:
            return
        if isinstance(decodings, Decodings):
            if decodings.late:
                output.cache.room.admit_late(decodings, self.name, self.layout.size)
            if decodings.pass_over(self.name):
                return
        if (decoding := output.cache.one(decodings, self.name)) is not None:
            self.land([(decoding, array)], decodings)

    def was_missing(self, fill: Any) -> None:
        """The store has no such chunk."""
        self.output.target[self.item[3]] = fill
        self.output.results[self.number] = MISSING
        if self.decodings is not None:
            self.output.cache.give_up_absent(self.decodings, [self.name])


def join_chunks(parts: Sequence[WholeChunk], size: int) -> Decoding | Decodings | None:
    """Decode chunks of one size, or wait for readers that do. Returns those that are decoded here."""
    output = parts[0].output
    cache = output.cache
    keys = [part.item[0].path for part in parts]
    origins = {}
    for part, origin in zip(parts, cache.origins.begin(keys, output.now), strict=True):
        if origin is None:
            continue
        if origin.is_dated and len(parts) > 1:
            origins[part.name] = origin
        elif (joined := cache.join(part.name, origin, size, output.loop)) is not None:
            leads, decoding = joined
            if leads:  # So it is the only one, for one that is not dated leads never.
                part.decodings = decoding
                return decoding
            part.followed = {(): decoding}
    if not origins:
        return None
    decodings = Decodings(output.loop, origins)
    followed = cache.join_all(decodings, size)
    for part in parts:
        part.decodings = decodings
        if part.name in followed:
            part.followed = {(): followed[part.name]}
    return decodings
