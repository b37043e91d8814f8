"""What is kept, and the room for it: the bound, evictions, and memory."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from zcache._decoded.buffers import Buffers
from zcache._decoded.chunk import OVERHEAD, overhead

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from zcache._core import Index
    from zcache._decoded.admission import Admission
    from zcache._decoded.chunk import Decoding, Decodings, Kept
    from zcache._decoded.lapsed import Lapsed
    from zcache._decoded.layout import Array

FILLS: Final = 2**12
"""Bytes of the bound for each chunk that holds nothing but the fill value: such chunks take less than `OVERHEAD`, which is not
counted, and no more are kept; of those with long names fewer."""


class Room:
    """Chunks that are kept, as the index of decoded chunks counts them.

    Parameters
    ----------
    index : Index
        Counts the bytes and chooses victims.
    max_size : int
        Bytes at most.
    values : dict of str to Kept
        What is kept, by name.
    lock : RLock
        Guards the values and their pins.
    admission : Admission
        Is told of evictions.
    lapsed : Lapsed
        Finds what goes first.
    """

    def __init__(
        self,
        index: Index,
        max_size: int,
        values: dict[str, Kept],
        lock: threading.RLock,
        admission: Admission,
        lapsed: Lapsed,
    ) -> None:
        self._index = index
        self._max_size = max_size
        self._values = values
        self._lock = lock
        self._admission = admission
        self.lapsed = lapsed
        self._buffers = Buffers(max_size)
        # Bytes that are counted for what is in `values`, or about to be.
        self._size = 0
        # Bytes of what is pinned.
        self._pinned = 0
        # Bytes of what holds nothing but the fill value, counted apart.
        self._fills, self._most_fills = 0, max_size // FILLS * OVERHEAD
        # In place of times, for these have no age: so a chunk is told from a later one of its name and size.
        self._numbers = itertools.count(1)

    def pin(self, kept: Kept, times: int = 1) -> bool:
        """Say that a chunk is copied from; False if it is gone."""
        with self._lock:
            if kept.is_gone:
                return False
            if not kept.pins:
                self._pinned += kept.size
            kept.pins += times
        return True

    def follow(self, decoding: Decoding) -> bool:
        """Count one more who waits for a chunk, or pin what it has come to; False if that is gone.

        To be called under the lock.
        """
        kept = decoding.kept
        if kept is not None:
            return self.pin(kept)
        decoding.waiting += 1
        return True

    def unpin(self, *copied: Kept) -> None:
        """Say that one of those who copied from each of these chunks has. What was to be evicted meanwhile goes."""
        is_due = False
        with self._lock:
            for kept in copied:
                kept.pins -= 1
                if not kept.pins:
                    self._pinned -= kept.size
                    is_due |= kept.is_condemned
        if is_due:
            self.remove(self._index.failed_deletes(1024))

    def admit_all(self, decodings: Decodings, names: list[str], size: int) -> None:
        """Decide which of these chunks are kept, and make room for them before they are decoded."""
        admitted = self._admission.admitted(names, len(self._values))
        if not admitted or not decodings.is_dated:
            return
        # Those that the store had not lately take no room before they are there.
        early, asking = self._admission.divide(admitted)
        # There is no room for the others, which are of the same size: but for their last coordinates they have one name.
        size += max(map(overhead, asking), default=0)
        count = max(0, self._vacant // size)
        decodings.late.update(asking[count:])
        with self._lock:
            for decoding in decodings.apart(early):
                decoding.is_admitted = True
            some = decodings.apart(asking[:count])
        held = self._reserve_all([one.name for one in some], size, [one.ticket for one in some])
        with self._lock:
            for decoding, reservation in zip(some, held, strict=True):
                if reservation is None:
                    decodings.late.add(decoding.name)
                elif not decoding.is_ended:  # Else it goes with its object.
                    decoding.reservation, decoding.size = reservation, size
                    decoding.is_admitted = True

    def admit(self, decoding: Decoding, size: int) -> bool:
        """Make room for a chunk before it is decoded; whether it is kept."""
        # One that the store had not lately takes no room before it is there.
        is_absent = self._admission.is_absent(decoding.name)
        if not is_absent:
            decoding.size = size + overhead(decoding.name)
            decoding.reservation = self.reserve(decoding.name, decoding.size, decoding.ticket)
        decoding.is_admitted = is_absent or decoding.reservation is not None
        return decoding.is_admitted

    def postpone(self, decodings: Decodings) -> None:
        """Give back the room of chunks that are being decoded: those get it that are there first."""
        for name, decoding in list(decodings.single.items()):
            with self._lock:
                reservation, decoding.reservation = decoding.reservation, None
                if reservation is not None:
                    decoding.is_admitted = False
                    decodings.late.add(name)
            self.give_back(reservation)

    def admit_late(self, decodings: Decodings, name: str, size: int) -> Decoding | None:
        """Keep a chunk that is decoded and had no room, if there is room now that no one uses."""
        size += overhead(name)
        if name not in decodings.late or size > self.unused:
            return None
        with self._lock:
            decoding = decodings.of(name)
        if decoding is None:
            return None
        reservation = self.reserve(name, size, decoding.ticket)
        with self._lock:
            # Its reader may have gone, while a thread of the pipeline goes on.
            if not decoding.is_ended and decoding.reservation is None:
                decoding.reservation, decoding.size = reservation, size
                decoding.is_admitted = reservation is not None
                return decoding
        self.give_back(reservation)
        return None

    def claim(self, decoding: Decoding, size: int, fill: Array | None, *, is_stale: bool) -> Any:
        """The room that a decoded chunk has, if it is kept; what it has no use for is given back."""
        reservation, decoding.reservation = decoding.reservation, None
        if reservation is not None and fill is None and not is_stale:
            return reservation
        name = decoding.name
        self._admission.note_present(name)
        if not decoding.is_admitted:
            return None
        if is_stale:
            # Perhaps it comes from a value that was past its age, in place of an error of the source.
            self.give_back(reservation)
            return None
        if fill is not None:
            self.give_back(reservation)
            is_full = self._fills + overhead(name) > self._most_fills
            return None if is_full else self.reserve(name, 0, decoding.ticket)
        decoding.size = size + overhead(name)
        return self.reserve(name, decoding.size, decoding.ticket)

    @property
    def _vacant(self) -> int:
        """Bytes of room that there is, or that evictions can make.

        A victim that is pinned would be lost for nothing: a read could evict what it has just found.
        """
        return self.unused + self._size - self._pinned

    @property
    def unused(self) -> int:
        """Bytes of room for which nothing has to be evicted."""
        return self._max_size - self._index.current_size

    def reserve(self, name: str, size: int, ticket: int) -> Any:
        """A reservation, for which others are evicted, but for those that are pinned; None if there is no room."""
        return None if size > self._vacant else self._reserve_all([name], size, [ticket])[0]

    def _reserve_all(self, names: list[str], size: int, tickets: list[int]) -> list[Any]:
        if not names:
            return []
        index = self._index
        if len(names) * size > self.unused:
            for name in self.lapsed.find(len(names)):
                # No one has asked for it: this counts neither a hit nor a miss.
                self.remove(index.drop_missing(name))
        held, victims = index.reserve_all(names, size, tickets, 0.0)
        while victims:
            dropped, failed = self._drop(victims, is_eviction=True)
            held, victims = index.advance_all(held, dropped, failed, 0.0)
        return held

    def give_back(self, reservation: Any) -> None:
        """Say that nothing comes of a reservation, if it is one."""
        if reservation is not None:
            self.remove(self._index.release(reservation))

    def memory(self, size: int, reserved: int) -> Array:
        """Memory for a chunk that has so many bytes reserved, to be `put`."""
        with self._lock:
            memory = self._buffers.take(size, self._max_size - self._size)
            self._size += reserved
        return memory

    def give_back_memory(self, unused: Sequence[tuple[Array, int]]) -> None:
        """Say that nothing is put into this memory, for which so many bytes were reserved."""
        with self._lock:
            for memory, reserved in unused:
                self._size -= reserved
                self._buffers.give_back(memory, self._max_size - self._size)

    def give_back_unused(self) -> None:
        """Give the memory that nothing is kept in back to the system."""
        with self._lock:
            self._buffers.clear()

    def put(self, landed: Sequence[Decoding]) -> None:
        """Keep what these have come to, and then `commit` them. To be called under the lock."""
        for one in landed:
            kept = one.kept
            assert kept is not None
            self._values[one.name] = kept
            self._fills += overhead(one.name) if kept.memory is None else 0

    def commit(self, landed: Sequence[Decoding]) -> None:
        """Have chunks that are kept be found from now on; closes their flights."""
        reservations, number = [one.reservation for one in landed], float(next(self._numbers))
        unknown, victims = self._index.commit_all(reservations, number)
        for at in unknown:
            one = landed[at]
            self._index.complete_flight(one.name, one.ticket)
            victims.append((-1, one.name))
        self.remove(victims)

    def remove(self, victims: Sequence[tuple[int, str]]) -> None:
        """Let go of what the index wants to be deleted."""
        if victims:
            dropped, failed = self._drop(victims)
            self._index.confirm_deletes([cell for cell in dropped if cell >= 0], failed)

    def _drop(
        self, victims: Sequence[tuple[int, str]], *, is_eviction: bool = False
    ) -> tuple[list[int], list[int]]:
        """Let go of chunks: the numbers of those that are gone, and of those that are still copied from."""
        dropped, failed = [], []
        values = self._values
        size = chunks = 0
        with self._lock:
            for cell, name in victims:
                kept = values.get(name)
                if kept is None:
                    dropped.append(cell)
                    continue
                if kept.pins:
                    kept.is_condemned = True
                    failed.append(cell)
                    continue
                del values[name]
                kept.is_gone = True
                dropped.append(cell)
                if kept.memory is None:
                    self._fills -= overhead(name)
                    continue
                self._size -= kept.size
                self._buffers.give_back(kept.memory, self._max_size - self._size)
                size += kept.size
                chunks += 1
            if is_eviction and chunks:
                self._admission.evicted(size, chunks)
        return dropped, failed
