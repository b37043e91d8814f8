"""The core: the index of a cache, and the fills of a cache directory.

Times are seconds on the clock of the index: since 1970 for the index of a directory, on any clock that
does not run backwards for one on the heap. Sizes are bytes. A byte range is None for the whole value,
``(1, start, end)``, ``(2, start, 0)`` for all from there on, or ``(3, count, 0)`` for the last bytes. A
victim is the number of an entry and the name of its bytes in the cache store: the caller that gets one deletes the
bytes and says so.

A method of an index that other processes share raises `IndexBusyError` if another process holds the lock for
longer than a step takes, and `CorruptIndexError` if the index cannot be used; nothing has changed then.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, Self, TypeAlias, final

from zcache._types import Minimised, Policy

__all__ = [
    "DEFAULT_MINIMISED",
    "DEFAULT_POLICY",
    "MAX_KEY",
    "METADATA",
    "MINIMISED",
    "NODES",
    "NO_SPACE_ON_VOLUME",
    "PATH_CONFLICT",
    "PENDING",
    "POLICIES",
    "SIGNATURE",
    "VALUE_HEADER",
    "Ages",
    "Committed",
    "CorruptIndexError",
    "DirectoryFills",
    "FillResult",
    "Granted",
    "HeldLock",
    "Index",
    "IndexBusyError",
    "IndexFullError",
    "NeedsEviction",
    "Plan",
    "ReadCounters",
    "Rejected",
    "Reservation",
    "SegmentFiles",
    "SegmentReader",
    "SegmentScan",
    "Stats",
    "__version__",
    "cache_key",
    "crc32c",
    "end_calls",
    "file_holds",
    "file_owner",
    "is_absent",
    "is_cacheable_key",
    "make_folder",
    "make_way",
    "open_cached",
    "open_folder",
    "open_own",
    "open_value",
    "read_record",
    "read_resident",
    "recorded_size_and_checksum",
    "remove_empty_folder",
    "remove_files",
    "remove_key",
    "remove_victims",
    "select",
    "sign_file",
    "simulate",
    "take_folder_bytes",
    "tells_residency",
    "volume_space",
    "write_tombstone",
]

__version__: Final[str]
POLICIES: Final[tuple[Policy, ...]]
"""Names of the policies of eviction."""
MINIMISED: Final[tuple[Minimised, ...]]
"""What the adaptive one may make least of."""
DEFAULT_POLICY: Final[Policy]
"""The one of an index that was given none."""
DEFAULT_MINIMISED: Final[Minimised]
"""What that one makes least of, unless it is told."""
PATH_CONFLICT: Final[str]
"""Reason of `Rejected` and `FillResult`: a file system cannot hold the value beside others."""
NO_SPACE_ON_VOLUME: Final[str]
"""Reason of `FillResult`: the volume, or what may be used of it, is full."""
NODES: Final[tuple[str, ...]]
"""Last parts of the keys of metadata documents that make a node, in both formats of Zarr."""
METADATA: Final[tuple[str, ...]]
"""Those of all metadata documents; begins with `NODES`."""
SIGNATURE: Final[int]
"""Nanoseconds below the millisecond in the modification time of each file that zcache wrote."""
PENDING: Final[int]
"""The same as long as the value is not committed."""
VALUE_HEADER: Final[int]
"""Bytes that stand before each value in a segment of a pool."""
MAX_KEY: Final[int]
"""Bytes of the longest key that is cached."""

_Range: TypeAlias = tuple[int, int, int] | None
_Victim: TypeAlias = tuple[int, str]
_Rest: TypeAlias = tuple[tuple[int, int], int]
_Hit: TypeAlias = int | tuple[str, int, int, int, int, int | None, bool]
_AbsenceAges: TypeAlias = tuple[float, float | None]
"""Seconds below which an absence counts; and, if it is that of a metadata document, the age below which another
document of its node has to be cached (None for any)."""
_Reserve: TypeAlias = Granted | NeedsEviction | Rejected

class CorruptIndexError(RuntimeError):
    """The index contradicts itself; it has to be emptied and rebuilt."""

class IndexBusyError(RuntimeError):
    """Another process holds the lock of the index; wait for it and try again."""

class IndexFullError(OSError):
    """The index cannot grow any further."""

@final
class Reservation:
    """Room for a value, or what is to be deleted for it.

    One that is dropped before `Index.commit` or `Index.release` is given back by the next step that asks for
    room or for what is in flight.
    """

@final
class Granted:
    """There is room: write the bytes, then commit or release.

    Attributes
    ----------
    reservation : Reservation
        The room.
    """

    __match_args__: Final = ("reservation",)
    def __new__(cls, reservation: Reservation) -> Granted: ...
    @property
    def reservation(self) -> Reservation: ...

@final
class NeedsEviction:
    """Delete the victims first, then `Index.advance`.

    Attributes
    ----------
    reservation : Reservation
        The room so far.
    victims : list of tuple of int, str
        What to delete.
    """

    __match_args__: Final = ("reservation", "victims")
    def __new__(cls, reservation: Reservation, victims: list[_Victim]) -> NeedsEviction: ...
    @property
    def reservation(self) -> Reservation: ...
    @property
    def victims(self) -> list[_Victim]: ...

@final
class Rejected:
    """The value stays uncached; nothing is held for it.

    Attributes
    ----------
    reason : str
        One of "too large", "key too long" (a part of its name has more than 255 bytes or, in a pool, the name more than
        448), "overtaken by a write", "already cached", "busy", "no space", "path conflict", "index full", "rebuilding".
    """

    __match_args__: Final = ("reason",)
    def __new__(cls, reason: str) -> Rejected: ...
    @property
    def reason(self) -> str: ...

@final
class Committed:
    """A fill has ended, and its flight is closed.

    Attributes
    ----------
    victims : list of tuple of int, str
        The bytes themselves, where a write has overtaken them; else nothing.
    has_failed_deletes : bool
        Whether there are bytes whose delete has failed, see `Index.failed_deletes`.
    """

    __match_args__: Final = ("victims", "has_failed_deletes")
    def __new__(cls, victims: list[_Victim], has_failed_deletes: bool) -> Committed: ...
    @property
    def victims(self) -> list[_Victim]: ...
    @property
    def has_failed_deletes(self) -> bool: ...

@final
class Ages:
    """Maximum ages in seconds by glob patterns, of which the first that matches holds.

    ``**`` is any number of parts of a key; ``*``, ``?`` and ``[...]`` stay within one part. None is any age.
    """

    def __new__(
        cls, rules: list[tuple[str, float | None]], default: float | None = None, /
    ) -> Ages: ...
    def of(self, key: str, /) -> float | None:
        """Maximum age of the value of a key."""

@final
class Plan:
    """Keys in the order in which they will be read: the first million of an iterable, taken from it at once.

    Raises
    ------
    OptionTypeError
        If it is no iterable of str, or a str or bytes itself.
    """

    def __new__(cls, keys: Iterable[str], /) -> Plan: ...
    def __len__(self) -> int:
        """Keys, each counted as often as it is read."""

    @property
    def state(self) -> Literal["followed", "done", "wrong"] | None:
        """What has become of it; None where no index goes by it. Takes no lock."""

@final
class ReadCounters:
    """Hits and misses of one store, whichever index has answered. Takes no lock."""

    hits: int
    misses: int
    negative_hits: int

    def __new__(cls) -> ReadCounters: ...
    def count_miss(self) -> None:
        """Count a read that was not."""

    def recount_as_negative_hit(self) -> None:
        """Say that what was counted as a miss was answered by an absence."""

    def recount_negative_as_miss(self) -> None:
        """Say that what was counted as a negative hit was none."""

    def retract_miss(self) -> None:
        """Take a miss back, because the same read is looked up once more."""

    def recount_as_miss(self) -> None:
        """Say that what was counted as a hit was none."""

    def recount_as_hit(self) -> None:
        """Say that what was counted as a miss was served after all."""

@final
class Stats:
    """The counters of an index, as of one moment.

    Parameters
    ----------
    refusals : int, optional
        The only ones that are counted elsewhere too. Default is 0; so are the other counters.

    Attributes
    ----------
    evictions : int
        Entries that had to go because bytes were needed.
    expirations : int
        Those of them that were stale.
    refusals : int
        Values that were left uncached.
    """

    evictions: int
    expirations: int
    refusals: int

    def __new__(cls, *, refusals: int = 0) -> Stats: ...
    def __add__(self, other: Stats, /) -> Stats: ...
    def __sub__(self, other: Stats, /) -> Stats: ...
    def __radd__(self, other: Stats, /) -> Stats: ...
    def __rsub__(self, other: Stats, /) -> Stats: ...

@final
class Index:
    """Entries, flights and reservations of one cache store, on the heap or in a directory.

    Parameters
    ----------
    max_size : int, optional
        Bytes that the cache store may hold. Default is no bound.
    max_age : float, optional
        Seconds after which an entry is of no use to anybody, and the first to go when bytes are needed.
        Default is never. What may be served is an argument of each look-up.
    slices_like_python : bool, optional
        Whether a cached value also answers ranges that reach beyond its end.
    flat_namespace : bool, optional
        Whether the cache store can hold ``a`` beside ``a/b``.
    verify : {"never", "first", "always"}, optional
        At which hits the bytes are compared with their checksum.
    seed : int, optional
        Seed of the hashes. Default is None: one that cannot be guessed.
    complete : bool, optional
        Whether the index knows all that is in the cache store. If not, `reserve` rejects with "rebuilding"
        until `finish_rebuild`.
    unit : int, optional
        Bytes of a block of the cache store, of which a value takes whole ones. Default is 1. With more, the
        folders count as well; see `count_folders`. An index in a directory that counts in another unit is
        emptied.
    eviction : {"lru", "none", "adaptive"}, optional
        Which entries go when bytes are needed. Default is `DEFAULT_POLICY`.
    minimise : {"requests", "bytes", "seconds"}, optional
        What "adaptive" makes least of. Default is `DEFAULT_MINIMISED`.
    holes : bool, optional
        Of a pool: whether its segments can have holes; where not, each value has a segment of its own.
        Default is None: each value has a file of its own.
    sources : bool, optional
        Whether it is that of a pool, where each folder at the root is a source with an age of its own. Default is
        False; with `holes` it always is.
    """

    def __new__(
        cls,
        *,
        max_size: int | None = None,
        max_age: float | None = None,
        slices_like_python: bool = False,
        flat_namespace: bool = False,
        verify: str = "never",
        seed: int | None = None,
        complete: bool = True,
        unit: int = 1,
        eviction: str = ...,
        minimise: str = ...,
        holes: bool | None = None,
        sources: bool = False,
    ) -> Index: ...
    @staticmethod
    def open(
        root: str,
        /,
        *,
        max_size: int | None = None,
        max_age: float | None = None,
        slices_like_python: bool = False,
        flat_namespace: bool = False,
        verify: str = "never",
        seed: int = 0,
        unit: int = 1,
        timeout: float = 1.0,
        eviction: str = ...,
        minimise: str = ...,
        holes: bool | None = None,
    ) -> tuple[Index, bool]:
        """Open the index in a directory; True says that it is new and has to be rebuilt by the caller.

        It goes by the policy that other processes use, if any does; see `set_policy`.

        Raises
        ------
        IndexBusyError
            If another process holds its lock for more than `timeout` seconds.
        """

    def policy(self) -> tuple[str, str]:
        """The eviction policy in force, and what it minimises."""

    def set_policy(self, eviction: str, minimise: str, /) -> tuple[str, str]:
        """Have all go by a policy from now on, unless another process uses the one in force.

        Returns that one, which stays as long as this process uses it; see `set_limits`.
        """

    def note_seconds(self, size: int, seconds: float, /) -> None:
        """Tell how long the source took for so many bytes; of use where seconds are minimised."""

    def set_plan(self, plan: Plan, /) -> tuple[int, int]:
        """Go by a plan from now on, or by none if it has no keys; returns a cursor for `match_plan`.

        What the plan will read soonest stays; what it does not have goes first, in the order of the policy.
        It takes its keys out of `plan`. Each source of a pool has a plan of its own.
        """

    def match_plan(self, cursor: tuple[int, int], /) -> tuple[int, int] | None:
        """Find entries of the plan from a cursor on, a batch; returns where to go on, None at the end."""

    def view(
        self, counters: ReadCounters, sampled: bool = False, tells_entries: bool = False, /
    ) -> Index:
        """The same index, whose lookups count in `counters` as well, and go into its sample if so asked.

        With `tells_entries` each hit is told with the handle of its entry.
        """

    def note_sizes(self, values: list[tuple[str, _Range, int]], /) -> None:
        """Tell the sample the bytes of values that are not in the cache store yet."""

    def settle_request(self, key: str, raw: _Range, size: int, is_hit: bool, /) -> None:
        """Say that the last request of these bytes that was no hit was served with `size` bytes by what was read for others.

        It may be a hit after all.
        """

    def retract_request(self, key: str, raw: _Range, /) -> None:
        """Take the last request of these bytes back out of the sample that was no hit.

        It is about no value, or is looked up once more.
        """

    def miss_request(self, key: str, raw: _Range, was_hit: bool, /) -> None:
        """Say that the source is asked for these bytes, where no lookup has sampled that.

        With `was_hit` the last such request, which was a hit, is none.
        """

    def sample(
        self,
    ) -> tuple[int, float, bool, tuple[int, int], bytes, bytes, bytes, bytes, bytes]:
        """The sampled requests of all views, and of all processes on a directory.

        Returns
        -------
        requests : int
            Requests, sampled or not, since the first one that counts.
        rate : float
            Part of all keys that is sampled, up to 1.
        has_slid : bool
            Whether there were sampled requests before the first one.
        taken : tuple of int
            Bytes of a block, of which an entry takes whole ones (0 and 1 are the same), and those of folders or segments
            for each entry.
        keys : bytes
            For each sampled request, oldest first, 8 bytes that stand for its key and range.
        sizes : bytes
            The bytes of the answer then, 8 bytes each; 2**64 - 1 where they are not known.
        flags : bytes
            2 bytes each, with these bits: 14, what was cached was too old; 15, it was a hit; 1, it stands for the
            requests before the first one that is kept; 0, it does not count and only fills a simulated cache. With bit
            2 or 3 it is no request: a write has dropped what was cached of the key, or has taken its place.
        wholes : bytes
            What stands for the whole value, 8 bytes each.
        ranges : bytes
            Which bytes of that, 24 bytes each: kind and numbers of a byte range, kind 0 for all. The end of a range is
            that of its bytes, or 2**64 - 1 where the value ended before it.
        """

    def within(self, label: str, slices_like_python: bool, /) -> Index:
        """The same index as one source of a pool sees it: its keys are those below the folder `label`.

        Counts, sizes and bounds stay those of the whole index. `slices_like_python` is about this source.
        """

    def __len__(self) -> int:
        """Entries that can be served."""

    @property
    def live_bytes(self) -> int:
        """Bytes of all entries that can be served."""

    def next_live(
        self, cursor: tuple[int, int] | None = None, /
    ) -> tuple[list[tuple[str, bool, int]], tuple[int, int] | None]:
        """Entries that can be served, a batch: key, whether it is the full value, and bytes.

        And where to go on; None at the end.
        """

    @property
    def current_size(self) -> int:
        """Bytes that the cache store holds, or may hold."""

    @property
    def memory(self) -> int:
        """Bytes of memory that the index uses."""

    @property
    def in_flight(self) -> tuple[int, int]:
        """Flights that are open, and reservations that are not committed."""

    def lookup(
        self,
        key: str,
        raw: _Range = None,
        now: float = 0.0,
        max_age: float | None = None,
        missing: _AbsenceAges | None = None,
        /,
    ) -> _Hit | Literal[False] | None:
        """Find what serves a request and is younger than `max_age` seconds; None counts as a miss.

        False says that the source has no such key, by an absence of the ages `missing`. Without that argument
        it says that there is an absence, of whatever age, and nothing was counted: then ask again with it.

        A whole value that needs no check is only its size, unless this view tells entries. Anything else is name,
        size of the entry, first byte and number of bytes in it, a handle for `mark_verified` and `discard`, the
        CRC32C if it is known, and whether the bytes have to be compared with it.
        """

    def lookup_all(self, keys: list[str], /) -> list[int]:
        """`lookup` of many whole values, of any age: the positions of those that are there."""

    def peek(
        self,
        key: str,
        raw: _Range,
        now: float,
        max_age: float | None = None,
        missing: _AbsenceAges | None = None,
        /,
    ) -> int | Literal[False] | None:
        """Number of bytes that would be served; counts and changes nothing.

        False says that the source has no such key; only with `missing`.
        """

    def handle_of(
        self, key: str, raw: _Range, size: int | None, now: float, max_age: float | None = None, /
    ) -> int | None:
        """What names the entry that would be served, for `discard`; None where there is none.

        With `size` only if that is the size of the entry. Counts and changes nothing.
        """

    def discard(self, handle: int, /) -> list[_Victim]:
        """Drop an entry whose bytes were not what they should be; not one that has taken its place."""

    def join(
        self,
        key: str,
        raw: _Range,
        flight: Any,
        now: float,
        anyway: bool,
        max_age: float | None = None,
        missing: _AbsenceAges | None = None,
        /,
    ) -> int | tuple[_Range, Any] | Literal[False] | None:
        """Join the flight that brings these bytes, or open one, which replaces what is older than `max_age`.

        Returns
        -------
        int
            A ticket: read the source, then fill or `complete_flight`.
        tuple
            The byte range and payload of the flight to wait for.
        None
            Look again: the bytes are cached by now, which is never said with `anyway`; or the source is
            known by now to have no such key.
        False
            The key cannot be cached.
        """

    def lead_all(self, keys: list[str], flight: Any, /) -> list[int | None]:
        """`join` for many whole values: tickets of those that have no flight, which get this one; else None."""

    def set_validator(self, key: str, ticket: int, validator: str, /) -> None:
        """Note the validator of what was read under a ticket; kept with the entry when that is committed."""

    def validator(self, key: str, raw: _Range, /) -> str | None:
        """Validator of the entry that would serve a request at any age, if it has one."""

    def refresh(
        self,
        key: str,
        raw: _Range,
        ticket: int,
        validator: str,
        fetched: float,
        now: float,
        /,
    ) -> _Hit | None:
        """Say that the source had this validator at `fetched`: the age of what has the same counts from then.

        Returns what serves the request with its entry, as `lookup` does, without counting it. None where that has
        another validator, or a write has made the ticket void.
        """

    def is_in_flight(self, key: str, /) -> bool:
        """Whether anything of a key is on its way from the source."""

    def complete_flight(self, key: str, ticket: int, /) -> None:
        """Close the flight of a ticket; nothing happens if it is closed."""

    def complete_flights(self, keys: list[str], tickets: list[int], /) -> None:
        """`complete_flight` for many."""

    def commit_absence(
        self, key: str, ticket: int, fetched: float, now: float, kept: bool, /
    ) -> list[_Victim]:
        """Say that the source has no such key; closes the flight of the ticket.

        Unless that is void, the entries of the key go, and it is remembered as missing if that is to be
        `kept`. Returns what to delete.
        """

    def abort_flight(self, key: str, flight: object, /) -> None:
        """Close the flight with this payload, whose reader cannot go on."""

    def supersede_flight(self, key: str, flight: object, /) -> None:
        """Have later readers join another flight than this one. What it brings is cached where nothing else is."""

    def reserve(self, key: str, raw: _Range, size: int, ticket: int, now: float, /) -> _Reserve:
        """Ask for room for a value that was read or written under a ticket."""

    def advance(
        self, reservation: Reservation, dropped: list[int], failed: list[int], now: float, /
    ) -> _Reserve:
        """Report the deletes that a reservation asked for, and go on with it."""

    def reserve_all(
        self, keys: list[str], size: int, tickets: list[int], now: float, /
    ) -> tuple[list[Reservation | None], list[_Victim]]:
        """`reserve` for many whole values of one size.

        Returns
        -------
        list of Reservation or None
            For each of them; None where there is no room.
        list of victims
            To be deleted, and reported by `advance_all`. If there are none, all reservations are granted.
        """

    def advance_all(
        self,
        reservations: list[Reservation | None],
        dropped: list[int],
        failed: list[int],
        now: float,
        /,
    ) -> tuple[list[Reservation | None], list[_Victim]]:
        """Report the deletes that these have asked for; returns what takes their place, as `reserve_all` does."""

    def fill_memory(
        self,
        values: dict[str, Any],
        key: str,
        raw: _Range,
        data: bytes,
        value: object,
        ticket: int,
        now: float,
        fetched: float | None = None,
        /,
    ) -> bool | None:
        """Make room in a dict, put `value` there and close the flight, all in one call.

        Its age counts from `fetched`; default is `now`. Returns whether anybody has joined the flight; None
        if the value stays uncached and its flight open.
        """

    def commit(
        self,
        reservation: Reservation,
        checksum: int | None,
        now: float,
        fetched: float | None = None,
        /,
    ) -> Committed | None:
        """Say that the bytes are written; closes the flight as well.

        Its age counts from `fetched`; default is `now`. None if the index was emptied meanwhile: it knows
        nothing of the bytes.
        """

    def commit_all(
        self, reservations: list[Reservation], now: float, /
    ) -> tuple[list[int], list[_Victim]]:
        """`commit` for many: the positions of those of which the index knows nothing any more, and what to delete."""

    def release(self, reservation: Reservation, /) -> list[_Victim]:
        """Give a reservation back whose bytes were not written, as far as is known; returns what to delete."""

    def abandon(self, reservation: Reservation, /) -> None:
        """Give it back without a delete: what it has begun counts as a failed delete."""

    def confirm_deletes(self, dropped: list[int], failed: list[int], /) -> bool:
        """Report deletes that no reservation waits for, by the numbers of their entries.

        Whether segments of a pool have lost their last values meanwhile; see `spent_segments`.
        """

    def expected(self, cells: list[int], /) -> list[tuple[int, int] | None]:
        """Size and CRC32C of entries that are being deleted; None where they are not known."""

    def failed_deletes(self, limit: int, /) -> list[_Victim]:
        """Up to `limit` entries whose delete has failed and is worth another try."""

    def begin_write(self, key: str, /) -> list[_Victim]:
        """Say that a key is going to be written in the source; fills of it that have begun end uncached."""

    def end_write(
        self, key: str, keeps: bool, flight: object = None, size: int | None = None, /
    ) -> tuple[list[_Victim], int | None]:
        """Say that a write has ended; returns what to delete, and, if it `keeps` its value, a ticket to cache that.

        With `flight`, which holds the value, readers may join that until the value is in the cache store. With its `size`
        the sample knows that it is cached.
        """

    def drop_missing(self, key: str, /) -> list[_Victim]:
        """Drop a key that the source does not have. Counts no request."""

    def invalidate(self, prefix: str, begins: bool | None = None, /) -> None:
        """Make void the flights and writes below a prefix ("" is everything).

        Then `drain_prefix` and `drain_absences`.

        With `begins` a change of all that begins (True) or ends (False).
        """

    def drain_prefix(self, prefix: str, at: _Rest = ..., /) -> tuple[list[_Victim], _Rest | None]:
        """Drop entries below a prefix, a batch at a time; and where to go on, None at the end."""

    def drain_absences(self, prefix: str, at: _Rest = ..., /) -> _Rest | None:
        """End absences below a prefix, a batch at a time; where to go on, None at the end."""

    @property
    def absences(self) -> int:
        """Keys that are remembered as missing, as of the last step; takes no lock."""

    def absent_keys(self) -> list[str]:
        """Keys that are remembered as missing, least recently used first."""

    def next_keys(
        self,
        prefix: str,
        now: float,
        max_age: float | None,
        ages: Ages | None = None,
        cursor: tuple[int, int] | None = None,
        /,
    ) -> tuple[list[str], tuple[int, int] | None]:
        """Some keys at or below a prefix of which something can be served, and where to go on.

        What is younger than `max_age` seconds can, or than `ages` says of its key.
        That is None at the end. A key that stays cached comes exactly once.
        """

    def stats(self) -> Stats:
        """What was counted since the index was opened; takes no lock."""

    def entries(self) -> list[tuple[str, _Range, int, str]]:
        """Key, byte range, size and state of each entry."""

    def recency(self) -> list[tuple[str, _Range]]:
        """Keys and byte ranges, least recently used first."""

    def validate(self) -> None:
        """Recompute all counts and lists; `CorruptIndexError` if one is wrong."""

    def after_fork(self) -> bool:
        """Start over in a forked child. False if the index has to be made or opened anew."""

    def mark_verified(self, handle: int, checksum: int, /) -> None:
        """Say that bytes were compared with their checksum, or what it is."""

    def adopt(self, values: list[tuple[int, int, str]], /) -> bool:
        """Enter values that are in the cache store: milliseconds of their fetch, size and name, by age.

        False if another participant rebuilds the index.
        """

    def mark_corrupt(self) -> None:
        """Say that the index does not fit the files; raises `CorruptIndexError` if it is in a directory."""

    def begin_decodes(
        self, keys: list[str], now: float, max_ages: list[float | None], /
    ) -> list[tuple[int, int] | None]:
        """Say that the bytes of some keys will be read and decoded; to be asked before they are read.

        Returns
        -------
        list of tuple or None
            Version of each key; milliseconds at which the oldest bytes were fetched that may be read, 0 where values
            expire and that is not known: then the result must not be kept. None while the key is being changed.
        """

    def is_current(
        self,
        key: str,
        version: int,
        fetched: int,
        landed: float,
        touch_ranges: bool,
        now: float,
        max_age: float | None = None,
        /,
    ) -> bool:
        """Whether what was decoded from a key may be used now.

        Nothing has changed the key since `begin_decodes` gave `version` and `fetched`; it has not expired; and
        no full value is cached that was read from the source after `landed`, when the decode had ended. If so,
        the full value counts as used, or, with `touch_ranges`, up to 1,024 ranges of it.
        """

    def stay_current(
        self, decoded: list[tuple[str, int, int, float, float | None]], now: float, /
    ) -> list[bool]:
        """`is_current` of many, each with its key, version, fetch time, end of its decode, and maximum age; no use counts."""

    def count_folders(self, size: int, /) -> None:
        """Count folders that were made or have grown, or, below 0, were removed."""

    def folder_sum(self) -> int:
        """Names the sum of the folders of now: a rebuild makes another one."""

    def count_folders_since(self, folder_sum: int | None, size: int, /) -> None:
        """`count_folders` of what was done while there was this sum. What was removed from another one is in none."""

    @property
    def bound(self) -> int | None:
        """The least bound of all processes that use the index, in bytes; None where none has any."""

    @property
    def excess(self) -> int:
        """Bytes above the bound that the cache store holds, or is about to hold, less those that are being deleted."""

    def are_listed(self, names: list[str], /) -> list[bool] | None:
        """Whether there is an entry of each name, of whatever state; None while the index is not complete."""

    @property
    def owns_rebuild(self) -> bool:
        """Whether this process is the one that fills the index again."""

    def segment_sizes(self) -> list[tuple[int, int]]:
        """Each segment that the index lists: its number, and the most bytes that its file takes on the disk."""

    def give_back_unlisted(self, files: SegmentFiles, numbers: list[int], /) -> None:
        """Give back all that these segments hold beside the values of the index; those without any go.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    @property
    def begins_empty(self) -> bool:
        """Whether the rebuild deletes what is in the pool, for the index was damaged and may have missed what was changed."""

    def adopt_segments(self, scan: SegmentScan, /) -> bool:
        """Add the segments that a scan has found, before `adopt_found`; False where others rebuild the index."""

    def adopt_found(self, scan: SegmentScan, start: int, stop: int, /) -> list[str] | None:
        """Add values that a scan has found, by their numbers; None where others rebuild the index.

        Returns what cannot be an entry, to be deleted; see `SegmentFiles.delete`.
        """

    def in_progress_below(self, prefix: str, /) -> list[_Victim]:
        """What is being deleted of a key, or of all keys below it, by the one that has dropped it.

        To be deleted before the key is changed. Nothing is to be reported.
        """

    def spent_segments(self, limit: int, /) -> list[tuple[int, int]]:
        """Cells and numbers of segments without values, whose files can be removed; nothing is appended to them from now on."""

    def segments_removed(self, segments: list[tuple[int, int]], /) -> None:
        """The files of such segments are gone."""

    def formerly(self, name: str, /) -> tuple[int, int, int] | None:
        """Fetch time in milliseconds, size and CRC32C of a value that an index of an earlier boot has listed.

        Known until the rebuild is finished.
        """

    @property
    def is_complete(self) -> bool:
        """Whether the index knows all that is in the cache store."""

    def disown(self) -> list[int]:
        """In a forked child: raise `IndexBusyError` at every step from now on, and never wait for a lock.

        Returns the descriptors of the parent's locks.
        """

    def set_limits(
        self,
        max_size: int | None,
        max_age: float | None,
        verify: str,
        uses_policy: bool,
        ages: list[tuple[str, float | None]] | None = None,
        /,
    ) -> None:
        """Change what the index was made with; a smaller size holds before new bytes are written.

        Of a pool, `ages` says of each source that is open here (by its label) for how many seconds values are of
        use, None for always. Default is None: as before.

        Unless this process `uses_policy`, another one may choose the policy; see `set_policy`.
        """

    def evict(self, size: int, now: float, /) -> list[_Victim]:
        """Drop entries of at least so many bytes, a batch at most."""

    @property
    def shared(self) -> bool:
        """Whether other processes may use the index."""

    @property
    def slot(self) -> int | None:
        """Number of this participant among those that share the index."""

    @property
    def is_alone(self) -> bool:
        """Whether there is no other live participant."""

    @property
    def is_in_place(self) -> bool:
        """Whether others who open the directory find this index now; true where it is not shared.

        A step alone looks only from time to time.
        """

    def finish_rebuild(self, is_emptied: bool = False, /) -> None:
        """Say that everything that is in the cache store was adopted, or, with `is_emptied`, deleted.

        Without, it does nothing where `begins_empty`.
        """

    def restart(self, seed: int, /) -> bool:
        """Empty an index that cannot be used; True asks the caller to rebuild it."""

    def rejoin(self, seed: int, /) -> bool:
        """Use it again after a time without it; True asks the caller to rebuild it."""

    def reclaim_dead(self) -> tuple[list[int], bool]:
        """Take over from participants that have died: their slots, and whether a `restart` is due."""

    def wait_unlocked(self) -> None:
        """Wait until no other process that lives holds the lock of the index."""

