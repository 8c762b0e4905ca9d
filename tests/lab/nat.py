"""A lab with an Internet in it: public machines, and machines behind gateways with a NAT or a firewall of some kind.

    r 203.0.113.10 ─┐                       ┌─ gateway 1, 203.0.113.1 ── a 10.1.0.2, c 10.1.0.3
    s 203.0.113.11 ─┴─ delay line, 40 ms ───┴─ gateway 2, 203.0.113.2 ── b 10.2.0.2

Kinds of gateways:

    masq    keeps ports, lets in what answers (nftables masquerade)
    eim     another port outside, the same for every destination; lets in what answers
    cone    as eim, and anybody may come in by that port
    fully   another port for each destination ("symmetric"); lets in what answers
    fw      no NAT; lets in what answers
    block   as masq, and nothing but TCP to ports 443 and 4001 of public machines goes out

With `ipv6` all have IPv6 too, r 2001:db8::10, a 2001:db8:1::2, and gateways are firewalls for it: they let in what
answers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .network import DEVICE, Lab, LabError, Namespace, run_command, wait_until

KINDS = ("masq", "eim", "cone", "fully", "fw", "block")
#: What machines behind a gateway connect from: few, so that a table of them fits into a rule.
PORTS = range(40000, 40400)
LISTENING = 4001
OUTSIDE = 20000


def _outside(gateway: int) -> str:
    """Its address on the Internet: those from 10 to 99 are of public machines."""
    return f"203.0.113.{gateway if gateway < 10 else 90 + gateway}"


def _spare(gateway: int) -> str:
    """Where it is after `move`."""
    return f"203.0.113.{200 + gateway}"


class NatLab(Lab):
    """`public`: how many public machines (r, s, …). `hidden`: how many behind each gateway. `nodes`: the public ones,
    those behind gateway 1, those behind gateway 2 … `rtt_ms` 0: a bridge in the place of the delay line, which is as
    fast as the machine."""

    def __init__(
        self, *, public: int = 1, hidden: tuple[int, ...] = (1, 1), rtt_ms: float = 40.0, ipv6: bool = False
    ) -> None:
        super().__init__(0)
        self._rtt_ms, self._ipv6 = rtt_ms, ipv6
        self._bridge = None if rtt_ms else Namespace(f"lab-{self.token}-bridge", "bridge", "")
        self.routers: dict[int, subprocess.Popen[str]] = {}  #: programs that give ports, by gateway
        labels = iter((*"abcdefghijklmnopq", *(f"a{number}" for number in range(32))))
        self.public = [
            Namespace(f"lab-{self.token}-{label}", label, f"203.0.113.{10 + place}")
            for place, label in zip(range(public), "rstuvw", strict=False)
        ]
        self.gateways = [
            Namespace(f"lab-{self.token}-g{place}", f"g{place}", _outside(place))
            for place in range(1, len(hidden) + 1)
        ]
        self.behind = [
            [
                Namespace(f"lab-{self.token}-{label}", label, f"10.{gateway}.0.{2 + place}")
                for place, label in zip(range(count), labels, strict=False)
            ]
            for gateway, count in enumerate(hidden, start=1)
        ]
        self.nodes = [*self.public, *(machine for machines in self.behind for machine in machines)]

    def _all(self) -> list[Namespace]:
        return [*self.nodes, *self.gateways, *([self._bridge] if self._bridge else [])]

    def _connect(self) -> None:
        outside = [*self.public, *self.gateways]
        if self._bridge is not None:
            self._bridged(self._bridge, outside)
        else:
            self._delayed(outside)
        for number, (gateway, machines) in enumerate(zip(self.gateways, self.behind, strict=True), 1):
            self._sysctl(gateway, "net.ipv4.ip_forward=1")
            self.ip(gateway, "link", "add", "lan", "type", "bridge")
            self.ip(gateway, "addr", "add", f"10.{number}.0.1/24", "dev", "lan")
            self.ip(gateway, "link", "set", "lan", "up")
            for machine in machines:
                self._join(machine, gateway, f"to-{machine.label}")
                self.ip(gateway, "link", "set", f"to-{machine.label}", "master", "lan", "up")
                self.ip(machine, "addr", "add", f"{machine.address}/24", "dev", DEVICE)
                self.ip(machine, "link", "set", DEVICE, "up")
                self.ip(machine, "route", "add", "default", "via", f"10.{number}.0.1")
                self._sysctl(machine, f"net.ipv4.ip_local_port_range={PORTS[0]} {PORTS[-1]}")
            self.nat(number, "masq")
        if self._ipv6:
            self._connect6()

    def _connect6(self) -> None:
        for place, machine in enumerate(self.public):
            self.ip(machine, "addr", "add", f"2001:db8::{10 + place}/128", "dev", "wan", "nodad")
            self.ip(machine, "-6", "route", "add", "default", "dev", "wan")
        for number, (gateway, machines) in enumerate(zip(self.gateways, self.behind, strict=True), 1):
            self._sysctl(gateway, "net.ipv6.conf.all.forwarding=1")
            self.ip(gateway, "addr", "add", f"2001:db8:{number}::1/64", "dev", "lan", "nodad")
            self.ip(gateway, "-6", "route", "add", "default", "dev", "wan")
            for place, machine in enumerate(machines):
                self.ip(machine, "addr", "add", f"2001:db8:{number}::{2 + place}/64", "dev", DEVICE, "nodad")
                self.ip(machine, "-6", "route", "add", "default", "via", f"2001:db8:{number}::1")

    def _bridged(self, bridge: Namespace, outside: list[Namespace]) -> None:
        self.ip(bridge, "link", "add", "br0", "type", "bridge")
        self.ip(bridge, "link", "set", "br0", "up")
        for each in outside:
            self.ip(
                each,
                "link",
                "add",
                "wan",
                "type",
                "veth",
                "peer",
                "name",
                f"to-{each.label}",
                "netns",
                bridge.name,
            )
            self.ip(bridge, "link", "set", f"to-{each.label}", "master", "br0", "up")
            self.ip(each, "addr", "add", f"{each.address}/24", "dev", "wan")
            self.ip(each, "link", "set", "wan", "up")

    def _delayed(self, outside: list[Namespace]) -> None:
        ends = [
            f"{each.name}={each.address}/32,2001:db8::{10 + place}/128"
            for place, each in enumerate(self.public)
        ]
        ends += [
            f"{each.name}={each.address}/32,{_spare(n)}/32,10.{n}.0.0/24,2001:db8:{n}::/64"
            for n, each in enumerate(self.gateways, 1)
        ]
        line = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("delay_line.py")), str(self._rtt_ms), *ends],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._processes.append(line)
        assert line.stdout is not None
        if line.stdout.readline() != "up\n":
            raise LabError("the delay line did not come up")
        for each in outside:
            self.ip(each, "addr", "add", f"{each.address}/32", "dev", "wan")
            self.ip(each, "link", "set", "wan", "mtu", "1500", "txqueuelen", "5000", "up")
            self.ip(each, "route", "add", "default", "dev", "wan", "src", each.address)

    def restart(self, gateway: int) -> None:
        """Gateway 1, 2 … starts again: it has forgotten what it had translated, and lost what came meanwhile."""
        each = self.gateways[gateway - 1]
        self.ip(each, "link", "set", "wan", "down")
        self.ip(each, "link", "set", "wan", "up")
        if self._bridge is None:
            self.ip(each, "route", "add", "default", "dev", "wan", "src", each.address)

    def move(self, gateway: int) -> None:
        """Gateway 1, 2 … has another address outside, and has forgotten what it had translated."""
        each = self.gateways[gateway - 1]
        self.ip(each, "link", "set", "wan", "down")
        self.ip(each, "addr", "flush", "dev", "wan", "scope", "global")
        self.ip(each, "addr", "add", f"{_spare(gateway)}/32", "dev", "wan")
        self.ip(each, "link", "set", "wan", "up")
        self.ip(each, "route", "add", "default", "dev", "wan", "src", _spare(gateway))

    def map_ports(self, gateway: int, *, pcp: bool = True, upnp: bool = True) -> None:
        """Gateway 1, 2 … gives ports to those behind it: miniupnpd, by PCP and NAT-PMP, by UPnP. `nat` ends that."""
        name = self.gateways[gateway - 1].name
        rules = """
