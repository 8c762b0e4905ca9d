"""Somebody changes the machine under a running node: it is mended, or the node says that it is not healthy, and why.

Never healthy and dead, and never a packet past the exit node. A few changes of the machine that has most to lose,
chosen by a seed that a failure names (VPND_STORM_SEED repeats it); with VPND_LONG_TESTS=1 200 of any of the three,
or VPND_STORM_CHANGES.

a  authority      b  exit node      c  client of the exit node, never silent
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from typing import Any, NamedTuple

import pytest
from lab import Lab, Node, check_logs, wait_until
from lab.clocks import LIBRARY, clocks_of
from lab.joining import all_reach_all, invite, machine
from lab.leaks import Leaks
from lab.network import run_command

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

LONG = bool(os.environ.get("VPND_LONG_TESTS"))
SEED = os.environ.get("VPND_STORM_SEED")
HOW_MANY = int(os.environ.get("VPND_STORM_CHANGES", 200 if LONG else 8))
#: Changes come one after the other here, and are not to wait for one another. Of real-time priority see lab.clocks.
SETTINGS = {"network": {"change_settle_max": "500ms"}, "process": {"realtime": False}}
#: How long the node has to mend it, or to say that it is not healthy.
MENDED_S = 10.0
#: And to be well again all the same, of what it cannot mend when that is undone; a clock that was set is the slowest.
WELL_S = 30.0
SETTLE_S = 20.0
#: Three nodes on one machine, whose processes read their clocks from files.
READY_S = 60.0
WORLD = "198.51.100.1"
#: A node looks at its clock every membership.gossip_interval.
FAKETIME = LIBRARY if LONG else None


class Change(NamedTuple):
    """Scripts of sh. `undo`: what the somebody does in the end, of what is not the node's to mend; ":" for nothing,
    where the node needs longer."""

    script: str
    undo: str = ""


CUT = "truncate -c -s {} $STATE/network/{}; kill -9 $CONTROL"
IN_ITS_PLACE = "nsenter --mount --target $SUPERVISOR"
OWN_LINK = "ip addr add $LAN/24 dev eth0; ip link set eth0 up; ip route replace default via $GATEWAY"
CHANGES = [
    Change("ip addr flush dev vpnd0"),
    Change("ip -6 addr flush dev vpnd0"),
    Change("ip addr del $OWN/16 dev vpnd0"),
    Change("ip addr add 10.86.77.77/32 dev vpnd0", "ip addr del 10.86.77.77/32 dev vpnd0"),
    Change("ip link set vpnd0 down"),
    Change("ip link set vpnd0 down; ip link set vpnd0 up"),
    Change("ip link set vpnd0 mtu 1000"),
    Change("ip link set vpnd0 mtu 1000; ip link set vpnd0 mtu 1400"),
    Change("ip link set vpnd0 txqueuelen 2 gso_max_segs 3"),
    Change("ip link set vpnd0 down; ip link set vpnd0 name other"),
    Change("echo 1 > /proc/sys/net/ipv6/conf/vpnd0/disable_ipv6"),
    Change("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6"),
    Change("ip route flush dev vpnd0; ip -6 route flush dev vpnd0"),
    Change("ip route flush table local dev vpnd0"),
    Change("ip route flush table main", "ip route add $NET dev eth0 src $LAN; ip route add default via $GATEWAY"),
    Change("ip rule flush; ip rule add priority 32766 lookup main"),
    Change("ip -6 rule flush; ip -6 rule add priority 32766 lookup main"),
    Change("ip rule del priority 5301"),
    Change("ip rule add priority 100 lookup main", "ip rule del priority 100"),
    Change("ip route flush table 7669; ip -6 route flush table 7669"),
    Change("ip route replace 10.86.0.0/16 dev eth0", "ip route del 10.86.0.0/16 dev eth0"),
    Change("ip route add blackhole 10.86.0.0/17; ip route add blackhole 10.86.128.0/17",
           "ip route del blackhole 10.86.0.0/17; ip route del blackhole 10.86.128.0/17"),
    Change("nft flush ruleset"),
    Change("nft delete table inet vpnd_vpnd0"),
    Change("ip link set eth0 down; sleep 1", OWN_LINK),
    Change("ip addr del $LAN/24 dev eth0; sleep 1", OWN_LINK),
    Change("ip addr add 192.168.77.99/24 dev eth0; sleep 0.3; ip addr del 192.168.77.99/24 dev eth0"),
    Change("ip route del default || true; sleep 0.5", "ip route replace default via $GATEWAY"),
    Change("ip neigh flush dev eth0"),
    Change("ip link set eth0 mtu 1300; sleep 0.3; ip link set eth0 mtu 1500"),
    Change("kill -9 $CONTROL"),
    Change("kill -9 $SHARD"),
]  # fmt: skip
#: Of what is not the network's, tried with VPND_LONG_TESTS=1 alone.
OTHERS = [
    Change("kill -STOP $CONTROL", ":"),
    Change("kill -STOP $SHARD", ":"),
    # files
    Change(CUT.format(0, "directory.bin")),
    Change(CUT.format(100, "directory.bin")),
    Change(CUT.format(0, "invitations.bin")),
    Change(CUT.format(50, "network.bin")),
    Change("rm -f $STATE/network/*.old; kill -9 $CONTROL"),
    Change("chmod 000 $STATE/network", "chmod 700 $STATE/network"),
    Change(f"{IN_ITS_PLACE} mount --bind /dev/null /etc/resolv.conf; kill -9 $CONTROL",
           f"{IN_ITS_PLACE} umount /etc/resolv.conf"),
    # limits
    Change("prlimit --pid $CONTROL --nofile=20:", "kill -9 $CONTROL"),
    Change("prlimit --pid $SHARD --nofile=10:", "kill -9 $SHARD"),
    Change("prlimit --pid $SUPERVISOR --nofile=24:; kill -9 $SHARD",
           "prlimit --pid $SUPERVISOR --nofile=1024:"),
    # as long as it lasts, no child that ends is started again either: its shared memory counts as a file
    # soft limits, for in a container not even root may raise a hard one again
    Change("prlimit --pid $SUPERVISOR --fsize=0:", "prlimit --pid $SUPERVISOR --fsize=unlimited:"),
    Change("prlimit --pid $CONTROL --fsize=0:", "kill -9 $CONTROL"),
    # sysctls
    # told of a client of the exit node, and the administrator's to decide
    Change("echo 1 > /proc/sys/net/ipv4/conf/vpnd0/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter",
           "echo 0 > /proc/sys/net/ipv4/conf/vpnd0/rp_filter; echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter"),
    Change("echo '4002 4003' > /proc/sys/net/ipv4/ip_local_port_range; kill -9 $SHARD",
           "echo '32768 60999' > /proc/sys/net/ipv4/ip_local_port_range"),
]  # fmt: skip
CLOCKS = [
    Change(f"echo {offset} > $CLOCK; sleep 7", "echo +0 > $CLOCK")
    for offset in ("+60", "-3600", "+3600", "-20000d", "+40d")
]


def changes() -> list[Change]:
    """Those that are tried, as far as this machine has the tools for them."""
    return [*CHANGES, *(OTHERS if LONG else []), *(CLOCKS if FAKETIME is not None else [])]


def run(node: Node, script: str, status: dict[str, Any]) -> None:
    """`status`: what the node said last of itself."""
    values = {
        "OWN": status["node"]["virtual_ip"],
        "STATE": str(node.state_dir),
        "CLOCK": node.env.get("FAKETIME_TIMESTAMP_FILE", ""),
        "SUPERVISOR": str(node.pids()[0]),
        "LAN": node.namespace.address,
        "NET": "192.168.77.0/24",
        "GATEWAY": "192.168.77.1" if node.namespace.label != "a" else "192.168.77.2",
        "CONTROL": str(status["control"]["pid"]),
        "SHARD": str(status["shards"][0]["pid"]),
    }
    given = [f"{key}={value}" for key, value in values.items()]
    # not every change finds what it changes
    run_command("ip", "netns", "exec", node.namespace.name, "env", *given, "sh", "-c", f"({script}); true")


class World:
    """Three nodes; whom each of them has to reach."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.own = {node: node.ask()["node"]["addresses"] for node in nodes}
        self.targets = {
            node: [text for other in nodes if other is not node for text in self.own[other]] for node in nodes
        }
        self.targets[nodes[2]].append(WORLD)
        self._said = {node: node.ask() for node in nodes}

    def run(self, node: Node, script: str) -> None:
        """On the machine of `node`, which may be unable to answer just now."""
        self._said[node] = node.ask() or self._said[node]
        run(node, script, self._said[node])

    def unreached(self, node: Node) -> list[str]:
        """Whom it does not reach right now."""
        pings = [
            node.lab.spawn(node.namespace, "ping", "-nqc1", "-W1", text, output=node.lab.directory / "pings")
            for text in self.targets[node]
        ]
        return [text for text, ping in zip(self.targets[node], pings, strict=True) if ping.wait()]

    def is_well(self, node: Node) -> bool:
        return bool(node.ask().get("health") == "healthy" and not self.unreached(node))

    def described(self) -> str:
        """What each node is, whom it does not reach, and what it logged last: whose fault it is need not be the one
        that was changed."""
        return "\n".join(
            f"{node.namespace.label}: {told.get('health')}, {told.get('ailments')}, does not reach "
            f"{self.unreached(node)}\n{node.log_tail(20)}"
            for node in self.nodes
            for told in (node.ask(),)
        )

    def judge(self, node: Node, change: Change) -> list[str]:
        """It is well in time, or says that it is not, be it by no answer: what it says. Raises AssertionError."""
        deadline = time.monotonic() + MENDED_S
        while True:
            told, unreached = node.ask(), self.unreached(node)
            if told.get("health") == "healthy" and not unreached:
                return []
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        said = [each["what"] for each in told.get("ailments", ())] if told else ["no daemon answers"]
        assert said, f"{node.namespace.label}: healthy, and does not reach {unreached} after: {change.script}"
        return said


