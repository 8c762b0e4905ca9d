"""What a node says of itself: the documented fields, books that add up, every drop under its reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from lab import (
    Lab,
    Node,
    inside,
    mesh_of_nodes,
    ping,
    running_nodes,
    settled,
    socket_in,
    tcp_transfer,
    udp_flow,
    wait_until,
)

from vpnd.metrics import GAUGES
from vpnd.status import Status

pytestmark = pytest.mark.root

METRICS_PORT = 9586
UDP_SEGMENT = 103  # Linux include/uapi/linux/udp.h
MAX_AGE_S = 0.05


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Node, Node]]:
    def change(nodes: list[Node]) -> None:
        nodes[0].config["metrics"] = {"listen": f"127.0.0.1:{METRICS_PORT}", "max_age": f"{MAX_AGE_S}s"}

    with running_nodes(change=change) as (a, b):
        yield a, b


def test_the_status_has_every_field_and_comes_back_as_it_was(pair: tuple[Node, Node]) -> None:
    a, b = pair
    assert ping(a.lab, a.namespace, b.virtual_ip, count=3).loss == 0
    told = a.status()
    status = msgspec.convert(told, Status, strict=True)
    assert json.loads(msgspec.json.encode(status)) == told, "every field, and no other"
    assert (status.health, status.ailments) == ("healthy", ())
    assert [shard.index for shard in status.shards] == [0, 1]
    for shard in status.shards:
        assert shard.answers and shard.pid != status.supervisor.pid
    (peer,) = status.peers
    assert (peer.name, peer.state, peer.virtual_ip) == ("b", "connected", b.virtual_ip)
    assert peer.sessions >= 2 and peer.rtt_ms is not None and 0 < peer.rtt_ms < 1000
    assert status.node.peer_id == b.config["peers"][0]["peer_id"]
    assert a.vpnd("status").stdout.startswith(f"{status.node.name}: healthy, 1 of 1 peer connected\n")
    wait_until(lambda: all(shard["rss_bytes"] > 1 << 20 for shard in a.ask()["shards"]), 10, "samples")


def test_the_books_of_both_add_up_after_traffic(pair: tuple[Node, Node]) -> None:
    a, b = pair
    before = settled(a), settled(b)
    tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 8 << 20)
    tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 8 << 20, reverse=True)
    udp_flow(a.namespace, b.namespace, b.virtual_ip, count=1000)
    after = settled(a), settled(b)
    assert after[0]["tun"]["bytes_read"] - before[0]["tun"]["bytes_read"] > 9 << 20
    for one, other in ((0, 1), (1, 0)):
        sent = after[one]["books"]["out"]["sent"] - before[one]["books"]["out"]["sent"]
        received = after[other]["books"]["in"]["received"] - before[other]["books"]["in"]["received"]
        assert sent == received > 0
    assert after[0]["peers"][0]["bytes_sent"] == after[1]["peers"][0]["bytes_received"]
    # 8 MiB in segments of at most the MTU, where superpackets are records
    least = (8 << 20) / after[0]["tun"]["mtu"]
    for one, other in ((0, 1), (1, 0)):
        sent = after[one]["books"]["out"]["sent_packets"] - before[one]["books"]["out"]["sent_packets"]
        received = (
            after[other]["books"]["in"]["received_packets"] - before[other]["books"]["in"]["received_packets"]
        )
        assert sent == received > least
        assert after[one]["peers"][0]["segments_sent"] == after[one]["books"]["out"]["sent_packets"]


@pytest.mark.parametrize("choice", ["streams", "datagrams"])
def test_what_is_sent_as_one_superpacket_counts_as_the_packets_that_it_is(choice: str) -> None:
    """Over a stream and in datagrams; cut by the sender, by the receiver, or not at all."""
    with running_nodes(shards=1, settings={"carrier": {"choice": choice}}) as (a, b):
        before = settled(a)["peers"][0], settled(b)["peers"][0]
        with (
            socket_in(a.namespace, b.virtual_ip, socket.SOCK_DGRAM) as sock,
            socket_in(b.namespace, b.virtual_ip, socket.SOCK_DGRAM) as inbox,
        ):
            inbox.bind((b.virtual_ip, 5000))
            inbox.settimeout(5.0)
            sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
            for _ in range(3):
                sock.sendto(bytes(20_000), (b.virtual_ip, 5000))
            for _ in range(60):
                assert len(inbox.recv(2000)) == 1000
        after = settled(a)["peers"][0], settled(b)["peers"][0]
        sent = after[0]["segments_sent"] - before[0]["segments_sent"]
        received = after[1]["segments_received"] - before[1]["segments_received"]
        assert sent == received == 60
        records = after[0]["packets_sent"] - before[0]["packets_sent"]
        assert records == (3 if "USO4" in settled(a)["tun"]["offloads"] else 60)


def dropped(node: Node, reason: str) -> int:
    count: int = settled(node)["dropped"][reason]
    return count


def send_datagrams(node: Node, ip: str, source: str = "") -> None:
    with socket_in(node.namespace, ip, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if source:
            sock.bind((source, 0))
        for port in range(5000, 5005):
            sock.sendto(b"five of them", (ip, port))


def test_what_nobody_owns_has_no_route(pair: tuple[Node, Node]) -> None:
    before = dropped(pair[0], "no_route")
    send_datagrams(pair[0], "10.86.77.77")
    wait_until(lambda: dropped(pair[0], "no_route") - before == 5, 5, "five packets without a route")


def test_a_superpacket_that_is_dropped_counts_as_the_packets_that_it_is(pair: tuple[Node, Node]) -> None:
    """Datagrams sent as one superpacket to an address of nobody: one record, and as many packets as datagrams."""
    a, _ = pair
    before = settled(a)
    with socket_in(a.namespace, "10.86.77.77", socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sock.sendto(bytes(20_000), ("10.86.77.77", 5000))

    def told() -> bool:
        after = settled(a)
        packets, records = (
            after[which]["no_route"] - before[which]["no_route"] for which in ("dropped_packets", "dropped")
        )
        if "USO4" not in after["tun"]["offloads"]:
            return packets == records == 20
        return (packets, records) == (20, 1)

    wait_until(told, 5, "twenty packets without a route")


def test_multicast_and_broadcast_are_not_carried(pair: tuple[Node, Node]) -> None:
    before = dropped(pair[0], "not_unicast")
    pair[0].lab.ip(pair[0].namespace, "route", "add", "239.1.2.3/32", "dev", "vpnd0")
    send_datagrams(pair[0], "239.1.2.3")
    wait_until(
        lambda: dropped(pair[0], "not_unicast") - before >= 5, 5, "five packets to nobody in particular"
    )


def test_a_peer_may_not_use_an_address_of_somebody_else(pair: tuple[Node, Node]) -> None:
    a, b = pair
    before = dropped(a, "source_not_allowed")
    b.lab.ip(b.namespace, "addr", "add", "10.86.0.99/32", "dev", "vpnd0")
    send_datagrams(b, a.virtual_ip, source="10.86.0.99")
    wait_until(lambda: dropped(a, "source_not_allowed") - before == 5, 5, "five packets with a false sender")


def test_what_is_not_for_us_is_not_let_in(pair: tuple[Node, Node]) -> None:
    """B believes that another address is A's: its own packets to it arrive at A, which does not own it."""

    def misled(nodes: list[Node]) -> None:
        nodes[1].config["peers"][0]["virtual_ip"] = "10.86.5.5"

    with running_nodes(change=misled) as (a, b):
        send_datagrams(b, "10.86.5.5")
        wait_until(lambda: dropped(a, "destination_not_ours") == 5, 5, "five packets for somebody else")


