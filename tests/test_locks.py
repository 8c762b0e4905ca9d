"""What the first run installs, perhaps as root: pinned packages, checked by their hashes, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
VENV = (ROOT / "scripts" / "venv.sh").read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_has_one_version_and_hashes(lock: Path) -> None:
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", lock.read_text(), flags=re.M))
    assert text
    for line in text.splitlines():
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+ (; .+ )?--hash=sha256:[0-9a-f]{64}", line), line


def test_what_builds_is_locked() -> None:
    """Where packages without wheels name setuptools and wheel, they get these."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-build.lock").read_text(), re.M)
    assert {re.split(r"[<>=~]", each)[0] for each in wanted} <= set(locked)


def test_every_package_is_installed_by_its_hash() -> None:
    """What users run has pip install by hash, first what builds, and no build that fetches; `lock` makes the locks."""
    installing = {
        path.name for path in (ROOT / "scripts").iterdir() if re.search(r"\bpip\"? install", path.read_text())
    }
    assert installing == {"venv.sh", "lock"}
    (command,) = re.findall(r"pip install (?:.*\\\n)*.*", VENV)
    assert {"--require-hashes", "--no-build-isolation"} <= set(command.split())
    assert 'for wanted in requirements-build.lock "$1"' in VENV
