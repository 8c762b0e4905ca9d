"""The package, built once for all that try it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

DEB = Path(__file__).resolve().parents[2] / "contrib" / "deb"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One, and the same as its next version."""
    directory = tmp_path_factory.mktemp("packages")
    subprocess.run([DEB / "build", "--output", directory], check=True)
    (first,) = directory.glob("*.deb")
    tree, second = directory / "tree", directory / "second.deb"
    subprocess.run(["dpkg-deb", "-R", first, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("-1\n", "-2\n", 1))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, second], check=True)
    return first, second