@final
class HeldLock:
    """The lock of the index of a directory, held as by a process that is stopped in the middle of a step.

    Parameters
    ----------
    root : str
        The folder of the index.
    timeout : float, optional
        Seconds to wait for the lock. Default is 1.

    Raises
    ------
    IndexBusyError
        If it is not free after `timeout`.
    """

    def __new__(cls, root: str, /, *, timeout: float = 1.0) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_raised: object) -> None: ...
    def release(self) -> bool:
        """Release it; False where it was taken over meanwhile, or released before."""

@final
class FillResult:
    """What became of one fill of a directory.

    Attributes
    ----------
    id : int
        What `DirectoryFills.submit` returned.
    outcome : {"filled", "rejected", "failed", "unlisted", "corrupt", "busy"}
        "failed": the file system refused; "unlisted": a valid value that the index does not list was in the way, and
        is gone; "corrupt": the index has to be rebuilt; "busy": another process has held the lock of the index for a
        second.
    reason : str or None
        Of "rejected", as in `Rejected`, or "no space on the volume", or "the index was emptied meanwhile";
        and of "corrupt".
    error : OSError or None
        Of "failed".
    delete_errors : list of OSError
        Deletes that have failed on the way; the bytes stay counted, and are deleted later.
    """

    @property
    def id(self) -> int: ...
    @property
    def outcome(self) -> Literal["filled", "rejected", "failed", "unlisted", "corrupt", "busy"]: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def error(self) -> OSError | None: ...
    @property
    def delete_errors(self) -> list[OSError]: ...

