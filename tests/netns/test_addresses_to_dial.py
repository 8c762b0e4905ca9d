"""What a node tells others of where it is: it can be dialed there, or nobody is told."""

from __future__ import annotations

import pytest
from lab import Lab, Namespace, wait_until
from lab.joining import JOIN_S, all_reach_all, invite, machine
from lab.node import P2P_PORT

from vpnd import errors
from vpnd.membership.token import parse_untrusted

pytestmark = pytest.mark.root

FORWARDED, FORWARDED_PORT = "203.0.113.5", 5001


def nft(lab: Lab, namespace: Namespace, *rules: str) -> None:
    for rule in rules:
        lab.run(namespace, "nft", rule)


@pytest.mark.setting("p2p.announce")
def test_a_host_of_bridges_is_joined_and_at_what_a_router_forwards_to_it() -> None:
    with Lab(2) as lab:
        a, b = (machine(lab, place) for place in range(2))
        host, guest = lab.nodes
        for number in range(4):
            lab.ip(host, "link", "add", f"br-{number:012x}", "type", "bridge")
            lab.ip(host, "addr", "add", f"172.{17 + number}.0.1/16", "dev", f"br-{number:012x}")
        lab.ip(host, "route", "add", "default", "via", guest.address)
        for node in (a, b):
            del node.config["p2p"]
        a.start()
        a.wait_ready(JOIN_S)
        first, *others = parse_untrusted(invite(a)).addresses
        assert first == f"/ip4/{host.address}/tcp/{P2P_PORT}" and others
        # Now only at an address that the machine does not have, as behind a router: b cannot dial its own any more.
        nft(
            lab,
            host,
            "add table ip router",
            "add chain ip router in { type nat hook prerouting priority dstnat; }",
            f"add rule ip router in ip daddr {FORWARDED} tcp dport {FORWARDED_PORT} dnat to {host.address}:{P2P_PORT}",
        )
        nft(
            lab,
            guest,
            "add table ip firewall",
            "add chain ip firewall out { type filter hook output priority 0; }",
            f"add rule ip firewall out ip daddr {host.address} tcp flags syn / syn,ack drop",
        )
        lab.ip(guest, "route", "add", FORWARDED, "via", host.address)
        announced = f"/ip4/{FORWARDED}/tcp/{FORWARDED_PORT}"
        a.config["p2p"] = {"announce": [announced]}
        a.write_config()
        a.vpnd("reload")
        token = invite(a)
        assert parse_untrusted(token).addresses[:2] == (announced, first)
        b.start("--join", token)
        b.wait_ready(JOIN_S)
        all_reach_all([a, b], JOIN_S)
        wait_until(
            lambda: b.ask()["peers"][0]["addresses"][:2] == [announced, first], JOIN_S, "b is told of it"
        )


def test_machines_without_ipv4_join_and_without_any_address_nobody_is_invited() -> None:
    with Lab(2) as lab:
        a, b = (machine(lab, place) for place in range(2))
        for node in (a, b):
            del node.config["p2p"]
            lab.ip(node.namespace, "-4", "addr", "flush", "dev", "eth0")
        a.start()
        a.wait_ready(JOIN_S)
        refused = a.vpnd("invite", check=False)
        assert refused.returncode == errors.ConfigError.exit_code and "p2p.announce" in refused.stderr
        assert not a.ask()["node"]["listen"]
        for number, node in enumerate((a, b), 1):
            lab.ip(node.namespace, "addr", "add", f"2001:db8:77::{number}/64", "dev", "eth0", "nodad")
        b.start("--join", invite(a))
        b.wait_ready(JOIN_S)
        all_reach_all([a, b], JOIN_S)
