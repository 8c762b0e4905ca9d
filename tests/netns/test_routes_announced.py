"""Networks behind members and exit nodes, with real forwarding.

a  makes the network             b  gateway, also in a LAN      c  client, of no LAN
                                 |  10.55.0.1
                                 server 10.55.0.2, knows nothing of any VPN
"""

from __future__ import annotations

import contextlib
import errno
import json
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest
from lab import Lab, LabError, Node, check_logs, ping, wait_until
from lab.joining import address, all_reach_all, invite, machine
from lab.network import Namespace, run_command
from lab.sockets import socket_in

pytestmark = pytest.mark.root

LAN, GATEWAY, SERVER = "10.55.0.0/24", "10.55.0.1", "10.55.0.2"
#: Documentation addresses (RFC 5737): the world behind the server.
WORLD, BEHIND, NOBODY = "198.51.100.1", "198.51.100.0/24", "198.51.100.9"
SETTLE_S = 10.0


@contextlib.contextmanager
def server_behind(lab: Lab, gateway: Namespace) -> Iterator[Namespace]:
    """A machine in a LAN with `gateway` alone, which is its default gateway; it has WORLD too."""
    server = Namespace(f"{gateway.name}-lan", "server", SERVER)
    run_command("ip", "netns", "add", server.name)
    try:
        lab.ip(gateway, "link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", server.name)
        for namespace, text in ((gateway, GATEWAY), (server, SERVER)):
            lab.ip(namespace, "addr", "add", f"{text}/24", "dev", "lan0")
            lab.ip(namespace, "link", "set", "lan0", "up")
        lab.ip(server, "link", "set", "lo", "up")
        lab.ip(server, "addr", "add", f"{WORLD}/32", "dev", "lo")
        lab.ip(server, "route", "add", "default", "via", GATEWAY)
        lab.ip(gateway, "route", "add", "198.51.100.0/24", "via", SERVER)
        yield server
    finally:
        subprocess.run(["ip", "netns", "del", server.name], check=False)


def forward(lab: Lab, gateway: Namespace) -> None:
    """Let a machine forward."""
    lab.run(gateway, "sysctl", "-qw", "net.ipv4.ip_forward=1")


def network(lab: Lab, advertise: list[str], *, exit_node: str = "", masquerade: bool = True) -> list[Node]:
    """The network of the picture, all nodes running."""
    a, b, c = (machine(lab, place) for place in range(3))
    b.config["network"] = {"advertise": advertise, "masquerade": masquerade}
    c.config["network"] = {"exit_node": exit_node}
    a.start()
    a.wait_ready()
    words = [word for text in advertise for word in ("--route", text)]
    b.start("--join", invite(a, *words))
    c.start("--join", invite(a))
    for node in (b, c):
        node.wait_ready()
    all_reach_all([a, b, c], SETTLE_S)
    return [a, b, c]


def way_to(node: Node, target: str, user: str = "0") -> str:
    """The device the node's machine sends a packet for `target` to; "" for nowhere."""
    done = node.lab.run(node.namespace, "ip", "route", "get", target, "uid", user, check=False)
    words = done.stdout.split()
    return words[words.index("dev") + 1] if "dev" in words else ""


def own_user() -> str:
    """Whose sockets keep out of the tunnel."""
    return str(pwd.getpwnam("vpnd").pw_uid)


def answers(node: Node, target: str) -> bool:
    if not way_to(node, target):
        return False
    try:
        return ping(node.lab, node.namespace, target, count=2, interval_s=0.1).loss == 0
    except LabError:  # the way has gone meanwhile
        return False


def filter_of(node: Node) -> str:
    """The node's nftables rules."""
    return node.lab.run(node.namespace, "nft", "list", "table", "inet", "vpnd_vpnd0", check=False).stdout


def rules(node: Node) -> list[str]:
    lines = [
        line for family in ("-4", "-6") for line in node.lab.ip(node.namespace, family, "rule").splitlines()
    ]
    return [line for line in lines if "lookup 76" in line or "suppress_prefixlength" in line]


def warned(node: Node, word: str) -> bool:
    return any(word in line for line in node.ask()["node"]["warnings"])


def ails(node: Node, word: str) -> bool:
    """Whether it says so, and is not healthy."""
    status = node.ask()
    told = any(word in f"{each['what']} {each['remedy']}" for each in status["ailments"])
    assert told <= (status["health"] == "degraded")
    return told


