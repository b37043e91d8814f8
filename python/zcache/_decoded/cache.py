"""Decoded chunks in the memory of this process.

Two indexes are asked. One of its own counts the bytes, chooses victims and joins readers, as it does for
encoded values: so the bound holds at every instant, and the eviction policies are the same. That of the byte
cache says whether what is kept is still what a read would decode, see `Index.begin_decodes`.
"""

from __future__ import annotations

import threading
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from zcache._core import Index, ReadCounters
from zcache._decoded.admission import Admission
from zcache._decoded.chunk import Decoding, Decodings
from zcache._decoded.landing import Landing
from zcache._decoded.lapsed import Lapsed
from zcache._decoded.origins import Origins
from zcache._decoded.outputs import Outputs
from zcache._decoded.room import Room
from zcache._index.calls import drained
from zcache._runtime.fork import at_fork
from zcache._runtime.registry import Registry

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Hashable, Iterator

    from zcache._ages import MaxAges
    from zcache._backends.base import Backend
    from zcache._decoded.chunk import Kept, Leader, Origin
    from zcache._index.counters import Counters
    from zcache._protocol.single_flight import LoopReference

LAYOUTS: Final = 4096
"""Ways of decoding with numbers that the next array finds. Codecs that are told apart as objects bring a new one with each array."""