@final
class SegmentFiles:
    """The segments of a pool: files with the values of many keys.

    Parameters
    ----------
    root : str
        Their folder, an absolute path.
    holes : bool
        Whether its file system can give back parts of a file; see `can_punch`.
    """

    def __new__(cls, root: str, /, *, holes: bool) -> SegmentFiles: ...
    @staticmethod
    def can_punch(folder: str, /) -> bool:
        """Whether a file in this folder can have holes that give their blocks back to the disk.

        Raises
        ------
        OSError
            If the folder takes no file.
        """

    def numbers(self) -> list[int]:
        """Numbers of all segments.

        Raises
        ------
        OSError
            If the folder cannot be listed.
        """

    def scan(self, numbers: list[int], cleans: bool, /) -> SegmentScan:
        """Find all valid values in these segments; with `cleans`, give back what else takes room there.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    def delete(self, names: list[str], /) -> list[OSError | None]:
        """Delete values, named as victims are; returns what the file system has said of each.

        Raises
        ------
        ValueError
            If a name is none of a victim.
        """

    def unseal(self, names: list[str], /) -> None:
        """Have a rebuild ignore values that could not be deleted, named as victims are; best effort."""

    def delete_below(self, prefix: str, only_counts: bool = False, /) -> int:
        """Delete all values at and below a prefix by their headers, or only count them.

        Takes time in proportion to all that there is: for a process that cannot ask the index. `walked` grows meanwhile.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    @property
    def walked(self) -> int:
        """Headers that were read to find values without the index: how such a call gets on."""

    def values(self) -> list[tuple[str, int, int]]:
        """Name, bytes and fetch time in milliseconds of each value, valid or not yet.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    def empty(self, number: int, /) -> None:
        """Delete all values of a segment with its file, also for those who have it open.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    def remove(self, number: int, /) -> None:
        """Remove the file of a segment.

        Raises
        ------
        OSError
            If the file system refuses.
        """

    def close(self) -> None:
        """Close what is open; it is opened again when it is needed."""

