"""A link on the way with a smaller MTU that says nothing of what it drops, as behind many a PPPoE line."""

from __future__ import annotations

import os
import time

import pytest
from lab import Node, SteadyFlow, check_logs, connected, pair_of_nodes, tcp_pair, transfer, wait_until
from lab.middle import MiddleLab
from lab.node import P2P_PORT
from lab.running import wait_connected

pytestmark = pytest.mark.root

LONG = "VPND_LONG_TESTS" in os.environ
#: The promise is 10 s.
FLOWS_AGAIN_S = 10.0 if LONG else 30.0
#: Trials come after 1, 2, 4, 8 s, each of which takes two more where large segments get lost.
GROWN_S = 30.0
SMALL, LARGE = 1000, 1300
#: Nothing passes for so long, while packets are sent: long enough for TCP to repeat a segment often.
SILENT_S = 5.0
BYTES = 1 << 20


def segments(node: Node) -> int:
    return int(node.ask()["peers"][0]["segment_bytes"])


@pytest.mark.setting("session.small_segment")
@pytest.mark.parametrize(
    ("version", "mtu", "stagger"),
    [(4, 1280, "0ms"), (6, 1280, "300ms")] + [(4, 1492, "300ms"), (6, 1492, "0ms")] * LONG,
)
def test_traffic_goes_on_where_large_packets_vanish(version: int, mtu: int, stagger: str) -> None:
    """`stagger`: with none both dial, so that there are two sessions that it is true of."""
    with MiddleLab() as lab:
        settings = {"session": {"small_segment": SMALL}, "p2p": {"dial_stagger": stagger}}
        nodes = pair_of_nodes(lab, shards=1, settings=settings)
        for place, node in enumerate(nodes, 1):
            own, other = (
                f"fd00:{each}::1" if version == 6 else f"10.{each}.0.1" for each in (place, 3 - place)
            )
            node.config["p2p"]["listen"] = [f"/ip{version}/{own}/tcp/{P2P_PORT}"]
            node.config["peers"][0]["addresses"] = [f"/ip{version}/{other}/tcp/{P2P_PORT}"]
            node.start()
        wait_connected(nodes)
        assert all(segments(node) > LARGE for node in nodes)
        pairs = [
            tcp_pair(one.namespace, other.namespace, other.virtual_ip) for one, other in (nodes, nodes[::-1])
        ]
        for sender, receiver in pairs:
            sender.sendall(b"x")
            assert receiver.recv(1) == b"x"
            receiver.settimeout(FLOWS_AGAIN_S)
            sender.settimeout(FLOWS_AGAIN_S)
        lab.narrow(mtu)
        begun_s = time.monotonic()
        for sender, receiver in pairs:
            with sender, receiver:
                transfer(sender, receiver, BYTES)
            passed_s = time.monotonic() - begun_s
            print(f"IPv{version}, MTU {mtu}: flows {passed_s:.1f} s after")
            assert passed_s < FLOWS_AGAIN_S
        wait_until(
            lambda: all(0 < segments(node) <= SMALL for node in nodes), 20.0, "status has the path's segments"
        )
        wait_until(
            lambda: any("large TCP segments do not reach" in node.log_file.read_text() for node in nodes),
            10.0,
            "a session with large segments was tried",
        )
        lab.widen()
        wait_until(lambda: all(segments(node) > LARGE for node in nodes), GROWN_S, "segments are large again")
        assert sum(node.ask()["peers"][0]["circuit_opened"] for node in nodes) == 0
        check_logs(nodes)
        for node in nodes:
            assert node.stop() == 0


def test_silence_is_not_taken_for_large_packets_that_vanish() -> None:
    """Nothing passes for some seconds, both ways: segments are as large as before, or are again when it is over."""
    with MiddleLab() as lab:
        nodes = pair_of_nodes(lab, shards=1)
        for place, node in enumerate(nodes, 1):
            node.config["peers"][0]["addresses"] = [f"/ip4/10.{3 - place}.0.1/tcp/{P2P_PORT}"]
            node.start()
        wait_connected(nodes)
        one, other = nodes
        with (
            SteadyFlow(one.namespace, other.namespace, other.virtual_ip),
            SteadyFlow(other.namespace, one.namespace, one.virtual_ip),
        ):
            for _ in range(2):
                lab.silence()
                time.sleep(SILENT_S)
                lab.widen()
                over_s = time.monotonic()
                wait_until(
                    lambda: all(connected(node) and segments(node) > LARGE for node in nodes),
                    10.0,
                    "segments are large",
                )
                print(f"large {time.monotonic() - over_s:.1f} s after {SILENT_S:g} s of silence")
        for node in nodes:
            assert "large TCP segments do not reach" not in node.log_file.read_text()
        check_logs(nodes)
        for node in nodes:
            assert node.stop() == 0
