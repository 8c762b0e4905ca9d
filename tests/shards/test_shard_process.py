"""Two real shard processes, back to back over loopback TCP; the test is supervisor and control of both."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from vpnd import seccomp
from vpnd.api import channel, ends, messages, parts
from vpnd.config.schema import Config, Metrics, Process, Registry, Session, Worker
from vpnd.metrics import SHARD_COUNTERS, create_page
from vpnd.packet import ring
from vpnd.packet.record import LENGTH, PACKET_OFFSET, VNET_BYTES
from vpnd.session import Established

USER = "nobody" if os.geteuid() == 0 else ""
TIMEOUT_S = 10


def packet(source: str, destination: str, payload: bytes, port: int = 9000) -> bytes:
    """A UDP datagram, checksum unused."""
    udp = struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, 17, 0,
        ipaddress.ip_address(source).packed, ipaddress.ip_address(destination).packed,
    )  # fmt: skip
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + struct.pack(">H", checksum) + header[12:] + udp


class ShardHarness:
    """One shard process with its rings, its counter page and both channels."""

    cipher = "chachapoly"

    def __init__(self, address: str, config: Config) -> None:
        self.to_shard = ring.Descriptors.create(config.worker.ring_bytes, "to")
        self.producer = ring.Producer(self.to_shard)
        tun, self.kernel = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_DGRAM
        )  # keeps packets apart, as a TUN
        self.kernel.settimeout(TIMEOUT_S)
        self.page, page_fd = create_page(SHARD_COUNTERS, "counters")
        ours, theirs = ends.pair()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shards", str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self.supervisor = channel.Channel(ours, "supervisor", "shard")
        descriptors = (*self.to_shard.all(), page_fd, tun.fileno())
        self.supervisor.send(
            messages.ShardStart(config=config, index=0, own=(f"{address}/32",), tun_offloads=0x7F & ~8),
            descriptors,
        )
        os.close(page_fd)
        tun.close()
        assert isinstance(self.hear(self.supervisor), messages.Ready)
        ours, theirs = ends.pair()
        self.supervisor.send(messages.ControlArrived(), (theirs.fileno(),))
        theirs.close()
        self.control = channel.Channel(ours, "control", "shard")
        assert self.hear(self.control) == messages.SessionsHeld(sessions=())
        self.control.send(messages.PeersComplete())

    def hear(self, which: channel.Channel) -> messages.Message:
        deadline = time.monotonic() + TIMEOUT_S
        while (received := which.receive()) is None:
            assert time.monotonic() < deadline, "nothing was heard"
            select.select([which.fileno()], [], [], 0.2)
        return received[0]

    def know(self, peer_id: str, address: str) -> None:
        self.control.send(messages.PeerKnown(peer_id=peer_id, name=peer_id, prefixes=(f"{address}/32",)))

    def give_session(
        self,
        sock: socket.socket,
        peer_id: str,
        initiator: bool,
        keys: tuple[bytes, bytes],
        session_id: int = 1,
    ) -> None:
        session = Established(
            peer_id=peer_id, initiator=initiator, cipher=self.cipher, send_key=keys[0], send_nonce=2,
            receive_key=keys[1], receive_nonce=2, leftover=b"",
        )  # fmt: skip
        self.control.send(messages.SessionHandover(session_id=session_id, session=session), (sock.fileno(),))
        sock.close()

    def send(self, *packets: bytes) -> None:
        for each in packets:
            size = PACKET_OFFSET + len(each)
            while (offset := self.producer.reserve(size)) < 0:
                self.producer.publish()
                time.sleep(0.001)
            LENGTH.pack_into(self.producer.buffer, offset, VNET_BYTES + len(each))
            self.producer.buffer[offset + 4 : offset + size] = bytes(VNET_BYTES) + each
            self.producer.commit(size)
        self.producer.publish()

    def receive(self, count: int) -> list[bytes]:
        """So many packets that the shard wrote into its TUN."""
        return [self.kernel.recv(70_000)[VNET_BYTES:] for _ in range(count)]

    def status(self) -> messages.ShardStatus:
        self.supervisor.send(messages.StatusRequest(serial=1))
        said: list[messages.ShardStatus] = []
        while not said or said[-1].more:
            status = self.hear(self.supervisor)
            assert isinstance(status, messages.ShardStatus)
            said.append(status)
        return parts.joined(said)

    def counts(self) -> dict[str, int]:
        self.sessions = self.status().sessions
        return self.page.read()

    def probe(self, destination: str) -> messages.ProbeAnswer:
        self.supervisor.send(messages.ProbeRequest(serial=7, destination=destination))
        answer = self.hear(self.supervisor)
        assert isinstance(answer, messages.ProbeAnswer) and answer.serial == 7
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for each in (self.supervisor, self.control, self.producer, self.kernel, self.page):
            each.close()
        self.to_shard.close()


def joined() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return one, other


CONFIG = Config(
    worker=Worker(ring_bytes=1 << 20, pending_timeout=0.3, idle_timeout=0.3, cleanup_interval=0.1),
    process=Process(user=USER),
)
A, B = "10.86.0.1", "10.86.0.2"


@contextlib.contextmanager
def two_shards(config: Config = CONFIG) -> Iterator[tuple[ShardHarness, ShardHarness]]:
    a = ShardHarness(A, config)
    try:
        b = ShardHarness(B, config)
        try:
            a.know("b", B)
            b.know("a", A)
            yield a, b
        finally:
            b.close()
    finally:
        a.close()


def join(
    a: ShardHarness, b: ShardHarness, sockets: Callable[[], tuple[socket.socket, socket.socket]] = joined
) -> None:
    one, other = sockets()
    keys = os.urandom(32), os.urandom(32)
    a.give_session(one, "b", True, keys)
    b.give_session(other, "a", False, keys[::-1])
    assert a.hear(a.control) == messages.SessionUp(session_id=1, peer_id="b")
    assert b.hear(b.control) == messages.SessionUp(session_id=1, peer_id="a")


@pytest.mark.parametrize("cipher", ["chachapoly", "aesgcm"])
def test_packets_cross_in_order_and_the_books_balance(cipher: str):
    with two_shards() as (a, b):
        a.cipher = b.cipher = cipher
        join(a, b)
        sent = [packet(A, B, bytes([i & 255]) * (i % 1300 + 1)) for i in range(3000)]
        received: list[bytes] = []
        for i in range(0, len(sent), 500):
            a.send(*sent[i : i + 500])
            received += b.receive(500)
        assert received == sent
        b.send(packet(B, A, b"back"))
        assert a.receive(1) == [packet(B, A, b"back")]
        counts = a.counts()
        assert counts["packets_from_tun"] == counts["packets_sent"] == 3000
        assert b.counts()["packets_to_tun"] == b.counts()["packets_received"] == 3000
        assert counts["bytes_sent"] == sum(map(len, sent)) == b.counts()["bytes_received"]
        assert counts["flows"] == 1 and counts["streams"] == 1 and counts["sessions"] == 1
        assert a.sessions[0].rtt_ms and a.sessions[0].state == "up"


def test_packets_wait_for_a_session_and_one_is_asked_for():
    with two_shards() as (a, b):
        early = [packet(A, B, bytes([i])) for i in range(5)]
        a.send(*early)
        assert a.hear(a.control) == messages.SessionWanted(peer_id="b")
        join(a, b)
        assert b.receive(5) == early


def test_packets_do_not_wait_for_ever():
    with two_shards() as (a, _):
        a.send(packet(A, B, b"late"))
        assert a.counts()["packets_queued"] == 1
        time.sleep(0.5)
        counts = a.counts()
        assert counts["dropped_no_session"] == 1 and counts["packets_queued"] == 0


REFUSED = [
    ("a source that is not the peer's", packet("10.86.0.9", B, b"x"), "source_not_allowed"),
    ("a destination that is not ours", packet(A, "10.86.0.9", b"x"), "destination_not_ours"),
    ("an IP length beyond the packet", packet(A, B, b"x" * 50)[:-3], "malformed_remote"),
]


@pytest.mark.parametrize("sentence,bad,reason", REFUSED, ids=[row[0] for row in REFUSED])
def test_a_bad_packet_among_good_ones_is_dropped_alone(sentence, bad, reason):
    with two_shards() as (a, b):
        a.know("c", "10.86.0.9")  # so that a sends it; b must refuse it
        a.control.send(messages.PeerKnown(peer_id="b", name="b", prefixes=(f"{B}/32", "10.86.0.9/32")))
        join(a, b)
        a.send(packet(A, B, b"before"), bad, packet(A, B, b"after"))
        assert b.receive(2) == [packet(A, B, b"before"), packet(A, B, b"after")]
        assert b.counts()[f"dropped_{reason}"] == 1


def test_no_peer_owns_the_destination():
    with two_shards() as (a, _):
        a.send(packet(A, "10.86.7.7", b"x"))
        time.sleep(0.1)
        assert a.counts()["dropped_no_route"] == 1


def test_control_is_asked_who_owns_a_destination_that_nobody_has():
    registry = Registry(negative_lifetime=0.3)
    with two_shards(msgspec.structs.replace(CONFIG, registry=registry)) as (a, b):
        join(a, b)
        a.send(packet(A, "10.86.7.7", b"before"))
        a.control.send(messages.OwnersAsked(networks=("10.86.0.0/16",)))
        time.sleep(0.1)
        a.send(packet(A, "10.86.7.7", b"x"), packet(A, "10.86.7.7", b"x", port=9001))
        for _ in range(2):  # once, and once more when packets still want it later
            assert a.hear(a.control) == messages.OwnerWanted(address=0x0A560707)
            a.send(packet(A, "10.86.7.7", b"x"))
            assert not select.select([a.control.fileno()], [], [], 0.1)[0]
            time.sleep(0.3)
            a.send(packet(A, "10.86.7.7", b"x"))
        a.control.send(messages.PeerKnown(peer_id="b", name="b", prefixes=(f"{B}/32", "10.86.7.7/32")))
        time.sleep(0.1)
        a.send(packet(A, "10.86.7.7", b"found"))
        a.counts()
        assert a.counts()["packets_sent"] == 1 and b.counts()["dropped_destination_not_ours"] == 1


def test_idle_flows_are_forgotten():
    with two_shards() as (a, b):
        join(a, b)
        a.send(*(packet(A, B, b"x", port=port) for port in range(100)))
        assert len(b.receive(100)) == 100
        assert a.counts()["flows"] == 100
        deadline = time.monotonic() + TIMEOUT_S
        while (counts := a.counts())["flows"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert counts["flows"] == 0 and counts["flows_reaped"] == 100


@pytest.mark.parametrize("sockets", [joined, socket.socketpair], ids=["tcp", "unix"])
def test_a_slow_tun_holds_the_sender_back_and_loses_nothing(sockets):
    # Half a second of waiting, and so much of it, is what the fair queue is there to prevent; here it is wanted.
    patient = msgspec.structs.replace(CONFIG, session=Session(delay_target=10.0, queue_bytes=1 << 22))
    with two_shards(patient) as (a, b):
        join(a, b, sockets)
        payload = os.urandom(1300)
        sent = [packet(A, B, i.to_bytes(4, "big") + payload) for i in range(1500)]  # twice the ring
        a.send(*sent)
        time.sleep(0.5)
        assert b.receive(len(sent)) == sent


def test_a_session_goes_over_a_socket_that_is_not_tcp():
    """Its bytes may be carried on by somebody between: no TCP options, no reset, no addresses."""
    with two_shards() as (a, b):
        join(a, b, socket.socketpair)
        there = [packet(A, B, i.to_bytes(4, "big")) for i in range(100)]
        back = [packet(B, A, i.to_bytes(4, "big")) for i in range(100)]
        a.send(*there)
        b.send(*back)
        assert (b.receive(100), a.receive(100)) == (there, back)
        probed = a.probe(B).session
        assert probed is not None and probed.rtt_ms is not None and (probed.local, probed.remote) == ("", "")
        a.supervisor.send(
            messages.NetworkChanged(reason="test", addresses=("192.0.2.1",))
        )  # what has no address keeps it
        assert len(a.status().sessions) == 1
        b.control.send(messages.PeerForgotten(peer_id="a"))
        while isinstance(told := a.hear(a.control), messages.SessionWanted):
            pass
        assert isinstance(told, messages.SessionDown)


def test_a_closed_session_is_told_and_the_next_one_takes_over():
    with two_shards() as (a, b):
        join(a, b)
        b.process.kill()
        down = a.hear(a.control)
        assert isinstance(down, messages.SessionDown) and down.session_id == 1


def test_a_forgotten_peer_loses_its_session():
    with two_shards() as (a, b):
        join(a, b)
        b.control.send(messages.PeerForgotten(peer_id="a"))
        assert isinstance(b.hear(b.control), messages.SessionDown)
        told = a.hear(a.control)
        while isinstance(
            told, messages.SessionWanted
        ):  # the peer's word that it goes may be read before its end
            told = a.hear(a.control)
        assert isinstance(told, messages.SessionDown)


def test_garbage_on_the_socket_ends_the_session_only():
    with two_shards() as (a, b):
        one, other = joined()
        a.give_session(one, "b", True, (bytes(32), bytes(32)))
        other.sendall(struct.pack(">H", 498) + os.urandom(498))
        down = a.hear(a.control)
        assert isinstance(down, messages.SessionDown)
        assert a.counts()["session_errors"] == 1
        other.close()
        join(a, b)
        a.send(packet(A, B, b"still there"))
        assert b.receive(1) == [packet(A, B, b"still there")]


def test_a_shard_stops_when_asked_and_when_the_supervisor_is_gone():
    with two_shards() as (a, b):
        a.supervisor.send(messages.Stop())
        assert a.process.wait(TIMEOUT_S) == 0
        b.supervisor.close()
        assert b.process.wait(TIMEOUT_S) == 0


@pytest.mark.root
@pytest.mark.setting("process.seccomp")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_shard_has_no_rights_left(wanted):
    config = msgspec.structs.replace(CONFIG, process=Process(seccomp=wanted))
    with contextlib.closing(ShardHarness(A, config)) as a:
        with open(f"/proc/{a.process.pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        assert "0" not in status["Uid"].split()
        assert status["CapEff"] == status["CapPrm"] == status["CapBnd"] == "0" * 16
        assert status["NoNewPrivs"] == "1"
        assert seccomp.holds(a.process.pid) is wanted


@pytest.mark.setting("metrics.interval")
def test_what_changes_seldom_is_stored_that_often() -> None:
    config = msgspec.structs.replace(CONFIG, metrics=Metrics(interval=60.0))
    with contextlib.closing(ShardHarness(A, config)) as shard:
        shard.know("b", B)
        shard.send(packet(A, B, b"x"))
        deadline = time.monotonic() + TIMEOUT_S
        while not shard.page.read()["packets_from_tun"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(2 * Metrics().interval)  # it would have been stored by now
        assert shard.page.read()["flows_created"] == 0
        assert shard.counts()["flows_created"] == 1, "whoever asks gets all"
