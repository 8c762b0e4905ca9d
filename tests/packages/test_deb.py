"""The Debian package, in a clean Debian. VPND_LONG_TESTS=1; takes ten minutes, the network, and mmdebstrap."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "contrib" / "deb" / "check"

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(1800),
    pytest.mark.long("takes ten minutes"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
]


def test_the_package_installs_runs_upgrades_and_purges(packages: tuple[Path, Path]) -> None:
    done = subprocess.run([CHECK, *packages], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
