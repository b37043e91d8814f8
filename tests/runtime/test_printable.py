"""Texts with lone surrogates can be shown, and what cannot be shown raises nothing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from zcache._runtime.coroutines import report

if TYPE_CHECKING:
    import pytest


class Unshowable(Exception):  # noqa: N818 - it is none of ours
    """An error of others."""

    def __repr__(self) -> str:
        raise IndexError


def test_error_that_cannot_be_shown_is_reported_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Handler()
    monkeypatch.setattr(logging.getLogger("zcache"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("zcache"), "propagate", False)

    def fail(_: object) -> None:
        raise Unshowable

    report(fail, None)
    assert len(records) == 1
