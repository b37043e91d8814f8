"""Folders of a cache directory that come and go with values: their blocks count towards the bound."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from zcache._core import Index, take_folder_bytes
from zcache._index.handle import ignore
from zcache._index.resolution import RETRYABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zcache._index.calls import Handle


@contextlib.contextmanager
def counted(handle: Handle) -> Iterator[None]:
    """Tell the index which folders this thread makes and removes in here."""
    folder_sum = None
    # Where only waiting could tell, what is removed goes on counting, until a rebuild.
    with contextlib.suppress(*RETRYABLE):
        folder_sum = handle.index.folder_sum()
    take_folder_bytes()
    try:
        yield
    finally:
        if folders := take_folder_bytes():
            handle.call_later(ignore, Index.count_folders_since, folder_sum, folders)