def test_a_firewall_of_the_gateway_that_drops_what_it_is_to_forward_is_told() -> None:
    with Lab(3) as lab, server_behind(lab, lab.nodes[1]):
        a, b, c = network(lab, [BEHIND])
        b.config["network"]["reconcile_interval"] = "200ms"
        b.write_config()
        assert "applied" in b.ask("reload")
        forward(lab, b.namespace)
        wait_until(lambda: answers(c, WORLD), SETTLE_S, "it forwards")
        assert b.ask()["health"] == "healthy"
        chain = (
            "nft",
            "add",
            "chain",
            "inet",
            "fw",
            "forward",
            "{ type filter hook forward priority 0; policy drop; }",
        )
        lab.run(b.namespace, "nft", "add", "table", "inet", "fw")
        lab.run(b.namespace, *chain)
        wait_until(lambda: ails(b, "inet fw forward"), SETTLE_S, "it is told")
        assert not answers(c, WORLD)
        told = next(each for each in b.ask()["ailments"] if "firewall" in each["what"])
        for command in told["remedy"].split("; "):
            lab.run(b.namespace, *command.split())
        wait_until(lambda: b.ask()["health"] == "healthy", SETTLE_S, "it is mended")
        assert answers(c, WORLD)
        check_logs([a, b, c])


def test_a_network_behind_a_member_is_reached_by_the_others() -> None:
    with Lab(3) as lab, server_behind(lab, lab.nodes[1]) as server:
        a, b, c = network(lab, [BEHIND])
        assert ails(b, "net.ipv4.ip_forward=1"), "nothing of the machine was changed, but said"
        for node in (a, c):
            wait_until(lambda node=node: way_to(node, WORLD) != "vpnd0", SETTLE_S, "nobody is sent there")
        forward(lab, b.namespace)
        for node in (a, c):
            wait_until(lambda node=node: way_to(node, WORLD) == "vpnd0", SETTLE_S, "the route is there")
        assert b.ask()["health"] == "healthy"
        assert answers(c, WORLD) and answers(a, WORLD)
        # the router behind it has an address that is nobody's here, and is heard all the same
        forward(lab, server)
        lab.ip(server, "route", "add", "unreachable", NOBODY)
        with socket_in(c.namespace, NOBODY, socket.SOCK_STREAM) as sock:
            assert sock.connect_ex((NOBODY, 9)) == errno.EHOSTUNREACH
        assert SERVER in lab.run(c.namespace, "ping", "-c1", "-W3", NOBODY, check=False).stdout
        assert way_to(c, WORLD, own_user()) != "vpnd0", "sessions never go through the tunnel"
        rows = {row["name"]: row for row in json.loads(a.vpnd("members", "--json").stdout)}
        assert rows["b"]["routes"] == [BEHIND]
        # the gateway goes: nobody is sent there any more once it is no member
        a.vpnd("remove", "b")
        wait_until(lambda: way_to(c, WORLD) != "vpnd0" and not rules(c), SETTLE_S, "the route is gone")
        for node in (c, a, b):
            assert node.stop() == 0
            assert not rules(node)
        check_logs([a, b, c])


def test_a_member_in_the_lan_of_a_gateway_is_reached_by_its_address_there() -> None:
    with Lab(3) as lab:
        gateway, inside = lab.nodes[1:]
        lab.ip(gateway, "link", "add", "lan0", "type", "veth", "peer", "name", "lan0", "netns", inside.name)
        for namespace, text in ((gateway, GATEWAY), (inside, SERVER)):
            lab.ip(namespace, "addr", "add", f"{text}/24", "dev", "lan0")
            lab.ip(namespace, "link", "set", "lan0", "up")
        forward(lab, gateway)
        a, b, c = network(lab, [LAN])
        wait_until(lambda: way_to(a, SERVER) == "vpnd0", SETTLE_S, "the route is there")
        wait_until(lambda: answers(a, SERVER) and answers(a, GATEWAY), SETTLE_S, "both are reached")
        assert way_to(c, GATEWAY) == "lan0", "its own network stays"
        assert "masquerade" in filter_of(b)
        lab.run(gateway, "nft", "flush", "table", "inet", "vpnd_vpnd0")
        b.vpnd("reload")  # makes it look
        wait_until(lambda: "masquerade" in filter_of(b), SETTLE_S, "it is mended")
        for node in (a, b, c):
            assert node.stop() == 0
        assert not filter_of(b)
        check_logs([a, b, c])


def test_a_member_that_may_not_announce_is_not_believed() -> None:
    with Lab(3) as lab, server_behind(lab, lab.nodes[1]):
        a, b, c = (machine(lab, place) for place in range(3))
        b.config["network"] = {"advertise": [LAN, "0.0.0.0/0"]}
        c.config["network"] = {"exit_node": "b"}
        a.start()
        a.wait_ready()
        for node in (b, c):
            node.start("--join", invite(a))
            node.wait_ready()
        all_reach_all([a, b, c], SETTLE_S)
        assert way_to(c, SERVER) != "vpnd0"
        assert way_to(c, WORLD) == "", "not past an exit node that is none either"
        assert not rules(a)


