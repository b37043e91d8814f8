"""Fixtures and profiles for all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, settings

import hung  # noqa: F401 - before zcache
from cases import by_test, pairwise, spread
from zcache.testing import FakeClock, patient_openings, set_block_size

if TYPE_CHECKING:
    from collections.abc import Iterator

# Nothing here is about time, and stores do I/O: no deadline. zarr's strategies filter a lot.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
    ],
}
settings.register_profile("laptop", max_examples=20, stateful_step_count=20, **_COMMON)
settings.register_profile("ci", max_examples=30, stateful_step_count=20, **_COMMON)
settings.load_profile("ci" if os.environ.get("CI") else "laptop")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample",
        type=int,
        metavar="CASES",
        help="run at most so many cases of each parametrized test, spread evenly over all of them",
    )
    parser.addoption(
        "--pairs",
        action="store_true",
        help="of each test with three parameters or more run so many cases that all pairs of values meet",
    )
    parser.addoption(
        "--without-once", action="store_true", help="leave out what need run on one Python only"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the options do not ask for: there is no time for all of it each time."""
    chosen = [
        item
        for item in items
        if not (config.getoption("--without-once") and item.get_closest_marker("once"))
    ]
    if config.getoption("--pairs"):
        chosen = [item for group in by_test(chosen) for item in pairwise(group)]
    if (limit := config.getoption("--sample")) is not None:
        chosen = [item for group in by_test(chosen) for item in spread(group, limit)]
    kept = {id(item) for item in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def pytest_collection_finish() -> None:
    """Take modules and test items out of later collections of garbage: many tests ask for one, of a tenth of a second."""
    gc.collect()
    gc.freeze()


ERA_INTERIM = Path(__file__).resolve().parents[2] / "shared" / "data" / "era_interim.zarr"


@pytest.fixture
def clock() -> FakeClock:
    """A clock for ``CacheStore(..., clock=clock)``."""
    return FakeClock()


@pytest.fixture(scope="session")
def era_interim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real group: geopotential `z` and wind `u`, chunked, and wind `v`, sharded. Read only!

    Where the data does not come with the checkout, a stand-in of the same layout.
    """
    if ERA_INTERIM.is_dir():
        yield ERA_INTERIM
        return
    path = tmp_path_factory.mktemp("era_interim") / "era_interim.zarr"
    make_era_interim(path)
    yield path


def make_era_interim(path: Path) -> None:
    """Write the stand-in."""
    group = zarr.open_group(path, mode="w")
    shape = (2, 3, 241, 480)
    dimensions = ("month", "level", "latitude", "longitude")
    noise = np.random.default_rng(0)
    for name in ("z", "u", "v"):
        array = group.create_array(
            name,
            shape=shape,
            chunks=(1, 1, 61, 120),
            shards=(1, 3, 244, 480) if name == "v" else None,
            dtype="int16",
            dimension_names=dimensions,
        )
        array[:] = noise.integers(-1000, 1000, shape).cumsum(axis=-1).astype("int16")
    for name, size in zip(dimensions, shape, strict=True):
        index = group.create_array(name, shape=(size,), dtype="int32", dimension_names=(name,))
        index[:] = np.arange(size)
    zarr.consolidate_metadata(path)


@pytest.fixture(autouse=True)
def block_size() -> Iterator[int | None]:
    """Count bytes in cache directories, so that bounds in tests need not be those of a file system.

    A module that defines this fixture anew has its own way.
    """
    before = set_block_size(1)
    yield 1
    set_block_size(before)


@pytest.fixture(autouse=True)
def patient_opening() -> Iterator[None]:
    """Have the opening of a directory wait until its index is rebuilt, however busy the machine is.

    A test that shortens the wait has its own way.
    """
    with patient_openings():
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say why a test had to be repeated: it may not fail again for weeks."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_line(f"\nfirst run of {report.nodeid}:")
        terminalreporter.write_line(str(getattr(report, "longreprtext", ""))[-4000:])
