"""`vpnd service`, as far as no systemd is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpnd.cli.service import compile_tree


@pytest.mark.parametrize("clone", [True, False])
def test_a_clone_gets_its_byte_code_when_it_becomes_a_service(tmp_path: Path, clone: bool) -> None:
    for name in ("shards", "supervisor", "vpnd"):
        (tmp_path / name / "deeper").mkdir(parents=True)
        (tmp_path / name / "deeper" / "code.py").write_text("")
    if clone:
        (tmp_path / "pyproject.toml").write_text("")
    compile_tree(tmp_path)
    assert len(list(tmp_path.rglob("*.pyc"))) == (3 if clone else 0)
