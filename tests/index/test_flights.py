"""Flights of many keys in one call."""

from __future__ import annotations

from zcache._core import Index


def test_lead_all_opens_flights_of_keys_that_have_none() -> None:
    index = Index()
    first = object()
    ticket = index.join("b", None, first, 0.0, True)
    # Such a key is never cached.
    keys = ["a", "b", "../c", "\udcff"]
    tickets = index.lead_all(keys, [object() for _ in keys])
    assert isinstance(tickets[0], int)
    assert tickets[1:] == [None, None, None]
    assert index.in_flight == (2, 0)
    assert index.join("b", None, object(), 0.0, True) == (None, first)
    assert isinstance(ticket, int)
    index.complete_flights(["a", "b"], [tickets[0], ticket])
    assert index.in_flight == (0, 0)
    # Nothing happens to what is closed, or was opened since.
    again = index.lead_all(["a"], [object()])
    index.complete_flights(["a", "b"], [tickets[0], ticket])
    assert index.in_flight == (1, 0)
    index.complete_flights(["a"], [again[0] or 0])
    assert index.in_flight == (0, 0)
    index.validate()


def test_lead_all_of_more_keys_than_one_step_takes() -> None:
    index = Index()
    keys = [f"v/{n}" for n in range(3000)]
    tickets = index.lead_all(keys, [object()] * len(keys))
    assert len({ticket for ticket in tickets if ticket is not None}) == len(keys)
    index.complete_flights(keys, [ticket or 0 for ticket in tickets])
    assert index.in_flight == (0, 0)
