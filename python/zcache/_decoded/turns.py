"""In which calls the wrapped pipeline is asked, so that what is being decoded takes no more than it may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from zcache._decoded.chunk import overhead
from zcache._decoded.jobs import AsAsked, WantedElements, cost_of_wanted, jobs_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from zcache._decoded.cache import DecodedCache
    from zcache._decoded.chunk import Decoding
    from zcache._decoded.jobs import Job
    from zcache._decoded.layout import Coords
    from zcache._decoded.parts import ShardPart
    from zcache._decoded.whole import WholeChunk

LEAST: Final = 2**25
"""Bytes that each read may take for what it decodes: as much as zarr takes anyway, for ten chunks of some MiB at once."""
SHARE: Final = 16
"""One in so many bytes of `decoded_size` it may take as well."""


def limit_of(max_size: int, output: int) -> int:
    """Bytes that a call may take, unless it is of one chunk."""
    return max(LEAST, max_size // SHARE, 2 * output)


class Turns:
    """Calls of the wrapped pipeline, one after the other: one, if what is missing takes no more than it may.

    Else only such inner chunks are decoded in whole as are kept or waited for, and those of which most is wanted.

    Parameters
    ----------
    cache : DecodedCache
        Decoded chunks.
    output : int
        Bytes of the output of the read.
    """

    def __init__(self, cache: DecodedCache, output: int) -> None:
        self._cache = cache
        self._limit = limit_of(cache.max_size, output)
        self._start()

    def _start(self) -> None:
        self._turn: list[Job | AsAsked] = []
        self._left = self._limit
        # Bytes of room for what this turn may keep: what earlier ones have kept is counted.
        self._promised = 0

    def of(
        self, shards: Sequence[ShardPart], chunks: Sequence[WholeChunk]
    ) -> Iterator[list[Job | AsAsked]]:
        """What is asked in each of them. The next one depends on the room that the one before has left."""
        wanted = [(shard, jobs_of(shard)) for shard in shards]
        turn: list[Job | AsAsked] = [job for _, jobs in wanted for job in jobs]
        turn += chunks
        if sum(job.cost for job in turn) <= self._limit:
            if turn:
                yield turn
            return
        for chunk in chunks:
            yield from self._add([chunk])
        for shard, jobs in wanted:
            if any(isinstance(job, AsAsked) for job in jobs):
                yield from self._add(jobs)
            else:
                yield from self._of_shard(shard)
        yield from self._end()

    def _end(self) -> Iterator[list[Job | AsAsked]]:
        turn = self._turn
        self._start()
        if turn:
            yield turn

    def _add(
        self, jobs: Sequence[Job | AsAsked], promised: int = 0
    ) -> Iterator[list[Job | AsAsked]]:
        cost = sum(job.cost for job in jobs)
        if cost > self._left:
            yield from self._end()
        self._turn += jobs
        self._left -= cost
        self._promised += promised

    def _of_shard(self, shard: ShardPart) -> Iterator[list[Job | AsAsked]]:
        rest = shard.missing
        is_first = True
        while rest:
            now, later, others = self._divide(shard, rest)
            if len(others) == shard.wanted_count:
                yield from self._add([AsAsked(shard)])
                return
            if is_first and len(now) == len(rest):
                jobs = jobs_of(shard)
                if sum(job.cost for job in jobs) <= self._limit:
                    yield from self._add(jobs, sum(now.values()))
                    return
            if is_first and len(rest) == shard.layout.count:
                # Its bytes stay until the next one comes, so it goes by itself.
                yield from self._end()
                shard.is_held = True
            is_first = False
            yield from self._by_elements(shard, others)
            yield from self._in_whole(shard, now)
            if later or shard.is_held:
                yield from self._end()
            rest = later

    def _by_elements(
        self, shard: ShardPart, coords: Iterable[Coords]
    ) -> Iterator[list[Job | AsAsked]]:
        """What is wanted of inner chunks, in as many jobs as it takes."""
        some: list[Coords] = []
        left = self._limit
        for at in coords:
            cost = cost_of_wanted(shard, at)
            if some and cost > left:
                yield from self._add([WantedElements(shard, some)])
                some, left = [], self._limit
            some.append(at)
            left -= cost
        if some:
            yield from self._add([WantedElements(shard, some)])

    def _in_whole(
        self, shard: ShardPart, promised: dict[Coords, int]
    ) -> Iterator[list[Job | AsAsked]]:
        """Inner chunks, and the room that each has, in as many jobs as it takes."""
        coords = list(promised)
        while coords:
            count = len(coords)
            while True:
                some = coords[:count]
                jobs = jobs_of(shard, some)
                cost = sum(job.cost for job in jobs)
                if cost <= self._limit or count == 1:
                    break
                count = max(1, min(count - 1, count * self._limit // cost))
            yield from self._add(jobs, sum(promised[at] for at in some))
            coords = coords[count:]

    def _divide(
        self, shard: ShardPart, coords: Sequence[Coords]
    ) -> tuple[dict[Coords, int], list[Coords], list[Coords]]:
        """Inner chunks to be decoded in whole, those for which there may be room after that, and those that no one needs.

        The first ones with the bytes of room that each is promised. They include those that take more by their elements.
        """
        decodings, cache = shard.decodings, self._cache
        late: Collection[str] = ()
        single: dict[str, Decoding] = {}
        if decodings is not None:
            late, single = decodings.late, decodings.single
        now: dict[Coords, int] = {}
        later: list[Coords] = []
        others: list[Coords] = []
        unneeded: list[Coords] = []
        room = cache.room.unused - self._promised
        for at, name in zip(coords, shard.names(coords), strict=True):
            size = shard.layout.size + overhead(name)
            one = single.get(name)
            if one is not None and (one.is_admitted or one.waiting):
                now[at] = 0
            elif name in late and size <= room:
                now[at] = size
                room -= size
            elif cost_of_wanted(shard, at) >= shard.layout.size:
                now[at] = 0
            else:
                (later if name in late else others).append(at)
        if later and not self._promised and not any(now.values()):
            others, later = others + later, []
        if decodings is None:
            return now, later, others
        # From now on who wants one of them decodes it for himself; who waits already gets it.
        names = shard.names(others)
        cache.pass_over(decodings, names)
        for at, name in zip(others, names, strict=True):
            one = single.get(name)
            if one is not None and not one.is_ended and not cache.passes_over(one):
                now[at] = 0
            else:
                unneeded.append(at)
        return now, later, unneeded
