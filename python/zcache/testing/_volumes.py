"""Volumes that a test needs for its cache directories, and openings that wait."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import zcache.testing._internals as _internals  # noqa: PLR0402 - not through the package, which imports this
from zcache.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from collections.abc import Iterator


def set_block_size(size: int | None) -> int | None:
    """Count the room of values in cache directories in blocks of another size, in this process.

    So a test may use small values and a small bound on any volume. It applies to directories that are opened from now
    on.

    Parameters
    ----------
    size : int or None
        Bytes, from 1 to 2**32: with 1 a value takes as many bytes as it has. None is what the volume says, as outside of
        tests.

    Returns
    -------
    int or None
        What was in force before.

    Raises
    ------
    OptionTypeError, OptionValueError
        If it is none of these.
    """
    is_number = isinstance(size, int) and not isinstance(size, bool)
    if size is not None and not (is_number and 1 <= size <= 2**32):
        kind = OptionValueError if is_number else OptionTypeError
        raise kind(
            f"invalid size: {size!r}. Give a whole number of bytes from 1 to 2**32, or None for what the volume says."
        )
    return _internals.set_block_size(size)


@contextlib.contextmanager
def without_shared_index(error: OSError | None = None) -> Iterator[None]:
    """Have directories and pools that are opened inside an index of their own, as on a volume that has no locks.

    Parameters
    ----------
    error : OSError, optional
        What opening the shared index raises. Default is ``ENOSYS``.
    """
    error = error or OSError(errno.ENOSYS, "no locks here")

    def refuse(*_: Any) -> Any:
        raise error

    with _internals.replaced_openings(refuse):
        yield


@contextlib.contextmanager
def patient_openings(seconds: float = 60.0) -> Iterator[None]:
    """Have directories that are opened inside wait until their index is rebuilt, on a machine that is busy too.

    Parameters
    ----------
    seconds : float, optional
        How long at most. Default is 60. Without this an opening continues after a second, and the rebuild in the
        background.
    """
    with _internals.patient_rebuilds(seconds):
        yield
