"""A real control process whose registry is a contract, and a real endpoint on loopback."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from control_harness import (
    REPOSITORY,
    ControlProcess,
    FakeShard,
    Identity,
    config,
    eventually,
    free_port,
    peer,
    receive,
)
from lab.chain import Chain
from network_harness import NetworkNode

from vpnd.api import messages
from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.config.schema import Config, Log, Network, Registry
from vpnd.control.common import Common
from vpnd.control.owning import Owning
from vpnd.logs import Seldom

pytestmark = pytest.mark.root

OURS, THEIRS, MORE = "10.86.0.1", "10.86.0.2", "10.86.0.9"


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    directory = tmp_path / "chain"
    directory.mkdir()
    port = free_port()
    made = Chain(directory, "127.0.0.1", port)
    process = subprocess.Popen(made.command())

    def answers() -> bool:
        with socket.socket() as probe:
            return not probe.connect_ex(("127.0.0.1", port))

    try:
        eventually(answers)
        yield made
    finally:
        process.kill()
        process.wait()


class Pair:
    """Node a, which asks the contract, and peer b, of which there is nothing but its id."""

    def __init__(self, chain: Chain, **registry: Any) -> None:
        self.a, self.b = Identity.pair()
        chain.give(OURS, self.a.peer_id)
        self.config: Config = msgspec.structs.replace(
            config(free_port(), peer("b", self.b, 2)), registry=Registry(**chain.settings | registry)
        )
        network = msgspec.structs.replace(self.config.network, virtual_ip=OURS)
        log = Log(level="debug")
        self.config = msgspec.structs.replace(self.config, network=network, log=log)


def greeted(process: ControlProcess, shard: FakeShard) -> tuple[str, ...]:
    """What the shard is told b may use."""
    process.channel.send(messages.ShardArrived(index=shard.index), (shard.theirs.fileno(),))
    shard.theirs.close()
    assert receive(shard.channel, messages.OwnersAsked)[0].networks == ("10.86.0.0/16",)
    shard.greet()
    (known,) = shard.peers
    return known.prefixes


def prefixes(shard: FakeShard) -> tuple[str, ...]:
    """The next thing told must be what b may use now."""
    return receive(shard.channel, messages.PeerKnown)[0].prefixes


def resolve(process: ControlProcess, what: str) -> dict[str, Any]:
    process.channel.send(messages.Request(serial=5, command="resolve", arguments={"what": what}))
    return dict(json.loads(receive(process.channel, messages.Answer)[0].result))


@pytest.mark.setting("registry.kind")
def test_addresses_follow_the_contract(chain: Chain) -> None:
    pair = Pair(chain)
    chain.give(THEIRS, pair.b.peer_id)
    with ControlProcess(pair.a, pair.config) as a:
        a.ready()
        shard = FakeShard(0)
        assert greeted(a, shard) == (f"{THEIRS}/32",), "a shard is told when the contract has been asked"
        status = a.status()
        assert status.peers[0].ownership == () and status.warnings == ()

        shard.channel.send(messages.OwnerWanted(address=0x0A560009))
        eventually(lambda: MORE in chain.asked())
        assert shard.quiet(0.1), "nobody has it"
        chain.give(MORE, pair.b.peer_id)
        shard.channel.send(messages.OwnerWanted(address=0x0A560009))
        assert prefixes(shard) == (f"{THEIRS}/32", f"{MORE}/32")
        found = resolve(a, MORE)
        assert (found["name"], [step["source"] for step in found["steps"]]) == (
            "b",
            ["directory", "contract"],
        )
        assert found["steps"][0]["result"] == "not known"
        shard.channel.send(messages.OwnerWanted(address=0xC0000201))
        eventually(lambda: a.counter("registry_wanted_refused") == 1)
        assert a.counter("registry_wanted") == 2

        chain.give(THEIRS, "")
        assert prefixes(shard) == (f"{MORE}/32",)
        (line,) = a.status().peers[0].ownership
        assert line == f"{THEIRS} is not used: the contract says that nobody owns it"
        eventually(lambda: a.counter("registry_disowned") == 1)
        found = resolve(a, THEIRS)
        assert (found["peer_id"], found["steps"][-1]["result"]) == ("", "nobody owns it")
        chain.give(OURS, pair.b.peer_id)
        eventually(lambda: a.status().warnings)
        assert a.status().warnings == (f"this node: {OURS} is not used: the contract says that b owns it",)

        chain.give(THEIRS, pair.b.peer_id)
        assert prefixes(shard) == (f"{THEIRS}/32", f"{MORE}/32")
        moved = msgspec.structs.replace(pair.config, peers=(peer("b", pair.b, 7),))
        a.channel.send(messages.Reconfigure(config=moved))
        eventually(lambda: "10.86.0.7" in chain.asked())
        assert "10.86.0.7" in a.status().peers[0].ownership[0]
        assert a.stop() == 0
        said = a.stderr()
        assert "Traceback" not in said
        assert "http" not in said, "there may be a key in the URL"


@pytest.mark.parametrize("mode", ["down", "hang", "lie"])
def test_an_endpoint_that_fails_keeps_unconfirmed_addresses_from_being_used_and_nothing_else(
    chain: Chain, mode: str
) -> None:
    pair = Pair(chain, timeout=0.5, max_requests=2, stale_lifetime=1.5, max_response_bytes=1 << 10)
    chain.give(THEIRS, pair.b.peer_id)
    chain.turn(mode)
    with ControlProcess(pair.a, pair.config) as a:
        a.ready()
        assert greeted(a, shard := FakeShard(0)) == ()
        eventually(lambda: "be looked up: the endpoint" in a.status().peers[0].ownership[0])
        waits_s = []
        for _ in range(5):
            begun_s = time.monotonic()
            a.status()
            waits_s.append(time.monotonic() - begun_s)
        assert min(waits_s) < 0.4, "nobody waits for it"
        assert a.counter("registry_unconfirmed") == 2
        chain.turn("up")
        assert prefixes(shard) == (f"{THEIRS}/32",)
        eventually(lambda: not a.counter("registry_unconfirmed"))
        chain.turn(mode)
        eventually(lambda: a.counter("registry_stale") == 2)
        assert shard.quiet(0.2), "what was confirmed is believed"
        assert "unless its owner is confirmed" in a.status().peers[0].ownership[0]
        assert prefixes(shard) == (), "and then not any more"
        assert a.stop() == 0
        said = a.stderr()
        assert "Traceback" not in said and said.count("could not be looked up") <= 2, "an outage is no flood"


def test_a_contract_is_asked_where_control_cannot_read_its_own_files(chain: Chain, tmp_path: Path) -> None:
    """Nothing can be imported any more when the first question is put."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "environment").symlink_to(sys.prefix)
    (private / "vpnd").symlink_to(REPOSITORY / "vpnd")
    python = str(private / "environment" / "bin" / "python")
    by_name = chain.settings["rpc_url"].replace("127.0.0.1", "localhost")
    secure = chain.settings["rpc_url"].replace("http", "https")
    pair, wary = Pair(chain, rpc_url=by_name), Pair(chain, rpc_url=secure)
    chain.give(THEIRS, pair.b.peer_id)
    with (
        ControlProcess(pair.a, pair.config, python=python, root=private) as a,
        ControlProcess(wary.a, wary.config, python=python, root=private) as b,
    ):
        a.ready()
        b.ready()
        assert greeted(a, FakeShard(0)) == (f"{THEIRS}/32",)
        assert greeted(b, FakeShard(0)) == ()
        assert "cannot be asked: ConnectError" in b.status().peers[0].ownership[0]
        for process in (a, b):
            assert process.stop() == 0
            assert "Traceback" not in (said := process.stderr()) and "import" not in said, said


