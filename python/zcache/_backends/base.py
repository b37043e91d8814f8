"""What the protocol needs of a cache store. Each kind of cache store implements this interface.

Names are keys of the cache store: a full value has the name of its key, a range one below
``.zcache/ranges/``. A method that raises an `Exception` has ended; after a `NoAnswerError` the
operation may go on, and its end is reported to the index by the backend itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from zcache._index.counters import Counters
from zcache._index.handle import ignore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from zcache._backends.access import Access
    from zcache._byte_ranges import ByteRange
    from zcache._core import Index
    from zcache._index.shared import SharedIndex
    from zcache._runtime.circuit_breaker import Operation
    from zcache._runtime.io import IO

    Victim = tuple[int, str]
    TryRead = Callable[[str, BufferPrototype, int, int, int], Buffer | None]
    FillNow = Callable[[str, ByteRange | None, bytes, Buffer, int, float], bool | None]
    Hit = int | tuple[str, int, int, int, int | None, int | None, bool]

ABSENT: Final = False
"""Stands for a hit: the source has no such key."""
BUSY: Final = -1
"""Stands for a hit or miss that is not known yet: the lock of the index was taken."""
READ_TIMEOUT: Final = 1.0
"""Seconds within which the cache store has to answer a hit, beside what its bytes take; then the source serves it."""
READ_RATE: Final = 2**26
"""Bytes that it has to read in each further second: the first hit of a process reads all of a value, however large."""
DELETE_TIMEOUT: Final = 1.0
"""Seconds that a write or delete waits for the cache store to drop what is outdated."""
WRITE_TIMEOUT: Final = 30.0
"""Seconds that one value may take to be written before that counts as a failure."""


def read_timeout(size: int) -> float:
    """Seconds within which the cache store has to answer a hit of so many bytes."""
    return READ_TIMEOUT + size / READ_RATE


class FillJob:
    """A value on its way into the cache store.

    Attributes
    ----------
    key : str
        Its key.
    byte_range : ByteRange or None
        Which part of the value it is; None for all.
    data : bytes
        The bytes.
    ticket : int
        Of its flight: whether it may be kept.
    fetched : float
        When the source was asked, in seconds on the clock of the index.
    backend : Backend
        Through which it was read or written.
    number : int
        Its place in the order of all jobs of a queue.
    handed_over_by : int or None
        The thread that is handing it over to the filler, until that has ended, well or not.
    """

    __slots__ = (
        "backend",
        "byte_range",
        "data",
        "fetched",
        "handed_over_by",
        "key",
        "number",
        "ticket",
    )

    def __init__(
        self,
        key: str,
        byte_range: ByteRange | None,
        data: bytes,
        ticket: int,
        fetched: float,
        backend: Backend,
    ) -> None:
        self.backend = backend
        self.key = key
        self.byte_range = byte_range
        self.data = data
        self.ticket = ticket
        self.fetched = fetched
        self.number = 0
        self.handed_over_by: int | None = None

    @property
    def name(self) -> str:
        """The key as the index of the place has it."""
        return self.backend.folder + self.key


class Ended:
    """How a job ended.

    Attributes
    ----------
    job : FillJob
        The job.
    failures : list of (Exception, Operation)
        What failed on the way, and which kind of operation that was.
    written : bool
        Whether the value is in the cache store.
    corrupt : bool
        Whether the index has to be rebuilt.
    reason : str or None
        Why the index has left the value uncached, if it has.
    """

    __slots__ = ("corrupt", "failures", "job", "reason", "written")

    def __init__(
        self,
        job: FillJob,
        *,
        written: bool = False,
        corrupt: bool = False,
        failures: Sequence[tuple[Exception, Operation]] = (),
        reason: str | None = None,
    ) -> None:
        self.job = job
        self.reason = reason
        self.written = written
        self.corrupt = corrupt
        self.failures = failures


class Filler(Protocol):
    """Carries out the jobs of a queue, in the background. One for each place, or pool, and process.

    Attributes
    ----------
    access : Access
        What may be done with the cache store. Where nothing is added, no job is begun; for want of room that is a refusal.
    """

    @property
    def access(self) -> Access: ...

    def submit(self, io: IO, job: FillJob) -> None:
        """Begin a job, or put it behind others; it always ends, and its flight with it.

        Raises
        ------
        Exception
            If it cannot be begun; then nothing of it is left.
        """

    def collect(self) -> Sequence[Ended]:
        """What has ended since the last call; never waits."""

    @property
    def completed(self) -> int:
        """Jobs that have ended since the beginning."""

    @property
    def is_idle(self) -> bool:
        """Whether no job is under way."""

    async def wait(self, io: IO, completed: int, timeout: float) -> bool:  # noqa: ASYNC109
        """Wait until `completed` is more than this; False after `timeout` seconds."""

    def can_wait_here(self) -> bool:
        """Whether jobs go on while a caller in this thread blocks."""


class Backend(ABC):
    """One cache store, as the protocol sees it.

    Parameters
    ----------
    store : Store
        The cache store.
    shared : SharedIndex
        The index of its place, with what all stores over that place share.

    Attributes
    ----------
    filler : Filler or None
        Carries out fills in the background; None where `fill_now` does them.
    fill_now : callable or None
        Fills on the spot, in one step, where nothing of it can wait or fail: takes key, byte range,
        bytes, a buffer over them, ticket and fetch time; returns whether a reader has joined the
        flight, or None where the value stays uncached and its flight open.
    works_in_background : bool
        Whether `begin` does anything.
    counters : Counters
        What its reads and writes came to.
    owns_what_it_reads : bool
        Whether `try_read` returns memory that is the reader's alone.
    removes_by_name : bool
        Whether others may take in, without the index, what is stored: then a change of the source removes
        it by name, whether or not the index knows it.
    value_header : int
        Bytes that stand before each value, in the blocks that it takes.
    folder : str
        What its keys begin with in the index of the place, where that is of several sources.
    """

    verify: ClassVar[str | None] = None
    """When bytes are verified, whatever the store asks for; None for as it asks."""
    filler: Filler | None = None
    fill_now: FillNow | None = None
    owns_what_it_reads: ClassVar[bool] = True
    works_in_background: ClassVar[bool] = True
    removes_by_name: ClassVar[bool] = False
    value_header: ClassVar[int] = 0
    folder = ""

    def __init__(self, store: Store, shared: SharedIndex) -> None:
        self.store: Any = store
        self.shared = shared
        self.breaker = shared.breaker
        self.counters = Counters()

    @property
    def tells_by_name(self) -> bool:
        """Whether others learn of a change only by what `remove_key` does.

        Then it is called before each change and after it, and what is written is not filled.
        """
        return False

    @property
    def hears_of_changes(self) -> bool:
        """Whether the index knows of each change that is made through this cache store."""
        return self.shared.handle.usable

    @property
    def completes(self) -> bool:
        """Whether something is at work, or may be, that has the index know all that is cached."""
        return True

    async def hear_of_changes(self, io: IO) -> bool:  # noqa: ARG002 - where nothing is told by name
        """Have the index know of each change that has ended, where `tells_by_name`.

        Returns
        -------
        bool
            False where that cannot be told, or not in time.
        """
        return True

    @property
    def hears_of_evictions(self) -> bool:
        """Whether a value that is not as the index knows it is damaged: else others may have evicted it."""
        return True

    @property
    def remembers_absences(self) -> bool:
        """Whether all who write through this cache store end what is remembered as missing here."""
        return True

    @property
    def needs_loop(self) -> bool:
        """Whether values can be deleted by coroutines of the cache store only."""
        return False

    @property
    def index(self) -> Index:
        """The index of now."""
        return self.shared.handle.index

    try_read: TryRead | None = None
    """Reads `size` bytes from `start` on of the value `name` of `total` bytes without waiting; None
    where that is not possible. Takes name, prototype, total, start and size."""

    @property
    def asks_for_entries(self) -> bool:
        """Whether a look-up is to tell the entry of each hit as well, which takes longer: what has to be waited for may be gone."""
        return self.try_read is None

    @abstractmethod
    async def read(
        self, io: IO, name: str, prototype: BufferPrototype, total: int, start: int, size: int
    ) -> Buffer | None:
        """Read the same; None where the value is gone or has another length."""

    def lookup_in(self, index: Any) -> Callable[..., Any]:
        """What looks a key up in this view of the index, as `Index.lookup` does.

        It may answer with an array of bytes that is the reader's alone, all of a full value that needed no waiting; or with
        such an array of a part of one, and the answer of `Index.lookup`.
        """
        look_up: Callable[..., Any] = index.lookup
        return look_up

    @property
    def is_turn_full(self) -> bool:
        """Whether nothing more is read without waiting in this turn of the event loop, but in the next one."""
        return False

    async def turn(self, size: int) -> TryRead | None:  # noqa: ARG002
        """Wait for a turn of the event loop in which so many bytes may be read without waiting.

        Returns
        -------
        callable or None
            Reads as `try_read` does, at once; None where to wait would change nothing.
        """
        return None

    @abstractmethod
    async def remove(self, io: IO, victims: Sequence[Victim]) -> None:
        """Delete the bytes of entries that the index has dropped, and tell the index what became of it.

        Never raises because of the cache store. Returns in any case: after `DELETE_TIMEOUT`, and `LOCK_TIMEOUT` for the index.
        """

    async def remove_key(
        self,
        io: IO,
        key: str,  # noqa: ARG002
        victims: Sequence[Victim],
        *,
        begins: bool,  # noqa: ARG002
    ) -> None:
        """Delete what is stored of a key that is written in the source, whether the index knows it or not.

        `victims` are the entries of it that the index has dropped; see `remove`.

        Raises
        ------
        CacheUnreachableError
            Before the write `begins`: if it would stay unknown to others who use the cache store.
        """
        if victims:
            await self.remove(io, victims)

    def remove_later(self, victims: Sequence[Victim]) -> None:
        """Leave bytes to a later delete: they stay counted until then."""
        if victims:
            cells = [cell for cell, _ in victims]
            self.shared.handle.call_later(ignore, _confirm_failed, cells)

    def release_unknown(self) -> None:  # noqa: B027 - nothing to do by default
        """Leave to a later delete what may have been written, or not."""

    def sort(
        self, victims: Sequence[Victim], outcome: Sequence[BaseException | None]
    ) -> tuple[list[int], list[int]]:
        """Cells of those that are gone, and of those that may not be; the circuit breaker hears how it went."""
        dropped, failed = [], []
        for (cell, _), error in zip(victims, outcome, strict=True):
            if error is None:
                dropped.append(cell)
            else:
                failed.append(cell)
                self.breaker.failed(error, "delete")
        if not failed:
            self.breaker.succeeded("delete")
        return dropped, failed

    def tell_later(self, prefix: str) -> None:  # noqa: B027 - nothing to do by default
        """Tell others in the background that a change below a prefix has ended, where `tells_by_name`."""

    def begin_change(self, prefix: str, *, is_key: bool = False) -> Callable[[], None]:
        """Count a change, and end decoded chunks of it.

        The places of other parts of the source, if they are known here, keep nothing of it either.

        Parameters
        ----------
        prefix : str
            What changes: all at and below it.
        is_key : bool, optional
            Whether it is one key. Default is False.

        Returns
        -------
        callable
            To be called when the change has ended. Only the first call counts.
        """
        changes = self.shared.changes
        changes.begin(prefix, is_key=is_key)
        return changes.count

    def check_drops(self) -> None:  # noqa: B027 - nothing to do by default
        """See that what is cached can be dropped, for all who read it.

        Raises
        ------
        CacheUnreachableError
            If it is only read from here.
        """

    def forget_elsewhere(self, prefix: str) -> None:
        """Have them forget what is at and below a prefix."""
        self.begin_change(prefix)()

    async def remove_unlisted(  # noqa: B027 - nothing to do by default
        self, io: IO, prefix: str, *, begins: bool | None = None
    ) -> None:
        """Delete what is stored of a key and below it, whether or not the index knows it yet.

        Called while the index is not complete; with `removes_by_name` before each change below a prefix
        `begins` and after it has ended, which is None where nothing is changed. See `remove_key`.
        """

    def begin(self, io: IO) -> None:  # noqa: B027 - nothing to do by default
        """Do in the background what the cache store asks for by now; called at each miss and write."""

    async def recorded_size_and_checksum(
        self,
        io: IO,  # noqa: ARG002
        name: str,  # noqa: ARG002
    ) -> tuple[int, int] | None:
        """Length and CRC32C that a value should have, where they are kept beside it.

        It may raise as `read` does.
        """
        return None

    async def intact_size(self, io: IO, name: str) -> int | None:  # noqa: ARG002
        """Length of a value, if it is the one that is recorded beside it. It may raise as `read` does."""
        return None


def names_of(victims: Sequence[Victim], cells: Sequence[int]) -> list[str]:
    """Names of the values in these cells."""
    wanted = set(cells)
    return [name for cell, name in victims if cell in wanted]


def _confirm_failed(index: Index, cells: list[int]) -> None:
    index.confirm_deletes([], cells)
