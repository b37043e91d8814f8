"""Questions to libraries, which may fail in any way."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")
_INTERRUPTS: Final = (
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
    asyncio.CancelledError,
    MemoryError,
)


class UnnamedError(Exception):
    """Which place or which source this is cannot be told."""


def ask(question: Callable[[], _T]) -> _T | None:
    """What a library answers; None if it fails, for then it cannot be told.

    A panic of one that is written in Rust is a `BaseException` and no `Exception`.
    """
    try:
        return question()
    except _INTERRUPTS:
        raise
    except BaseException:  # noqa: BLE001 - see above
        return None
