"""Which cases of parametrized tests run: a few that are spread over all, or those in which all pairs of values meet."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

Factors = tuple[tuple[str, tuple[int, ...]], ...]
"""Name of each parameter of a case, and which value it has there."""


def by_test(items: Iterable[pytest.Item]) -> Iterable[list[pytest.Item]]:
    """All cases of each test."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return cases.values()


def spread(cases: Sequence[pytest.Item], limit: int) -> list[pytest.Item]:
    """The first case, and others at equal distances: no more than so many.

    Where there is one, it is the first of some tests, the last of others: first cases are much alike.
    """
    if limit == 1:
        return [cases[crc32(cases[0].nodeid.encode()) % len(cases)]]
    count = min(limit, len(cases))
    return [cases[i * len(cases) // count] for i in range(count)]


def pairwise(cases: Sequence[pytest.Item]) -> list[pytest.Item]:
    """So many cases that each value of a parameter meets each value of each other parameter in one of them.

    These are all cases of a test with fewer than three parameters, and of one that lists its cases.
    """
    pairs = [set(combinations(factors_of(item), 2)) for item in cases]
    missing = set[tuple[object, ...]]().union(*pairs)
    if any(len(found) < 3 for found in pairs):  # Three parameters make three pairs.
        return list(cases)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [cases[i] for i in sorted(chosen)]


def factors_of(item: pytest.Item) -> Factors:
    """The parameters of a case; names that one `parametrize` gives together are one parameter."""
    spec = getattr(item, "callspec", None)
    if spec is None:
        return ()
    together: dict[str, str] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        together |= dict.fromkeys(names, ",".join(names))
    found: dict[str, tuple[int, ...]] = {}
    for name, value in sorted(spec.params.items()):
        # Values need be neither hashable nor comparable: each is one object in all its cases.
        factor = together.get(name, name)
        found[factor] = (*found.get(factor, ()), id(value))
    return tuple(found.items())
