"""Paths as people write them."""

from __future__ import annotations

import os

from zcache._source.urls import redact
from zcache.exceptions import OptionValueError


def absolute(path: str, option: str) -> str:
    """A path from the root on, so that it is the same wherever the process goes later.

    `..` is left to the system, which follows links before it.

    Parameters
    ----------
    path : str
        The path.
    option : str
        What has named it, for the error.

    Raises
    ------
    OptionValueError
        If it is relative, and the working directory has been removed.
    """
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError as error:
        # A URL that is misspelt is a path as well.
        raise OptionValueError(
            f"invalid {option}: {redact(path)!r} is relative, but there is no working directory any more "
            f"({error.strerror}). Give the path in full, or change to a directory that exists."
        ) from None


def expand_home(path: str, option: str) -> str:
    """A path with the home of a user in the place of the ``~`` at its beginning.

    Parameters
    ----------
    path : str
        The path.
    option : str
        What has named it, for the error.

    Raises
    ------
    OptionValueError
        If that home is not known.
    """
    expanded = os.path.expanduser(path)
    # What stands there for a home that is not known would be made in the working directory.
    if not expanded.startswith("~"):
        return expanded
    user = path.partition("/")[0][1:]
    why = f"there is no user {user!r}" if user else "your home is not known: set HOME"
    shown = redact(path)
    raise OptionValueError(
        f"invalid {option}: {shown!r}, but {why}. Give the path in full, or {f'./{shown}'!r} for what is called so."
    )