def test_members_have_the_addresses_the_contract_gives_them(chain: Chain, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with NetworkNode(tmp_path, "a") as a, NetworkNode(tmp_path, "b") as b:
        a.config = msgspec.structs.replace(a.config, registry=Registry(**chain.settings))
        a.start()
        b.start(a.invite())
        eventually(lambda: a.knows(b) and b.knows(a))
        ipv4, ipv6 = (f"{text}/{128 if ':' in text else 32}" for text in b.own.addresses)
        eventually(lambda: {a.address, b.address} <= set(chain.asked()))
        a.pump(0.2)
        assert a.peers[b.peer_id].prefixes == (ipv6,), "who may talk is up to the network, as whom is not"
        assert b.peers[a.peer_id].prefixes[0] == f"{a.address}/32", "who does not ask believes the network"
        assert a.status().warnings == (
            f"this node: {a.address} is not used: the contract says that nobody owns it",
        )

        def given(*prefixes: str) -> bool:
            a.pump()
            return a.peers[b.peer_id].prefixes == prefixes

        chain.give(b.address, b.peer_id)
        eventually(lambda: given(ipv4, ipv6))
        steps = [(step["source"], step["result"]) for step in a.do("resolve", what=b.address)["steps"]]
        assert steps[0][0] == "directory" and steps[1] == ("contract", f"peer {b.peer_id}")
        chain.give(b.address, a.peer_id)
        eventually(lambda: given(ipv6))
        assert b.peer_id in a.sessions and a.report().members == 2


@pytest.mark.parametrize(
    ("in_network", "peers", "governed", "own"),
    [
        pytest.param(False, False, ["10.86.0.0/16", "10.88.0.0/16"], [OURS], id="of the configuration alone"),
        pytest.param(True, False, ["10.99.0.0/16"], ["10.99.0.1"], id="of the network alone"),
        pytest.param(
            True, True, ["10.86.0.0/16", "10.88.0.0/16", "10.99.0.0/16"], [OURS, "10.99.0.1"], id="of both"
        ),
    ],
)
def test_what_the_contract_is_asked_about(
    in_network: bool, peers: bool, governed: list[str], own: list[str]
) -> None:
    listed = config(1, *([peer("b", Identity(), 2)] if peers else []))
    network = Network(virtual_ip=OURS, subnet=16, routes=("10.88.0.0/16",))
    live = Live(msgspec.structs.replace(listed, registry=Registry(kind="contract"), network=network))
    seldom = Seldom(logging.getLogger(), live, lambda: 0.0)
    owning = Owning(
        None,  # type: ignore[arg-type]  # nothing is asked
        Common(live, lambda name: None, seldom, lambda: 0.0),
        "me",
        in_network=in_network,
        gauge=lambda name, value: None,
    )
    if in_network:
        owning.own_changed(
            OwnAddresses(
                network="home",
                label="me",
                addresses=("10.99.0.1", "fd99::1"),
                subnets=("10.99.0.0/16", "fd99::/64"),
            )
        )
    assert list(owning.ownership.governed) == governed
    assert [line.split()[2] for line in owning.warnings()] == own


def test_without_a_contract_nothing_of_it_is_loaded() -> None:
    code = (
        "import sys, vpnd.control.main\nassert not {'vpnd.adapter.contract', 'httpcore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
