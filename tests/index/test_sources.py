"""The views that sources have of the index of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zcache._core import Granted, Index

if TYPE_CHECKING:
    from collections.abc import Callable

PAST = (1, 5, 50)
"""A range beyond the end of a value of three bytes."""


def test_each_source_of_a_pool_slices_in_its_own_way() -> None:
    """Whichever has looked up last."""
    pool = Index(max_size=1000, flat_namespace=True)
    python, other = pool.within("a" * 8, True), pool.within("b" * 8, False)
    for view in (python, other):
        ticket = view.join("k", None, object(), 0.0, False)
        assert isinstance(ticket, int)
        view.set_validator("k", ticket, "v1")
        granted = view.reserve("k", None, 3, ticket, 0.0)
        assert isinstance(granted, Granted)
        view.commit(granted.reservation, None, 0.0)
    for last in (python, other):
        assert last.lookup("none", PAST) is None
        assert python.validator("k", PAST) == "v1"
        assert python.peek("k", PAST, 0.0) == 0
        assert other.validator("k", PAST) is None
        assert other.peek("k", PAST, 0.0) is None


def test_many_keys_at_once_are_refused_to_a_source() -> None:
    """They would be those of the whole pool."""
    pool = Index(max_size=1000, flat_namespace=True)
    view = pool.within("a" * 8, True)
    calls: list[Callable[[], object]] = [
        lambda: view.lookup_all(["k"]),
        lambda: view.lead_all(["k"], object()),
        lambda: view.complete_flights(["k"], [1]),
        lambda: view.reserve_all(["k"], 1, [1], 0.0),
        lambda: view.advance_all([], [], [], 0.0),
        lambda: view.commit_all([], 0.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="of a pool"):
            call()
    assert not pool.is_in_flight("k")
