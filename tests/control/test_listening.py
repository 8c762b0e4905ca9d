"""Addresses to listen on: all of them, alone, and announced as others can dial them."""

from __future__ import annotations

import ipaddress
import re
import sys
from pathlib import Path

import pytest
import trio
from control_harness import free_port
from control_nodes import Node, offered, running
from lab import Lab

from vpnd import interfaces
from vpnd.adapter import addresses, binding, host
from vpnd.adapter.addresses import parse_endpoint
from vpnd.errors import AlreadyRunningError, ConfigError, MachineError

Monkey = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("probe", "check"), [(True, True), (True, False), (False, True), (False, False)], ids=str
)
def test_a_second_daemon_on_the_port_is_refused(probe: bool, check: bool, monkeypatch: Monkey) -> None:
    async def main() -> None:
        address = f"/ip4/127.0.0.1/tcp/{free_port()}"
        first, second, everywhere = (
            Node(listen=address),
            Node(listen=address),
            Node(listen=address.replace("127.0.0.1", "0.0.0.0")),
        )
        async with running(first):
            if not probe:
                monkeypatch.setattr(binding, "probe", lambda endpoints: None)
            if not check:
                monkeypatch.setattr(binding, "check", lambda *arguments: None)
            for node in (second, everywhere):
                if probe or check:
                    with pytest.raises(AlreadyRunningError, match=r"in use"):
                        async with running(node):
                            pass
                else:
                    async with running(node):
                        assert node.port == first.port
            assert await offered(first, "/noise"), "the first one goes on"

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_an_address_that_cannot_be_bound_is_an_error(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(binding, "probe", lambda endpoints: None)
        monkeypatch.setattr(binding, "check", lambda *arguments: None)

    async def main() -> None:
        node = Node(listen="/ip4/192.0.2.1/tcp/0")
        if guarded:
            with pytest.raises(MachineError, match="no interface has the address"):
                async with running(node):
                    pass
            monkeypatch.setattr(binding, "probe", lambda endpoints: None)
            with pytest.raises(MachineError, match="could not be bound"):
                async with running(Node(listen="/ip4/192.0.2.1/tcp/0")):
                    pass
        else:
            async with running(node):
                assert node.host.listen_addresses() == ()

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_nobody_is_told_to_dial_a_wildcard(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(host.Host, "_announce", lambda node, candidates: list(candidates))

    async def main() -> None:
        node = Node(listen="/ip4/0.0.0.0/tcp/0")
        async with running(node):
            announced = [str(address) for address in node.host.libp2p.get_addrs()]
            assert any("/0.0.0.0/" in address for address in announced) != guarded

    trio.run(main)


#: A line of /proc/net/tcp up to the inode: slot, addresses, state, queues, timer, uid, timeout.
LINE = (
    "   0: {local} {remote} {state} 00000000:00000000 00:00000000 00000000 65534        0 {inode} 1 0 100 0"
)
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
V4 = (
    LINE.format(local="0100007F:0FA1", remote="00000000:0000", state="0A", inode=4242),
    LINE.format(local="0100007F:0FA1", remote="0100007F:B0C4", state="01", inode=4243),
)
V6 = (LINE.format(local="0" * 24 + "01000000:0FA1", remote="0" * 32 + ":0000", state="0A", inode=77),)


@pytest.mark.skipif(sys.byteorder != "little", reason="the samples are from a little-endian machine")
def test_the_kernels_table_is_read_as_the_kernel_writes_it(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text("\n".join((HEADER, *V4)))
    (tmp_path / "tcp6").write_text("\n".join((HEADER, *V6)))
    found = binding.listeners([tmp_path / "tcp", tmp_path / "tcp6", tmp_path / "missing"])
    assert [(listener.endpoint.multiaddr(), listener.inode) for listener in found] == [
        ("/ip4/127.0.0.1/tcp/4001", 4242),
        ("/ip6/::1/tcp/4001", 77),
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "collide"),
    [
        ("/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/1", True),
        ("/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.1/tcp/2", False),
        ("/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1", False),
        ("/ip4/10.0.0.1/tcp/1", "/ip4/0.0.0.0/tcp/1", True),
        ("/ip4/10.0.0.1/tcp/1", "/ip6/::/tcp/1", True),
        ("/ip4/0.0.0.0/tcp/1", "/ip6/::1/tcp/1", False),
    ],
)
def test_which_listeners_share_a_connection(ours: str, theirs: str, collide: bool) -> None:
    assert binding._collide(parse_endpoint(ours), parse_endpoint(theirs)) is collide
    assert binding._collide(parse_endpoint(theirs), parse_endpoint(ours)) is collide


def test_wildcards_become_the_addresses_of_the_machine_without_the_vpns_own(monkeypatch: Monkey) -> None:
    held = (
        "lo 127.0.0.1/8", "lo ::1/128", "eth0 192.0.2.7/24", "eth0 2001:db8::7/64", "eth0 fe80::7/64",
        "vpnd0 10.86.0.1/16", "vpnd1 10.87.0.1/16",
    )  # fmt: skip
    pairs = [entry.split() for entry in held]
    found = [interfaces.Held(name, ipaddress.ip_interface(address)) for name, address in pairs]
    monkeypatch.setattr(interfaces, "addresses", lambda: found)
    bound = [
        parse_endpoint(text) for text in ("/ip4/0.0.0.0/tcp/1", "/ip4/198.51.100.1/tcp/2", "/ip6/::/tcp/3")
    ]
    expanded = addresses.expand_wildcards(bound, "vpnd0", ("10.87.0.1", ""))
    assert [endpoint.multiaddr() for endpoint in expanded] == [
        "/ip4/198.51.100.1/tcp/2",
        "/ip6/2001:db8::7/tcp/3",
        "/ip4/192.0.2.7/tcp/1",
    ]


@pytest.mark.root
def test_the_most_useful_addresses_come_first() -> None:
    with Lab(2) as lab:
        host, router = lab.nodes
        for number in range(4):  # as Docker makes them, before the machine's own
            for name in (f"docker{number}", f"br{number}"):
                lab.ip(host, "link", "add", name, "type", "bridge")
                lab.ip(host, "addr", "add", f"172.{17 + number}.{len(name)}.1/24", "dev", name)
        lab.ip(host, "addr", "add", "fd00:77::1/64", "dev", "eth0", "nodad")
        lab.ip(host, "addr", "add", "8.8.4.4/32", "dev", "eth0")
        lab.ip(host, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
        lab.ip(host, "addr", "add", "9.9.9.9/32", "dev", "other0")
        lab.ip(host, "route", "add", "default", "via", router.address)
        bound = [parse_endpoint(text) for text in ("/ip4/0.0.0.0/tcp/1", "/ip6/::/tcp/1")]
        # a process of its own: /sys shows the interfaces of the namespace that mounted it
        program = (
            "import sys; from vpnd.adapter.addresses import *; bound = map(parse_endpoint, sys.argv[1:]); "
            "print(*(each.ip for each in expand_wildcards(bound, '')))"
        )
        words = [each.multiaddr() for each in bound]
        done = lab.run(host, sys.executable, "-P", "-c", program, *words, env={"PYTHONPATH": str(ROOT)})
        order = done.stdout.split()
        assert order[:4] == ["8.8.4.4", "fd00:77::1", host.address, "9.9.9.9"]
        assert len(order) == 12 and all(text.startswith("172.") for text in order[4:])


def test_names_are_looked_up_and_bad_addresses_are_refused_in_words() -> None:
    async def main() -> None:
        found = await addresses.resolve("/dns4/localhost/tcp/4001")
        assert [endpoint.multiaddr() for endpoint in found] == ["/ip4/127.0.0.1/tcp/4001"]
        for bad in ("/ip4/1.2.3/tcp/1", "/ip4/192.0.2.1/udp/1/quic-v1", "nonsense"):
            with pytest.raises(ConfigError, match=re.escape(bad)):
                await addresses.resolve(bad)

    trio.run(main)
    with pytest.raises(ConfigError, match="not a name"):
        parse_endpoint("/dns4/localhost/tcp/4001")
