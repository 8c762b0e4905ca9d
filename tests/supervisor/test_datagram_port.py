"""The UDP port of a node: one port, of which each shard has the datagrams that name it."""

from __future__ import annotations

import os
import pwd
import select
import socket
import sys
from collections.abc import Iterator

import pytest

from shards.session.udp import with_ecn
from supervisor.datagrams import BY_FIRST_BYTE, SO_ATTACH_REUSEPORT_CBPF, DatagramPort
from vpnd.api import messages
from vpnd.config.live import Live
from vpnd.config.schema import P2P, Carrier, Config, Process

pytestmark = pytest.mark.root

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Shards:
    """Who is given the sockets: duplicates of them, and the port, by index."""

    def __init__(self, port: DatagramPort, count: int) -> None:
        self.sockets: dict[int, socket.socket] = {}
        self.port = 0
        for index in range(count):
            port.give(index, self._take)

    def _take(self, message: messages.Message, descriptors: tuple[int, ...]) -> None:
        assert isinstance(message, messages.DatagramSocket)
        self.port = message.port
        self.sockets[message.number] = socket.socket(fileno=os.dup(descriptors[0]))


def port(listen: tuple[str, ...] = (LOOPBACK,), **carrier: object) -> DatagramPort:
    settings = {"choice": "auto"} | carrier
    config = Config(
        p2p=P2P(listen=listen),
        carrier=Carrier(**settings),
        process=Process(user="nobody"),  # type: ignore[arg-type]
    )
    return DatagramPort(Live(config))


@pytest.fixture
def opened() -> Iterator[DatagramPort]:
    each = port()
    assert each.open() and not each.open()
    yield each
    each.close()


def arrives(shards: Shards, first: int, host: str = "127.0.0.1") -> list[int]:
    """Which sockets a datagram with this first byte comes out of."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes((first, 1, 2, 3)), (host, shards.port))
    found = []
    for index, each in shards.sockets.items():
        try:
            each.recv(100)
            found.append(index)
        except BlockingIOError:
            pass
    return found


def test_the_first_byte_says_which_shard(opened: DatagramPort) -> None:
    shards = Shards(opened, 3)
    assert len({each.getsockname() for each in shards.sockets.values()}) == 1
    for index in (0, 1, 2, 1):
        assert arrives(shards, index) == [index]
    assert len(arrives(shards, 200)) == 1, "what names nobody goes to anybody, who counts it"
    later = Shards(opened, 5)
    assert arrives(later, 4) == [4], "a shard more"


def test_who_is_given_a_socket_cannot_change_the_choice_for_others(opened: DatagramPort) -> None:
    shards = Shards(opened, 2)
    for each in shards.sockets.values():
        with pytest.raises(PermissionError):
            each.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, BY_FIRST_BYTE)
    uid = pwd.getpwnam("nobody").pw_uid
    assert [os.fstat(each.fileno()).st_uid for each in shards.sockets.values()] == [uid, uid]


@pytest.mark.setting("carrier.receive_buffer")
def test_the_receive_buffer_is_what_the_setting_says_whatever_the_system_allows() -> None:
    each = port(receive_buffer=9_000_000)
    assert each.open()
    (sock,) = Shards(each, 1).sockets.values()
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 9_000_000
    each.close()


def test_both_families_where_both_are_listened_on() -> None:
    each = port(("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"))
    assert each.open()
    shards = Shards(each, 2)
    assert arrives(shards, 1) == [1] and arrives(shards, 0, "::1") == [0]
    each.close()


def test_streams_alone_need_no_port_and_one_that_is_taken_is_none() -> None:
    each = port(choice="streams")
    assert not each.open()
    assert not Shards(each, 1).sockets
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        each = port((f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}",))
        assert not each.open() and not Shards(each, 1).sockets


@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", "::1"])
def test_marks_of_congestion_go_and_come_with_datagrams_of_both_versions(host: str) -> None:
    ports = [port(("/ip6/::/tcp/0",)) for _ in range(2)]
    try:
        assert all(each.open() for each in ports)
        here, there = (Shards(each, 1) for each in ports)
        address = (host, there.port, 0, 0)
        with here.sockets[0] as sender, there.sockets[0] as receiver:
            for bits in range(4):
                sender.sendmsg((b"\0abc",), (with_ecn(address, bits),), 0, address)
                assert select.select([receiver], [], [], 5)[0]
                _, ((_, _, data),), _, _ = receiver.recvmsg(100, 100)
                assert int.from_bytes(data, sys.byteorder) & 3 == bits
    finally:
        for each in ports:
            each.close()