def test_it_is_mended_or_told() -> None:
    seed = int(SEED or random.SystemRandom().randrange(1 << 32))
    dice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(3))
        lab.ip(lab.nodes[1], "addr", "add", f"{WORLD}/32", "dev", "lo")
        for namespace in lab.nodes:
            gateway = lab.nodes[0] if namespace is not lab.nodes[0] else lab.nodes[1]
            lab.ip(namespace, "route", "add", "default", "via", gateway.address)
        a, b, c = (machine(lab, place, SETTINGS) for place in range(3))
        stack.enter_context(clocks_of([a, b, c] if FAKETIME is not None else []))
        b.config["network"]["advertise"] = ["0.0.0.0/0"]
        lab.run(b.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        c.config["network"]["exit_node"] = "b"
        a.start()
        a.wait_ready(READY_S)
        b.start("--join", invite(a, "--route", "0.0.0.0/0"))
        c.start("--join", invite(a))
        for node in (b, c):
            node.wait_ready(READY_S)
        all_reach_all([a, b, c], SETTLE_S)
        world = World([a, b, c])
        wait_until(lambda: world.is_well(c), SETTLE_S, "the exit node is in use")
        every = changes()
        chosen = [(dice.choice(world.nodes) if LONG else c, dice.choice(every)) for _ in range(HOW_MANY)]
        with Leaks(c.namespace, WORLD) as leaks, contextlib.ExitStack() as traffic:
            for node in (a, b) if LONG else ():  # without an exit node: only sent
                traffic.enter_context(Leaks(node.namespace, *world.targets[node]))
            for number, (node, change) in enumerate(chosen):
                where = f"seed {seed}, change {number} on {node.namespace.label}: {change.script}"
                begun_s = time.monotonic()
                world.run(node, change.script)
                try:
                    said = world.judge(node, change)
                    if change.undo:
                        world.run(node, change.undo)
                    for each in world.nodes:
                        wait_until(
                            lambda each=each: world.is_well(each), WELL_S, f"{each.namespace.label} well"
                        )
                except Exception as error:
                    raise AssertionError(f"{where}: {error}\n{world.described()}") from error
                assert leaks.leaked == 0, where
                print(f"{where}: well after {time.monotonic() - begun_s:.1f} s, said {said}", flush=True)
        check_logs([a, b, c])
        for node in (c, b, a):
            assert node.stop() == 0
