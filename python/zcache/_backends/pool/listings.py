"""Answers to `list_dir` of one source of a pool."""

from __future__ import annotations

import os
import shutil

from zcache._backends.listings import DirectoryListings
from zcache._backends.pool.register import label_of
from zcache._core import make_folder


class SourceListings(DirectoryListings):
    """Answers in a folder of their own beside the index of the pool, which is made with the first of them.

    Parameters
    ----------
    index_root : str
        The folder of the index.
    source : str
        Its name.
    only_reads : bool, optional
        Whether no answer is added. Default is False.
    """

    def __init__(self, index_root: str, source: str, *, only_reads: bool = False) -> None:
        super().__init__(os.path.join(index_root, label_of(source)), source, only_reads=only_reads)

    def rename(self, source: str) -> None:
        # docstring inherited
        self._keep_in(os.path.join(os.path.dirname(self._root), label_of(source)), source)

    def _keep_in(self, root: str, source: str) -> None:
        super()._keep_in(root, source)
        # The folder: it is made before the first answer, and goes after the last one.
        self._mark = root

    def _set_mark(self) -> None:
        # docstring inherited
        pass

    def _open(self, path: str) -> int:
        try:
            return super()._open(path)
        except FileNotFoundError:
            make_folder(self._root)
            return super()._open(path)


def remove_listings(index_root: str, label: str) -> None:
    """Forget all answers of a source, and its folder."""
    shutil.rmtree(os.path.join(index_root, label), ignore_errors=True)
