"""docs/security.md: what it promises is held by tests, which it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "security.md").read_text()
#: Chapters of promises, in which each paragraph or point names a test.
PROMISES = ("What vpnd promises", "Denial of service")
#: Paragraphs of those that say what is not promised.
NOT_PROMISED = "What it does not promise"


def functions() -> set[str]:
    """The names of all tests."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.add(node.name)
    return found


def test_every_test_it_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert named
    assert not named - functions()


def promises() -> list[str]:
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
    texts = [text for name in PROMISES for text in re.split(r"\n\n|\n(?=- )", chapters[name].strip())]
    return [text for text in texts if not text.startswith(NOT_PROMISED)]


@pytest.mark.parametrize("text", promises(), ids=lambda text: " ".join(text.split()[:6]))
def test_a_promise_names_the_tests_that_hold_it(text: str) -> None:
    assert re.search(r"`test_\w+`", text)