@final
class SegmentScan:
    """What a scan of the segments of a pool has found: its length is the number of values.

    Attributes
    ----------
    size : int
        Bytes of all values.
    """

    def __len__(self) -> int: ...
    @property
    def size(self) -> int: ...

@final
class SegmentReader:
    """Reads values of one source from the segments of a pool.

    Parameters
    ----------
    index : Index
        The view that the source has of the index; see `Index.within`.
    files : SegmentFiles
        The segments.
    """

    def __new__(cls, index: Index, files: SegmentFiles, /) -> SegmentReader: ...
    @staticmethod
    def on_the_spot(
        index: Index,
        files: SegmentFiles,
        begins: Callable[[int], bool],
        note_cold: Callable[[], object],
        largest: int,
        /,
    ) -> SegmentReader:
        """A reader that has its `lookup` read values of at most `largest` bytes.

        Parameters
        ----------
        begins : callable
            Counts bytes that are read now, or were since the last time, unless they are too many: then it
            returns False.
        note_cold : callable
            Hears of each value that is not in memory.
        """

    def lookup(
        self,
        key: str,
        raw: _Range = None,
        now: float = 0.0,
        max_age: float | None = None,
        missing: _AbsenceAges | None = None,
        /,
    ) -> Any:
        """As `Index.lookup`; of what is in memory, and needs no check, the bytes.

        Those of a full value are an array, those of a range an array and the answer of `Index.lookup`.
        """

    def read(
        self, name: str, into: Any, total: int, start: int, size: int, waits: bool, /
    ) -> bool | None:
        """Read into a buffer what a value of `total` bytes has from `start` on.

        Returns
        -------
        bool or None
            True if all was read, and the entry was still the same afterwards; False where that would
            have to wait, and `waits` is False; None where there is no such value.

        Raises
        ------
        OSError
            If the file system refuses.
        BufferError
            If the buffer has less room than `size` bytes.
        """

    def recorded(self, name: str, /) -> tuple[int, int] | None:
        """Length and CRC32C that stand before a value."""

