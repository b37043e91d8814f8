"""Bounds as users write them: sizes in bytes or text, ages in seconds or "infinity"."""

from __future__ import annotations

import math
import operator
import re
from numbers import Real
from typing import Any, Literal

MAX_BYTES = 2**64 - 1

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(value: object, name: str = "max_size") -> int | None:
    """Convert a size to bytes.

    Parameters
    ----------
    value : int, str or None
        Bytes from 0 to 2**64 - 1; or a number and a unit, such as ``"256MB"`` (10**6 bytes each) or
        ``"2 GiB"`` (2**30 bytes each), in any case; or None for no bound.
    name : str
        How the caller calls it, for the error.

    Raises
    ------
    TypeError
        For anything else, bool and float among them.
    ValueError
        For a negative number, one beyond 64 bits, an unknown unit, or part of a byte.
    """
    if value is None:
        return None
    size: int
    if isinstance(value, str):
        size = _parse_size_text(value, name)
    else:
        if isinstance(value, bool):
            raise TypeError(_size_message(name, value))
        try:
            size = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(_size_message(name, value)) from None
    if not 0 <= size <= MAX_BYTES:
        raise ValueError(_size_message(name, value))
    return size


def _parse_size_text(text: str, name: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(_size_message(name, text))
    whole, _, fraction = match[1].partition(".")
    unit = _UNITS[match[2].lower()]
    # Whole numbers throughout: a float would round a bound of petabytes.
    scale: int = 10 ** len(fraction)
    try:
        size, rest = divmod(int(whole + fraction) * unit, scale)
    except ValueError:  # Python reads no number of thousands of digits.
        raise ValueError(_size_message(name, text)) from None
    if rest and unit == 1:
        raise ValueError(_size_message(name, text))
    return size


def _size_message(name: str, value: object) -> str:
    none = "no bound" if name == "max_size" else "the default"
    return (
        f"{name}={value!r} is no size. Give a whole number of bytes from 0 to 2**64 - 1, text such "
        f'as "256MB" or "2 GiB", or None for {none}.'
    )


def parse_age(value: object) -> float | Literal["infinity"]:
    """Convert a maximum age to seconds, or to "infinity".

    Parameters
    ----------
    value : float, int, str or None
        Seconds from 0 on, fractions allowed; or ``"infinity"``, None or ``float("inf")``, which all
        mean that nothing ever expires.

    Raises
    ------
    TypeError
        For anything else, bool among them.
    ValueError
        For a negative number, NaN, or any other text.
    """
    if value is None or (isinstance(value, str) and value == "infinity"):
        return "infinity"
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise TypeError(_age_message(value))
    number: Any = value
    try:
        age = math.nan if isinstance(number, str) else float(number)
    except TypeError:  # numpy's time spans call themselves integers
        raise TypeError(_age_message(value)) from None
    except OverflowError:
        raise ValueError(_age_message(value)) from None
    if math.isnan(age) or age < 0:
        raise ValueError(_age_message(value))
    if math.isinf(age):
        return "infinity"
    return number if isinstance(number, int) else age


def _age_message(value: object) -> str:
    return (
        f"max_age_seconds={value!r} is no age. Give seconds as a number from 0 on (0 keeps nothing "
        f'fresh), or "infinity" or None for entries that never expire.'
    )
