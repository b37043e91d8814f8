"""A cache directory: whose it is, and how its index is filled from a walk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from typing import TYPE_CHECKING, Any, Final

from zcache import _files
from zcache._identity import TRANSIENT

if TYPE_CHECKING:
    from zcache._books import Books
    from zcache._core import Index

logger = logging.getLogger("zcache")

FORMAT: Final = 1
_BATCH: Final = 4096


class Directory:
    """A directory that holds a cache, with its stamp.

    Parameters
    ----------
    root : path
        The directory; made if it is missing.
    source : str
        Name of the source; see `zcache._identity.identify`.
    adopt : bool
        Take over what is there already.

    Raises
    ------
    ValueError
        If it belongs to somebody else.
    OSError
        If it cannot be used.
    """

    def __init__(self, root: os.PathLike[str] | str, source: str, *, adopt: bool) -> None:
        self.root = os.path.abspath(root)
        self.reserved = os.path.join(self.root, ".zcache")
        self.index_root = os.path.join(self.reserved, "index")
        self._stamp_path = os.path.join(self.reserved, "stamp.json")
        self.source = source
        self.cold = False
        os.makedirs(self.root, exist_ok=True)
        stamp = self._read_stamp(adopt)
        if stamp is None:
            stamp = self._claim(adopt)
        if stamp["source"] != source:
            if not str(stamp["source"]).startswith(TRANSIENT):
                raise ValueError(self._other_source(stamp["source"]))
            # What a source left that has ended with its process is of no use to anybody.
            self.cold = True
        os.makedirs(self.index_root, exist_ok=True)
        os.makedirs(os.path.join(self.reserved, "tmp"), exist_ok=True)

    def _read_stamp(self, adopt: bool) -> dict[str, Any] | None:
        try:
            with open(self._stamp_path, encoding="utf-8") as file:
                stamp = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError:
            stamp = None
        if not isinstance(stamp, dict) or not {"zcache", "source"} <= stamp.keys():
            if adopt:
                os.unlink(self._stamp_path)
                return None
            raise ValueError(
                f"the stamp of the cache directory {self.root} cannot be read. Pass adopt=True to "
                "take the directory over, or give another one."
            )
        if stamp["zcache"] != FORMAT:
            raise ValueError(
                f"the cache directory {self.root} has format {stamp['zcache']!r}, this zcache reads "
                f"format {FORMAT}. Use the version of zcache that made it, or give another directory."
            )
        return stamp

    def _claim(self, adopt: bool) -> dict[str, Any]:
        found = [name for name in os.listdir(self.root) if name != ".zcache"]
        if found and not adopt:
            raise ValueError(
                f"the directory {self.root} is not empty and was not made by zcache (it holds "
                f"{found[0]!r}, for instance). Give an empty or a new directory; or pass adopt=True if "
                f"all that it holds is a cache of {self.source}, which zcache may serve and delete."
            )
        if found:
            self._adopt()
        return self._write_stamp(replace=False)

    def _write_stamp(self, *, replace: bool) -> dict[str, Any]:
        stamp = {"zcache": FORMAT, "source": self.source}
        os.makedirs(self.reserved, exist_ok=True)
        unfinished = f"{self._stamp_path}.{os.getpid()}"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(stamp, file)
        if replace:
            os.replace(unfinished, self._stamp_path)
            return stamp
        try:
            os.link(unfinished, self._stamp_path)
        except FileExistsError:
            # Another process was first; its stamp counts.
            return self._read_stamp(adopt=False) or stamp
        finally:
            os.unlink(unfinished)
        return stamp

    def _adopt(self) -> None:
        for directory, names, files in os.walk(self.root):
            if directory == self.root and ".zcache" in names:
                names.remove(".zcache")
            for name in files:
                path = os.path.join(directory, name)
                _files.sign(path, os.lstat(path))

    def _other_source(self, other: str) -> str:
        return (
            f"the cache directory {self.root} holds the cache of {other}, not of {self.source}. Give "
            f"another directory; or, if both are the same data, pass source_id={other!r}."
        )

    def restamp(self, alone: bool) -> None:
        """Make the directory the current source's, after it has been emptied.

        Raises
        ------
        ValueError
            If the source that it belongs to is still in use.
        """
        if not alone:
            raise ValueError(
                f"the cache directory {self.root} is in use for another source that has no name "
                "outside its process (such as a MemoryStore). Give another directory, or pass the "
                "same source_id= to both if they are the same data."
            )
        self._write_stamp(replace=True)

    def tmp(self, place: int) -> str:
        """Beginning of the names of the unfinished files of one participant."""
        return os.path.join(self.reserved, "tmp", f"p{place}-{os.getpid()}-")

    def sweep_tmp(self, place: int) -> None:
        """Remove what a participant that is gone has left unfinished."""
        directory = os.path.join(self.reserved, "tmp")
        for name in os.listdir(directory):
            if name.startswith(f"p{place}-"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))

    def path(self, name: str) -> str:
        """The file of a value."""
        return os.path.join(self.root, *name.split("/"))

    def free_space(self) -> tuple[int, int]:
        """Bytes that we may still write to the volume, and bytes of the whole volume."""
        volume = os.statvfs(self.root)
        return volume.f_bavail * volume.f_frsize, volume.f_blocks * volume.f_frsize

    def rebuild(self, books: Books, index: Index, why: str) -> None:
        """Fill an empty index from a walk of the directory."""
        found = sorted(_files.walk(self.root))
        for start in range(0, len(found), _BATCH):
            books.must(index.adopt, found[start : start + _BATCH])
        books.must(index.complete)
        if found:
            logger.warning(
                "the index of the cache directory %s was rebuilt (%s): %d values, %d bytes",
                self.root,
                why,
                len(found),
                sum(size for _, size, _ in found),
            )