@final
class DirectoryFills:
    """Fills of one cache directory, done by threads that need no interpreter.

    Each fill makes room, deletes victims, writes the bytes and commits. However it ends, its flight is closed
    and nothing is left reserved. Fills that are pending when the object is dropped are done still.

    Parameters
    ----------
    index : Index
        The index of the directory.
    root : str
        The directory, an absolute path.
    tmp : str
        Directory of unfinished files, on the same file system.
    threads : int, optional
        Threads at most. They start on demand and end after five seconds without work.
    on_idle : callable
        Called without arguments, in one of the threads, when there was nothing to do for 50 ms after there
        was, and soon after a fill has "failed" or is "unlisted" or "corrupt". It must not keep the object alive, nor wait.
    source : bytes, optional
        Short name of the source, 8 bytes; zeros where it has none.
    marked : str, optional
        A file whose time others change who share no index with this process, before and after they change
        the source: what was read before is not kept. Default is None: all share the index.
    segments : SegmentFiles, optional
        Where the values of a pool are. Default is None: each has a file of its own.
    """

    def __new__(
        cls,
        index: Index,
        root: str,
        tmp: str,
        *,
        threads: int = 2,
        on_idle: Callable[[], object],
        source: bytes = ...,
        marked: str | None = None,
        segments: SegmentFiles | None = None,
    ) -> DirectoryFills: ...
    def submit(
        self,
        key: str,
        raw: _Range,
        data: bytes,
        ticket: int,
        fetched: float,
        min_free_space: int | None,
        now: float | None = None,
        /,
    ) -> int:
        """Hand a value in; returns the number of its result.

        Its age counts from `fetched`; `now` is the time at this call, default is `fetched`. `min_free_space`
        are bytes of the volume that stay free; None is 1 GiB or a twentieth of a small volume.

        Raises
        ------
        OSError
            If no thread can be started, or after a fork. The flight is open still.
        """

    def look(self) -> None:
        """Look whether `marked` has another time than before; each commit does that as well."""

    def collect(self) -> list[FillResult]:
        """Results since the last call. Never waits for a fill or for another process."""

    def wait(self, completed: int, timeout: float, /) -> bool:
        """Wait until more fills than this have ended, at most so many seconds; whether they have."""

    @property
    def completed(self) -> int:
        """Fills that have ended, since the beginning."""

    @property
    def pending(self) -> int:
        """Fills that have not ended."""

    @property
    def pending_size(self) -> int:
        """Bytes of the values that have not ended."""

    def abandon(self) -> None:
        """In a forked child: drop everything, without waiting for a lock."""

