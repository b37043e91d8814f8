"""The code in the documents runs: the README's, that of the class that is replaced, the docstrings'."""

from __future__ import annotations

import doctest
import importlib
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTED = ROOT / "tests" / "data" / "documented.md"
# zarr's own page. It is not ours to ship.
SEED = ROOT.parent / "shared" / "seed" / "experimental.md"
# The one line that changes for who moves from there.
THEIR_IMPORT = "from zarr.experimental.cache_store import CacheStore"
OUR_IMPORT = "from zcache import CacheStore"

FENCE = re.compile(
    r"(?:<!--\s*not run:\s*(?P<reason>[^>]*?)\s*-->\s*\n)?"
    r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
SESSION = re.compile(r'\bsession="([^"]*)"')


class Block(NamedTuple):
    """A block of Python in a document."""

    document: Path
    line: int
    """Number of its first line of code."""
    session: str
    """Blocks of one session share a namespace; those that name none are of one session."""
    code: str
    reason: str | None
    """Why it is not run, where that is so."""


def blocks_of(document: Path) -> list[Block]:
    """The blocks of Python in a document, in their order; none where there is no document."""
    if not document.exists():
        return []
    text = document.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        session = SESSION.search(match["info"])
        line = text.count("\n", 0, match.start("code")) + 1
        name = session[1] if session else ""
        blocks.append(Block(document, line, name, match["code"], match["reason"]))
    return blocks


def sessions_of(document: Path) -> dict[str, list[Block]]:
    sessions: dict[str, list[Block]] = {}
    for block in blocks_of(document):
        if block.reason is None:
            sessions.setdefault(block.session, []).append(block)
    return sessions


DOCS = sorted((ROOT / "docs").glob("*.md"))
SESSIONS = [
    pytest.param(blocks, id=f"{document.name}-{name}".rstrip("-"))
    for document in (README, DOCUMENTED, SEED, *DOCS)
    for name, blocks in sessions_of(document).items()
]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", SESSIONS)
def test_document_blocks_run(
    blocks: list[Block], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        code = block.code
        if block.document == SEED:
            code = code.replace(THEIR_IMPORT, OUR_IMPORT)
            assert "zarr.experimental" not in code
        # Line numbers in a traceback are those of the document.
        exec(compile("\n" * (block.line - 1) + code, str(block.document), "exec"), namespace)


@pytest.mark.skipif(not SEED.exists(), reason="zarr's page does not lie beside this checkout")
def test_seed_document_is_read_whole() -> None:
    """Nothing of it is left out because our reader does not understand it."""
    blocks = blocks_of(SEED)
    assert len(blocks) == SEED.read_text(encoding="utf-8").count("```python")
    assert all(block.reason is None and block.session for block in blocks)
    assert sum(block.code.count(THEIR_IMPORT) for block in blocks) == len(sessions_of(SEED))


def test_readme_has_code_that_runs() -> None:
    blocks = blocks_of(README)
    assert len(blocks) == README.read_text(encoding="utf-8").count("```python")
    assert any(block.reason is None for block in blocks)
    assert all(block.reason for block in blocks if block.reason is not None)


@pytest.mark.parametrize("document", [README, *DOCS], ids=lambda path: path.name)
def test_document_blocks_are_python(document: Path) -> None:
    """Also those that are not run."""
    for block in blocks_of(document):
        compile("\n" * (block.line - 1) + block.code, str(document), "exec")


def test_readme_begins_with_opening_a_url() -> None:
    first = blocks_of(README)[0].code
    assert "xr.open_zarr(zcache.open(url" in first
    compile(first, "README.md", "exec")


def test_readme_says_how_to_move() -> None:
    text = README.read_text(encoding="utf-8")
    assert THEIR_IMPORT in text
    assert OUR_IMPORT in text


def test_readme_names_what_exists() -> None:
    """Targets of make, and files of this repository."""
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(re.findall(r"`[^`]+`", text))))
    named |= set(re.findall(r"^(?:\$ )?make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "name", ["zcache.store", "zcache.testing", "zcache.testing._clock", "zcache.testing._doubles"]
)
def test_docstrings_run(name: str) -> None:
    tested = doctest.testmod(importlib.import_module(name), exclude_empty=True)
    assert tested.attempted > 0
    assert tested.failed == 0


EXAMPLE = """\
```python
a = 1
```

<!-- not run: needs a bucket -->
```python
raise SystemExit
```

```python exec="true" session="two"
b = 2
```
```bash
make test
```
"""


def test_document_blocks_are_found(tmp_path: Path) -> None:
    document = tmp_path / "example.md"
    document.write_text(EXAMPLE)
    first, second, third = blocks_of(document)
    assert (first.line, first.session, first.code, first.reason) == (2, "", "a = 1\n", None)
    assert (second.line, second.reason) == (7, "needs a bucket")
    assert (third.line, third.session, third.code) == (11, "two", "b = 2\n")
    assert list(sessions_of(document)) == ["", "two"]
    assert blocks_of(tmp_path / "missing.md") == []
