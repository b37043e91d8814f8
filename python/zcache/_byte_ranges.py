"""Byte requests as the index takes them, and which keys it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest

from zcache._core import MAX_KEY
from zcache.exceptions import OptionTypeError

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest

RESERVED = ".zcache"
"""First part of the keys that zcache keeps for itself in the cache store."""

ByteRange: TypeAlias = tuple[int, int, int]
"""A byte request for the index: kind (1 range, 2 offset, 3 suffix) and its numbers."""

_LIMIT = 2**63
_REQUESTS = (RangeByteRequest, OffsetByteRequest, SuffixByteRequest)


def check_key(key: object) -> None:
    if not isinstance(key, str):
        raise OptionTypeError(f'invalid key: {key!r}. Give text, such as "temperature/c/0/0".')


def check_prefix(prefix: object) -> str:
    if not isinstance(prefix, str):
        raise OptionTypeError(
            f'invalid prefix: {prefix!r}. Give a key or a directory as text, or "" for everything.'
        )
    return prefix


def check_byte_range(request: object) -> None:
    if request is not None and not isinstance(request, _REQUESTS):
        raise OptionTypeError(
            f"invalid byte_range: {request!r}. Give one of zarr.abc.store, such as RangeByteRequest(0, 100), or None "
            "for the full value."
        )


def to_byte_range(request: ByteRequest | None) -> ByteRange | None:
    """Convert a byte request; None stands for the whole value.

    Raises
    ------
    ValueError
        Where stores differ in what they make of the request (negative numbers, an end before the
        start, an unknown type): the source has to answer it, each time.
    """
    kind = type(request)
    if request is None:
        return None
    if kind is RangeByteRequest and 0 <= request.start <= request.end < _LIMIT:  # type: ignore[union-attr]
        return (1, request.start, request.end)  # type: ignore[union-attr]
    if kind is OffsetByteRequest and 0 <= request.offset < _LIMIT:  # type: ignore[union-attr]
        return (2, request.offset, 0)  # type: ignore[union-attr]
    if kind is SuffixByteRequest and 0 <= request.suffix < _LIMIT:  # type: ignore[union-attr]
        return (3, request.suffix, 0)  # type: ignore[union-attr]
    raise ValueError(f"no cacheable byte request: {request!r}")


def to_request(byte_range: ByteRange | None) -> ByteRequest | None:
    """The inverse of `to_byte_range`."""
    if byte_range is None:
        return None
    kind, first, second = byte_range
    if kind == 1:
        return RangeByteRequest(first, second)
    return OffsetByteRequest(first) if kind == 2 else SuffixByteRequest(first)


def to_text(byte_range: ByteRange | None) -> str:
    """A byte range as names of entries have it: ``first-end``, ``first-``, ``-count``; "" for all."""
    if byte_range is None:
        return ""
    kind, first, second = byte_range
    return f"{first}-{second}" if kind == 1 else f"{first}-" if kind == 2 else f"-{first}"


def from_text(text: str) -> ByteRange | None:
    """The inverse of `to_text`.

    Raises
    ------
    ValueError
        If it is none of its texts.
    """
    if not text:
        return None
    first, dash, second = text.partition("-")
    numbers = [int(part) for part in (first, second) if part.isascii() and part.isdecimal()]
    if dash and len(numbers) == bool(first) + bool(second) > 0 and max(numbers) < _LIMIT:
        if first and second:
            return (1, numbers[0], numbers[1])
        return (2, numbers[0], 0) if first else (3, numbers[0], 0)
    raise ValueError(f"range is {text!r:.40}, none of first-end, first-, -count")


def is_reserved(key: str) -> bool:
    """Whether a key belongs to zcache itself."""
    return key == RESERVED or key.startswith(RESERVED + "/")


def is_plain(key: str) -> bool:
    """Whether a key names no other place than it seems to."""
    return not {"", ".", ".."} & set(key.split("/"))


def is_too_long(key: str) -> bool:
    """Whether neither a key that is text nor any key below it can be cached."""
    return len(key.encode()) > MAX_KEY


def is_encodable(key: str) -> bool:
    """Whether a key is text: lone surrogates are not."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