def end_calls(timeout: float, /) -> bool:
    """Have threads of `DirectoryFills` call no Python code any more, for the interpreter ends.

    Waits for those that do, `timeout` seconds at most. Whether they have ended.
    """

def open_cached(path: str, /) -> int:
    """Open a file for reading if that needs no disk; `BlockingIOError` if it does.

    No part of its path may be a link (``ELOOP``).
    """

def make_way(path: str, /) -> None:
    """Remove what stands in the place of a file of zcache's own and is none.

    A link, which is not followed, a pipe or an empty folder; one that holds something is moved aside, to
    ``aside-<16 hex digits>-<name>``.
    """

def make_folder(path: str, mode: int | None = None, /, *, group_writes: bool = False) -> None:
    """Make a folder of zcache's own, unless it is there; those above it are.

    It has these permissions whatever the umask says; by default those of the folder above, and its group. It has them
    before it has its name, so no other process finds one that it may not use yet. In a sticky folder only its owner may
    write into it, and its group with `group_writes`.
    """

def open_own(path: str, flags: int, /) -> int:
    """Open a file of zcache's own, made where it is missing: as `make_folder` makes a folder.

    No part of its path may be a link (``ELOOP``), and a pipe does not block.
    """

def open_value(root: str, name: str, /) -> int:
    """Open a value in a cache directory for reading.

    A link or a mount below the directory leads nowhere (``ELOOP``, ``EXDEV``).
    """

