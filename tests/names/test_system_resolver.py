"""What the C library of this machine makes of the answers: a namespace whose resolver is the name server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 60
HERE = Path(__file__).resolve().parent

# The child has network and mounts of its own: port 53 of its loopback, and a resolv.conf nobody else sees
SCRIPT = """
set -eu
ip link set lo up
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
exec "$2" "$3"
"""


@pytest.mark.root
def test_names_and_addresses_are_found_by_any_program(tmp_path: Path) -> None:
    for program in ("unshare", "ip", "getent"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not there")
    if not all(Path("/etc", name).exists() for name in ("resolv.conf", "nsswitch.conf")):
        pytest.skip("this machine has no resolv.conf or nsswitch.conf to be hidden")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    command = ["unshare", "--net", "--mount", "sh", "-c", SCRIPT, "sh"]
    command += [str(tmp_path), sys.executable, str(HERE / "resolver_child.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "a.home.vpn: fd12:3456:789a::1",
        "b.home.vpn: 10.86.0.2",
        "10.86.0.1: a.home.vpn",
        "fd12:3456:789a::6: six.home.vpn",
    ]
    assert lines[4:] == ["c.home.vpn: nothing", "silent.home.vpn: nothing", "many.home.vpn: 200 over TCP"]
