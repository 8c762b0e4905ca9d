"""Two nodes whose addresses are the contract's to give."""

from __future__ import annotations

import subprocess

import pytest
from lab import Node, SteadyFlow, drops, ping, running_nodes, wait_until
from lab.chain import Chain

pytestmark = pytest.mark.root

PORT = 8545
#: From what the contract says to what nodes do: registry.positive_lifetime, and some.
SOON_S = 3.0
#: For control to start again.
AGAIN_S = 15.0
SPARE = "10.86.0.9"


def test_an_address_is_whose_the_contract_says_it_is() -> None:
    chains: list[tuple[Chain, subprocess.Popen[str]]] = []

    def ask_a_contract(nodes: list[Node]) -> None:
        where = nodes[0]
        directory = where.lab.directory / "chain"
        directory.mkdir()
        chain = Chain(directory, where.namespace.address, PORT)
        chains.append((chain, where.lab.spawn(where.namespace, *chain.command())))
        for node in nodes:
            chain.give(node.virtual_ip, node.peer_id())
            node.config["registry"] = {
                key: f"{value}s" if isinstance(value, float) else value
                for key, value in chain.settings.items()
            }

    with running_nodes(change=ask_a_contract) as (a, b):
        ((chain, process),) = chains
        b_id = b.peer_id()

        def lines() -> list[str]:
            return list(a.ask()["peers"][0]["ownership"])

        def loss(source: Node, ip: str) -> float:
            return ping(source.lab, source.namespace, ip, count=3, interval_s=0.1, wait_s=0.5).loss

        wait_until(lambda: not lines(), SOON_S, "b's address is confirmed")
        assert loss(a, b.virtual_ip) == 0

        said = f"the contract says that b owns {b.virtual_ip}"
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:
            a.lab.run(a.namespace, "kill", "-9", str(a.ask()["control"]["pid"]))
            wait_until(lambda: a.log_file.read_text().count(said) == 2, AGAIN_S, "control is back")
        assert flow.sent and not flow.lost, "a control that comes back asks before it tells"

        chain.give(SPARE, b_id)
        loss(a, SPARE)
        assert drops(b.ask())["destination_not_ours"], "sent to b, which has it not on its device"
        assert SPARE in a.ask()["peers"][0]["virtual_ips"]

        chain.give(b.virtual_ip, "")
        wait_until(lines, SOON_S, "b has lost its address")
        assert loss(a, b.virtual_ip) == 1 and loss(b, a.virtual_ip) == 1
        dropped = drops(a.ask())
        assert dropped["source_not_allowed"] and dropped["no_route"]
        why = f"{b.virtual_ip} is not used: the contract says that nobody owns it"
        assert f"b: {why}" in a.vpnd("status").stdout
        assert b.ask()["node"]["warnings"] == [f"this node: {why}"]
        resolved = a.vpnd("resolve", b.virtual_ip, check=False)
        assert resolved.returncode == 1 and "nobody owns it" in resolved.stdout

        chain.give(b.virtual_ip, b_id)
        wait_until(lambda: not lines() and not b.ask()["node"]["warnings"], SOON_S, "it has it back")
        process.kill()
        process.wait()
        wait_until(lines, SOON_S, "the endpoint is missed")
        assert loss(a, b.virtual_ip) == 0, "what was confirmed is believed"
