"""`vpnd ping`'s question to a real shard: which session carries the pings, how long is it, and if none does, why."""

from __future__ import annotations

import os
import signal
import time

import msgspec
import pytest
from test_shard_process import CONFIG, A, B, join, joined, packet, two_shards

from vpnd.api import messages
from vpnd.config.schema import Config, Health, Multiplexer

TIMEOUT_S = 0.3
IMPATIENT: Config = msgspec.structs.replace(CONFIG, health=Health(interval=60.0, timeout=TIMEOUT_S))


def echo_request(source: str, destination: str) -> bytes:
    """As `packet`, of ICMP: only the headers matter to a shard."""
    udp = packet(source, destination, b"x")
    return udp[:9] + b"\x01" + udp[10:]


def test_the_session_of_the_flow_is_named_and_measured():
    with two_shards() as (a, b):
        join(a, b)
        a.send(echo_request(A, B))
        assert b.receive(1)
        here, there = a.probe(B), b.probe(A)
        assert here.session is not None and there.session is not None and not here.why
        assert (here.session.peer_id, here.session.session_id) == ("b", 1)
        assert (here.session.local, here.session.remote) == (there.session.remote, there.session.local)
        assert here.session.local.startswith("127.0.0.1:")
        for session in (here.session, there.session):
            assert session.rtt_ms is not None and 0 < session.rtt_ms < 1000
        assert b.counts()["flows"] == 0, "to ask makes no flow"


def test_of_several_sessions_it_is_that_which_the_flow_is_pinned_to():
    four = msgspec.structs.replace(CONFIG, multiplexer=Multiplexer(min_sessions=4, max_sessions=4))
    with two_shards(four) as (a, b):
        for session_id in range(1, 5):
            one, other = joined()
            keys = os.urandom(32), os.urandom(32)
            a.give_session(one, "b", True, keys, session_id)
            b.give_session(other, "a", False, keys[::-1], session_id)
            while not isinstance(a.hear(a.control), messages.SessionUp):
                pass  # it says how many it wants
        a.send(echo_request(A, B))
        assert b.receive(1)
        (carrier,) = {session.session_id for session in b.status().sessions if session.packets_received}
        for _ in range(5):
            answer = a.probe(B)
            assert answer.session is not None and answer.session.session_id == carrier


def test_a_session_that_says_nothing_is_named_as_well():
    with two_shards(IMPATIENT) as (a, b):
        join(a, b)
        b.process.send_signal(signal.SIGSTOP)
        begun_s = time.monotonic()
        answer = a.probe(B)
        assert time.monotonic() - begun_s > TIMEOUT_S / 2
        assert answer.session is not None and answer.session.session_id == 1
        assert answer.session.rtt_ms is None and answer.why == "no answer within 0.3 s"


def test_a_session_that_ends_meanwhile_has_no_answer():
    with two_shards(IMPATIENT) as (a, b):
        join(a, b)
        b.process.send_signal(signal.SIGSTOP)
        a.supervisor.send(messages.ProbeRequest(serial=7, destination=B))
        a.status()  # it has the request by now
        b.process.kill()
        assert isinstance(a.hear(a.control), messages.SessionDown)
        answer = a.hear(a.supervisor)
        assert answer.session.rtt_ms is None and answer.why == "it has ended"


NONE = [
    ("nobody has the address", [], "10.86.7.7", "no peer owns 10.86.7.7"),
    ("nobody has the IPv6 address", [], "fd00::7", "no peer owns fd00::7"),
    ("packets wait", [], B, "packets wait for one"),
    (
        "the circuit is open",
        [messages.PeerCircuit(peer_id="b", state="open")],
        B,
        "its circuit is open, packets are dropped",
    ),
]


@pytest.mark.parametrize(("sentence", "told", "destination", "why"), NONE, ids=[row[0] for row in NONE])
def test_why_there_is_no_session(sentence, told, destination, why):
    with two_shards() as (a, _):
        for message in told:
            a.control.send(message)
        a.send(echo_request(A, destination if "." in destination else B))
        deadline = time.monotonic() + 5
        while (answer := a.probe(destination)).why != why and time.monotonic() < deadline:
            time.sleep(0.01)  # what control says comes by another channel
        assert (answer.session, answer.why) == (None, why)
