"""A real control process whose peers, settings and network change, and whose peer goes away and comes back."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest
from control_harness import (
    ControlProcess,
    FakeShard,
    Identity,
    config,
    eventually,
    free_port,
    peer,
    receive,
)

from vpnd.api import messages
from vpnd.config.schema import P2P, CircuitBreaker, Config, Log, Retry

pytestmark = pytest.mark.root


def with_breaker(configuration: Config, reset_s: float = 0.2, **retry: Any) -> Config:
    """Circuits that open after two failures."""
    return msgspec.structs.replace(
        configuration,
        circuit_breaker=CircuitBreaker(failure_threshold=2, reset_timeout=reset_s),
        retry=Retry(**{"initial_interval": 0.05, "max_interval": 0.3} | retry),
    )


def network_changed(process: ControlProcess) -> None:
    process.channel.send(messages.NetworkChanged(reason="address added", addresses=("127.0.0.1",)))


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port that answers no SYN: its queue of connections is full."""
    with socket.socket() as hole, contextlib.ExitStack() as filling:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(2):
            filler = filling.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        yield hole.getsockname()[1]


class Nodes:
    """Node a, which dials, and node b, which may be there or not."""

    def __init__(self) -> None:
        self.a, self.b = Identity.pair()
        self.b_port = free_port()
        self.b_config = config(self.b_port, peer("a", self.a, 1))

    def start_a(self, configuration: Config) -> ControlProcess:
        process = ControlProcess(self.a, configuration)
        process.ready()
        return process

    def listed(self, *ports: int, number: int = 2) -> Config:
        """What a is set to: b, at these ports."""
        return config(free_port(), peer("b", self.b, number, *(ports or (self.b_port,))))


def test_the_circuit_of_a_dead_peer_opens_and_every_shard_hears_of_it() -> None:
    nodes = Nodes()
    with nodes.start_a(with_breaker(nodes.listed())) as a:
        shard = FakeShard(0)
        a.add_shard(shard)
        assert shard.circuit() == "open"
        assert a.counter("circuits_opened") == 1
        assert a.status().peers[0].circuit_opened == 1
        # Somebody talks to it: every reset_timeout a probe.
        for _ in range(3):
            shard.want(nodes.b.peer_id)
            assert (shard.circuit(), shard.circuit()) == ("half_open", "open")
        assert a.counter("circuits_opened") == 1 and a.counter("circuits_closed") == 0
        assert a.counter("dials") == 5 and a.counter("retries") == 4
        late = FakeShard(1)
        a.add_shard(late)
        assert late.circuits[nodes.b.peer_id] in ("open", "half_open")
        report = a.status().peers[0]
        assert report.circuit in ("open", "half_open") and "refused" in report.last_error
        with ControlProcess(nodes.b, nodes.b_config) as b:
            b.ready()
            b_shard = FakeShard(0)
            b.add_shard(b_shard)
            shard.want(nodes.b.peer_id)
            session = shard.session()
            assert session.peer_id == nodes.b.peer_id
            assert shard.circuit() == "closed"
            assert a.counter("circuits_closed") == 1
            assert a.counter("circuits_open") == a.counter("circuits_half_open") == 0
            assert a.status().peers[0].circuit == "closed"
        a.stop()
        log = a.stderr()
    assert log.count("the circuit of b is open: ") == 1
    assert log.count("the circuit of b is closed") == 1
    assert "half_open" not in log


def test_a_session_that_fails_counts_and_one_that_was_closed_does_not() -> None:
    nodes = Nodes()
    settings = with_breaker(nodes.listed(), reset_s=60.0)
    settings = msgspec.structs.replace(
        settings, circuit_breaker=CircuitBreaker(failure_threshold=1, reset_timeout=60.0)
    )
    with nodes.start_a(settings) as a, ControlProcess(nodes.b, nodes.b_config) as b:
        b.ready()
        b_shard, shard = FakeShard(0), FakeShard(0)
        b.add_shard(b_shard)
        a.add_shard(shard)
        session = shard.session()
        shard.channel.send(
            messages.SessionDown(
                session_id=session.id, peer_id=session.peer_id, reason="not needed", failed=False
            )
        )
        session = shard.session()
        shard.down(session, "no answer")
        assert shard.circuit() == "open"
        assert shard.quiet(0.3), "for a minute"
        network_changed(a)
        assert shard.circuit() == "half_open"
        shard.session()
        assert shard.circuit() == "closed"


