"""The name service of control: follows the members, and the sockets it is given."""

from __future__ import annotations

import os
import socket

import dns.message
import dns.query
import dns.rcode
import pytest
import trio

from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Dns
from vpnd.control.dns_service import NameService
from vpnd.discovery.registry import Member
from vpnd.errors import ProtocolViolation

OWN = OwnAddresses(
    network="home", label="me", addresses=("10.86.0.1", "fd86::1"), subnets=("10.86.0.0/16", "fd86::/64")
)
B = Member(peer_id="id-b", name="b", prefixes=("10.86.0.2/32", "10.9.0.0/24"), addresses=())


class Service(NameService):
    def __init__(self) -> None:
        self.others: list[Member] = [B]
        self.reads = 0
        super().__init__("id-me", self.read, Dns(), lambda name: None)

    def read(self) -> list[Member]:
        self.reads += 1
        return self.others

    def ask(self, name: str, rdtype: str = "A") -> tuple[str, list[str]]:
        wire = self.answer_untrusted(dns.message.make_query(name, rdtype).to_wire(), tcp=False)
        assert wire is not None
        answer = dns.message.from_wire(wire)
        return dns.rcode.to_text(answer.rcode()), [str(each) for rrset in answer.answer for each in rrset]


def service() -> Service:
    made = Service()
    made.own_changed(OWN)
    return made


def test_members_and_this_node_have_names() -> None:
    names = service()
    assert names.ask("b.home.vpn") == ("NOERROR", ["10.86.0.2"])
    assert names.ask("me.home.vpn", "AAAA") == ("NOERROR", ["fd86::1"])
    assert names.ask("1.0.86.10.in-addr.arpa", "PTR") == ("NOERROR", ["me.home.vpn."])
    assert names.ask("c.home.vpn") == ("NXDOMAIN", [])


def test_before_it_is_known_what_this_node_is_nothing_is_answered() -> None:
    names = Service()
    assert names.answer_untrusted(dns.message.make_query("b.home.vpn", "A").to_wire(), tcp=False) is None


def test_who_comes_is_answered_and_who_goes_is_not() -> None:
    names = service()
    assert names.ask("c.home.vpn") == ("NXDOMAIN", [])
    names.others = [Member(peer_id="id-c", name="c", prefixes=("10.86.0.3/32",), addresses=())]
    names.changed()
    assert names.ask("c.home.vpn") == ("NOERROR", ["10.86.0.3"])
    assert names.ask("b.home.vpn") == ("NXDOMAIN", [])


def test_many_changes_cost_one_table() -> None:
    names = service()
    names.ask("b.home.vpn")
    for _ in range(100):
        names.changed()
    for _ in range(10):
        names.ask("b.home.vpn")
    assert names.reads == 2


def test_this_node_may_become_another() -> None:
    names = service()
    names.own_changed(
        OwnAddresses(network="work", label="you", addresses=("10.87.0.1",), subnets=("10.87.0.0/16",))
    )
    assert names.ask("you.work.vpn") == ("NOERROR", ["10.87.0.1"])
    assert names.ask("me.home.vpn")[0] == "REFUSED"


def pair() -> tuple[int, list[int]]:
    """A UDP port of loopback and the descriptors of the sockets on it, UDP and TCP."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    return udp.getsockname()[1], [udp.detach(), tcp.detach()]


async def over_udp(port: int) -> str:
    query = dns.message.make_query("b.home.vpn", "A")
    answer = await trio.to_thread.run_sync(lambda: dns.query.udp(query, "127.0.0.1", port=port, timeout=5))
    return str(answer.answer[0][0])


def test_it_answers_on_the_sockets_given_last() -> None:
    async def main() -> None:
        names = service()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(names.run)
            first, descriptors = pair()
            names.sockets(1, descriptors)
            assert descriptors == []
            assert await over_udp(first) == "10.86.0.2"
            held = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                later, descriptors = pair()
                names.sockets(1, descriptors)
                assert await over_udp(later) == "10.86.0.2"
            assert len(os.listdir("/proc/self/fd")) <= held, "those before are closed"
            names.sockets(0, [])
            await trio.sleep(0.05)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind(("127.0.0.1", later))  # free
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_another_number_of_sockets_than_announced_breaks_the_rules() -> None:
    with pytest.raises(ProtocolViolation):
        service().sockets(1, [])
