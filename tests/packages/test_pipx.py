"""The wheel, installed by pipx, starts a node. VPND_LONG_TESTS=1; needs pipx and the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, Node, wait_until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900),
    pytest.mark.long("takes minutes, pipx and the network"),
    pytest.mark.skipif(not shutil.which("pipx"), reason="needs pipx"),
]


def test_a_wheel_that_pipx_installed_starts_a_node(tmp_path: Path) -> None:
    source, wheels, programs = (tmp_path / name for name in ("source", "wheels", "bin"))
    # as a user of a clone has it: what git knows, for setuptools writes into the tree that it builds from
    files = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", wheels, source]
    subprocess.run(wheel, check=True)
    (made,) = wheels.glob("vpnd-*.whl")
    homes = {"PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(programs)}
    subprocess.run(
        ["pipx", "install", "--python", "/usr/bin/python3", made], env=os.environ | homes, check=True
    )
    command = [str(programs / "vpnd")]
    with Lab(1) as lab:
        node = Node(lab, lab.nodes[0], command=command)
        node.start()
        status = node.wait_ready(60.0)
        assert status["health"] == "healthy" and status["node"]["mode"] == "network"
        unit = node.vpnd("service", "unit").stdout
        assert f"ExecStart={tmp_path}/pipx/venvs/vpnd/bin/vpnd start\n" in unit
        assert node.stop() == 0
        wait_until(lambda: not lab.leaks(), 10, f"nothing is left, but: {lab.leaks()}")
