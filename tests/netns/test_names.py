"""Names of members, asked for as any program would: at a node's own virtual address, and at another's."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator

import pytest
from lab import Lab, Node, check_logs, wait_until
from lab.joining import machine, network_of

pytestmark = pytest.mark.root

DNS = {"dns": {"enabled": True}}
SETTLE_S = 10.0

#: Asks (server, transport, name, type) one after the other; prints the code and the sorted data of the records of each.
ASK = """
import sys, json, dns.message, dns.query, dns.rcode
for server, transport, name, rdtype in json.loads(sys.argv[1]):
    query = dns.message.make_query(name, rdtype)
    try:
        answer = {"udp": dns.query.udp, "tcp": dns.query.tcp}[transport](query, server, timeout=2)
    except Exception as error:
        print(json.dumps([type(error).__name__, []]))
    else:
        found = [str(record) for rrset in answer.answer for record in rrset]
        print(json.dumps([dns.rcode.to_text(answer.rcode()), sorted(found)]))
"""

Question = tuple[str, str, str, str]


def ask_all(node: Node, questions: list[Question]) -> list[tuple[str, list[str]]]:
    """What a program on the node's machine is told."""
    done = node.lab.run(node.namespace, sys.executable, "-c", ASK, json.dumps(questions))
    return [(code, found) for code, found in map(json.loads, done.stdout.splitlines())]


def ask(
    node: Node, server: str, name: str, rdtype: str = "A", transport: str = "udp"
) -> tuple[str, list[str]]:
    """One question."""
    return ask_all(node, [(server, transport, name, rdtype)])[0]


def addresses(node: Node) -> list[str]:
    """IPv4 first."""
    return list(node.ask()["node"]["addresses"])


@pytest.fixture(scope="module")
def members() -> Iterator[tuple[Node, Node]]:
    with Lab(2) as lab:
        a, b = network_of(lab, DNS)
        wait_until(lambda: ask(a, addresses(a)[0], "b.home.vpn")[1], SETTLE_S, "a answers for b")
        yield a, b
        check_logs([a, b])


def test_a_name_has_the_members_addresses_wherever_it_is_asked_for(members: tuple[Node, Node]) -> None:
    a, b = members
    expected: dict[Question, tuple[str, list[str]]] = {}
    for asked, owner in itertools.product((a, b), repeat=2):
        v4, v6 = addresses(owner)
        for server, transport in itertools.product(addresses(asked), ("udp", "tcp")):
            name = f"{owner.namespace.label}.home.vpn"
            expected[server, transport, name, "A"] = ("NOERROR", [v4])
            expected[server, transport, name, "AAAA"] = ("NOERROR", [v6])
    for asking in (a, b):
        answers = ask_all(asking, list(expected))
        assert dict(zip(expected, answers, strict=True)) == expected


def test_an_address_has_the_members_name(members: tuple[Node, Node]) -> None:
    a, b = members
    for text in addresses(b):
        reverse = ipaddress.ip_address(text).reverse_pointer
        assert ask(a, addresses(a)[0], reverse, "PTR") == ("NOERROR", ["b.home.vpn."])


def test_who_is_nobody_does_not_exist_and_other_zones_are_refused(members: tuple[Node, Node]) -> None:
    a, _ = members
    server = addresses(a)[0]
    assert ask(a, server, "nobody.home.vpn") == ("NXDOMAIN", [])
    assert ask(a, server, "b.home.vpn", "MX") == ("NOERROR", [])
    assert ask(a, server, "example.org") == ("REFUSED", [])


def test_nobody_outside_the_vpn_is_answered(members: tuple[Node, Node]) -> None:
    a, b = members
    code, found = ask(b, a.namespace.address, "a.home.vpn")
    assert not found
    assert code not in ("NOERROR", "NXDOMAIN")


def test_the_machines_resolver_is_left_alone_and_the_user_is_told(members: tuple[Node, Node]) -> None:
    a, _ = members
    warnings = a.ask()["node"]["warnings"]
    assert any("home.vpn" in line and "dig" in line for line in warnings)


def test_names_are_answered_again_when_control_has_been_killed(members: tuple[Node, Node]) -> None:
    a, _ = members
    server = addresses(a)[0]
    os.kill(a.ask()["control"]["pid"], signal.SIGKILL)
    wait_until(
        lambda: ask(a, server, "b.home.vpn")[0] == "NOERROR" and ask(a, server, "b.home.vpn", "A", "tcp")[1],
        SETTLE_S,
        "the next control answers",
    )


def test_a_port_that_is_taken_is_a_warning_and_no_failed_start() -> None:
    with Lab(2) as lab:
        # another DNS server that listens everywhere
        taken = "import socket,time; s=socket.socket(); s.bind(('',53)); s.listen(); time.sleep(60)"
        lab.spawn(lab.nodes[0], sys.executable, "-c", taken)
        wait_until(
            lambda: ":53 " in lab.run(lab.nodes[0], "ss", "-Hltn").stdout, SETTLE_S, "the port is taken"
        )
        a = machine(lab, 0, DNS)
        a.start()
        a.wait_ready()
        warnings = a.ask()["node"]["warnings"]
        assert any("port 53" in line and "in use" in line for line in warnings), warnings
        assert a.stop() == 0
