"""The file of recorded requests: how it begins, its columns, its path.

It is text with a line for each request, as CSV (RFC 4180), compressed by gzip. Each batch is a member of its
own, which any tool for gzip reads on; so what was written before an error, or before the process died, stays
whole.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from zcache._source.paths import expand_home
from zcache._source.urls import redact
from zcache.exceptions import OptionTypeError, OptionValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC: Final = "# zcache requests, format "
RECORDING_FORMAT: Final = "2"
HEAD: Final = f"{MAGIC}{RECORDING_FORMAT}: "
"""What a file begins with; JSON follows."""
_FIRST: Final = ("time", "key", "range", "size", "hit", "entry_range", "entry_size")
COLUMNS: Final = {"1": _FIRST, RECORDING_FORMAT: (*_FIRST, "outdated")}
"""Of each format that can be read."""
LONGEST_ROW: Final = 2**14
"""Characters of a row at most, in all of its lines: a key takes twice its own, as it is quoted."""


def path_of_recording(path: object) -> str:
    """The path of a file, with the home of a user in the place of the ``~`` at its beginning.

    Raises
    ------
    OptionTypeError, OptionValueError
        If no file can have such a path, or that home is not known.
    """
    advice = 'Give the path of a file, such as "requests.csv.gz".'
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        raise OptionTypeError(f"invalid path: {path!r}. {advice}") from None
    shown = redact(text) if isinstance(text, str) else text
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise OptionValueError(f"invalid path: {shown!r} has no encoding. {advice}") from None
    if not encoded:
        raise OptionValueError(f"invalid path: {shown!r} is empty. {advice}")
    if b"\0" in encoded:
        raise OptionValueError(f"invalid path: {shown!r} contains a null character. {advice}")
    return expand_home(os.fsdecode(encoded), "path")


@contextlib.contextmanager
def errors_name(path: str) -> Iterator[None]:
    """Have an error of the file name it, which a descriptor does not tell, without what is secret in a URL."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = redact(path)
        raise