add table inet filter
add chain inet filter forward { type filter hook forward priority 0; policy accept; }
add chain inet filter miniupnpd
add chain inet filter prerouting { type nat hook prerouting priority -101; policy accept; }
add chain inet filter postrouting { type nat hook postrouting priority 99; policy accept; }
add chain inet filter prerouting_miniupnpd
add chain inet filter postrouting_miniupnpd
add rule inet filter forward jump miniupnpd
add rule inet filter prerouting jump prerouting_miniupnpd
add rule inet filter postrouting jump postrouting_miniupnpd
"""
        run_command("ip", "netns", "exec", name, "nft", rules)
        # It takes an address of documentation, as all of the lab's are, for one behind another NAT.
        settings = f"""ext_ifname=wan
ext_ip=44.1.2.3
listening_ip=lan
port=0
enable_natpmp={"yes" if pcp else "no"}
enable_upnp={"yes" if upnp else "no"}
secure_mode=yes
min_lifetime=60
max_lifetime=86400
uuid=00000000-0000-0000-0000-000000000000
allow 1024-65535 10.{gateway}.0.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
        config = self.directory / f"igd{gateway}.conf"
        config.write_text(settings)
        pid_file, log = self.directory / f"igd{gateway}.pid", self.directory / f"igd{gateway}.log"
        command = ("miniupnpd", "-d", "-f", str(config), "-P", str(pid_file))
        self.routers[gateway] = self.spawn(self.gateways[gateway - 1], *command, output=log)
        wait_until(pid_file.exists, 10.0, "miniupnpd runs")

    def _sysctl(self, namespace: Namespace, setting: str) -> None:
        run_command("ip", "netns", "exec", namespace.name, "sysctl", "-qw", setting)

    def nat(self, gateway: int, kind: str, *, reset: bool = False) -> None:
        """Make gateway 1, 2 … of that kind. `reset`: it answers unasked SYNs to itself with a reset, instead of
        dropping them. What it had translated before goes on until its connections end."""
        rules = _rules(gateway, kind, [machine.address for machine in self.behind[gateway - 1]], reset)
        name = self.gateways[gateway - 1].name
        done = subprocess.run(
            ["ip", "netns", "exec", name, "nft", "-f", "-"], input=rules, text=True, capture_output=True
        )
        if done.returncode:
            raise LabError(done.stderr)


