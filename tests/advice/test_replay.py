"""`zcache.replay`: what is made of recorded requests, and of files that are damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.storage import MemoryStore

from support import buf, value_sync
from zcache import CacheStore, OptionTypeError, OptionValueError, RecordingError, replay
from zcache._advice import recording
from zcache._advice.replay import load
from zcache._advice.trace import Simulator, sampled
from zcache._core import POLICIES, is_cacheable_key
from zcache._source.slicing import slices_like_python
from zcache.testing._internals import ask

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import ByteRequest

    from zcache._types import Policy
    from zcache.testing import FakeClock


def source_of(count: int, size: int = 100) -> MemoryStore:
    return MemoryStore({f"a/c/{number}": buf(bytes(size)) for number in range(count)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.csv.gz"


def recorded(path: Path, **options: Any) -> tuple[CacheStore, list[int]]:
    keys = np.random.default_rng(4).integers(0, 60, 1000).tolist()
    store = CacheStore(source_of(60), max_size=2000)
    with store.record(path, **options):
        for key in keys:
            value_sync(store, f"a/c/{key}")
    return store, keys


@pytest.mark.parametrize("anonymous", [False, True])
def test_replay_is_what_advise_says(path: Path, anonymous: bool) -> None:
    store, keys = recorded(path, anonymous=anonymous)
    advice, replayed = store.advise(), replay(path)
    assert replayed.requests == advice.requests == len(keys)
    assert replayed.max_size == advice.max_size == 2000
    assert list(replayed.sizes) == list(advice.sizes)
    for name, curve in advice.curves.items():
        assert replayed.curves[name].hit_ratio == pytest.approx(curve.hit_ratio)
        assert replayed.curves[name].source_bytes == pytest.approx(curve.source_bytes)
    assert str(replayed) == str(advice)
    # And that is what the store had.
    assert replayed.hit_ratio == pytest.approx(store.cache_stats()["hit_rate"])


def ranges_and_wholes(seed: int) -> tuple[MemoryStore, list[tuple[str, ByteRequest | None]]]:
    """Values, and requests of them and of parts of them, also beyond their ends: some that are read often, and any."""
    draw = random.Random(seed)
    sizes = {f"a/c/{number}": draw.choice([1, 7, 50, 100, 300]) for number in range(20)}
    requests: list[tuple[str, ByteRequest | None]] = []
    for _ in range(400):
        key = f"a/c/{int(20 * draw.random() ** 2)}"
        start = draw.randrange(sizes[key])
        count = draw.randint(1, sizes[key] - start)
        kinds = [
            None,
            RangeByteRequest(0, 1),
            RangeByteRequest(start, start + count),
            OffsetByteRequest(start),
            SuffixByteRequest(count),
            RangeByteRequest(start, sizes[key] + draw.choice([0, 1, 10**6])),
            RangeByteRequest(start, start),
            OffsetByteRequest(sizes[key] + draw.choice([0, 10])),
            SuffixByteRequest(sizes[key] + draw.choice([0, 1, 50])),
        ]
        requests.append((key, draw.choice(kinds)))
    return MemoryStore({key: buf(bytes(size)) for key, size in sizes.items()}), requests


def read_all(store: CacheStore, requests: list[tuple[str, ByteRequest | None]]) -> tuple[int, int]:
    """Read them; how many were hits, and the bytes of the others."""
    missed = 0
    for key, request in requests:
        before = store.cache_stats()["misses"]
        value = value_sync(store, key, request)
        assert value is not None
        missed += len(value) * (store.cache_stats()["misses"] - before)
    return store.cache_stats()["hits"], missed


@pytest.mark.parametrize("eviction", ["lru", "none"])
@pytest.mark.parametrize("seed", range(12))
def test_replay_of_ranges_and_whole_values_is_what_caches_of_each_size_have(
    path: Path, seed: int, eviction: Any
) -> None:
    """A range that the whole value had served was told as one of its entry, with the bytes of all of it."""
    source, requests = ranges_and_wholes(seed)
    sizes = [100, 300, 700, 1500, 4000]
    store = CacheStore(source, max_size=sizes[seed % len(sizes)], eviction=eviction)
    with store.record(path):
        read_all(store, requests)
    policies: tuple[Any, ...] = ("lru", "none")
    for policy in policies:
        real = [
            read_all(CacheStore(source, max_size=size, eviction=policy), requests) for size in sizes
        ]
        for advice in (store.advise(sizes=sizes), replay(path, sizes=sizes)):
            curve = advice.curves[policy]
            assert not curve.error.any()
            assert not curve.source_bytes_error.any()
            assert curve.hit_ratio * len(requests) == pytest.approx([hits for hits, _ in real])
            assert curve.source_bytes == pytest.approx([missed for _, missed in real])


@pytest.mark.parametrize("eviction", POLICIES)
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_each_request_is_simulated_as_the_cache_has_served_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, is_known: bool, eviction: Policy
) -> None:
    """Of a range that the value had cut off, the sample knew no more than the bytes that it had brought."""
    source, requests = ranges_and_wholes(seed)
    if not is_known:
        monkeypatch.setattr("zcache._cache.slices_like_python", lambda source: False)
    # The adaptive policy draws what it learns from, so it is itself only where all has room.
    for size in (10**6,) if eviction == "adaptive" else (300, 1500, 10**6):
        store = CacheStore(source, max_size=size, eviction=eviction)
        recording = path.with_name(f"{size}.csv.gz")
        hits = []
        with store.record(recording):
            for key, request in requests:
                before = store.cache_stats()["hits"]
                assert value_sync(store, key, request) is not None
                hits.append(store.cache_stats()["hits"] > before)
        slices = is_known and slices_like_python(source)
        sample = ask(store, partial(sampled, slices_like_python=slices))
        for trace in (sample, load(recording)[0]):
            assert trace.earlier == 0
            simulated = Simulator(trace).hits(eviction, size, trace.costs())
            assert simulated.tolist() == hits


@pytest.mark.parametrize("eviction", POLICIES)
def test_parts_of_one_value_are_simulated_as_each_of_its_own_age(
    path: Path, clock: FakeClock, eviction: Policy
) -> None:
    """One that is too old takes no other part of its value with it, in the cache as in the simulation."""
    draw = random.Random(3)
    source = source_of(10)
    store = CacheStore(source, max_age_seconds=10, clock=clock, eviction=eviction)
    # None of these ranges lies in another.
    parts = [None, RangeByteRequest(0, 7), RangeByteRequest(5, 20), SuffixByteRequest(9)]
    # These are served by a whole value where the source is known to slice so.
    parts += [SuffixByteRequest(1000), OffsetByteRequest(1000), RangeByteRequest(50, 1000)]
    hits = []
    with store.record(path):
        for _ in range(1000):
            before = store.cache_stats()["hits"]
            value_sync(store, f"a/c/{draw.randrange(10)}", draw.choice(parts))
            hits.append(store.cache_stats()["hits"] > before)
            clock.advance(draw.choice([0, 0.1, 2]))
    assert 0.1 < np.mean(hits) < 0.9
    sample = ask(store, partial(sampled, slices_like_python=slices_like_python(source)))
    for trace in (sample, load(path)[0]):
        assert trace.outdated.any()
        assert trace.earlier == 0
        found = Simulator(trace).hits(eviction, 10**6, trace.costs()) & ~trace.outdated
        assert found.tolist() == hits


def test_replay_of_a_recording_that_began_on_a_warm_cache_knows_that(path: Path) -> None:
    """It was simulated as if all its keys had come for the first time, with no error."""
    store = CacheStore(source_of(200), max_size=100_000)
    for number in range(200):
        value_sync(store, f"a/c/{number}")
    with store.record(path):
        for number in range(200):
            value_sync(store, f"a/c/{number}")
            assert value_sync(store, f"a/c/{number}", RangeByteRequest(0, 5)) == bytes(5)
    advice = replay(path, sizes=[5000, 20_000, 100_000])
    assert (advice.requests, advice.best_hit_ratio, advice.cold_share) == (400, 1, 0)
    assert advice.hit_ratio == 1
    assert advice.guessed_share == 0.5
    curve = advice.curves["lru"]
    # What was used last of it is not known, but that all of it fits.
    assert list(curve.error) == [0.5, 0, 0]
    assert "50.0% are of values that were cached or requested before these" in str(advice)


def test_replay_of_a_recording_that_began_with_a_value_cached_knows_that_it_serves_its_ranges(
    path: Path,
) -> None:
    store = CacheStore(source_of(1, 1000), max_size=100_000)
    value_sync(store, "a/c/0")
    with store.record(path):
        for start in range(200):
            request = RangeByteRequest(start, start + 5)
            assert value_sync(store, "a/c/0", request) == bytes(5)
    advice = replay(path, sizes=[500, 1000])
    assert advice.best_hit_ratio == advice.guessed_share == 1
    assert list(advice.curves["lru"].hit_ratio) == [0, 1]
    assert list(advice.curves["lru"].error) == [1, 0]


def test_replay_with_given_sizes_and_policies(path: Path) -> None:
    recorded(path)
    advice = replay(path, sizes=["3KB", 6000], policies="lru")
    assert list(advice.sizes) == [3000, 6000]
    assert list(advice.curves) == ["lru"]
    assert advice.curves["lru"].source_requests[1] == 60
    assert advice.curves["lru"].source_bytes[1] == 6000


def test_replay_reads_the_first_format(path: Path) -> None:
    recorded(path)
    now = replay(path)
    text = gzip.decompress(path.read_bytes()).decode()
    head, columns, *lines = text.splitlines(keepends=True)
    head = head.replace("format 2: ", "format 1: ").replace('"value_header": 0, ', "")
    head = head.replace(', "beside_value": 0', "")
    assert "value" not in head
    lines = [line.rpartition(",")[0] + "\r\n" for line in lines]
    first = [head, columns.replace(",outdated", ""), *lines]
    path.write_bytes(gzip.compress("".join(first).encode()))
    assert str(replay(path)) == str(now)


@pytest.mark.parametrize("max_size", [2000, None])
def test_replay_of_values_that_expire_is_what_advise_says(
    path: Path, clock: FakeClock, max_size: int | None
) -> None:
    store = CacheStore(source_of(50), max_size=max_size, max_age_seconds=10, clock=clock)
    with store.record(path):
        for number in range(12):
            for key in range(50):
                value_sync(store, f"a/c/{key}")
                value_sync(store, f"a/c/{key % 7}")
            clock.advance(20 if number % 3 == 2 else 1)
    advice, replayed = store.advise(), replay(path)
    # Less than all but the first requests.
    assert 0 < advice.best_hit_ratio < 1 - 60 / 1200
    assert str(replayed) == str(advice)
    if max_size is None:
        assert replayed.best_hit_ratio == pytest.approx(store.cache_stats()["hit_rate"])


@pytest.mark.parametrize("kind", ["cut", "flipped", "text", "zeros", "empty", "gzip", "other"])
def test_replay_of_a_damaged_file_names_it_and_the_way_out(path: Path, kind: str) -> None:
    recorded(path)
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[:-7],
            "flipped": data[: len(data) // 2] + b"\xff\x00\xff" + data[len(data) // 2 + 3 :],
            "text": b"time,key\n",
            "zeros": bytes(100),
            "empty": b"",
            "gzip": gzip.compress(b"time,key,range\n1,2,3\n"),
            "other": gzip.compress(b"# zcache requests, format 3: {}\n"),
        }[kind]
    )
    with pytest.raises(RecordingError, match=r"requests\.csv\.gz.*no complete recording.*record"):
        replay(path)


@pytest.mark.parametrize(
    "line",
    [
        "1,a,,10,0,,10",
        "x,a,,10,0,,10,0",
        "nan,a,,10,0,,10,0",
        "inf,a,,10,0,,10,0",
        "-1,a,,10,0,,10,0",
        "1,a,,10,0,,-1,0",
        "1,a,,-1,0,,10,0",
        "1,a,-,10,0,,10,0",
        "1,a,3,10,0,,10,0",
        "1,a,1-2-3,10,0,,10,0",
        "1,a,x-2,10,0,,10,0",
        "1,a,9223372036854775808-,10,0,,10,0",
        "1,a,,10,0,-x,10,0",
        "1,a,,10,0,,1_0,0",
        "1,a,,10,0,,18446744073709551615,0",
        "1,a,,10,0,,9223372036854775807,0",
        f"1,a,,10,0,,{'9' * 5000},0",
        "1,a,,10,2000,,10,0",
        "1,a,,10,2,,10,0",
        "1,a,,10,,,10,0",
        "1,a,,10,0,,10,2",
        "1,a,,10,0,,10,",
        '1,"a',
        "1,2,3",
        "1," + "a" * 2**20 + ",,10,0,,10,0",
        "1," + "a" * 4001 + ",,10,0,,10,0",
        "1,a,1-" + "2" * 100 + ",10,0,,10,0",
        '1,a,"' + '\n","\n' * 10_000 + '",10,0,,10,0',
    ],
)
def test_replay_of_a_line_that_is_wrong_names_it(path: Path, line: str) -> None:
    recorded(path)
    text = gzip.decompress(path.read_bytes()).decode() + line + "\n"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(RecordingError, match=r"line \d+|end of data"):
        replay(path)


GOOD = {
    "max_size": 2000,
    "block_size": 1,
    "value_header": 0,
    "beside_value": 0,
    "eviction": "lru",
    "anonymous": False,
}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("3", "no JSON object"),
        ('"max_size"', "no JSON object"),
        ("{}", "max_size is 'missing'"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "no complete recording"),
        *(
            (json.dumps({**GOOD, name: value}), f"its {name} is")
            for name, value in [
                ("max_size", -1),
                ("max_size", 2**64),
                ("max_size", 10**400),
                ("max_size", True),
                ("max_size", 1.5),
                ("block_size", -1),
                ("block_size", 2**64),
                ("block_size", float("inf")),
                ("block_size", None),
                ("block_size", "4096"),
                ("block_size", []),
                ("value_header", -1),
                ("value_header", None),
                ("beside_value", -1),
                ("beside_value", 1e3),
                ("slices_like_python", None),
                ("slices_like_python", 1),
                ("eviction", "no policy"),
                ("eviction", None),
                ("eviction", ["lru"]),
            ]
        ),
    ],
)
def test_replay_of_a_head_that_is_wrong_names_it(path: Path, head: str, message: str) -> None:
    recorded(path)
    first, _, rest = gzip.decompress(path.read_bytes()).decode().partition("\r\n")
    first = first[: first.index("{")] + head
    path.write_bytes(gzip.compress(f"{first}\r\n{rest}".encode()))
    with pytest.raises(RecordingError, match=message) as caught:
        replay(path)
    assert str(path) in str(caught.value)


def test_replay_of_another_format_says_that_a_version_knows_it(path: Path) -> None:
    path.write_bytes(gzip.compress(b"# zcache requests, format 27: {}\r\ntime,key\r\n"))
    with pytest.raises(
        RecordingError, match=r"its format is '27'.*the version of zcache that made"
    ):
        replay(path)


def test_replay_of_what_is_no_recording_reads_no_more_than_its_beginning(path: Path) -> None:
    """Zeros that would take more memory than there may be."""
    path.write_bytes(gzip.compress(bytes(2**26)) * 40)
    tracemalloc.start()
    try:
        with pytest.raises(RecordingError, match=r"it begins with .*, not with"):
            replay(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def in_members(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Have a recording of many members; where each ends, and how many requests there are by then."""
    monkeypatch.setattr(recording, "BATCH", 100)
    names = ["a\nb", "c\rd", "e\r\nf", 'g"h', *"ijk"]
    store = CacheStore(MemoryStore({name: buf(random.Random(name).randbytes(9)) for name in names}))
    with store.record(path):
        for _ in range(100):
            for name in names:
                value_sync(store, name)
    data, ends, rows = path.read_bytes(), [(0, 0)], -1
    while rest := data[ends[-1][0] :]:
        member = zlib.decompressobj(31)
        text = member.decompress(rest).decode()
        lines = list(csv.reader(io.StringIO(text, newline="")))
        # The first one has two lines and no rows.
        rows += len(lines) - (rows < 0)
        ends.append((len(data) - len(member.unused_data), rows))
    assert rows == 700
    return ends[1:]


