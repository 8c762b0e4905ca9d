"""Every function that reads foreign bytes has a fuzz entry, and raises what it says and nothing else.

VPND_FUZZ_INPUTS=1000000 gives each so many inputs; `python -m fuzz.guided NAME` in tests/ goes on guided by coverage.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "tests" / name) for name in ("membership", "names")]

from fuzz.entries import ENTRIES, SHELLS  # noqa: E402
from fuzz.mutate import inputs  # noqa: E402

INPUTS = int(os.environ.get("VPND_FUZZ_INPUTS", "2000"))
#: What root reads of its own children: values of checked types, not bytes.
CHILDREN = "supervisor.claims."


def untrusted() -> set[str]:
    """module.function of all of the product."""
    found = set()
    for path in (path for part in ("vpnd", "shards", "supervisor") for path in (ROOT / part).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.endswith("_untrusted"):
                found.add(f"{module}.{node.name}")
    return {name for name in found if not name.startswith(CHILDREN)}


def test_every_function_that_reads_foreign_bytes_has_an_entry() -> None:
    covered = {name for entry in ENTRIES.values() for name in entry.covers}
    assert covered | SHELLS.keys() == untrusted()
    assert not covered & SHELLS.keys()
    assert not [where for where in SHELLS.values() if not (ROOT / where).exists()]


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_reaches_what_it_says(name: str) -> None:
    entry, reached = ENTRIES[name], set()

    def profile(frame, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name.endswith("_untrusted"):
            reached.add(f"{frame.f_globals['__name__']}.{frame.f_code.co_name}")

    for data in inputs(entry.seeds, 200):
        sys.setprofile(profile)
        try:
            entry.run(data)
        except entry.errors:
            pass
        finally:
            sys.setprofile(None)
    assert set(entry.covers) <= reached


@pytest.mark.timeout(0 if INPUTS > 100_000 else 120)
@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_undeclared_comes_of_any_bytes(name: str) -> None:
    entry = ENTRIES[name]
    for data in inputs(entry.seeds, INPUTS):
        try:
            entry.run(data)
        except entry.errors:
            continue
        except Exception as error:
            pytest.fail(f"{name}: {type(error).__name__}: {error} of {data.hex()}")