def test_what_the_queue_of_the_device_drops_is_in_the_books(pair: tuple[Node, Node]) -> None:
    """More packets than the queue takes while nobody reads it: what the kernel dropped is told, and adds up."""
    a, b = pair
    before = settled(a)
    supervisor = before["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        with socket_in(a.namespace, b.virtual_ip, socket.SOCK_DGRAM) as sock:
            for _ in range(3000):
                sock.sendto(bytes(100), (b.virtual_ip, 9))
    finally:
        os.kill(supervisor, signal.SIGCONT)
    after = settled(a)
    link = json.loads(a.lab.ip(a.namespace, "-s", "-j", "link", "show", "dev", "vpnd0"))[0]["stats64"]["tx"]
    assert after["dropped"]["tun_queue_full"] == link["dropped"] > before["dropped"]["tun_queue_full"] + 1000
    read = after["tun"]["reads"] - before["tun"]["reads"]
    assert read + after["dropped"]["tun_queue_full"] - before["dropped"]["tun_queue_full"] >= 3000
    assert after["tun"]["reads"] == link["packets"]


def test_what_is_no_ip_packet_is_malformed(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    before = dropped(a, "malformed_local")
    # An IPv4 header that says it is 60 bytes long, in a packet of 24.
    packet = struct.pack(">BBHHHBBH4s4s4x", 0x4F, 0, 24, 0, 0, 64, 17, 0, bytes(4), bytes([10, 86, 0, 2]))
    with a_raw_device(a) as device:
        device.send(packet)
    wait_until(lambda: dropped(a, "malformed_local") - before == 1, 5, "a packet that lies about itself")


def a_raw_device(node: Node) -> socket.socket:
    """Packets as they are onto the TUN device, around the kernel's checks."""
    with inside(node.namespace):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
        sock.bind(("vpnd0", 0x0800))
    return sock


def test_a_stranger_is_refused_and_counted() -> None:
    with Lab(3) as lab:
        nodes = mesh_of_nodes(lab, shards=1)
        nodes[0].config["peers"] = [peer for peer in nodes[0].config["peers"] if peer["name"] != "c"]
        for node in nodes:
            node.start()
        a, _, c = nodes
        for node in nodes:
            node.wait_ready()

        def refused() -> int:
            count: int = a.ask()["control"]["counters"]["refused_unknown_peer"]
            return count

        wait_until(lambda: refused() > 1, 10, "a stranger is refused")
        assert ping(lab, c.namespace, a.virtual_ip, count=2).loss == 1
        (report,) = [peer for peer in c.ask()["peers"] if peer["name"] == "a"]
        assert report["state"] != "connected" and "list this one" in report["last_error"]


def get(node: Node, path: str) -> tuple[int, str]:
    """Status and body of an answer of the Prometheus endpoint. Raises OSError: nobody was there to answer."""
    with socket_in(node.namespace, "127.0.0.1", socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(("127.0.0.1", METRICS_PORT))
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    if not answer:
        raise ConnectionError("closed without an answer")
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def scrape(node: Node) -> dict[str, float]:
    """The samples of the Prometheus endpoint."""
    code, body = get(node, "/metrics")
    assert code == 200
    rows = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", body, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def exporter(node: Node) -> psutil.Process:
    """The process that answers HTTP."""
    children = psutil.Process(node.ask()["supervisor"]["pid"]).children()
    (found,) = [child for child in children if "vpnd.exporter" in child.cmdline()]
    return found


def test_http_is_answered_by_a_process_without_rights_that_comes_back(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    process = exporter(a)
    assert 0 not in process.uids() and 0 not in process.gids()
    said = Path(f"/proc/{process.pid}/status").read_text()
    capabilities = re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\s(\w+)$", said, re.MULTILINE)
    assert len(capabilities) == 5 and not any(int(each, 16) for each in capabilities)
    process.kill()

    def back() -> bool:
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            return exporter(a).pid != process.pid and get(a, "/healthz")[0] == 200
        return False

    wait_until(back, 15, "another exporter")
    assert a.status()["health"] == "healthy"


def test_each_path_says_its_own_and_others_are_404(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    assert get(a, "/healthz") == (200, "ok\n")
    assert get(a, "/readyz") == (200, "healthy\n")
    for path in ("/", "/metric", "/metrics/", "/../etc/passwd"):
        assert get(a, path)[0] == 404


def test_readyz_is_the_health_of_status(pair: tuple[Node, Node]) -> None:
    a, _ = pair
    shard = a.ask()["shards"][1]
    os.kill(shard["pid"], signal.SIGSTOP)
    try:
        wait_until(lambda: get(a, "/readyz")[0] == 503, 20, "a shard that hangs makes the node ill")
        done = a.vpnd("status", check=False)
        assert done.returncode == 9 and "shard" in done.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(shard["pid"], signal.SIGCONT)
    wait_until(lambda: get(a, "/readyz") == (200, "healthy\n"), 20, "it works again")


def test_prometheus_is_told_the_same_as_status(pair: tuple[Node, Node]) -> None:
    a, b = pair
    assert ping(a.lab, a.namespace, b.virtual_ip, count=3).loss == 0

    def agree() -> bool:
        before = settled(a)
        time.sleep(MAX_AGE_S)  # what an earlier scrape was answered with
        samples, after = scrape(a), settled(a)
        if before["tun"] != after["tun"]:
            return False
        for name in ("packets_read", "packets_written", "bytes_read", "bytes_written"):
            assert samples[f"vpnd_tun_{name}_total"] == after["tun"][name]
        for reason, count in after["dropped_packets"].items():
            assert samples[f'vpnd_dropped_packets_total{{reason="{reason}"}}'] == count
        for shard in after["shards"]:
            for name in ("packets_sent", "packets_received", "bytes_to_tun"):
                assert samples[f'vpnd_shard_{name}_total{{shard="{shard["index"]}"}}'] == shard[name]
            assert samples[f'vpnd_shard_sessions{{shard="{shard["index"]}"}}'] == shard["sessions"]
        for name, count in after["control"]["counters"].items():
            kind = "" if name in GAUGES else "_total"
            assert samples[f"vpnd_control_{name}{kind}"] == count
        assert samples["vpnd_ready"] == samples["vpnd_healthy"] == samples["vpnd_peers_connected"] == 1
        (peer,) = after["peers"]
        labels = f'{{peer="b",peer_id="{peer["peer_id"]}"}}'
        assert samples[f"vpnd_peer_sent_bytes_total{labels}"] == peer["bytes_sent"]
        return True

    wait_until(agree, 10, "a moment without packets")


def test_a_question_that_is_none_is_answered_with_an_error(pair: tuple[Node, Node]) -> None:
    for question in (
        b"\n",
        b"{}\n",
        b"[1]\n",
        b"status\n",
        json.dumps({"command": "dance"}).encode() + b"\n",
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(pair[0].state_dir / "vpnd.sock"))
            sock.sendall(question)
            assert "error" in json.loads(b"".join(iter(lambda: sock.recv(65536), b"")))