def test_replay_of_a_file_that_is_cut_off_simulates_its_whole_members(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of the next one was too little for that, and of a member that ended in zeros rows were made up."""
    ends = in_members(path, monkeypatch)
    data = path.read_bytes()
    assert len(ends) > 5
    (first, _), (second, rows), (third, _) = ends[0], ends[2], ends[3]
    for cut in (*range(second, second + 30), *range(third - 30, third)):
        path.write_bytes(data[:cut])
        assert len(load(path, truncated=True)[0]) == rows, cut
        if cut > second:
            with pytest.raises(RecordingError, match=r"cut off after [\d,]+ lines\. Simulate what"):
                replay(path)
    # What a machine leaves that lost its power.
    for cut in range(second, third - 4, 17):
        path.write_bytes(data[:cut] + bytes(4096))
        assert len(load(path, truncated=True)[0]) == rows, cut
        with pytest.raises(
            RecordingError, match=r"(cut off|damaged) after [\d,]+ lines.*truncated=True"
        ) as caught:
            replay(path)
        lines = 2 + data_lines(data[first:second])
        assert f"after {lines:,} lines" in str(caught.value)
    # Nothing is whole.
    path.write_bytes(data[: first - 1])
    with pytest.raises(RecordingError, match=r"cut off in its first part\. Copy it again"):
        replay(path, truncated=True)
    path.write_bytes(data)
    assert replay(path, truncated=True).requests == 700
    with pytest.raises(OptionTypeError, match="truncated"):
        replay(path, truncated=1)  # type: ignore[arg-type]


def data_lines(data: bytes) -> int:
    return gzip.decompress(data).count(b"\n")


def test_replay_of_a_line_that_is_wrong_in_a_whole_member_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = in_members(path, monkeypatch)
    data = path.read_bytes()
    wrong = gzip.compress(b"1,a,,10,0,,10,0,0\r\n1,a\r\n" + b"1,a,,10,0,,10,0,0\r\n" * 9)
    path.write_bytes(data + wrong)
    with pytest.raises(RecordingError, match=r"line [\d,]+ has"):
        load(path, truncated=True)
    # The same with other bytes at its end: it is not what was written.
    path.write_bytes(data + wrong[:-8] + bytes(8))
    assert len(load(path, truncated=True)[0]) == ends[-1][1]


def test_replay_of_many_long_keys_takes_bounded_memory(path: Path) -> None:
    """A megabyte of file took a gigabyte."""
    recorded(path)
    text = gzip.decompress(path.read_bytes()).decode()
    lines = "".join(f"1,{number}{'x' * 3900},,10,0,,10,0\r\n" for number in range(10_000))
    path.write_bytes(gzip.compress((text + lines).encode()))
    del text, lines
    tracemalloc.start()
    try:
        load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_replay_knows_long_keys_of_one_beginning_apart(path: Path) -> None:
    keys = ["x" * 200 + end for end in "abc"]
    store = CacheStore(MemoryStore({key: buf(bytes(10)) for key in keys}))
    with store.record(path):
        for key in keys * 50:
            value_sync(store, key)
    assert replay(path, sizes=[30]).curves["lru"].source_requests[0] == 3


def test_longest_keys_that_are_cached_can_be_replayed(path: Path) -> None:
    key = "/".join(['"' * 199] * 20)
    store = CacheStore(MemoryStore({key: buf(bytes(10))}))
    assert is_cacheable_key(key)
    assert not is_cacheable_key("/".join(["a" * 200] * 20))
    with store.record(path):
        for _ in range(100):
            value_sync(store, key)
    assert replay(path).requests == 100


@pytest.mark.parametrize("call", ["record", "replay"])
@pytest.mark.parametrize("end", ["", "\0", "\ud800"])
def test_path_of_a_recording_that_is_a_url_is_shown_without_what_is_secret(
    call: str, end: str
) -> None:
    url = f"http://user:password@host/x?token=password{end}"
    use: Any = CacheStore(MemoryStore()).record if call == "record" else replay
    with pytest.raises((FileNotFoundError, OptionValueError)) as caught:
        use(url)
    assert "password" not in f"{caught.value} {caught.value!r}"
    assert "http://host/x" in str(caught.value)


def test_replay_of_no_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replay(path)
