"""Which cases of parametrized tests the options choose."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from cases import pairwise, spread

if TYPE_CHECKING:
    import pytest


def cases_of(marks: list[Any], **values: list[Any]) -> list[Any]:
    """Stand-ins for the items of a test, of the product of all values."""
    return [
        SimpleNamespace(
            nodeid=f"test_one[{case}]",
            callspec=SimpleNamespace(params=dict(zip(values, case, strict=True))),
            iter_markers=lambda name: marks,
        )
        for case in product(*values.values())
    ]


def test_pairwise_all_pairs_of_values_meet_in_few_cases() -> None:
    values = {"write": [[n] for n in range(7)], "cache": ["a", "b", "c"], "warm": [True, False]}
    every = cases_of([], **values)
    chosen = [case.callspec.params for case in pairwise(every)]
    assert len(every) == 42
    assert 21 <= len(chosen) < 30
    for one, other in combinations(values, 2):
        met = {(str(case[one]), str(case[other])) for case in chosen}
        assert met == {(str(a), str(b)) for a in values[one] for b in values[other]}


def test_pairwise_of_two_parameters_is_all_cases() -> None:
    every = cases_of([], one=[1, 2, 3], other=["a", "b"])
    assert pairwise(every) == every


def test_pairwise_names_that_are_given_together_are_one_parameter() -> None:
    mark = SimpleNamespace(args=("one, other",), kwargs={})
    every = cases_of([mark], one=[1, 2, 3], other=["a", "b"], third=[None, ()])
    assert pairwise(every) == every


def test_pairwise_of_a_test_without_parameters_is_that_test(request: pytest.FixtureRequest) -> None:
    assert pairwise([request.node]) == [request.node]


def test_spread_begins_with_the_first_at_equal_distances() -> None:
    every = cases_of([], one=list(range(10)))
    assert [case.callspec.params["one"] for case in spread(every, 3)] == [0, 3, 6]
    assert spread(every, 20) == every
    assert spread(every, 1)[0] in every
