"""The unit and the package under a real systemd, which boots a clean Debian in a container. VPND_LONG_TESTS=1."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRIAL = Path(__file__).with_name("booted.sh")
#: What the unit and the package need there; the network is not there any more when the trial begins.
INCLUDED = "systemd,systemd-sysv,dbus,iproute2,nftables,python3,init-system-helpers,passwd"
UNIT = """\
[Service]
Type=oneshot
ExecStart=/bin/sh /trial.sh {interpreter}
TimeoutStartSec=infinity
[Install]
WantedBy=multi-user.target
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(1800),
    pytest.mark.long("takes five minutes, mmdebstrap and systemd-nspawn"),
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
    pytest.mark.skipif(not shutil.which("systemd-nspawn"), reason="needs systemd-nspawn"),
]


def test_a_booted_machine_runs_the_unit_and_the_package(packages: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    suite = "bookworm"
    subprocess.run(["mmdebstrap", "--variant=minbase", f"--include={INCLUDED}", suite, root], check=True)
    for name, file in (("first.deb", packages[0]), ("second.deb", packages[1]), ("trial.sh", TRIAL)):
        shutil.copyfile(file, root / name)
    units = root / "etc/systemd/system"
    (units / "trial.service").write_text(UNIT.format(interpreter=sys.executable))
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "trial.service").symlink_to("../trial.service")
    # registered nowhere: no systemd need run here. Private network: what it does to addresses and routes is its own.
    command = [
        "systemd-nspawn", "--boot", "--directory", str(root), "--machine", f"vpnd-{tmp_path.parent.name}",
        "--register=no", "--keep-unit", "--private-network", "--console=pipe", "--capability=CAP_NET_ADMIN",
        "--bind=/dev/net/tun", f"--bind-ro={ROOT}",
    ]  # fmt: skip
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=600, check=False)
    result = root / "trial.result"
    assert result.exists() and result.read_text() == "ok\n", (root / "trial.log").read_text()