def open_folder(root: str, name: str, /) -> int:
    """Open a folder in a cache directory, to list it; see `open_value`. The name "" is the directory."""

def tells_residency(file: int, /) -> bool:
    """Whether `read_resident` can be used for files of the file system that an open file is on.

    Only on tmpfs and overlayfs, and not where a sandbox says of all pages that they are in memory.
    """

def read_resident(path: str, into: Any, total: int, start: int, size: int, /) -> float | None:
    """Read the `size` bytes from `start` on of a file of `total` bytes, if all of them are in memory.

    They fill the beginning of `into`, a writable buffer of bytes. Returns the seconds that it had to wait all the same; None where
    nothing was read: the file is another one, its pages are not in memory, or the kernel does not say, as of
    files of another user. Raises `BlockingIOError` where to open it needs a disk.
    """

def recorded_size_and_checksum(path: str, /) -> tuple[int, int] | None:
    """Size and CRC32C that a file should have, where its file system has recorded them."""

def remove_files(root: str, names: list[str], /) -> list[OSError | None]:
    """Remove values from a cache directory; what zcache did not write stays. Folders go with their last value."""

def remove_victims(
    root: str, names: list[str], known: list[tuple[int, int] | None], now: float, /
) -> list[OSError | None]:
    """The same for values that the index has dropped.

    With `known`, the size and CRC32C that the index knows of each, a file that has them is removed as well. One
    that is not zcache's is an error (``EEXIST``). Where there is no file, that is noted below
    ``.zcache/missing/``, with `now`, in seconds since 1970: others may have moved it away, and a rebuild must not
    take it in once it is back.
    """

