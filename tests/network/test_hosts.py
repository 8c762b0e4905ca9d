"""Names of members in a hosts file: the block, what may be in it, and that it goes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path

import pytest
from lab import Lab, wait_until
from lab.joining import join, machine

from supervisor.network import hosts
from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.config.schema import Config, Dns
from vpnd.errors import ProtocolViolation

OWN = OwnAddresses(network="home", label="a", addresses=("10.86.0.1",), subnets=("10.86.0.0/16",))
OTHERS = "127.0.0.1\tlocalhost\n# mine\n"
SOON_S = 20.0


def told(*rows: tuple[str, str]) -> bytes:
    return json.dumps(
        [{"name": name, "addresses": [address], "state": "member"} for name, address in rows]
    ).encode()


def test_only_addresses_and_names_of_the_network_get_in() -> None:
    said = told(
        ("Nas", "10.86.0.2"),
        ("bank", "192.0.2.1"),
        ("a b", "10.86.0.3"),
        ("x\n192.0.2.1 bank.example", "10.86.0.4"),
        ("bank.example", "10.86.0.5"),
    )
    assert hosts.lines_untrusted(said, OWN) == ["10.86.0.2\tnas.home.vpn"]
    with pytest.raises(ProtocolViolation):
        hosts.lines_untrusted(b"[1]", OWN)


@pytest.mark.parametrize("before", [OTHERS, "", "127.0.0.1 localhost"])
def test_the_rest_of_the_file_stays_as_it_is(tmp_path: Path, before: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(before)
    marks = hosts.marks("vpnd0")
    for _ in range(2):
        hosts.replace_block(file, marks, ["10.86.0.2\tnas.home.vpn"])
    assert file.read_text().count("nas.home.vpn") == 1 and file.read_text().startswith(before)
    hosts.replace_block(file, marks, [])
    assert file.read_text().rstrip("\n") == before.rstrip("\n")


def test_the_shell_takes_the_block_of_its_node_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "my hosts"
    file.write_text(OTHERS)
    for device in ("vpnd0", "vpnd1"):
        hosts.replace_block(file, hosts.marks(device), [f"10.86.0.2\t{device}.home.vpn"])
    (command,) = hosts.cleanup_commands(Config(dns=Dns(hosts_file=str(file))))
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert "vpnd0" not in file.read_text() and "vpnd1.home.vpn" in file.read_text()
    assert file.read_text().startswith(OTHERS)


@pytest.mark.setting("dns.hosts_interval")
def test_it_is_compared_every_interval(tmp_path: Path) -> None:
    file, asked = tmp_path / "hosts", 0
    file.write_text(OTHERS)

    async def members() -> bytes:
        nonlocal asked
        asked += 1
        return told(("nas", f"10.86.0.{asked}"))

    async def main() -> None:
        config = Config(dns=Dns(hosts_file=str(file), hosts_interval=0.05))
        named = hosts.HostsFile(Live(config), members, lambda: OWN)
        deadline_s = asyncio.get_running_loop().time() + 4
        while "10.86.0.3" not in file.read_text() and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.01)
        assert "10.86.0.3\tnas.home.vpn" in file.read_text() and "10.86.0.2" not in file.read_text()
        await named.close()

    asyncio.run(main())
    assert file.read_text() == OTHERS


@pytest.mark.root
@pytest.mark.setting("dns.hosts_file")
def test_members_are_found_by_name_without_a_resolver_until_the_node_ends(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(OTHERS)
    with Lab(2) as lab:
        a = machine(lab, 0, {"dns": {"hosts_file": str(file), "hosts_interval": "200ms"}})
        b = machine(lab, 1)
        a.start()
        a.wait_ready()
        join(a, b)
        wait_until(lambda: "\tb.home.vpn" in file.read_text(), SOON_S, "b has a name")
        # as on a machine with this /etc/hosts
        script = f"mount --bind {file} /etc/hosts && exec ping -c1 -W5 b.home.vpn"
        lab.run(a.namespace, "unshare", "--mount", "sh", "-c", script)
        a.kill(signal.SIGKILL)
        wait_until(lambda: file.read_text() == OTHERS, SOON_S, "what it had written is gone after kill -9")
        a.wait_ended()
        a.start()
        a.wait_ready()
        wait_until(lambda: "\tb.home.vpn" in file.read_text(), SOON_S, "it is there again")
        assert a.stop() == 0
        assert file.read_text() == OTHERS
