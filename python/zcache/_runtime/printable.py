r"""Texts that every terminal and file takes, and that people read.

Python has what is not UTF-8 in a path as lone surrogates, which can be written nowhere: of a report that holds one, nothing would
be seen. What is shown has them as ``\udcff``.
"""

from __future__ import annotations

import logging


def printable(text: str) -> str:
    """A text with its lone surrogates escaped, as `repr` does it."""
    return text.encode(errors="backslashreplace").decode()


def shown_seconds(seconds: float) -> str:
    """A time as text, without what a float makes of it."""
    return f"{round(seconds, 3):g} s"


def _make_printable(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - what cannot be shown is the handlers' matter, which raise nothing
        return True
    if (shown := printable(message)) != message:
        record.msg, record.args = shown, None
    return True


logging.getLogger("zcache").addFilter(_make_printable)
