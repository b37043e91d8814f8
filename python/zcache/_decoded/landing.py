"""What becomes of decoded chunks: they are kept, if there is room, and handed to those who wait for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zcache._decoded.buffers import copy_into
from zcache._decoded.chunk import Kept

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from zcache._core import Index
    from zcache._decoded.chunk import Decoding, Decodings
    from zcache._decoded.layout import Array
    from zcache._decoded.origins import Origins
    from zcache._decoded.room import Room


class Landing:
    """Takes in chunks of one size.

    Parameters
    ----------
    index : Index
        Of decoded chunks.
    room : Room
        What is kept.
    lock : RLock
        Guards the decodes and what is kept.
    origins : Origins
        Knows whether bytes may have been past their age.
    now : callable
        Clock of the byte cache, in seconds.
    """

    def __init__(
        self,
        index: Index,
        room: Room,
        lock: threading.RLock,
        origins: Origins,
        now: Callable[[], float],
    ) -> None:
        self._index = index
        self._room = room
        self._lock = lock
        self._origins = origins
        self._now = now

    def land(
        self,
        arrived: Sequence[tuple[Decoding, Array, Array | None]],
        decodings: Decodings | None = None,
    ) -> None:
        """Keep chunks that were decoded, if there is room, and hand them to those who wait for them.

        With each comes the same with one element in memory, if it holds nothing but the fill value, or None. With
        `decodings`, others find them once they are committed with the rest of these, and until then join their flights.
        """
        with self._lock:
            # Of the others the reader has gone, and a thread of the pipeline goes on.
            arrived = [one for one in arrived if not one[0].is_ended]
            for one in arrived:
                one[0].is_ended = True
        landed: list[Decoding] = []
        is_committed = False
        try:
            landed = self._keep(arrived)
            with self._lock:
                if decodings is not None and decodings.landed is not None:
                    decodings.landed += landed
                    is_committed = True
            if landed and not is_committed:
                self._room.commit(landed)
                is_committed = True
        except MemoryError:
            pass  # Their reader has them.
        finally:
            if not is_committed or len(landed) < len(arrived):
                closing = set(landed) if is_committed else ()
                for decoding, *_ in arrived:
                    if decoding not in closing:
                        self._index.complete_flight(decoding.name, decoding.ticket)
            for one in arrived:
                one[0].end()

    def _keep(self, arrived: Sequence[tuple[Decoding, Array, Array | None]]) -> list[Decoding]:
        """Copy what is kept, or waited for. Returns those that are kept, to be committed."""
        room, now = self._room, self._now()
        latest, is_stale = None, False
        landed: list[Decoding] = []
        found, taken = [], []
        try:
            for decoding, array, fill in arrived:
                origin = decoding.origin
                if origin is not latest:
                    # Inner chunks of a shard have the same one.
                    latest, is_stale = origin, self._origins.may_be_stale(origin)
                    origin.landed = max(origin.landed, now)
                reservation = room.claim(decoding, array.nbytes, fill, is_stale=is_stale)
                if fill is None and reservation is not None:
                    memory = room.memory(array.nbytes, decoding.size)
                    taken.append((memory, decoding.size))
                    kept = Kept(copy_into(memory, array), origin, memory, decoding.size)
                elif reservation is not None or decoding.waiting:
                    kept = Kept(array if fill is None else fill, origin)
                else:
                    continue
                found.append((decoding, kept, reservation))
            with self._lock:
                for decoding, kept, reservation in found:
                    decoding.kept = kept
                    if decoding.waiting:
                        room.pin(kept, decoding.waiting)
                    if reservation is not None:
                        decoding.reservation = reservation
                        landed.append(decoding)
                room.put(landed)
        except BaseException:
            if not landed:
                room.give_back_memory(taken)
            raise
        return landed

    def commit(self, decodings: Decodings, *, is_over: bool = False) -> None:
        """Have what has landed be found by others; what lands after the end, in a thread, is committed by itself."""
        with self._lock:
            landed = decodings.landed
            if landed is not None:
                decodings.landed = None if is_over else []
        if landed:
            self._room.commit(landed)