def file_holds(path: str, size: int, checksum: int, /) -> bool:
    """Whether a regular file has this size and this CRC32C."""

def file_owner(path: str, /) -> Literal["ours", "pending", "foreign"]:
    """The owner of a file, by its time or by the note beside it."""

def read_record(path: str, /) -> tuple[int, int, bool, int, bytes] | None:
    """What is noted beside a value.

    Size, CRC32C, whether it was committed, milliseconds since 1970 of its fetch, and its source (8 bytes,
    zeros where that is unknown); None where nothing is noted.
    """

def take_folder_bytes() -> int:
    """Bytes by which folders have grown or, below 0, shrunk in what this thread did since it last asked."""

def sign_file(root: str, name: str, fetched: int, /) -> None:
    """Say that a file in a cache directory is a value of zcache's, fetched at this time in milliseconds since 1970."""

def remove_empty_folder(root: str, name: str, /) -> bool:
    """Remove a folder in a cache directory that holds nothing but empty folders. Whether it is gone."""

def remove_key(root: str, key: str, /) -> list[tuple[str, OSError]]:
    """Remove what a cache directory holds of a key, ranges included; names that stayed, and why."""

def is_absent(root: str, key: str, /) -> bool:
    """Whether a cache directory holds nothing of a key, as far as that is known without waiting."""

def volume_space(path: str, /) -> tuple[int, int, int]:
    """Bytes that may still be written to a volume, bytes of the whole volume, and those that stay free by default."""

def write_tombstone(root: str, name: str, /) -> None:
    """Leave a tombstone for a value that is not valid any more but could not be deleted."""

def crc32c(data: bytes, /) -> int:
    """CRC32C of bytes."""

def is_cacheable_key(key: str, /) -> bool:
    """Whether a key can be cached."""

def cache_key(key: str, raw: _Range, /) -> str:
    """Name in the cache store of the bytes of a key."""

def select(size: int, raw: _Range, slices_like_python: bool, /) -> tuple[int, int] | None:
    """First byte and number of bytes that a range selects of a value; None where sources disagree."""

def simulate(
    eviction: str,
    capacity: int,
    keys: bytes,
    sizes: bytes,
    parts: bytes | None = None,
    slices_like_python: bool = False,
    kinds: bytes | None = None,
    lens: bytes | None = None,
    /,
) -> bytes:
    """Which requests a cache would have served, by the code of the eviction policies themselves.

    Parameters
    ----------
    eviction : {"lru", "none", "adaptive"}
        The policy, which minimises requests.
    capacity : int
        Bytes that the cache holds at most.
    keys, sizes : bytes
        What each request asks for, as a number, and the bytes that it takes: 8 bytes each, in native order. What is held
        and is asked for with another size is another value from then on.
    parts : bytes, optional
        Of which values the numbers from 0 on are byte ranges: the number of the whole one, kind and numbers of the range
        (kind 0 for the whole value); 32 bytes each. Default is None: all are whole values.
    slices_like_python : bool, optional
        Whether the source does, whatever the request. Default is False: a whole value serves what all sources agree
        about.
    kinds : bytes, optional
        What each step is: 0, a read; 1, a read of what is too old, which is replaced where it is held; 2, a write has
        dropped the value and its ranges; 3, the same, and what was written takes their place. Default is None: reads.
    lens : bytes, optional
        Bytes of each answer, as `sizes`. Default is None: those that it takes.

    Returns
    -------
    bytes
        1 for each request that is served, 0 for the others.

    Raises
    ------
    ValueError
        If there is no such policy, or there are not as many sizes as keys.
    """
