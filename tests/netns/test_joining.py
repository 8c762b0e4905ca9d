"""A network as a new user meets it: one machine starts, others join by token, one is lost, one is thrown out."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from lab import Lab, Node, check_logs, ping, process_tree, socket_in, wait_for_answer, wait_until
from lab.joining import address, all_reach_all, invite, join, machine, network_of, standing, wait_standing

from vpnd import errors

pytestmark = pytest.mark.root

#: The promise is 5 s on an idle machine; another program may have half of this one.
REACHED_S = 10.0
#: No new packet of a removed member arrives after so long.
REMOVED_S = 3.0
WATCH_S = 3.0
STOPS_S = 20.0


@contextlib.contextmanager
def lab_of(count: int) -> Iterator[Lab]:
    """A lab; what its nodes have printed is looked at afterwards."""
    with Lab(count) as lab:
        yield lab
        for log in lab.directory.glob("*.log"):
            assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")[-3000:]


def test_two_join_by_token_and_all_reach_all_at_every_address() -> None:
    with lab_of(3) as lab:
        a, b, c = (machine(lab, place) for place in range(3))
        a.start()
        status = a.wait_ready()
        assert status["network"]["name"] == "home" and status["network"]["authority"]
        wait_until(lambda: "vpnd invite" in a.log_file.read_text(), REACHED_S, "it says what is next")
        for node in (b, c):
            token = invite(a)
            begun_s = time.monotonic()
            node.start("--join", token)
            wait_until(lambda node=node: node.ask().get("ready"), REACHED_S, "it has joined")
            all_reach_all([a, node], REACHED_S - (time.monotonic() - begun_s))
            print(f"{node.namespace.label} reached {time.monotonic() - begun_s:.2f} s after its start")
        all_reach_all([a, b, c], REACHED_S)
        rows = {row["name"]: row for row in json.loads(b.vpnd("members", "--json").stdout)}
        assert set(rows) == {"a", "b", "c"}
        assert rows["a"]["authority"] and not rows["c"]["authority"]
        refusal = b.vpnd("invite", check=False)
        assert refusal.returncode == errors.RefusedError.exit_code and "no authority" in refusal.stderr
        assert [row["name"] for row in b.ask()["peers"]] != [] and b.ask()["node"]["mode"] == "network"
        assert len({address(node) for node in (a, b, c)}) == 3
        assert all(address(node) in b.vpnd("members").stdout for node in (a, b, c))
        for word in ("c", address(c), c.ask()["node"]["peer_id"]):
            found = json.loads(b.vpnd("resolve", word, "--json").stdout)
            assert found["name"] == "c" and found["steps"]
        other = ipaddress.ip_address(c.ask()["node"]["addresses"][1]).exploded
        for word, version in (("C.home.vpn", 4), (other, 6)):
            said = json.loads(b.vpnd("ping", word, "-c", "1", "--json").stdout)
            assert (said["name"], said["received"]) == ("c", 1) and said["pings"][0]["session"]["rtt_ms"] > 0
            assert ipaddress.ip_address(said["address"]).version == version
        assert "c" in b.vpnd("peers").stdout
        for node in (c, b, a):
            assert node.stop() == 0


def test_without_its_maker_a_network_goes_on_also_after_a_restart() -> None:
    with lab_of(3) as lab:
        a, b, c = network_of(lab)
        all_reach_all([b, c], REACHED_S)
        before = address(b), address(c)
        a.kill(signal.SIGKILL)
        a.wait_ended()
        assert ping(lab, b.namespace, address(c), count=10, interval_s=0.05).loss == 0
        for node in (b, c):
            assert node.stop() == 0
        for node in (b, c):
            node.start()
        for node in (b, c):
            node.wait_ready()
        assert (address(b), address(c)) == before
        all_reach_all([b, c], REACHED_S)
        for node in (b, c):
            assert node.stop() == 0


def test_two_that_were_never_on_together_meet_without_a_third() -> None:
    with lab_of(3) as lab:
        a, b, c = (machine(lab, place) for place in range(3))
        a.start()
        a.wait_ready()
        join(a, c)
        wait_until(
            lambda: [row["addresses"] for row in a.ask()["peers"]] != [[]], REACHED_S, "a knows where c is"
        )
        assert c.stop() == 0
        join(a, b)  # c does not hear of it
        wait_until(lambda: len(b.ask()["peers"]) == 2, REACHED_S, "b knows a and c")
        a.kill(signal.SIGKILL)
        a.wait_ended()
        c.start()
        c.wait_ready()
        begun_s = time.monotonic()
        all_reach_all([b, c], REACHED_S)
        print(f"they reached each other {time.monotonic() - begun_s:.2f} s after the second was ready")
        assert {row["name"] for row in json.loads(c.vpnd("members", "--json").stdout)} == {"a", "b", "c"}
        counters = c.ask()["control"]["counters"]
        assert counters["introduced"] == 1 and not counters["enrolled"]
        for node in (c, b):
            assert node.stop() == 0


class Stream:
    """Datagrams from one node to another, every 10 ms while the block lasts; `last_s`: when the last one arrived."""

    def __init__(self, source: Node, target: Node, ip: str) -> None:
        self._sender = socket_in(source.namespace, ip, socket.SOCK_DGRAM)
        self._receiver = socket_in(target.namespace, ip, socket.SOCK_DGRAM)
        self._receiver.bind((ip, 7777))
        self._receiver.setblocking(False)
        self._to = (ip, 7777)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.last_s = 0.0

    def _run(self) -> None:
        while not self._over.wait(0.01):
            with contextlib.suppress(OSError):  # the device of a node that is restarted is away
                self._sender.sendto(b"x", self._to)
            with contextlib.suppress(BlockingIOError):
                while self._receiver.recv(100):
                    self.last_s = time.monotonic()

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._sender.close()
        self._receiver.close()


def test_a_removed_member_is_out_within_seconds_knows_it_and_stays_out() -> None:
    with lab_of(3) as lab:
        a, b, c = network_of(lab)
        all_reach_all([b, c], REACHED_S)
        with Stream(b, c, address(c)) as stream:
            wait_until(lambda: stream.last_s, REACHED_S, "datagrams arrive")
            assert "b" in a.vpnd("remove", "b").stdout
            removed_s = time.monotonic()
            wait_until(
                lambda: time.monotonic() - max(removed_s, stream.last_s) > WATCH_S,
                REMOVED_S + WATCH_S,
                "no packet of it arrives any more",
            )
            print(f"the last packet came {stream.last_s - removed_s:+.2f} s after `vpnd remove` returned")
            wait_standing(b, "removed", REMOVED_S)
            assert "removed from" in b.log_file.read_text()
            said = b.vpnd("status", check=False).stdout
            assert "removed from network home" in said and "--join TOKEN" in said
            assert ping(lab, a.namespace, address(c), count=3).loss == 0

            assert b.stop() == 0
            b.start()
            b.wait_ready()
            assert standing(b) == "removed"
            before_s = stream.last_s
            time.sleep(1.0)
            assert stream.last_s == before_s
        assert b.stop() == 0
        join(a, b)
        all_reach_all([b, c], REACHED_S)
        for node in (a, b, c):
            assert node.stop() == 0


OTHER = {"membership": {"subnet": "10.87.0.0/16", "name": "other"}}


def test_a_member_of_one_network_does_not_join_another_before_it_has_left() -> None:
    with lab_of(3) as lab:
        a, b, c = machine(lab, 0), machine(lab, 1, OTHER), machine(lab, 2)
        for node in (a, b):
            node.start()
            node.wait_ready()
        join(b, c)
        assert c.ask()["network"]["name"] == "other" and address(c).startswith("10.87.")
        done = c.vpnd("join", invite(a), check=False)
        assert done.returncode == errors.ConfigError.exit_code and "vpnd leave" in done.stderr
        assert c.ask()["network"]["name"] == "other"
        assert c.stop() == 0
        done = c.vpnd("start", "--join", invite(a), check=False)
        assert done.returncode == errors.ConfigError.exit_code
        assert "in the network other already" in done.stderr and "vpnd leave" in done.stderr
        c.start()
        c.wait_ready()
        assert "left the network other" in c.vpnd("leave").stdout
        assert c.wait_ended() == 0
        assert not any((c.state_dir / "network").iterdir())
        assert json.loads(b.vpnd("members", "--json").stdout)[0]["name"] == "b", "its name is free at once"
        join(a, c)
        all_reach_all([a, c], REACHED_S)
        for node in (c, b, a):
            assert node.stop() == 0


def test_a_network_nobody_else_is_in_is_left_by_joining_another_while_the_node_runs_or_not() -> None:
    with lab_of(3) as lab:
        a, b, c = machine(lab, 0), machine(lab, 1, OTHER), machine(lab, 2, OTHER)
        for node in (a, b, c):
            node.start()
            node.wait_ready()
        used = invite(a)
        pid = b.ask()["supervisor"]["pid"]
        assert "joined the network home" in b.vpnd("join", used).stdout
        assert b.ask()["supervisor"]["pid"] == pid, "what started it still has it"
        refused = c.vpnd("join", used, check=False)
        assert refused.returncode == errors.RefusedError.exit_code and "used" in refused.stderr
        assert c.ask()["network"]["name"] == "other", "nothing was given up for a token that is worth nothing"
        assert c.stop() == 0
        join(a, c)
        all_reach_all([a, b, c], REACHED_S)
        for node in (b, c):
            assert (
                not node.ask()["network"]["authority"]
                and not (node.state_dir / "network/authority.key").exists()
            )
        for node in (c, b, a):
            assert node.stop() == 0


def test_a_detached_node_joins_by_a_token_nobody_can_see() -> None:
    with lab_of(2) as lab:
        a, b = machine(lab, 0), machine(lab, 1)
        a.start()
        a.wait_ready()
        token = invite(a, "--name", "attic", "--ip", "10.86.7.7")
        b.write_config()
        command = ["ip", "netns", "exec", b.namespace.name, *b.command, "start", "--detach", "--join", "-"]
        with (lab.directory / "detach.log").open("w") as out:  # no pipe: the daemon might hold it
            subprocess.run(
                command, env={**os.environ, **b.env}, input=token, text=True, stdout=out, stderr=out, check=True,
                timeout=60,
            )  # fmt: skip
        assert "attic in home runs as 10.86.7.7 on vpnd0" in (lab.directory / "detach.log").read_text()
        status = b.ask()
        assert status["network"]["label"] == "attic"
        for pid in process_tree([status["supervisor"]["pid"]]):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                assert token.encode() not in file.read()
        wait_for_answer(lab, a.namespace, "10.86.7.7", REACHED_S)
        b.vpnd("stop")
        assert a.stop() == 0


def test_shards_that_come_later_know_what_is_ours_and_a_reload_changes_nothing() -> None:
    with lab_of(2) as lab:
        a, b = network_of(lab)
        all_reach_all([a, b], REACHED_S)
        assert b.vpnd("reload").stdout == "nothing has changed\n"
        os.kill(b.ask()["shards"][0]["pid"], signal.SIGKILL)
        assert "2 shards" in b.vpnd("scale", "2").stdout
        wait_until(lambda: b.ask().get("ready"), REACHED_S, "all shards are back")
        all_reach_all([a, b], REACHED_S)
        assert b.ask()["dropped"]["destination_not_ours"] == 0
        for node in (b, a):
            assert node.stop() == 0


def configured(node: Node, number: int, other: Node, other_number: int) -> None:
    """Name `other` under [[peers]] of `node`, and an address for it."""
    node.config["network"] = {"virtual_ip": f"10.70.0.{number}", "subnet": 24}
    node.config["peers"] = [
        {
            "name": other.namespace.label,
            "peer_id": other.peer_id(),
            "virtual_ip": f"10.70.0.{other_number}",
            "addresses": [f"/ip4/{other.namespace.address}/tcp/4001"],
        }
    ]


def test_a_member_has_configured_peers_beside_its_network() -> None:
    with lab_of(3) as lab:
        a, b, c = (machine(lab, place) for place in range(3))
        for node in (b, c):
            node.write_config()
        configured(b, 2, c, 3)
        configured(c, 3, b, 2)
        a.start()
        a.wait_ready()
        c.start()
        join(a, b)
        c.wait_ready()
        for one, ip in ((b, "10.70.0.3"), (c, "10.70.0.2"), (b, address(a)), (a, address(b))):
            wait_for_answer(lab, one.namespace, ip, REACHED_S)
        status = c.ask()
        assert status["node"]["mode"] == "static" and status["network"] is None
        sources = {row["name"]: row["source"] for row in b.ask()["peers"]}
        assert sources == {"a": "membership", "c": "configuration"}
        refusal = c.vpnd("invite", check=False)
        assert refusal.returncode == 1 and "in no network" in refusal.stderr
        assert {row["name"] for row in json.loads(a.vpnd("members", "--json").stdout)} == {"a", "b"}
        for node in (c, b, a):
            assert node.stop() == 0


def test_while_control_is_away_the_last_known_is_shown_and_sessions_go_on() -> None:
    with lab_of(2) as lab:
        a, b = network_of(lab)
        all_reach_all([a, b], REACHED_S)
        before = a.ask()
        os.kill(before["control"]["pid"], signal.SIGSTOP)
        try:
            during = a.ask()
            assert [row["name"] for row in during["peers"]] == ["b"]
            assert during["network"]["current"] is False and during["network"]["name"] == "home"
            assert ping(lab, a.namespace, address(b), count=5, interval_s=0.05).loss == 0
        finally:
            os.kill(before["control"]["pid"], signal.SIGKILL)
        wait_until(lambda: a.ask().get("ready"), REACHED_S, "control is back")
        wait_until(lambda: a.ask()["network"]["current"], REACHED_S, "it says what is")
        assert a.ask()["node"]["addresses"] == before["node"]["addresses"]
        assert ping(lab, b.namespace, address(a), count=5, interval_s=0.05).loss == 0
        check_logs([a, b])
        for node in (b, a):
            assert node.stop() == 0
