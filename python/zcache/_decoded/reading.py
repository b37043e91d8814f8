"""One read of a selection: hits are copied, what is missing is decoded by the wrapped pipeline, in one call if that takes little."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

from zarr.core.buffer import cpu

from zcache._decoded.chunk import Decodings
from zcache._decoded.jobs import AsAsked, largest_of, stacks_of
from zcache._decoded.layout import scatter
from zcache._decoded.parts import Output, ShardPart
from zcache._decoded.turns import Turns
from zcache._decoded.whole import WholeChunk, join_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zcache._decoded.cache import DecodedCache
    from zcache._decoded.chunk import Decoding, Kept
    from zcache._decoded.jobs import Job
    from zcache._decoded.layout import Array, Layout

PATIENCE: Final = 1.0
"""Seconds for which a reader waits at least for what others decode."""
PACE: Final = 40 * 2**20
"""Bytes that a slow codec decodes in a second: for as long as its own decode may take, a reader waits for that of others."""
ON_ITS_WAY: Final = 2.0
"""Seconds for which a reader waits for a chunk the bytes of which are on their way from the source: its own read would join theirs."""


class _Catcher(cpu.NDBuffer):
    """Stands for the output in a call of zarr's pipelines: what they assign goes to who asked for it.

    So each decoded chunk is copied out as soon as it is there, and kept without a copy.
    """

    def __init__(self, target: Any, jobs: Sequence[Job | AsAsked]) -> None:
        super().__init__(target)
        self._jobs = jobs

    def __setitem__(self, key: Any, value: Any) -> None:
        job = self._jobs[key]
        if isinstance(value, cpu.NDBuffer):
            array = value.as_numpy_array()
            # Out of an array without axes zarr takes a scalar, and of text that is only as long as its value.
            job.arrived(array if array.ndim else array.astype(job.part.layout.dtype, copy=False))
        else:
            job.was_missing(value)


class Reading:
    """One call of `CodecPipeline.read`.

    Parameters
    ----------
    pipeline : CodecPipeline
        The wrapped pipeline.
    cache : DecodedCache
        Decoded chunks.
    target : ndarray
        The output.
    drop_axes : tuple of int
        Axes that it does not have.
    size : int
        Chunks that are read.
    patience : int
        How many times as long as usual it waits for others.
    """

    def __init__(
        self,
        pipeline: Any,
        cache: DecodedCache,
        target: Array,
        drop_axes: tuple[int, ...],
        size: int,
        patience: int = 1,
    ) -> None:
        self.pipeline = pipeline
        self.cache = cache
        self._patience = patience
        self.output = Output(cache, target, drop_axes, size)
        self._shards: list[ShardPart] = []
        self._chunks: list[WholeChunk] = []
        # Of chunks: shards have their own.
        self._decodings: list[Decoding | Decodings] = []
        # For how many seconds it waits for others, until when, and whether it has done so in vain.
        self._allowance = self._until = 0.0
        self._is_late = False

    async def run(
        self, batch: Sequence[Any], layouts: Sequence[Layout], out: Any, *, is_missed: bool = False
    ) -> Any:
        """Read a batch, and say which chunks were there; with `is_missed` the cache was asked, and has none of it."""
        try:
            self._look_up(batch, layouts, is_missed=is_missed)
            if self._shards or self._chunks:
                self.cache.begins(self)
                self._postpone()
                await self._decode(out)
                for many in self._many():
                    self.cache.landing.commit(many)
                await self._take_followed(out)
        finally:
            if self._shards or self._chunks:
                self._end()
        return tuple(self.output.results)

    def _end(self) -> None:
        """Do without what has not ended."""
        for part in self._parts():
            if part.followed:
                part.leave()
        for decodings in self.led():
            self.cache.give_up_all(decodings)
        self.cache.ends(self)
        # Nothing here keeps the output any longer.
        self._shards.clear()
        self._chunks.clear()

    def _look_up(self, batch: Sequence[Any], layouts: Sequence[Layout], *, is_missed: bool) -> None:
        """Copy out what is kept, and note what else is wanted."""
        output, cache = self.output, self.cache
        hits: list[Kept] = []
        chunks: dict[Layout, list[int]] = {}
        shards: list[ShardPart] = []
        try:
            for number, layout in enumerate(layouts):
                if layout.inner is None:
                    chunks.setdefault(layout, []).append(number)
                    continue
                shard = ShardPart(output, number, batch[number], layout)
                shards.append(shard)
                if shard.look_up(hits, is_missed=is_missed):
                    shards.pop()
            self._shards += shards
            for layout, numbers in chunks.items():
                self._look_up_chunks(batch, layout, numbers, hits, is_missed=is_missed)
            # Once all are looked up: room for one must not be that of another one that is kept.
            for shard in shards:
                shard.join()
        finally:
            output.has_values = any(kept.memory is not None for kept in hits)
            cache.room.unpin(*hits)

    def _look_up_chunks(
        self,
        batch: Sequence[Any],
        layout: Layout,
        numbers: list[int],
        hits: list[Kept],
        *,
        is_missed: bool,
    ) -> None:
        """The same for the chunks of one layout."""
        output, target, drop_axes = self.output, self.output.target, self.output.drop_axes
        prefix = f"{layout.number}/"
        names = [prefix + batch[n][0].path for n in numbers]
        found = set()
        hit = () if is_missed else self.cache.get_all(names, output.mark, output.now)
        for at, kept in hit:
            hits.append(kept)
            found.add(at)
            _, _, selection, place, _ = batch[numbers[at]]
            scatter(target, place, kept.array, selection, drop_axes)
        if len(found) == len(names):
            return
        parts = [
            WholeChunk(output, number, batch[number], layout, names[at])
            for at, number in enumerate(numbers)
            if at not in found
        ]
        self._chunks += parts
        decodings = join_chunks(parts, layout.size)
        if decodings is not None:
            self._decodings.append(decodings)

    def _postpone(self) -> None:
        """Where there is no room for all that is decoded, have no one hold it for what may be absent."""
        led = self._many()
        if any(decodings.late for decodings in led):
            for decodings in led:
                self.cache.room.postpone(decodings)

    def _parts(self) -> list[ShardPart | WholeChunk]:
        return [*self._shards, *self._chunks]

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """In which chunks are decoded."""
        return self.output.loop

    def led(self) -> list[Decoding | Decodings]:
        """What others may wait for."""
        shards = [shard.decodings for shard in self._shards]
        return [one for one in (*self._decodings, *shards) if one is not None]

    def _many(self) -> list[Decodings]:
        return [one for one in self.led() if isinstance(one, Decodings)]

    async def _decode(self, out: Any) -> None:
        chunks = [chunk for chunk in self._chunks if not chunk.followed]
        if not self._is_zarrs:
            for chunk in chunks:
                chunk.cost = chunk.layout.size
        begun = time.perf_counter()
        held: ShardPart | None = None
        for jobs in Turns(self.cache, self.output.target.nbytes).of(self._shards, chunks):
            part = jobs[0].part
            if held is not None and held is not part:
                held.release()
                held = None
            if held is None and isinstance(part, ShardPart) and part.is_held:
                held = part
                await part.hold()
            await self._ask(jobs, out)
        if held is not None:
            held.release()
        self.cache.count_seconds(time.perf_counter() - begun)

    @property
    def _is_zarrs(self) -> bool:
        """Whether zarr's own pipeline decodes, which only assigns to its output."""
        return type(self.pipeline).__module__ == "zarr.core.codec_pipeline"

    async def _ask(self, jobs: Sequence[Job | AsAsked], out: Any) -> None:
        """One call of the wrapped pipeline."""
        items = [
            (item[0], item[1], job.selection, number, item[4])
            for number, job in enumerate(jobs)
            for item in (job.part.item,)
        ]
        if self._is_zarrs:
            catcher: Any = _Catcher(self.output.target, jobs)
            await self.pipeline.read(items, catcher, drop_axes=())
        else:
            await self._decode_elsewhere(items, jobs, out)

    async def _decode_elsewhere(
        self, items: Sequence[Any], jobs: Sequence[Job | AsAsked], out: Any
    ) -> None:
        """The same with a pipeline that may write into the memory of its output.

        It gets memory for whole chunks, one below the other, from which those that are kept are copied.
        """
        asked = []
        pairs: list[tuple[Any, Job]] = []
        for item, job in zip(items, jobs, strict=True):
            if isinstance(job, AsAsked):
                asked.append((*item[:3], job.part.item[3], item[4]))
            else:
                pairs.append((item, job))
        if asked:
            parts = [job.part for job in jobs if isinstance(job, AsAsked)]
            found: Any = await self.pipeline.read(asked, out, self.output.drop_axes) or ()
            for n, part in enumerate(parts):
                part.is_absent = bool(found) and found[n]["status"] == "missing"
        stacks = stacks_of(pairs)
        if len(stacks) == 1:
            await self._decode_stack(stacks[0])
            return
        # As in one call: all of them at once.
        tasks = [asyncio.ensure_future(self._decode_stack(stack)) for stack in stacks]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _decode_stack(self, stack: Sequence[Any]) -> None:
        """Decode what lies in one array."""
        shapes: list[Any] = [job.shape for _, job in stack]
        places, rows = [], 0
        for shape in shapes:
            rest = [slice(0, n) for n in shape[1:]]
            places.append((slice(rows, rows + shape[0]), *rest) if shape else ())
            rows += shape[0] if shape else 0
        dtype = stack[0][1].part.layout.dtype
        buffer = cpu.NDBuffer.empty((rows, *largest_of(shapes)) if shapes[0] else (), dtype=dtype)
        wanted = [
            (*item[:3], place, item[4]) for (item, _), place in zip(stack, places, strict=True)
        ]
        found: Any = await self.pipeline.read(wanted, buffer, drop_axes=()) or ()
        array = buffer.as_numpy_array()
        for n, (_, job) in enumerate(stack):
            where: Any = (*places[n], ...)
            chunk = array[where]
            # Where it does not say what was there, nothing but the fill value is not kept.
            only_fill = job.part.layout.only_fill(chunk) is not None
            if found[n]["status"] == "missing" if found else only_fill:
                job.was_missing(chunk.flat[0])
            else:
                job.arrived(chunk)

    async def _take_followed(self, out: Any) -> None:
        """Copy out what others have decoded; what they could not, or not in time, is read here."""
        following = [part for part in self._parts() if part.followed]
        size = sum(len(part.followed) * part.layout.size for part in following)
        self._allowance = self._patience * (PATIENCE + size / PACE)
        self._until = self.loop.time() + self._allowance
        again: list[Any] = []
        overdue: list[Any] = []
        for part in following:
            lost = await self._take(part)
            if any(decoding.is_overdue for decoding in lost):
                overdue.append(part)
            elif lost:
                again.append(part)
        for shard in self._shards:
            if shard not in again and shard not in overdue:
                shard.finish()
        if again:
            begun = time.perf_counter()
            items = [part.item for part in again]
            found: Any = await self.pipeline.read(items, out, self.output.drop_axes)
            self.cache.count_seconds(time.perf_counter() - begun)
            self._report(again, found or ())
        if overdue:
            await self._start_over(overdue, out)

    async def _take(self, part: ShardPart | WholeChunk) -> list[Decoding]:
        """Copy out what others decode of a chunk or shard. Returns what has come to nothing."""
        lost: list[Decoding] = []
        while part.followed:
            at, decoding = next(iter(part.followed.items()))
            ended = decoding.done or await self._wait(decoding)
            del part.followed[at]
            if ended and (kept := decoding.kept) is not None:
                self.output.copy(part, at, kept)
                self.cache.count_followed()
                if isinstance(part, ShardPart):
                    part.is_absent = False
                continue
            self.cache.leave(decoding)
            if not ended and (loop := decoding.loop) is not None:
                self.cache.give_up_loop(loop)
            lost.append(decoding)
        return lost

    async def _wait(self, decoding: Decoding) -> bool:
        """Wait for a chunk that another reader decodes; False if it cannot be awaited.

        If that takes too long, the decode is abandoned for all who wait: a reader must not depend on what else another one reads.
        """
        latest = self.loop.time() + self._patience * ON_ITS_WAY
        was_on_its_way = False
        while not self._is_late:
            try:
                async with asyncio.timeout_at(self._until):
                    return await decoding.wait()
            except TimeoutError:
                now = self.loop.time()
                is_on_its_way = now < latest and self.cache.origins.is_on_its_way(decoding.origin)
                # Those that come after it are not waited for either.
                self._is_late = not (is_on_its_way or was_on_its_way)
                self._until, was_on_its_way = now + self._allowance, is_on_its_way
        if not decoding.done:
            if (loop := decoding.loop) is None or not loop.is_running():
                return False
            decoding.is_overdue = True
            self.cache.give_up(decoding)
        return True

    async def _start_over(self, parts: Sequence[Any], out: Any) -> None:
        """Read what others decode too slowly: one of those who have waited for it decodes it for all of them."""
        for decodings in self.led():
            self.cache.give_up_all(decodings)
        output = self.output
        reading = Reading(
            self.pipeline,
            self.cache,
            output.target,
            output.drop_axes,
            len(parts),
            # So few decode the same where the source is slow.
            2 * self._patience,
        )
        items, layouts = [part.item for part in parts], [part.layout for part in parts]
        self._report(parts, await reading.run(items, layouts, out))

    def _report(self, parts: Sequence[Any], found: Sequence[Any]) -> None:
        """Say which of the chunks were there, if that is known."""
        for part, result in zip(parts, found, strict=False):
            self.output.results[part.number] = result