def test_more_sessions_are_dialed_for_until_the_shard_has_what_it_wants() -> None:
    nodes = Nodes()
    with nodes.start_a(nodes.listed()) as a, ControlProcess(nodes.b, nodes.b_config) as b:
        b.ready()
        b_shards = [FakeShard(0), FakeShard(1)]
        for one in b_shards:
            b.add_shard(one)
        shard = FakeShard(0)
        a.add_shard(shard)
        sessions = [shard.session()]
        b_shards[0].session()
        b_shards[1].want(nodes.a.peer_id, 3, urgent=False)
        eventually(lambda: b.status().serial)  # it has been heard
        shard.want(nodes.b.peer_id, 4, urgent=False)
        sessions += [shard.session() for _ in range(3)]
        for _ in range(3):
            b_shards[1].session()
        assert b_shards[0].quiet(0.1), "they went where they were wanted"
        assert shard.quiet(0.3)
        shard.down(sessions[0])
        shard.session()
        shard.want(nodes.b.peer_id, 1, urgent=False)
        eventually(lambda: a.status().serial)
        shard.down(sessions[1])
        assert shard.quiet(0.3), "three are more than it wants"


def test_a_changed_network_calls_off_the_dial_that_hangs_and_ends_all_waiting() -> None:
    nodes = Nodes()
    with black_hole() as hole:
        settings = with_breaker(nodes.listed(hole), 60.0, initial_interval=30.0, max_interval=30.0)
        p2p = msgspec.structs.replace(settings.p2p, connect_timeout=60.0, dial_timeout=60.0)
        with nodes.start_a(msgspec.structs.replace(settings, p2p=p2p)) as a:
            shard = FakeShard(0)
            a.add_shard(shard)
            eventually(lambda: a.counter("dials") == 1)
            for round_ in range(1, 4):
                network_changed(a)
                eventually(lambda expected=round_ + 1: a.counter("dials") == expected)  # type: ignore[misc]
            assert a.counter("network_changes") == 3
            report = a.status().peers[0]
            assert (report.state, report.dial_failures, a.counter("dial_failures")) == ("dialing", 0, 0)
            fds = a.fds()
            network_changed(a)
            eventually(lambda: a.counter("dials") == 5 and a.fds() == fds)
            a.stop()
            assert a.stderr().count("the network changed: address added") == 4


def reconfigure(process: ControlProcess, configuration: Config) -> None:
    process.channel.send(messages.Reconfigure(config=configuration))


def test_peers_are_added_changed_and_removed_while_it_runs() -> None:
    nodes = Nodes()
    settings = nodes.listed()
    nobody = msgspec.structs.replace(settings, peers=())
    with nodes.start_a(nobody) as a, ControlProcess(nodes.b, nodes.b_config) as b:
        b.ready()
        b_shard, shard = FakeShard(0), FakeShard(0)
        b.add_shard(b_shard)
        a.add_shard(shard)
        reconfigure(a, settings)
        known = receive(shard.channel, messages.PeerKnown)[0]
        assert (known.name, known.prefixes) == ("b", ("10.86.0.2/32",))
        first, b_first = shard.session(), b_shard.session()

        moved = msgspec.structs.replace(settings, peers=(peer("bee", nodes.b, 7, nodes.b_port),))
        reconfigure(a, moved)
        known = receive(shard.channel, messages.PeerKnown)[0]
        assert (known.name, known.prefixes) == ("bee", ("10.86.0.7/32",))
        assert a.status().peers[0].name == "bee"
        assert shard.quiet(0.1), "its session goes on"

        reconfigure(a, nobody)
        assert receive(shard.channel, messages.PeerForgotten)[0].peer_id == nodes.b.peer_id
        assert a.status().peers == ()
        shard.down(first, "no longer a peer")
        b_shard.down(b_first)
        shard.want(nodes.b.peer_id)
        assert shard.quiet(0.3), "not dialed any more"

        reconfigure(b, with_address_of_a(nodes, settings))
        b_shard.want(nodes.a.peer_id)
        receive(b_shard.channel, messages.PeerKnown)
        eventually(lambda: a.counter("refused_unknown_peer") > 0)

        reconfigure(a, settings)
        receive(shard.channel, messages.PeerKnown)
        again = shard.session()
        assert again.peer_id == nodes.b.peer_id
        assert a.status().peers[0].dial_failures == 0


def with_address_of_a(nodes: Nodes, settings: Config) -> Config:
    """b's configuration, with an address for a."""
    port = int(settings.p2p.listen[0].rpartition("/")[2])
    return msgspec.structs.replace(nodes.b_config, peers=(peer("a", nodes.a, 1, port),))


