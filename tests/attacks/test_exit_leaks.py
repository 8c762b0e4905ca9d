"""Past an exit node nothing leaves in the clear, whatever becomes of it, of the daemon, or of the machine's rules.

a  authority, and the way to the Internet without a tunnel      b  exit node      c  client of the exit node
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

import pytest
from lab import Lab, Node, ping, wait_until
from lab.joining import all_reach_all, invite, machine
from lab.leaks import Leaks
from lab.network import run_command

pytestmark = pytest.mark.root

#: Documentation addresses (RFC 5737, 3849): the world, which only b can answer for.
WORLD, WORLD6 = "198.51.100.1", "2001:db8:77::1"
SETTLE_S = 15.0
#: Long enough for the reconciler, the janitor and every race of theirs.
WATCH_S = 0.7


@contextlib.contextmanager
def world() -> Iterator[Lab]:
    with Lab(3) as lab:
        a, b, c = lab.nodes
        lab.ip(b, "addr", "add", f"{WORLD}/32", "dev", "lo")
        lab.ip(c, "route", "add", "default", "via", a.address)
        lab.ip(c, "-6", "addr", "add", "2001:db8:1::3/64", "dev", "eth0", "nodad")
        lab.ip(c, "-6", "route", "add", "default", "via", "2001:db8:1::1")
        # nobody has to answer for a packet to leave
        lab.ip(c, "-6", "neigh", "add", "2001:db8:1::1", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
        yield lab


def answers(node: Node) -> bool:
    done = node.lab.run(node.namespace, "ping", "-nqc1", "-W1", WORLD, check=False)
    return done.returncode == 0


def ailing(node: Node, words: str) -> bool:
    """Whether it is told in the status, as what ails the node."""
    answer = node.ask()
    return answer["health"] == "degraded" and any(words in each["remedy"] for each in answer["ailments"])


CHANGES = [
    "ip rule flush; ip rule add priority 32766 lookup main",
    "ip -6 rule flush; ip -6 rule add priority 32766 lookup main",
    "ip route flush table 7669; ip -6 route flush table 7669",
    "nft flush ruleset",
    "ip link set vpnd0 down",
    "ip addr flush dev vpnd0",
]


def test_nothing_leaves_past_an_exit_node() -> None:
    with world() as lab:
        a, b, c = (machine(lab, place) for place in range(3))
        c.config["network"] = {"exit_node": "b"}
        b.config["network"] = {"advertise": ["0.0.0.0/0"]}
        lab.run(b.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        a.start()
        a.wait_ready()
        with Leaks(c.namespace, WORLD, WORLD6) as leaks:
            assert leaks.within(WATCH_S) > 0, "without a node it goes the usual way"
            c.start("--join", invite(a))
            c.wait_ready()
            assert leaks.within(WATCH_S) == 0, "nobody knows a member b"
            b.start("--join", invite(a, "--route", "0.0.0.0/0"))
            b.wait_ready()
            all_reach_all([a, b, c], SETTLE_S)
            before = leaks.leaked
            wait_until(lambda: answers(c), SETTLE_S, "through the exit node")
            for change in CHANGES:
                run_command("ip", "netns", "exec", c.namespace.name, "sh", "-c", change)
                assert leaks.within(WATCH_S) == 0, change
                wait_until(lambda: answers(c), SETTLE_S, f"mended: {change}")
            # a rule before ours is not ours to delete: the nftables rules hold, and the user is told
            lab.ip(c.namespace, "rule", "add", "priority", "100", "lookup", "main")
            assert leaks.within(WATCH_S) == 0
            wait_until(lambda: ailing(c, "rule del priority 100"), SETTLE_S, "it is told")
            lab.ip(c.namespace, "rule", "del", "priority", "100")
            wait_until(lambda: answers(c), SETTLE_S, "without that rule")
            # the exit node announces nothing any more
            b.stop()
            b.config["network"] = {}
            b.start()
            b.wait_ready()
            all_reach_all([a, b, c], SETTLE_S)
            assert not answers(c)
            # it is no member any more
            a.vpnd("remove", "b")
            assert leaks.within(WATCH_S) == 0 and leaks.leaked == before
            # the daemon is killed; then it cannot be started
            c.kill(signal.SIGKILL)
            c.wait_ended()
            assert leaks.within(WATCH_S) == 0, "killed"
            c.config["metrics"] = {"listen": "192.0.2.77:9"}
            c.start()
            assert c.wait_ended() != 0
            assert leaks.within(WATCH_S) == 0, "a start that failed"
            c.config["metrics"] = {}
            c.start()
            c.wait_ready()
            assert leaks.within(WATCH_S) == 0 and leaks.leaked == before
            # its device is taken away, and the node ends
            lab.ip(c.namespace, "link", "del", "vpnd0")
            assert c.wait_ended() == 1
            assert leaks.within(WATCH_S) == 0 and leaks.leaked == before
            assert "is undone" in c.vpnd("stop").stdout
            wait_until(lambda: leaks.within(0.1) > 0, SETTLE_S, "the usual way again")
            assert c.vpnd("stop", check=False).returncode == 3
            left = [lab.ip(c.namespace, family, "rule") for family in ("-4", "-6")]
            assert not [text for text in left if "7669" in text or "suppress" in text]
            assert "vpnd" not in run_command("ip", "netns", "exec", c.namespace.name, "nft", "list", "tables")


@pytest.mark.setting("network.exit_kill_switch")
def test_without_the_kill_switch_a_killed_daemon_leaves_the_machine_as_it_was() -> None:
    with world() as lab:
        c = machine(lab, 2)
        c.config["network"] = {"exit_node": "b", "exit_kill_switch": False}
        with Leaks(c.namespace, WORLD) as leaks:
            c.start()
            c.wait_ready()
            assert leaks.within(WATCH_S) > 0, "nobody knows a member b"
            c.kill(signal.SIGKILL)
            c.wait_ended()
            tables = ("ip", "netns", "exec", c.namespace.name, "nft", "list", "tables")
            wait_until(lambda: "vpnd" not in run_command(*tables), SETTLE_S, "the janitor's work")
            assert leaks.within(WATCH_S) > 0


def listening(lab: Lab, node: Node, port: int) -> subprocess.Popen[str]:
    program = (
        "import socket, sys\n"
        "heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"heard.bind(('0.0.0.0', {port}))\n"
        "while True: print(heard.recvfrom(99)[1][0], flush=True)\n"
    )
    return lab.spawn(node.namespace, "python3", "-c", program, output=lab.directory / "heard")


@pytest.mark.setting("network.nftables")
@pytest.mark.parametrize("guarded", [True, False])
def test_a_neighbour_that_is_no_member_does_not_reach_virtual_addresses(guarded: bool) -> None:
    with Lab(2) as lab:
        a, stranger = machine(lab, 0), lab.nodes[1]
        a.config["network"] = {"nftables": guarded, "interface": "vp.n*d-0"}
        a.start()
        own = a.wait_ready()["node"]["addresses"][0]
        listening(lab, a, 7777)
        lab.ip(stranger, "route", "add", f"{own}/32", "via", a.namespace.address)
        # pretends to be a member, on the wire of the LAN
        lab.ip(stranger, "addr", "add", "10.86.99.99/32", "dev", "lo")
        send = "import socket,sys; s=socket.socket(2,2); s.bind((sys.argv[1],0)); s.sendto(b'x',(sys.argv[2],7777))"

        def heard(source: str, target: str) -> bool:
            for _ in range(3):
                lab.run(stranger, "python3", "-c", send, source, target)
            with contextlib.suppress(Exception):
                wait_until(lambda: source in (lab.directory / "heard").read_text(), 1.0, "heard")
            return source in (lab.directory / "heard").read_text()

        wait_until(lambda: heard(stranger.address, a.namespace.address), 5.0, "it listens")
        (lab.directory / "heard").write_text("")
        assert heard("10.86.99.99", own) is not guarded
        assert ping(lab, a.namespace, own, count=2, interval_s=0.1).loss == 0, "the machine reaches itself"
        a.stop()
        assert "vpnd" not in lab.run(a.namespace, "nft", "list", "tables").stdout
