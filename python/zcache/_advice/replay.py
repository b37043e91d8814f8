"""`replay`: what recorded requests would have come to with other sizes and policies."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from array import array
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from zcache._advice.advise import advise, parse_policies, parse_sizes
from zcache._advice.recording import COLUMNS, HEAD
from zcache._advice.trace import UNKNOWN, Trace, complete
from zcache.exceptions import RecordingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zcache._advice.advice import Advice


def replay(
    path: str | os.PathLike[str],
    *,
    sizes: Iterable[int | str] | None = None,
    policies: Iterable[str] | None = None,
) -> Advice:
    """Simulate recorded requests, all of them, with other sizes and policies.

    Parameters
    ----------
    path : str or PathLike
        A file that `CacheStore.record` has made.
    sizes : iterable of int or str, optional
        Bytes, or text such as ``"2 GiB"``. Default is None: from 1/16 to 16 times the bound of the
        recorded store or, where it had none, the bytes of all entries that were requested.
    policies : iterable of str, optional
        Any of "lru", "none" and "adaptive". Default is None: all.

    Returns
    -------
    Advice
        As `CacheStore.advise` gives, without errors of sampling. False in a condition, with a `reason`, if there
        are fewer than 100 requests.

    Raises
    ------
    RecordingError
        A `ValueError`: the file is damaged, or no such recording.
    OSError
        If it cannot be read.
    OptionTypeError, OptionValueError
        If a size or a policy is none.
    """
    parsed, named = parse_sizes(sizes), parse_policies(policies)
    trace, max_size, policy = load(path)
    return advise(trace, max_size=max_size, policy=policy, sizes=parsed, policies=named)


def load(path: str | os.PathLike[str]) -> tuple[Trace, int | None, str]:
    """The requests of a file, in the order of their times, and the bound and the policy of the store."""
    name = os.fspath(path)
    try:
        with gzip.open(name, "rt", encoding="utf-8", newline="") as file:
            return _parse(file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(name, f"it is not, or not wholly, compressed by gzip ({error})") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise _damaged(name, str(error)) from error


def _damaged(name: str, what: str) -> RecordingError:
    return RecordingError(
        f"{name!r} is no complete recording of requests: {what}. Copy it again from where it was made, or "
        "record anew with `with store.record(path):`."
    )


def _parse(file: TextIO) -> tuple[Trace, int | None, str]:
    head = file.readline()
    if not head.startswith(HEAD):
        raise ValueError(f"it begins with {head[:40]!r}, not with {HEAD!r}")
    about: dict[str, Any] = json.loads(head.removeprefix(HEAD))
    lines = csv.reader(file, strict=True)
    if tuple(next(lines, ())) != COLUMNS:
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    numbers: dict[tuple[str, str], int] = {}
    times, keys, sizes, hits = array("d"), array("Q"), array("Q"), array("b")
    for line in lines:
        if len(line) != len(COLUMNS):
            raise ValueError(f"line {lines.line_num + 1} has {len(line)} columns")
        try:
            at, key, _, _, hit, entry_range, size = line
            times.append(float(at))
            keys.append(numbers.setdefault((key, entry_range), len(numbers)))
            sizes.append(int(size) if size else UNKNOWN)
            hits.append(int(hit))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"line {lines.line_num + 1}: {error}") from error
    max_size = about["max_size"]
    if not (max_size is None or (type(max_size) is int and max_size >= 0)):
        raise ValueError(f"its max_size is {max_size!r}")
    # Misses were written when they were known, not when they were made.
    order = np.argsort(np.frombuffer(times, float), kind="stable")
    trace = complete(
        np.frombuffer(keys, np.uint64)[order],
        np.frombuffer(sizes, np.uint64)[order],
        np.frombuffer(hits, np.int8)[order] != 0,
        int(about["block_size"]),
    )
    return trace, max_size, str(about["eviction"])
