"""The Debian package, in a clean Debian. VPND_LONG_TESTS=1; takes ten minutes, the network, and mmdebstrap."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DEB = Path(__file__).resolve().parents[2] / "contrib" / "deb"

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(1800),
    pytest.mark.long("takes ten minutes"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
]


def test_the_package_installs_runs_upgrades_and_purges(tmp_path: Path) -> None:
    subprocess.run([DEB / "build", "--output", tmp_path], check=True)
    (first,) = tmp_path.glob("*.deb")
    tree, second = tmp_path / "tree", tmp_path / "second.deb"
    subprocess.run(["dpkg-deb", "-R", first, tree], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("-1\n", "-2\n", 1))
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, second], check=True)
    done = subprocess.run([DEB / "check", first, second], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
