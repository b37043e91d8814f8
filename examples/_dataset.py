"""The dataset of the demo: the ERA-Interim group beside the repository, or a generated one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Dataset", "demo_dataset", "generated_dataset", "memory_store"]

_ERA_INTERIM = Path(__file__).resolve().parents[2] / "shared" / "data" / "era_interim.zarr"


@dataclass(frozen=True)
class Dataset:
    """A Zarr format 3 group as the objects of a bucket.

    Attributes
    ----------
    title
        One line for people.
    objects
        Key to bytes, for every key of the group.
    """

    title: str
    objects: Mapping[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of all objects."""
        return sum(map(len, self.objects.values()))


def demo_dataset() -> Dataset:
    """Return the ERA-Interim group where it is present, else a generated one."""
    if not (_ERA_INTERIM / "zarr.json").is_file():
        return generated_dataset()
    files = (path for path in _ERA_INTERIM.rglob("*") if path.is_file())
    return Dataset(
        "ERA-Interim monthly means",
        {path.relative_to(_ERA_INTERIM).as_posix(): path.read_bytes() for path in files},
    )


def generated_dataset(*, small: bool = False) -> Dataset:
    """Return a group of two chunked arrays, a sharded one and their coordinates.

    The values are smooth fields plus noise, so that they compress as measured data do and not to
    nothing: 23 MB of objects, or 0.1 MB when `small`.
    """
    times, latitudes, longitudes = (2, 48, 96) if small else (8, 360, 720)
    chunks = (1, latitudes // 3, longitudes // 3) if small else (1, 120, 240)
    shards = (1, latitudes, longitudes)
    dimensions = ("time", "latitude", "longitude")
    coordinates = {
        "time": np.arange(times, dtype="int32"),
        "latitude": np.linspace(89.75, -89.75, latitudes, dtype="float32"),
        "longitude": np.linspace(0.25, 359.75, longitudes, dtype="float32"),
    }
    rng = np.random.default_rng(20)
    store = MemoryStore()
    group = zarr.create_group(store, attributes={"title": "generated weather"})
    for name, values in coordinates.items():
        group.create_array(name, data=values, chunks=values.shape, dimension_names=(name,))
    for name, sharded in (("temperature", False), ("humidity", False), ("wind", True)):
        data = _field(rng, times, latitudes, longitudes)
        group.create_array(
            name,
            data=data,
            chunks=chunks,
            shards=shards if sharded else None,
            dimension_names=dimensions,
        )
    with warnings.catch_warnings():
        # zarr warns that consolidated metadata is an extension of format 3; xarray writes it.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)
    objects = {key: value.to_bytes() for key, value in store._store_dict.items()}
    return Dataset("generated weather", objects)


def _field(
    rng: np.random.Generator, times: int, latitudes: int, longitudes: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a travelling wave with noise in its lower digits."""
    phase = np.linspace(0, 6, times)[:, None, None]
    wave = np.sin(np.linspace(0, 9, latitudes)[None, :, None] + phase) + np.cos(
        np.linspace(0, 12, longitudes)[None, None, :] - phase
    )
    noise = rng.normal(scale=0.01, size=wave.shape)
    return (wave + noise).astype("float32")


def memory_store(objects: Mapping[str, bytes]) -> MemoryStore:
    """Return a store in memory that holds `objects`: the truth for every read."""
    from_bytes = default_buffer_prototype().buffer.from_bytes
    return MemoryStore({key: from_bytes(value) for key, value in objects.items()})
