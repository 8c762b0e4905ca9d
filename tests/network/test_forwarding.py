"""Firewalls of this machine, as nft tells them: what is certain to drop what members send to announced networks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.network import forwarding
from supervisor.network.forwarding import Forwarding
from vpnd.cli import main
from vpnd.config import paths
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network

pytestmark = pytest.mark.root

MEMBERS = ("10.86.0.0/16", "fd86::/64")
LAN = ("192.168.4.0/24",)

#: With iptables-nft in a table of that name.
DOCKER = """
table ip filter {{
 chain DOCKER {{
  iifname != "docker0" oifname "docker0" drop
 }}
 chain DOCKER-USER {{
  {}
 }}
 chain DOCKER-CT {{
  oifname "docker0" ct state related,established counter accept
 }}
 chain DOCKER-FORWARD {{
  jump DOCKER-CT
  oifname "docker0" counter jump DOCKER
  iifname "docker0" counter accept
 }}
 chain FORWARD {{
  type filter hook forward priority filter; policy drop;
  counter jump DOCKER-USER
  counter jump DOCKER-FORWARD
 }}
}}
"""
FIREWALL = """
table inet fw {{
 set lans {{
  type ifname
 }}
 chain forward {{
  type filter hook forward priority 0; policy {};
  {}
 }}
}}
"""
BOTH = 'iifname "tn0" accept; oifname "tn0" accept'

#: (sentence, rules, whether they are in the way)
FIREWALLS = [
    ("none", "", False),
    ("only what comes to the machine itself", "table inet f {\n chain c {\n type filter hook input priority 0; "
     "policy drop;\n }\n}", False),
    ("Docker's", DOCKER.format(""), True),
    ("Docker's, let in", DOCKER.format(BOTH), False),
    ("Docker's, and no answers", DOCKER.format('iifname "tn0" accept'), True),
    ("all is dropped", FIREWALL.format("drop", ""), True),
    ("all is let through", FIREWALL.format("accept", ""), False),
    ("answers alone are let through", FIREWALL.format("drop", "ct state established,related accept"), True),
    ("ours, and answers", FIREWALL.format("drop", 'ct state established accept; iifname "tn0" accept'), False),
    ("ours by another name", FIREWALL.format("drop", 'iifname "tn*" accept; oifname "tn*" accept'), False),
    ("other devices", FIREWALL.format("drop", 'iifname { "lan0", "eth1" } accept; oifname "lan*" accept'), True),
    ("from everywhere but one", FIREWALL.format("drop", 'iifname != "wan0" accept'), False),
    ("the LAN's own way out", FIREWALL.format("drop", 'iifname "eth0" accept; ct state established accept'), True),
    ("into the LAN, and back", FIREWALL.format("drop", 'oifname "eth0" accept; iifname "eth0" accept'), False),
    ("by address", FIREWALL.format("drop", "ip saddr 10.86.0.0/15 accept; ct state established accept"), False),
    ("by part of the addresses", FIREWALL.format("drop", "ip saddr 10.86.3.1-10.86.3.9 accept; "
     "ct state established accept"), False),
    ("by other addresses", FIREWALL.format("drop", "ip saddr { 10.9.0.0/16, 10.87.0.1 } accept; "
     "ct state established accept"), True),
    ("by IPv6 addresses", FIREWALL.format("drop", "ip6 saddr != fd00::/64 accept; ct state established accept"), True),
    ("some ports", FIREWALL.format("drop", "ct state established accept; tcp dport 22 accept"), False),
    ("a set", FIREWALL.format("drop", "ct state established accept; iifname @lans accept"), False),
    ("by a map of states", FIREWALL.format("drop", "ct state vmap { established : accept, invalid : drop }; "
     'iifname "lan0" accept'), True),
    ("by a map of devices", FIREWALL.format("drop", 'iifname vmap { "tn0" : accept, "eth0" : accept }'), False),
    ("by a map of some", FIREWALL.format("drop", 'iifname vmap { "lan0" : accept, "eth0" : accept }'), True),
    ("what is to be redirected", FIREWALL.format("drop", "ct status dnat accept; ct state established accept"), True),
    ("a rule at the end", FIREWALL.format("accept", "ct state established accept; reject"), True),
    ("a rule at the end for some", FIREWALL.format("accept", "ct state established accept; tcp dport 25 reject"),
     False),
    ("a rule at the end behind a way out", FIREWALL.format("accept", "meta mark 7 return; drop"), False),
    ("a limit", FIREWALL.format("drop", "ct state established accept; limit rate 5/second accept"), False),
    ("our own", "table inet vpnd_tn0 {\n chain through {\n type filter hook forward priority 300; policy drop;\n }\n}",
     False),
    ("a second one that lets through what the first drops", FIREWALL.format("drop", "")
     + "table ip g {\n chain c {\n type filter hook forward priority -5; policy accept;\n accept\n }\n}", True),
]  # fmt: skip


@pytest.fixture
def gateway(namespaces, entered) -> Callable[[str], None]:
    """A machine with a LAN behind eth0; call it with rules."""
    name = namespaces[0]
    ip = ("ip", "-n", name)
    for words in (
        ("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", namespaces[1]),
        ("addr", "add", "192.168.4.2/24", "dev", "eth0"),
        ("addr", "add", "2001:db8:4::2/64", "dev", "eth0", "nodad"),
        ("link", "set", "eth0", "up"),
        ("route", "add", "default", "via", "192.168.4.1"),
    ):
        subprocess.run((*ip, *words), check=True)
    subprocess.run(("ip", "-n", namespaces[1], "link", "set", "eth0", "up"), check=True)

    def load(rules: str) -> None:
        text = f"flush ruleset\n{rules.replace('; ', chr(10)).replace(': ', ' : ')}"
        subprocess.run(("ip", "netns", "exec", name, "nft", "-f", "-"), input=text, text=True, check=True)

    with entered(name):
        yield load


@pytest.mark.parametrize(("what", "rules", "in_the_way"), FIREWALLS, ids=[row[0] for row in FIREWALLS])
def test_a_firewall_that_is_certain_to_drop_is_told_and_no_other(gateway, what, rules, in_the_way) -> None:
    gateway(rules)
    for advertised in (LAN, ("0.0.0.0/0",)):
        assert bool(forwarding.obstacles("tn0", advertised, MEMBERS)) == in_the_way
    assert not forwarding.obstacles("tn0", (), MEMBERS)


def test_the_remedy_that_is_told_is_one(gateway) -> None:
    """For tables of iptables in its own words, which this machine may not have."""
    gateway(FIREWALL.format("drop", "ct state invalid drop"))
    (line,) = forwarding.obstacles("tn0", (*LAN, "2001:db8:4::/64"), MEMBERS)
    what, _, remedy = line.partition(": ")
    assert "inet fw forward" in what and "192.168.4.0/24, 2001:db8:4::/64" in what
    for command in remedy.split("; "):
        subprocess.run(command.split(), check=True)
    assert not forwarding.obstacles("tn0", (*LAN, "2001:db8:4::/64"), MEMBERS)
    gateway(DOCKER.format(""))
    (line,) = forwarding.obstacles("tn0", (*LAN, "2001:db8:4::/64"), MEMBERS)
    assert line.endswith("iptables -I FORWARD -i tn0 -j ACCEPT; iptables -I FORWARD -o tn0 -j ACCEPT")
    assert "2001:db8" not in line, "Docker's is of IPv4"


def test_doctor_says_so_before_a_node_runs(
    gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "vpnd.toml"
    config.write_text('[network]\ninterface = "tn0"\nadvertise = ["192.168.4.0/24"]\n')
    tmp_path.chmod(0o700)
    for rules, verdict in ((DOCKER.format(""), "fault"), (DOCKER.format(BOTH), "fine")):
        gateway(rules)
        main(["doctor", "--json", "--state-dir", str(tmp_path)])
        found = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "firewall"]
        assert [row["verdict"] for row in found][:1] == [verdict]
        assert verdict == "fine" or "FORWARD" in found[0]["says"] + found[0]["remedy"]


def test_without_nft_nothing_is_known(gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway(DOCKER.format(""))
    monkeypatch.setattr(paths, "PROGRAMS", "/nowhere")
    assert not forwarding.obstacles("tn0", LAN, MEMBERS)


@pytest.mark.setting("network.reconcile_interval")
@pytest.mark.parametrize(("interval_s", "again"), [(0.0, True), (600.0, False)])
def test_a_firewall_is_read_seldom(gateway, interval_s: float, again: bool) -> None:
    looking = Forwarding(Live(Config(network=Network(interface="tn0", reconcile_interval=interval_s))))
    looking.members = MEMBERS
    gateway(DOCKER.format(""))
    assert not looking.look(), "nothing is announced"
    looking.advertised = LAN
    assert looking.look()
    gateway("")
    assert bool(looking.look()) is not again
    looking.advertised = ("0.0.0.0/0",)
    assert not looking.look()
