"""What is kept, and the room for it: the bound, evictions, and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from zcache._core import Granted, NeedsEviction
from zcache._decoded.buffers import Buffers

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Sequence

    from zcache._core import Index
    from zcache._decoded.admission import Admission
    from zcache._decoded.chunk import Kept
    from zcache._decoded.layout import Array

FILLS: Final = 65_536
"""Chunks that hold nothing but the fill value, which take no memory, and are kept at most."""


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
    """

    def __init__(
        self,
        index: Index,
        max_size: int,
        values: dict[str, Kept],
        lock: threading.RLock,
        admission: Admission,
    ) -> None:
        self._index = index
        self._max_size = max_size
        self._values = values
        self._lock = lock
        self._admission = admission
        self._buffers = Buffers(max_size)
        # Bytes of what is in `values`, or about to be.
        self._size = 0
        # Bytes of what is pinned.
        self._pinned = 0
        self._fills = 0

    def pinned(self, name: str) -> Kept | None:
        """A chunk that is kept, to be copied from."""
        with self._lock:
            kept = self._values.get(name)
            if kept is not None:
                if not kept.pins:
                    self._pinned += kept.size
                kept.pins += 1
        return kept

    def pin(self, kept: Kept, times: int = 1) -> None:
        """Say that a chunk is copied from. To be called under the lock."""
        if not kept.pins:
            self._pinned += kept.size
        kept.pins += times

    def unpin(self, copied: Iterable[Kept]) -> bool:
        """Say that one of those who copied from each of them has; whether chunks are to be evicted that could not be."""
        is_due = False
        with self._lock:
            for kept in copied:
                kept.pins -= 1
                if not kept.pins:
                    self._pinned -= kept.size
                    is_due |= kept.is_condemned
        return is_due

    def reserve(self, name: str, size: int, ticket: int) -> Any:
        """A reservation, for which others are evicted, but for those that are pinned; None if there is no room."""
        index = self._index
        # A victim that is pinned would be lost for nothing: a read could evict what it has just found.
        if size > self._max_size - index.current_size + self._size - self._pinned:
            return None
        answer = index.reserve(name, None, size, ticket, 0.0)
        while isinstance(answer, NeedsEviction):
            dropped, failed = self._drop(answer.victims, is_eviction=True)
            answer = index.advance(answer.reservation, dropped, failed, 0.0)
        return answer.reservation if isinstance(answer, Granted) else None

    def reserve_fill(self, name: str, ticket: int) -> Any:
        """The same for a chunk of the fill value."""
        return None if self._fills >= FILLS else self.reserve(name, 0, ticket)

    def give_back(self, reservation: Any) -> None:
        """Say that nothing comes of a reservation, if it is one."""
        if reservation is not None:
            self.remove(self._index.release(reservation))

    def memory(self, size: int) -> Array:
        """Memory for a chunk that has a reservation, to be `put`."""
        with self._lock:
            memory = self._buffers.take(size, self._max_size - self._size)
            self._size += size
            return memory

    def put(self, name: str, kept: Kept) -> None:
        """Keep a chunk; its reservation is committed next."""
        with self._lock:
            self._values[name] = kept
            self._fills += kept.memory is None

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
        with self._lock:
            for cell, name in victims:
                kept = self._values.get(name)
                if kept is not None and kept.pins:
                    kept.is_condemned = True
                    failed.append(cell)
                    continue
                if kept is not None:
                    del self._values[name]
                    kept.is_gone = True
                    if kept.memory is None:
                        self._fills -= 1
                    else:
                        size = kept.memory.nbytes
                        self._size -= size
                        self._buffers.give_back(kept.memory, self._max_size - self._size)
                        if is_eviction:
                            self._admission.evicted(size)
                dropped.append(cell)
        return dropped, failed