def test_through_an_exit_node_the_world_is_reached_and_nothing_stays_behind() -> None:
    with Lab(3) as lab, server_behind(lab, lab.nodes[1]):
        a, b, c = network(lab, ["0.0.0.0/0"], exit_node="b")
        forward(lab, b.namespace)
        wait_until(lambda: way_to(c, WORLD) == "vpnd0", SETTLE_S, "the way to everywhere is there")
        wait_until(lambda: answers(c, WORLD), SETTLE_S, "the world is reached")
        assert way_to(a, WORLD) != "vpnd0", "who did not ask for it has no exit node"
        assert way_to(c, "192.168.77.1") == "eth0", "the machine's own networks stay"
        assert way_to(c, WORLD, own_user()) != "vpnd0"
        assert answers(c, address(a)) and answers(c, "192.168.77.1")
        before = c.ask()
        assert all(peer["state"] == "connected" for peer in before["peers"])
        # somebody switches forwarding off on the exit node, and on again: both it and its user say so meanwhile
        assert b.ask()["health"] == c.ask()["health"] == "healthy"
        lab.run(b.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=0")
        wait_until(lambda: ails(b, "net.ipv4.ip_forward=1"), SETTLE_S, "the exit node says that it is none")
        wait_until(lambda: ails(c, "b is no exit node now"), SETTLE_S, "so does who uses it")
        wait_until(lambda: way_to(c, WORLD) == "", SETTLE_S, "and nothing leaves past it")
        assert c.vpnd("status", check=False).returncode == 9
        forward(lab, b.namespace)
        wait_until(lambda: answers(c, WORLD), SETTLE_S, "the world is reached again")
        assert b.ask()["health"] == c.ask()["health"] == "healthy"
        # an exit node that is lost and comes back
        b.kill(signal.SIGKILL)
        b.wait_ended()
        b.start()
        b.wait_ready()
        wait_until(lambda: answers(c, WORLD), SETTLE_S, "the world is reached again")
        # a client that is killed
        assert rules(c)
        c.kill(signal.SIGKILL)
        c.wait_ended()
        # its device goes with its last child, which ends a moment later
        wait_until(lambda: way_to(c, WORLD) == "", SETTLE_S, "its kill switch is there")
        c.start()
        c.wait_ready()
        wait_until(lambda: way_to(c, WORLD) == "vpnd0" and answers(c, WORLD), SETTLE_S, "and once more")
        assert c.stop() == 0
        assert not rules(c)
        check_logs([a, b, c])


@pytest.mark.setting("network.masquerade")
def test_a_route_of_the_machine_is_not_taken_over() -> None:
    with Lab(3) as lab, server_behind(lab, lab.nodes[1]):
        lab.ip(lab.nodes[2], "addr", "add", "10.55.0.77/16", "dev", "eth0")
        forward(lab, lab.nodes[1])
        a, b, c = network(lab, [LAN], masquerade=False)
        wait_until(lambda: way_to(a, SERVER) == "vpnd0", SETTLE_S, "elsewhere it is routed")
        assert "masquerade" not in filter_of(b)
        wait_until(lambda: warned(c, LAN), SETTLE_S, "the user is told")
        assert way_to(c, SERVER) == "eth0"
        # the network that was in the way is left: a moment later the announced one is routed
        lab.ip(c.namespace, "addr", "del", "10.55.0.77/16", "dev", "eth0")
        wait_until(lambda: way_to(c, SERVER) == "vpnd0", SETTLE_S, "now it is")
        assert not warned(c, LAN)


def test_nodes_of_one_machine_leave_each_others_rules_alone() -> None:
    with Lab(2) as lab:
        first = machine(lab, 0, {"network": {"exit_node": "b"}})
        second = machine(
            lab, 0, {"membership": {"subnet": "10.87.0.0/16"}, "network": {"interface": "vpnd1"}}
        )
        third = machine(lab, 0, {"membership": {"subnet": "10.88.0.0/16"}, "network": {"interface": "tun0"}})
        for port, node in enumerate((second, third), start=5001):
            node.config["p2p"]["listen"] = [f"/ip4/{node.namespace.address}/tcp/{port}"]
        for node, name in ((second, "second"), (third, "third")):
            node.state_dir = lab.directory / name
            node.state_dir.mkdir(mode=0o700)
            node.config_file = node.state_dir / "vpnd.toml"
            node.env |= {"VPND_STATE_DIR": str(node.state_dir), "VPND_CONFIG": str(node.config_file)}
            node.log_file = lab.directory / f"{name}.log"
        first.start()
        first.wait_ready()
        alone = rules(first)
        assert alone, "its kill switch"
        second.start()
        second.wait_ready()
        assert rules(first) == alone
        second.kill(signal.SIGKILL)
        second.wait_ended()
        wait_until(lambda: not (second.state_dir / "vpnd.sock").exists(), SETTLE_S, "it is cleaned up")
        assert rules(first) == alone
        second.config["network"]["exit_node"] = "b"
        second.start()
        second.wait_ready()
        assert len(rules(first)) > len(alone), "each has its own"
        assert second.stop() == 0
        assert rules(first) == alone
        third.start()
        assert third.wait_ended() == 5
        assert "network.route_table = 7669" in third.log_file.read_text()
        assert rules(first) == alone
        assert first.stop() == 0
        assert not rules(first)
