"""Flights of many keys in one call."""

from __future__ import annotations

from zcache._core import Granted, Index, ReadCounters


def test_lead_all_opens_flights_of_keys_that_have_none() -> None:
    index = Index()
    first = object()
    ticket = index.join("b", None, first, 0.0, True)
    # Such a key is never cached.
    keys = ["a", "b", "../c", "\udcff"]
    tickets = index.lead_all(keys, flight := object())
    assert isinstance(tickets[0], int)
    assert tickets[1:] == [None, None, None]
    assert index.in_flight == (2, 0)
    assert index.join("b", None, object(), 0.0, True) == (None, first)
    assert index.join("a", None, object(), 0.0, True) == (None, flight)
    assert isinstance(ticket, int)
    index.complete_flights(["a", "b"], [tickets[0], ticket])
    assert index.in_flight == (0, 0)
    # Nothing happens to what is closed, or was opened since.
    again = index.lead_all(["a"], object())
    index.complete_flights(["a", "b"], [tickets[0], ticket])
    assert index.in_flight == (1, 0)
    index.complete_flights(["a"], [again[0] or 0])
    assert index.in_flight == (0, 0)
    index.validate()


def test_lead_all_of_more_keys_than_one_step_takes() -> None:
    index = Index()
    keys = [f"v/{n}" for n in range(3000)]
    tickets = index.lead_all(keys, object())
    assert len({ticket for ticket in tickets if ticket is not None}) == len(keys)
    index.complete_flights(keys, [ticket or 0 for ticket in tickets])
    assert index.in_flight == (0, 0)


def test_lookup_all_says_which_keys_are_there_and_counts_each() -> None:
    index = Index()
    keys = [f"v/{n}" for n in range(3000)]
    for key in keys[::7]:
        ticket = index.join(key, None, object(), 0.0, True)
        assert isinstance(ticket, int)
        granted = index.reserve(key, None, 1, ticket, 0.0)
        assert isinstance(granted, Granted)
        index.commit(granted.reservation, None, 0.0)
    counters = ReadCounters()
    # Such keys are never cached.
    found = index.view(counters, False, False).lookup_all([*keys, "../c", "\udcff"])
    assert found == list(range(0, 3000, 7))
    assert (counters.hits, counters.misses) == (len(found), 3002 - len(found))