def dials_to(process: ControlProcess, port: int) -> int:
    """Sockets of `process` that connect to that port."""
    sockets = psutil.Process(process.process.pid).net_connections("tcp4")
    return sum(bool(each.raddr) and each.raddr.port == port for each in sockets)


def test_a_removed_peer_is_not_dialed_to_the_end_and_another_address_is_tried_at_once() -> None:
    nodes = Nodes()
    with black_hole() as hole, ControlProcess(nodes.b, nodes.b_config) as b:
        b.ready()
        b_shard, shard = FakeShard(0), FakeShard(0)
        b.add_shard(b_shard)
        settings = nodes.listed(hole)
        settings = msgspec.structs.replace(
            settings, p2p=msgspec.structs.replace(settings.p2p, connect_timeout=60.0, dial_timeout=60.0)
        )
        with nodes.start_a(settings) as a:
            a.add_shard(shard)
            eventually(lambda: dials_to(a, hole) == 1)
            reconfigure(a, msgspec.structs.replace(settings, peers=()))
            receive(shard.channel, messages.PeerForgotten)
            eventually(lambda: dials_to(a, hole) == 0)
            reconfigure(a, settings)
            receive(shard.channel, messages.PeerKnown)
            eventually(lambda: a.counter("dials") == 2)
            begun_s = time.monotonic()
            reconfigure(a, msgspec.structs.replace(settings, peers=nodes.listed(nodes.b_port).peers))
            receive(shard.channel, messages.PeerKnown)
            shard.session()
            assert time.monotonic() - begun_s < 10.0
            assert a.counter("dial_failures") == 0


@pytest.mark.setting("log.level")
def test_limits_timings_and_the_log_level_change_while_it_runs() -> None:
    nodes = Nodes()
    slow = with_breaker(nodes.listed(), 60.0, initial_interval=60.0, max_interval=60.0)
    with nodes.start_a(slow) as a:
        shard = FakeShard(0)
        a.add_shard(shard)
        eventually(lambda: a.counter("dial_failures") == 1)
        quick = with_breaker(slow, 0.1, max_interval=0.1)
        quick = msgspec.structs.replace(quick, log=Log(level="debug"))
        reconfigure(a, quick)
        assert shard.circuit() == "open"
        assert (shard.circuit(), shard.circuit()) == ("half_open", "open")
        limited = msgspec.structs.replace(
            quick, p2p=msgspec.structs.replace(quick.p2p, max_sessions_per_peer=1), log=Log(level="error")
        )
        reconfigure(a, limited)
        with ControlProcess(nodes.b, with_address_of_a(nodes, limited)) as b:
            b.ready()
            b_shard = FakeShard(0)
            b.add_shard(b_shard)
            b_shard.want(nodes.a.peer_id, 2)
            shard.session()
            assert shard.circuit() == "closed"
            eventually(lambda: a.counter("refused_session_limit") > 0)
            shard.want(nodes.b.peer_id, 3)
            assert shard.quiet(0.3), "one is the limit, for its own wanting as well"
        a.stop()
        log = a.stderr()
    assert "the circuit of b is half_open" in log, "debug"
    assert "the circuit of b is closed" not in log, "error"


@pytest.mark.setting("log.refusal_interval")
def test_what_strangers_cause_is_logged_as_seldom_as_set_now() -> None:
    nodes = Nodes()
    crowded = msgspec.structs.replace(
        nodes.listed(), p2p=P2P(listen=("/ip4/127.0.0.1/tcp/0",), max_inbound_handshakes=1)
    )

    def crowd(process: ControlProcess, address: tuple[str, int]) -> None:
        before = process.counter("refused_handshake_limit")
        with contextlib.ExitStack() as opened:
            for number in range(6):
                opened.enter_context(socket.create_connection(address))
                eventually(lambda: process.counter("refused_handshake_limit") >= before + number)  # noqa: B023

    with ControlProcess(nodes.a, msgspec.structs.replace(crowded, log=Log(refusal_interval=3600.0))) as a:
        host, port = a.ready().listen[0].split("/")[2:5:2]
        crowd(a, (host, int(port)))
        reconfigure(a, msgspec.structs.replace(crowded, log=Log(refusal_interval=0.0)))
        crowd(a, (host, int(port)))
        a.stop()
        log = a.stderr()
    assert 5 <= log.count("too many handshakes under way") <= 7, "one of the first, all of the others"
