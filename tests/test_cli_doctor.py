"""`vpnd doctor` without a node: what is in the way is a fault with a remedy, and exit code 1."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vpnd
from vpnd.cli import main


def found(capsys: pytest.CaptureFixture[str], state_dir: Path) -> tuple[int, dict[str, list[dict[str, str]]]]:
    code = main(["doctor", "--json", "--state-dir", str(state_dir)])
    rows: dict[str, list[dict[str, str]]] = {}
    for row in json.loads(capsys.readouterr().out):
        rows.setdefault(row["name"], []).append(row)
    return code, rows


def verdicts(rows: list[dict[str, str]]) -> set[str]:
    return {row["verdict"] for row in rows}


def write(state_dir: Path, text: str) -> None:
    state_dir.mkdir(mode=0o700, exist_ok=True)
    (state_dir / "vpnd.toml").write_text(text)
    (state_dir / "vpnd.toml").chmod(0o600)


def test_every_part_of_the_machine_is_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, rows = found(capsys, tmp_path / "state")
    names = "configuration versions kernel tun rights user clock ports mtu tcp dns routes firewall files node"
    assert set(rows) >= set(names.split()) - {"user"}
    assert all(row["remedy"] for each in rows.values() for row in each if row["verdict"] == "fault")
    assert verdicts(rows["node"]) == {"fine"}
    assert main(["doctor", "--state-dir", str(tmp_path)]) in (0, 1)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_port_that_somebody_has_is_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write(tmp_path, f'[p2p]\nlisten = ["/ip4/127.0.0.1/tcp/{port}"]\n')
        code, rows = found(capsys, tmp_path)
    assert code == 1 and verdicts(rows["ports"]) == {"fault"}
    assert f":{port}" in rows["ports"][0]["remedy"]


def test_a_key_that_others_can_read_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "")
    tmp_path.chmod(0o700)
    key = tmp_path / "identity.pem"
    key.touch(mode=0o600)
    assert verdicts(found(capsys, tmp_path)[1]["files"]) == {"fine"}
    key.chmod(0o644)
    code, rows = found(capsys, tmp_path)
    assert code == 1 and "mode 0644" in rows["files"][0]["says"]


def test_a_configuration_that_cannot_be_used_is_told_and_the_rest_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "[network]\nmtu = 7\n")
    code, rows = found(capsys, tmp_path)
    assert code == 1 and verdicts(rows["configuration"]) == {"fault"} and "kernel" in rows
    assert "network.mtu" in rows["configuration"][0]["says"]


@pytest.mark.skipif(os.geteuid() != 0, reason="trusts files of others without root")
def test_routes_of_the_machine_that_the_vpn_would_take_are_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from supervisor.network import overlap

    taken = next(
        each.network for each in overlap.in_use() if each.device != "lo" and each.network.version == 4
    )
    address = next(iter(taken.hosts()), taken.network_address)
    write(tmp_path, f'[network]\nvirtual_ip = "{address}"\nsubnet = 24\n')
    code, rows = found(capsys, tmp_path)
    assert (
        code == 1 and verdicts(rows["routes"]) == {"fault"} and "allow_overlap" in rows["routes"][0]["remedy"]
    )


@pytest.mark.root
def test_of_a_node_of_root_another_user_is_told_that_it_may_not_be_asked(tmp_path: Path) -> None:
    """Neither that its configuration is wrong, nor that none runs."""
    (tmp_path / "vpnd.toml").write_text("")
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-m", "vpnd", "doctor", "--json", "--state-dir", str(tmp_path)],
        user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False, cwd="/",
        env={"PYTHONPATH": str(Path(vpnd.__file__).parent.parent)},
    )  # fmt: skip
    found = [
        (row["name"], row["verdict"])
        for row in json.loads(done.stdout)
        if row["name"] in ("configuration", "node")
    ]
    assert found == [("configuration", "hint"), ("node", "hint")]
    assert "sudo" in done.stdout