def _rules(gateway: int, kind: str, hosts: list[str], reset: bool) -> str:
    if kind not in KINDS:
        raise LabError(f"no gateway is {kind!r}")
    outward, inward = [], []
    if kind in ("eim", "cone"):
        for place, host in enumerate(hosts):
            shift = OUTSIDE - 1000 * place
            ports = [*PORTS, LISTENING]
            there = ", ".join(f"{port} : {port + shift}" for port in ports)
            back = ", ".join(f"{port + shift} : {port}" for port in ports)
            outward.append(
                f"oifname wan ip saddr {host} meta l4proto tcp "
                f"snat to {_outside(gateway)} : tcp sport map {{ {there} }}"
            )
            if kind == "cone":
                inward.append(
                    f"iifname wan tcp dport {{ {_keys(back)} }} dnat to {host} : tcp dport map {{ {back} }}"
                )
    if kind != "fw":
        outward.append(f"oifname wan masquerade {'fully-random' if kind == 'fully' else ''}")
    forward = ["ct state established,related accept", "ct status dnat accept"]
    if kind == "block":
        forward += [
            "iifname lan meta l4proto udp drop",
            "iifname lan ip daddr != 203.0.113.10-203.0.113.20 drop",
        ]
        forward.append(f"iifname lan tcp dport != {{ 443, {LISTENING} }} drop")
    forward.append("iifname wan drop")
    newline = "\n"
    return f"""flush ruleset
table ip n {{
 chain post {{
  type nat hook postrouting priority 100;
  {newline.join(outward)}
 }}
 chain pre {{
  type nat hook prerouting priority -100;
  {newline.join(inward)}
 }}
}}
table ip f {{
 chain through {{
  type filter hook forward priority 0;
  {newline.join(forward)}
 }}
 chain to_itself {{
  type filter hook input priority 0;
  ct state established,related accept
  iifname wan {"accept" if reset else "drop"}
 }}
}}
table ip6 f {{
 chain through {{
  type filter hook forward priority 0;
  ct state established,related accept
  iifname wan drop
 }}
}}
"""


def _keys(pairs: str) -> str:
    return ", ".join(pair.partition(" : ")[0] for pair in pairs.split(", "))
