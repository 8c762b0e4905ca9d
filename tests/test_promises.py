"""docs/security.md: what it promises is held by tests, which it names."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "security.md").read_text()
#: The one chapter that tells the reader what to do; in all others each sentence is a promise, and names its tests.
ADVICE = "When something is stolen"
#: How sentences begin that promise nothing: they explain another one, or say what does not hold.
NOT_PROMISED = (
    "Behind each sentence stand",
    "What it does not promise",
    "What comes faster than control",
    "What is left:",
    "What is refused fails with EPERM",
    "Where the kernel or the machine",
    "That is also how long",
    "Whoever runs the endpoint",
    "The endpoint learns",
    "Run on an authority nothing",
)


def all_tests() -> Counter[str]:
    """The names of all tests, and how many there are of each."""
    found: Counter[str] = Counter()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[node.name] += 1
    return found


def test_every_name_leads_to_one_test() -> None:
    named, there = set(re.findall(r"`(test_\w+)`", TEXT)), all_tests()
    assert named
    assert {name: there[name] for name in named if there[name] != 1} == {}


def sentences() -> list[str]:
    """Of all chapters of promises; tables are none."""
    chapters = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    texts = [
        text
        for name, chapter in chapters
        if name != ADVICE
        for text in re.split(r"\n\n|\n(?=- )", chapter.strip())
        if not text.startswith("|")
    ]
    found = [
        re.sub(r"^(- )?(\*\*.+?\*\* )?", "", sentence)
        for text in texts
        for sentence in re.split(r"(?<=\.)\s+(?=[A-Z`*])", text)
    ]
    return [
        one for one in (" ".join(sentence.split()) for sentence in found) if not one.startswith(NOT_PROMISED)
    ]


@pytest.mark.parametrize("sentence", sentences(), ids=lambda sentence: " ".join(sentence.split()[:6]))
def test_a_promise_names_the_tests_that_hold_it(sentence: str) -> None:
    assert re.search(r"`test_\w+`", sentence)
