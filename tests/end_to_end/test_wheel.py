"""The wheel in ``dist/``, where `make wheel` or `make test` has built one."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
OLDEST_GLIBC, OLDEST_LIBGCC = (2, 17), (4, 8, 0)


@pytest.fixture(scope="module")
def wheel() -> Iterator[zipfile.ZipFile]:
    found = list((ROOT / "dist").glob("zarr_zcache-*.whl"))
    if not found:
        pytest.skip("there is no wheel in dist/; `make wheel` builds one")
    (path,) = found
    with zipfile.ZipFile(path) as archive:
        yield archive


def is_for_linux(wheel: zipfile.ZipFile) -> bool:
    return "linux" in Path(str(wheel.filename)).name


def extension(wheel: zipfile.ZipFile) -> bytes:
    (name,) = (name for name in wheel.namelist() if "/_core." in name and name.endswith(".so"))
    return wheel.read(name)


def elf(library: bytes) -> Any:
    from elftools.elf.elffile import ELFFile

    return ELFFile(io.BytesIO(library))


def versions(library: bytes, prefix: str) -> set[tuple[int, ...]]:
    """The versions of glibc (``GLIBC_``) or libgcc (``GCC_``) that a library asks for."""
    needed = elf(library).get_section_by_name(".gnu.version_r").iter_versions()
    names = [version.name for _, versions in needed for version in versions]
    found = [re.fullmatch(prefix + r"([0-9.]+)", name) for name in names]
    return {tuple(map(int, match[1].split("."))) for match in found if match}


def symbols_without_version(library: bytes) -> set[str]:
    """Symbols that a library must find in another one, whichever version that has."""
    file = elf(library)
    versions = file.get_section_by_name(".gnu.version")
    return {
        symbol.name
        for number, symbol in enumerate(file.get_section_by_name(".dynsym").iter_symbols())
        if symbol.entry.st_shndx == "SHN_UNDEF"
        and symbol.entry.st_info.bind == "STB_GLOBAL"
        and isinstance(versions.get_symbol(number).entry.ndx, str)
    }


def test_wheel_tag_is_stable_abi_and_manylinux_2_17(wheel: zipfile.ZipFile) -> None:
    name = Path(str(wheel.filename)).name
    assert "-cp311-abi3-" in name
    if is_for_linux(wheel):
        assert re.search(r"[-.]manylinux_2_17_[a-z0-9_]+\.whl$", name)


def test_wheel_has_the_licenses_of_what_is_compiled_in(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/THIRD_PARTY_LICENSES"))
    assert wheel.read(name) == (ROOT / "THIRD_PARTY_LICENSES").read_bytes()
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert b"\nLicense-File: THIRD_PARTY_LICENSES\n" in wheel.read(metadata)


def test_wheel_asks_for_no_symbol_of_a_newer_system(wheel: zipfile.ZipFile) -> None:
    if not is_for_linux(wheel):
        pytest.skip("this wheel is for a system without glibc")
    library = extension(wheel)
    assert max(versions(library, "GLIBC_")) <= OLDEST_GLIBC
    # The unwinder is the system's; `copy_unwinder` in scripts/envs.py says why.
    assert max(versions(library, "GCC_")) <= OLDEST_LIBGCC
    # Those of Python have no versions. One of glibc without a version is newer than what zig was asked for, so it must be
    # weak: the program looks whether it is there.
    others = symbols_without_version(library)
    assert "PyModuleDef_Init" in others
    assert {name for name in others if not name.startswith(("Py", "_Py"))} == set()


def test_wheel_names_no_folder_of_its_builder(wheel: zipfile.ZipFile) -> None:
    folders = {ROOT, Path.home(), Path(os.environ.get("CARGO_HOME", ROOT))}
    for name in wheel.namelist():
        content = wheel.read(name)
        for folder in folders:
            assert folder == Path("/") or f"{folder}/".encode() not in content, name
    # The names of source files are there, without those of the folders that they were in.
    assert b"cargo-home/registry/src/" in extension(wheel)


def test_wheel_entries_have_one_time_and_the_modes_of_a_package(wheel: zipfile.ZipFile) -> None:
    entries = wheel.infolist()
    assert len({entry.date_time for entry in entries}) == 1
    assert {entry.external_attr >> 16 & 0o777 for entry in entries} <= {0o644, 0o755}