class DecodedCache:
    """Decoded chunks of the arrays of one store and its copies.

    Parameters
    ----------
    max_size : int
        Bytes that it holds at most, those among them that are being decoded.
    backend : Backend
        Of the byte cache, with its index and clock.
    ages : MaxAges
        How old bytes may be for their chunks to be served.
    counters : Counters
        Of the byte cache.
    """

    def __init__(
        self,
        max_size: int,
        backend: Backend,
        ages: MaxAges,
        counters: Counters,
    ) -> None:
        self.max_size = max_size
        self.origins = Origins(backend, ages, counters)
        self.now = backend.shared.clock
        self._handle = handle = backend.shared.handle
        self._seconds = 0.0
        self._layouts: dict[Hashable, int] = {}
        self._numbers = count()
        self._reads = ReadCounters()
        self.keeps: object = None  # lives as long as this
        # Where only copies of one store have it: by this they find it in their process.
        self.token = ""
        self._start()
        handle.watch(self)
        backend.shared.changes.watch(self)
        _live.add(self)

    def _start(self) -> None:
        # Reentrant: inside it the garbage collector may end a reader. Never held while anything waits.
        self._lock = threading.RLock()
        policy = {name: self._handle.limits[name] for name in ("eviction", "minimise")}
        index = Index(max_size=self.max_size, flat_namespace=True, **policy)
        self._index = index.view(self._reads, False, False)
        self._values: dict[str, Kept] = {}
        self._admission = Admission(self.max_size, is_open=policy["eviction"] == "adaptive")
        lapsed = Lapsed(self._values, self._lock, self.origins, self.now)
        self.room = Room(
            self._index, self.max_size, self._values, self._lock, self._admission, lapsed
        )
        self.landing = Landing(self._index, self.room, self._lock, self.origins, self.now)
        self.outputs = Outputs(self.max_size // 32)
        # By their addresses. No lock, no set: the garbage collector may end a reader while they are listed.
        self._readings: dict[int, weakref.ref[Leader]] = {}
        # In which they were begun, but for those that have been found not to run since.
        self._loops: set[LoopReference] = set()
        self.origins.use_index(self._handle.index)

    def use_index(self, index: Index) -> None:
        """Nothing that is kept is known to be current by another index of the byte cache."""
        if self.origins.use_index(index):
            self.clear()

    def number_of(self, layout: Hashable) -> int:
        """A number for a way of decoding: what is decoded in another way has another name."""
        with self._lock:
            number = self._layouts.pop(layout, None)
            if number is None:
                number = next(self._numbers)
            self._layouts[layout] = number
            if len(self._layouts) > LAYOUTS:
                # That of the longest ago: arrays that have it keep its number.
                del self._layouts[next(iter(self._layouts))]
            return number

    def get(self, name: str, reader: object, now: float) -> Kept | None:
        """A chunk that is kept and current, to be unpinned once it is copied. Counts a hit or a miss.

        `reader` stands for one read: of an origin that it has found current it does not ask again.
        """
        return None if self._index.lookup(name) is None else self._take(name, reader, now)

    def get_all(self, names: list[str], reader: object, now: float) -> Iterator[tuple[int, Kept]]:
        """`get` of many chunks: the positions of those that are kept, with these."""
        for at in self._index.lookup_all(names):
            kept = self._take(names[at], reader, now)
            if kept is not None:
                yield at, kept

    def _take(self, name: str, reader: object, now: float) -> Kept | None:
        """Pin a chunk that the index has found, if it is current."""
        # It may be evicted until it is pinned.
        kept = self._values.get(name)
        if kept is not None:
            origin = kept.origin
            is_current: bool | None = True
            if origin.checked is not reader:
                is_current = self.origins.is_current(origin, origin.landed, now)
                if is_current:
                    origin.checked = reader
                    self._admission.hit()
            if is_current and self.room.pin(kept):
                return kept
            if is_current is False:
                self._discard(name, kept)
        self._reads.recount_as_miss()
        return None

    def drop(self, name: str, kept: Kept) -> None:
        """Forget a chunk that was found and is not used after all: it was a miss."""
        self._discard(name, kept)
        self._reads.recount_as_miss()

    def _discard(self, name: str, kept: Kept) -> None:
        """Free a chunk that is not current, and not of what takes its place meanwhile."""
        entry = self._index.handle_of(name, None, None, 0.0)
        # That is its own, then: what is newer is in its place before its entry is there.
        if entry is not None and self._values.get(name) is kept:
            self.room.remove(self._index.discard(entry))

    def join(
        self, name: str, origin: Origin, size: int, loop: asyncio.AbstractEventLoop
    ) -> tuple[bool, Decoding] | None:
        """Decode a chunk for all who want it, or wait for who does, if that would be current now.

        Returns
        -------
        tuple of bool, Decoding
            Whether the caller decodes, and then `Landing.land` or `give_up`; else it waits, and `leave` if it does not
            use what comes.
        None
            It cannot be kept: decode it for yourself.
        """
        self.give_up_stopped()
        index, reference = self._index, weakref.ref(loop)
        for _ in range(2):
            decoding = Decoding(reference, name, origin)
            answer: Any = index.join(name, None, decoding, 0.0, True)
            if isinstance(answer, int) and not isinstance(answer, bool):
                return self._lead(decoding, answer, size)
            if not answer:
                return None
            other: Decoding | Decodings = answer[1]
            if (passed := other.take_passed(name)) is not None:
                index.complete_flight(name, passed)
                continue
            if other.is_cut_off:
                # Its reader cannot end it while it is referred to, perhaps by those who wait for it.
                if isinstance(other, Decodings):
                    self.landing.commit(other)
                if (one := self.one(other, name)) is not None:
                    self.give_up(one)
                continue
            if (one := self.one(other, name)) is None:
                # It has ended since the index was asked, or its reader was gone before it could end.
                index.abort_flight(name, other)
                continue
            now = self.now()
            is_current = self.origins.is_current(one.origin, now, now)
            if is_current is None:
                return None
            if not is_current:
                index.invalidate(name)  # It began before a change, or has expired.
                continue
            with self._lock:
                if self.room.follow(one):
                    return False, one
            # It was evicted.
        return None

    def join_all(self, decodings: Decodings, size: int) -> dict[str, Decoding]:
        """`join` for many chunks of one size. Returns those for which the caller waits."""
        self.give_up_stopped()
        index, names, loop = self._index, list(decodings.origins), decodings.loop
        assert loop is not None  # The caller runs in it.
        followed: dict[str, Decoding] = {}
        try:
            tickets = index.lead_all(names, decodings)
            with self._lock:
                led = decodings.lead(names, tickets)
            for name, ticket in zip(names, tickets, strict=True) if led is not names else ():
                if ticket is not None:
                    continue
                joined = self.join(name, decodings.origins[name], size, loop)
                if joined is not None:
                    (decodings.single if joined[0] else followed)[name] = joined[1]
            self.room.admit_all(decodings, led, size)
        except BaseException:
            for name in names:
                index.abort_flight(name, decodings)
            self.give_up_all(decodings)
            for decoding in followed.values():
                self.leave(decoding)
            raise
        return followed

    def one(self, decodings: Decoding | Decodings, name: str) -> Decoding | None:
        """The decode of one chunk, by itself; None where it has ended."""
        with self._lock:
            return decodings.of(name)

    def _lead(self, decoding: Decoding, ticket: int, size: int) -> tuple[bool, Decoding] | None:
        decoding.ticket = ticket
        if not decoding.origin.is_dated:
            self.give_up(decoding)
            return None
        if self._admission.admits(decoding.name, len(self._values)):
            self.room.admit(decoding, size)
        return True, decoding

    def give_up(self, decoding: Decoding) -> None:
        """End a decode that has brought nothing."""
        with self._lock:
            if decoding.is_ended:
                return
            decoding.is_ended = True
            reservation, decoding.reservation = decoding.reservation, None
        index, name = self._index, decoding.name
        try:
            self.room.give_back(reservation)
        finally:
            index.complete_flight(name, decoding.ticket)
            decoding.abandon()

    def passes_over(self, decoding: Decoding) -> bool:
        """End a decode that is done, if no one keeps the chunk or waits for it."""
        if decoding.is_admitted:
            return False
        with self._lock:
            if decoding.waiting or decoding.is_ended:
                return False
            decoding.is_ended = True
        self._index.complete_flight(decoding.name, decoding.ticket)
        decoding.end()
        return True

    def pass_over(self, decodings: Decodings, names: list[str] | None = None) -> None:
        """End those of these decodes, or of all, that are done, and have chunks that are neither kept nor waited for."""
        with self._lock:
            ended = decodings.take(names)
        if ended:
            self._index.complete_flights(list(ended), list(ended.values()))

    def give_up_all(self, decodings: Decoding | Decodings) -> None:
        """`give_up` for all of these decodes."""
        if isinstance(decodings, Decoding):
            if not decodings.is_ended:
                self.give_up(decodings)
            return
        self.pass_over(decodings)
        self.landing.commit(decodings, is_over=True)
        for decoding in list(decodings.single.values()):
            if not decoding.is_ended:
                self.give_up(decoding)

    def give_up_absent(self, decodings: Decoding | Decodings, names: list[str]) -> None:
        """`give_up` for some of these decodes, because the store has no such chunks."""
        self._admission.note_absent(names)
        if isinstance(decodings, Decoding):
            self.give_up(decodings)
            return
        self.pass_over(decodings, names)
        for name in names if decodings.single else ():
            if (decoding := decodings.single.get(name)) is not None:
                self.give_up(decoding)

    def begins(self, reading: Leader) -> None:
        """Note a read that decodes, or waits for who does, until it `ends`."""
        self._readings[id(reading)] = weakref.ref(reading)
        with self._lock:
            self._loops.add(weakref.ref(reading.loop))

    def ends(self, reading: Leader) -> None:
        """Say that all decodes of a read have ended."""
        self._readings.pop(id(reading), None)

    def give_up_stopped(self) -> None:
        """End all that is decoded in event loops that do not run: some are never run again, and would keep its room."""
        if not self._loops:
            return
        with self._lock:
            stopped = [
                one for one in self._loops if (loop := one()) is None or not loop.is_running()
            ]
            self._loops.difference_update(stopped)
        for one in stopped:
            # What was decoded in one that is gone has ended with it.
            if (loop := one()) is not None:
                self.give_up_loop(loop)

    def give_up_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """End all that is decoded in an event loop that does not go on: no one waits for any of it once more."""
        for reference in list(self._readings.values()):
            reading = reference()
            if reading is not None and reading.loop is loop:
                for decodings in reading.led():
                    self.give_up_all(decodings)

    def leave(self, decoding: Decoding) -> None:
        """Do without what another reader decodes."""
        with self._lock:
            kept = decoding.kept
            if kept is None:
                decoding.waiting -= 1
        if kept is not None:
            self.room.unpin(kept)
        elif decoding.is_cut_off:
            self.give_up(decoding)

    def count_followed(self) -> None:
        """Count a miss as a hit: another reader has decoded the chunk."""
        self._reads.recount_as_hit()

    def clear(self) -> None:
        """Let go of everything, and of its memory; what is being decoded now is not kept."""
        self.give_up_stopped()
        index = self._index
        index.invalidate("")
        for victims in drained(index.drain_prefix, ""):
            self.room.remove(victims)
        self.room.give_back_unused()
        self.outputs.clear()
        self._admission.forget_absent()

    def changes(self, prefix: str, *, is_key: bool) -> None:
        """Drop what is at and below a prefix, which is being changed; what is being decoded of it now is not kept.

        What comes of one key is not current any more, and goes first when room is needed: to drop it, the index would look
        at all of the array.
        """
        index = self._index
        if not self._values and index.in_flight == (0, 0):
            return
        if is_key:
            self.room.lapsed.note()
            return
        for number in range(len(self._layouts)):
            scope = f"{number}/{prefix}"
            index.invalidate(scope)
            for victims in drained(index.drain_prefix, scope):
                self.room.remove(victims)

    def count_seconds(self, seconds: float) -> None:
        """Count time that the wrapped pipeline took."""
        with self._lock:
            self._seconds += seconds

    @property
    def size(self) -> int:
        """Bytes that are kept, and that are being decoded to be kept."""
        return self._index.current_size

    def stats(self) -> dict[str, int | float]:
        """What `CacheStore.cache_stats` says of it."""
        return {
            "decoded_hits": self._reads.hits,
            "decoded_misses": self._reads.misses,
            "decoded_size": self.size,
            "decode_seconds": self._seconds,
        }

    def after_fork(self) -> None:
        """Start empty in a forked child: what the parent decodes now never ends here."""
        self._start()


_ACCESS: Final = frozenset(
    {
        *("get", "get_sync", "get_partial_values", "get_ranges", "get_ranges_sync", "_get_many"),
        *("set", "set_sync", "_set", "_set_many", "set_if_not_exists"),
        *("delete", "delete_sync", "delete_dir", "clear"),
    }
)
"""Methods by which a store shows and takes values."""


class KeepsDecoded:
    """Base of the store that may keep decoded chunks of its arrays."""

    _decoded: DecodedCache | None = None


def decoded_of(store: object) -> DecodedCache | None:
    """Decoded chunks of the arrays on a store, if it keeps any.

    Asked of its type: a wrapper may pass the attributes of what it wraps on, and show other values. So may a subclass
    that reads or writes in another way, be it by a method of its own, of a mixin or of another base.
    """
    kind = type(store)
    if KeepsDecoded not in kind.__bases__:
        if not issubclass(kind, KeepsDecoded):
            return None
        usual = next(base for base in kind.__mro__ if KeepsDecoded in base.__bases__)
        # Each time: a method may be assigned to a class at any time.
        if any(getattr(kind, n, None) is not getattr(usual, n, None) for n in _ACCESS):
            return None
    return store._decoded  # type: ignore[attr-defined,no-any-return]


_live: Registry[DecodedCache] = Registry()


def _after_fork() -> None:
    for cache in _live.snapshot():
        cache.after_fork()


at_fork(_after_fork)

NOTHING: Final = {"decoded_hits": 0, "decoded_misses": 0, "decoded_size": 0, "decode_seconds": 0.0}
"""The statistics where no decoded chunks are kept."""
