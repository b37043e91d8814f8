"""`CacheStore.record`: the requests of a store, written to a file while they are made."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections import deque
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from zcache._advice.file_format import (
    COLUMNS,
    HEAD,
    RECORDING_FORMAT,
    errors_name,
    path_of_recording,
)
from zcache._advice.trace import sampled
from zcache._byte_ranges import to_text
from zcache._core import is_cacheable_key
from zcache._runtime.exiting import at_exit
from zcache._runtime.fork import at_fork
from zcache._runtime.latch import Latch
from zcache._runtime.registry import Registry
from zcache._runtime.threads import Life, start_thread
from zcache._source.urls import redact
from zcache.exceptions import RecordingExistsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from zcache._backends.base import Hit
    from zcache._byte_ranges import ByteRange
    from zcache._protocol.hits import Hits

logger = logging.getLogger("zcache")

BATCH: Final = 32_768
"""Requests that are written together, ..."""
PAUSE: Final = 1.0
"""... or all that there are after so many seconds."""
MOST: Final = 1_000_000
"""Requests that wait to be written at most; those for which there is no room are left out."""
MOST_PENDING: Final = 100_000
"""Requests that wait for what they come to at most."""
_BESIDE_DIGITS: Final = 12
"""Room in the first line for a number that is known when the recording ends."""
_AT_ONCE: Final = 500
"""Lines that are made while no other thread runs."""

# Time, key, range, bytes (None where they are not known), whether it was a hit; the name and the bytes of the entry, where
# that is not what was asked for; for a miss whether what is cached was too old.
_Request = tuple[float, str, "ByteRange | None", int | None, bool, str | None, int | None, bool]


class _Look(NamedTuple):
    """A request that was looked up: when, what was found, and whether what is cached was too old."""

    at: float
    hit: Hit | None
    outdated: bool


class _Outcomes:
    """What requests come to, as readers tell it, in that order. For one thread at a time.

    Attributes
    ----------
    known : list
        Requests of which it is known.
    pending : int
        How many others there are.
    """

    def __init__(self) -> None:
        self.known: list[_Request] = []
        self.pending = 0
        self._looks: dict[tuple[str, ByteRange | None], list[_Look]] = {}

    def hit(self, key: str, byte_range: ByteRange | None, look: _Look) -> None:
        """What was found has served the request."""
        hit = look.hit
        assert hit is not None
        if isinstance(hit, int):
            self.known.append((look.at, key, byte_range, hit, True, None, None, False))
        else:
            self.known.append((look.at, key, byte_range, hit[3], True, hit[0], hit[1], False))

    def wait(self, key: str, byte_range: ByteRange | None, look: _Look) -> None:
        """A request was looked up of which more will be told."""
        if self.pending >= MOST_PENDING:
            self.end()
        self._looks.setdefault((key, byte_range), []).append(look)
        self.pending += 1

    def read(self, key: str, byte_range: ByteRange | None, served: bool) -> None:
        """See `Recorder.read`."""
        look = self._take(key, byte_range, found=True)
        if look is not None and served:
            self.hit(key, byte_range, look)
        elif look is not None:
            self.wait(key, byte_range, look._replace(hit=None))

    def brought(
        self,
        key: str,
        byte_range: ByteRange | None,
        size: int,
        hit: bool,
        entry: tuple[str, int] | None,
    ) -> None:
        """See `Recorder.brought`."""
        look = self._take(key, byte_range, found=False)
        if look is not None:
            self.known.append(
                (look.at, key, byte_range, size, hit, *(entry or (None, None)), look.outdated)
            )

    def retract(self, key: str, byte_range: ByteRange | None) -> None:
        """See `Recorder.retract`."""
        self._take(key, byte_range, found=False)

    def end(self) -> None:
        """Take what has come to nothing yet for hits, and misses without their size."""
        looks, self._looks, self.pending = self._looks, {}, 0
        for (key, byte_range), some in looks.items():
            for look in some:
                if look.hit is not None:
                    self.hit(key, byte_range, look)
                else:
                    self.known.append(
                        (look.at, key, byte_range, None, False, None, None, look.outdated)
                    )

    def _take(self, key: str, byte_range: ByteRange | None, *, found: bool) -> _Look | None:
        """Take out the last of these requests that has found something, or nothing: each reader tells of its own."""
        asked = key, byte_range
        looks = self._looks.get(asked, [])
        for number in reversed(range(len(looks))):
            if (looks[number].hit is not None) is found:
                look = looks.pop(number)
                self.pending -= 1
                if not looks:
                    del self._looks[asked]
                return look
        return None


class Recording:
    """A file that the requests of one store and its copies are written to, in this process.

    It ends by `close`, with its ``with`` block, or where no one refers to it any more. One that is open when the
    process exits is written to its end.

    Parameters
    ----------
    writer : RequestWriter
        Does the work: readers and a thread refer to that, and so do not keep alive a recording that its user has
        dropped.
    """

    def __init__(self, writer: RequestWriter) -> None:
        self._writer = writer
        self._is_closed = False
        # First: what an interrupt leaves of the rest ends as well.
        weakref.finalize(self, writer.drop).atexit = False
        writer.begin()

    def __enter__(self) -> Self:
        if self._is_closed:
            raise UsageError(
                f"the recording {self._writer.shown!r} is closed. Begin another: `with store.record(path):`, with "
                "the path of a file that does not exist."
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, once all is written. In a forked child nothing is left to do."""
        self._is_closed = True
        self._writer.close()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is recorded any more: it was closed, or the file could not be written."""
        return self._writer.has_ended

    @property
    def left_out(self) -> int:
        """Requests that were not written, because they came faster than they could be."""
        return self._writer.left_out


class RequestWriter:
    """Takes the requests of readers for a `Recording`, and has a thread that writes them.

    Parameters
    ----------
    hits : Hits
        Where the requests come by.
    path : path-like
        Of the file, which must not exist.
    anonymous : bool
        Whether keys are written as hashes, with a secret that is not kept.
    about : dict
        What is said of the store at the beginning.

    Attributes
    ----------
    left_out : int
        Requests that were not written, because they came faster than they could be.
    shown : str
        The path, without what is secret where that is a URL.

    Raises
    ------
    OptionTypeError, OptionValueError
        If no file can have such a path.
    """

    def __init__(
        self,
        hits: Hits,
        path: str | os.PathLike[str],
        *,
        anonymous: bool,
        about: dict[str, Any],
    ) -> None:
        self._hits = hits
        self._path = path_of_recording(path)
        self.shown = redact(self._path)
        self._secret = secrets.token_bytes(32) if anonymous else None
        # The handler of a signal that has interrupted a reader may close it, and waits for the thread that writes. So that takes no
        # lock of readers, each step of which is one of a deque.
        self._told: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._outcomes = _Outcomes()
        self._warnings: deque[tuple[Any, ...]] = deque()
        # Guards `left_out`; never held over I/O, for readers take it.
        self._counting = threading.RLock()
        self.left_out = 0
        # Guards the end, which takes place once.
        self._ending = threading.RLock()
        self._once = iter((None,))
        self._begun = time.perf_counter()
        self._is_ended, self._has_stopped = Latch(), Latch()
        self._is_dropped = False
        self._process = os.getpid()
        self._about = {**about, "anonymous": anonymous}

    def begin(self) -> None:
        """Make the file, and take requests from now on; whatever it raises, nothing is left of it.

        Raises
        ------
        RecordingExistsError
            If there is such a file.
        OSError
            If it cannot be made.
        UsageError
            If the requests are being recorded already.
        """
        file: io.FileIO | None = None
        try:
            # Without a buffer: what could not be written is not tried again.
            with errors_name(self._path):
                file = self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - closed when it ends
                self._append(self._head(0))
            # Before it takes requests: a child that is forked then has to take none.
            _writers.add(self)
            self._hits.hook.attach(self, self._hits)
            self._start()
        except BaseException as error:
            self.drop()
            self._told.clear()
            self._has_stopped.set()
            if file is not None:
                file.close()
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
            elif isinstance(error, FileExistsError):
                raise RecordingExistsError(
                    f"{self.shown!r} exists already, and a recording overwrites nothing. Give another path, or "
                    "remove the file."
                ) from None
            raise

    def _start(self) -> None:
        """Have a thread write; `_has_stopped` is set once it has ended."""
        life = Life()
        # Also where that is before its first line.
        weakref.finalize(life, self._has_stopped.set).atexit = False
        start_thread([life], self._run)

    def _run(self, _: Life) -> None:
        try:
            with self._ends_it():
                while not (self._is_ended.wait(PAUSE) or self._is_dropped):
                    self._write_told()
                self._write_told()
            if not self._is_ended.is_set:
                self._end()
        finally:
            self._has_stopped.set()
        if not self._is_ended.is_set:
            self._warn()

    def close(self) -> None:
        """See `Recording.close`."""
        self._hits.hook.detach(self, self._hits)
        self._is_ended.set()
        if self._process != os.getpid():
            return
        self._has_stopped.wait()
        self._end()
        self._warn()

    def drop(self) -> None:
        """End it soon, without a lock and without waiting: the garbage collector calls it anywhere."""
        self._hits.hook.detach(self, self._hits)
        self._is_dropped = True

    @property
    def has_ended(self) -> bool:
        """See `Recording.has_ended`."""
        return self._hits.hook.recorder is not self

    # ------------------------------------------------------ what readers call

    def looked_up(
        self, key: str, byte_range: ByteRange | None, hit: Hit | None, *, served: bool
    ) -> None:
        """A request was looked up: what the index has found, or None; and whether that was served at once."""
        at, outdated = time.perf_counter() - self._begun, False
        step = self._outcomes.wait
        if served:
            step = self._outcomes.hit
        elif hit is None:
            if not is_cacheable_key(key):
                return
            outdated = self._hits.is_outdated(key, byte_range)
        if len(self._told) < MOST:
            self._told.append((step, (key, byte_range, _Look(at, hit, outdated))))
        else:
            with self._counting:
                self.left_out += 1

    def _tell(self, step: Callable[..., None], *args: Any) -> None:
        """Tell what a request has come to; without that its size stays unknown."""
        if len(self._told) < 2 * MOST:
            self._told.append((step, args))

    def read(self, key: str, byte_range: ByteRange | None, *, served: bool) -> None:
        """See `Recorder.read`."""
        self._tell(self._outcomes.read, key, byte_range, served)

    def brought(
        self,
        key: str,
        byte_range: ByteRange | None,
        size: int,
        *,
        hit: bool,
        entry: tuple[str, int] | None,
    ) -> None:
        """See `Recorder.brought`."""
        self._tell(self._outcomes.brought, key, byte_range, size, hit, entry)

    def retract(self, key: str, byte_range: ByteRange | None) -> None:
        """See `Recorder.retract`."""
        self._tell(self._outcomes.retract, key, byte_range)

    # ------------------------------------------------------------ the writer

    @contextlib.contextmanager
    def _ends_it(self) -> Iterator[None]:
        """Have an error end the recording, and no reader see it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is
            self._hits.hook.detach(self, self._hits)
            self._told.clear()
            with contextlib.suppress(OSError):
                self._file.close()
            self._warnings.append(
                (
                    "the recording of requests to %s has ended before its time: %r. What was written before stays.",
                    self.shown,
                    error,
                )
            )

    def _end(self) -> None:
        """Write what is left, and close the file, once."""
        # Not under the lock, for it may wait for other threads.
        beside = None if self._file.closed else self._beside()
        with self._ending:
            # The handler of a signal that comes in here leaves it to what it has interrupted.
            for _ in self._once:
                self._finish(beside)

    def _finish(self, beside: int | None) -> None:
        if not self._file.closed:
            with self._ends_it(), contextlib.closing(self._file):
                self._write_told()
                self._outcomes.end()
                self._write_known()
                if beside is not None:
                    os.pwrite(self._file.fileno(), self._head(beside), 0)
        if self.left_out:
            self._warnings.append(
                (
                    "%s lacks %d requests, which came faster than they could be written.",
                    self.shown,
                    self.left_out,
                )
            )

    def _warn(self) -> None:
        """Log what there is to warn of, while no one waits for this thread: the log has locks."""
        with contextlib.suppress(IndexError):
            while True:
                logger.warning(*self._warnings.popleft())

    def _rest(self) -> None:
        """Let readers go first, but where one waits for the end: each turn of theirs may take milliseconds."""
        if not self._is_ended.is_set:
            time.sleep(0)

    def _write_told(self) -> None:
        outcomes = self._outcomes
        while self._told:
            while self._told and len(outcomes.known) < BATCH:
                for _ in range(min(_AT_ONCE, len(self._told))):
                    step, args = self._told.popleft()
                    step(*args)
                self._rest()
            self._write_known()

    def _write_known(self) -> None:
        """Write the requests of which it is known what they have come to, in batches."""
        while known := self._outcomes.known:
            some, self._outcomes.known = known[:BATCH], known[BATCH:]
            text = io.StringIO(newline="")
            lines = csv.writer(text)
            for begin in range(0, len(some), _AT_ONCE):
                lines.writerows(self._lines(some[begin : begin + _AT_ONCE]))
                self._rest()
            self._append(gzip.compress(text.getvalue().encode(), 6))

    def _lines(self, requests: Iterable[_Request]) -> Iterable[tuple[Any, ...]]:
        for at, key, byte_range, size, hit, entry, whole, outdated in requests:
            asked = to_text(byte_range)
            shown = key if self._secret is None else self._hash(key)
            known = "" if size is None else size
            by, by_size = asked, known
            if entry is not None and whole is not None:
                by, by_size = "" if entry == key else entry.rpartition("@")[2], whole
            yield (f"{at:.6f}", shown, asked, known, int(hit), by, by_size, int(outdated))

    def _hash(self, key: str) -> str:
        return blake2b(key.encode(), key=self._secret or b"", digest_size=16).hexdigest()

    def _head(self, beside: int) -> bytes:
        """The first member of the file, of one length, so that it can be written again in its place."""
        shown = json.dumps({**self._about, "beside_value": beside})
        room = len(json.dumps({**self._about, "beside_value": 0})) + _BESIDE_DIGITS
        text = f"{HEAD}{shown:<{room}}\r\n{','.join(COLUMNS[RECORDING_FORMAT])}\r\n"
        return gzip.compress(text.encode(), 0)

    def _beside(self) -> int | None:
        """What the cache store has beside each value, which is not known while the cache is empty; None if no one can tell."""
        ask = partial(sampled, header=self._hits.backend.value_header)
        try:
            return self._hits.handle.call_blocking(ask).beside
        except Exception:  # noqa: BLE001 - whatever it is, the requests are to be written
            return None

    def _append(self, data: bytes) -> None:
        """Add a member to the file, all of it or nothing."""
        before = self._file.tell()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise

    def after_fork(self) -> None:
        """Leave the file to the parent."""
        self._hits.hook.detach(self, self._hits)
        self._counting, self._ending, self._is_ended = threading.RLock(), threading.RLock(), Latch()


# A thread that still writes keeps its own alive.
_writers: Registry[RequestWriter] = Registry()


def _after_fork() -> None:
    for writer in _writers.snapshot():
        writer.after_fork()


def _at_exit(threads_have_ended: bool) -> None:
    if threads_have_ended:
        for writer in _writers.snapshot():
            writer.close()


at_fork(_after_fork)
at_exit(_at_exit)
