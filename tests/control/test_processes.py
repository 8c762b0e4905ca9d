"""Two real control processes over loopback, the test playing their supervisors and shards."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from control_harness import (
    PATIENCE_S,
    ControlProcess,
    FakeShard,
    Identity,
    Session,
    config,
    eventually,
    free_port,
    peer,
    receive_any,
)

from vpnd.api import messages
from vpnd.api.channel import ChannelClosed

pytestmark = pytest.mark.root


class Two:
    """Nodes a and b, a with the smaller peer id, which therefore dials."""

    def __init__(self, *, b_knows_addresses: bool = True) -> None:
        self.a_identity, self.b_identity = Identity.pair()
        self.a_port, self.b_port = free_port(), free_port()
        a_ports = (self.a_port,) if b_knows_addresses else ()
        self.a_config = config(self.a_port, peer("b", self.b_identity, 2, self.b_port))
        self.b_config = config(self.b_port, peer("a", self.a_identity, 1, *a_ports))
        self.a = ControlProcess(self.a_identity, self.a_config)
        self.b = ControlProcess(self.b_identity, self.b_config)

    def close(self) -> None:
        for process in (self.a, self.b):
            process.__exit__(None, None, None)


@pytest.fixture
def two() -> Iterator[Two]:
    nodes = Two()
    try:
        nodes.a.ready()
        nodes.b.ready()
        yield nodes
    finally:
        nodes.close()


def talk(x: Session, y: Session) -> None:
    """Both directions work, and they are one session."""
    assert {x.initiator, y.initiator} == {True, False}
    x.send(b"from x")
    y.send(b"from y")
    assert (y.receive(), x.receive()) == (b"from x", b"from y")


def test_every_shard_of_both_nodes_gets_a_session(two: Two) -> None:
    a_shards = [FakeShard(0), FakeShard(1)]
    b_shards = [FakeShard(0), FakeShard(1), FakeShard(2)]
    for shard in b_shards:
        two.b.add_shard(shard)
    for shard in a_shards:
        two.a.add_shard(shard)
    known = b_shards[2].peers
    assert [(one.peer_id, one.name, one.prefixes) for one in known] == [
        (two.a_identity.peer_id, "a", ("10.86.0.1/32",))
    ]
    # a dials for its two; b hands those to its emptiest shards and dials for the third when its turn comes.
    a_sessions = [shard.session() for shard in a_shards]
    assert [session.initiator for session in a_sessions] == [True, True]
    b_sessions = [shard.session() for shard in b_shards]
    assert sorted(session.initiator for session in b_sessions) == [False, False, True]
    a_sessions.append(a_shards[0].session())
    for session in a_sessions:
        matching = [other for other in b_sessions if other.state.receive_key == session.state.send_key]
        assert len(matching) == 1
        talk(session, matching[0])
    assert len({session.id for session in a_sessions}) == 3
    assert (two.a.state(), two.b.state()) == ("connected", "connected")
    assert two.a.counter("sessions_dialed") == 2 and two.a.counter("sessions_accepted") == 1
    assert two.b.counter("sessions_dialed") == 1 and two.b.counter("sessions_accepted") == 2
    for shard in a_shards + b_shards:
        assert shard.quiet(0.1)
    # Who has sessions already hears of those that the peer makes for others, and looks after its own.
    assert [shard.doubted for shard in a_shards] == [[], [two.b_identity.peer_id]]
    assert [shard.doubted for shard in b_shards] == [[two.a_identity.peer_id], [], []]
    # And of those that fail elsewhere.
    a_shards[1].down(a_sessions[1])
    assert a_shards[0].quiet(0.5) and a_shards[0].doubted == [two.b_identity.peer_id]


def test_a_lost_session_is_replaced_at_once_a_hundred_times_without_a_trace(two: Two) -> None:
    a_shard, b_shard = FakeShard(0), FakeShard(0)
    two.b.add_shard(b_shard)
    two.a.add_shard(a_shard)
    before = (0, 0)
    for round_ in range(100):
        a_session, b_session = a_shard.session(), b_shard.session()
        if round_ % 50 == 0:
            talk(a_session, b_session)
        if round_ == 2:
            before = (two.a.fds(), two.b.fds())
        b_shard.down(b_session)
        a_shard.down(a_session)
    assert a_shard.session().peer_id == two.b_identity.peer_id
    b_shard.session()
    # Not more than then; then one more may have been about to be closed.
    eventually(lambda: two.a.fds() <= before[0] and two.b.fds() <= before[1])
    assert two.a.counter("dial_failures") == two.b.counter("handshake_failures") == 0


def test_a_restarted_control_knows_what_the_shards_hold(two: Two) -> None:
    a_shard, b_shard = FakeShard(0), FakeShard(0)
    two.b.add_shard(b_shard)
    two.a.add_shard(a_shard)
    a_session, b_session = a_shard.session(), b_shard.session()
    two.a.process.send_signal(signal.SIGKILL)
    two.a.process.wait()
    two.a.__exit__(None, None, None)
    talk(a_session, b_session)  # control's death costs nobody a session

    two.a = ControlProcess(two.a_identity, two.a_config)
    two.a.ready()
    a_shard.attach(((a_session.id, a_session.peer_id, True),))
    two.a.add_shard(a_shard)
    eventually(lambda: two.a.state() == "connected")
    assert a_shard.quiet(0.5), "it has a session already"
    assert two.a.counter("dials") == 0
    b_shard.down(b_session)
    a_shard.down(a_session)
    replacement = a_shard.session()
    assert replacement.id != a_session.id
    talk(replacement, b_shard.session())


def test_a_shard_that_dies_or_misbehaves_or_sleeps_costs_the_others_nothing(two: Two) -> None:
    good, dying, rude, asleep = (FakeShard(index, silent=index == 3) for index in range(4))
    for shard in (good, dying, rude):
        two.a.add_shard(shard)
    # This one neither reads nor says what it holds.
    two.a.channel.send(messages.ShardArrived(index=3), (asleep.theirs.fileno(),))
    b_shard = FakeShard(0)
    two.b.add_shard(b_shard)
    for shard in (good, dying, rude):
        shard.session()
        b_shard.session()
    dying.channel.close()
    # past the rules of its own end
    os.write(rude.channel.fileno(), msgspec.msgpack.encode(messages.SessionsHeld(sessions=())))
    with pytest.raises(ChannelClosed):
        while True:
            receive_any(rude.channel)
    replacement = FakeShard(1)
    two.a.add_shard(replacement)
    replacement.session()
    two.a.channel.send(messages.ShardLeft(index=2))
    two.a.channel.send(messages.ShardLeft(index=2))
    assert two.a.state() == "connected"
    assert good.quiet(0.1)
    assert two.a.counter("sessions_dialed") == 4, "none for the one that is asleep"


def test_the_other_side_may_come_later_or_not_at_all() -> None:
    nodes = Two(b_knows_addresses=False)
    try:
        nodes.a.ready()
        nodes.b.ready()
        b_shard = FakeShard(0)
        nodes.b.add_shard(b_shard)
        assert nodes.b.state() == "waiting"
        assert b_shard.quiet(0.3)
        nodes.b.stop()
        a_shard = FakeShard(0)
        nodes.a.add_shard(a_shard)
        eventually(lambda: nodes.a.state() == "backoff" and nodes.a.status().peers[0].dial_failures >= 3)
        report = nodes.a.status().peers[0]
        assert "connection refused" in report.last_error
        assert 0 <= report.next_dial_s <= 0.3
        assert nodes.a.counter("dial_failures") >= 3
        nodes.b.__exit__(None, None, None)
        nodes.b = ControlProcess(nodes.b_identity, nodes.b_config)
        nodes.b.ready()
        b_shard = FakeShard(0)
        nodes.b.add_shard(b_shard)
        for _ in range(20):
            a_shard.channel.send(messages.SessionWanted(peer_id=nodes.b_identity.peer_id))
        talk(a_shard.session(), b_shard.session())
        eventually(lambda: nodes.a.status().peers[0].last_error == "")
    finally:
        nodes.close()


def test_no_shard_a_stranger_and_too_many_sessions_are_refused_and_counted() -> None:
    member, node = Identity.pair()
    stranger = Identity()
    port = free_port()
    listed = config(port, peer("member", member, 1), max_sessions_per_peer=2)
    with (
        ControlProcess(node, listed) as server,
        ControlProcess(member, config(free_port(), peer("node", node, 2, port))) as client,
        ControlProcess(stranger, config(free_port(), peer("node", node, 2, port))) as outsider,
    ):
        for process in (server, client, outsider):
            process.ready()
        client_shards = [FakeShard(index) for index in range(3)]
        client.add_shard(client_shards[0])
        refused = client_shards[0].session(up=False)
        assert not refused.socket.recv(1), "closed by the other side, which has no shard yet"
        assert server.counter("refused_no_shard") == 1
        outside = FakeShard(0)
        outsider.add_shard(outside)
        eventually(lambda: server.counter("refused_unknown_peer") > 0)
        # the one that refuses knows before the one that is refused
        eventually(lambda: "does the other node list this one" in outsider.status().peers[0].last_error)
        assert outsider.counter("sessions_dialed") == 0
        server_shard = FakeShard(0)
        server.add_shard(server_shard)
        client_shards[0].down(refused)
        for shard in client_shards[1:]:
            client.add_shard(shard)
        server_shard.session()
        server_shard.session()
        eventually(lambda: server.counter("refused_session_limit") > 0)
        assert server_shard.quiet(0.3)
        assert server.counter("sessions_accepted") == 2


def test_the_port_of_another_daemon_is_refused_with_the_kind_of_error(two: Two) -> None:
    identity = Identity()
    with ControlProcess(identity, config(two.a_port)) as second:
        failed = second.failed()
        assert failed.kind == "AlreadyRunningError"
        assert str(two.a_port) in failed.error
        assert second.process.wait(PATIENCE_S) == 5
    assert two.a.status().serial


@pytest.mark.setting("p2p.listen")
@pytest.mark.parametrize(
    ("listen", "kind", "said"),
    [
        ("/ip4/192.0.2.1/tcp/4001", "MachineError", "no interface has the address"),
        ("/ip4/127.0.0.1/tcp/81", "MachineError", "privileged"),
    ],
)
def test_what_cannot_be_listened_on_is_said(listen: str, kind: str, said: str) -> None:
    with ControlProcess(Identity(), config(listen)) as process:
        failed = process.failed()
        assert failed.kind == kind
        assert said in failed.error
        assert process.process.wait(PATIENCE_S) == 6


def test_it_ends_with_stop_with_its_supervisor_and_not_with_ctrl_c(two: Two) -> None:
    two.a.process.send_signal(signal.SIGINT)
    assert two.a.status().listen == (f"/ip4/127.0.0.1/tcp/{two.a_port}",)
    assert two.a.stop() == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", two.a_port), 1).close()
    two.b.channel.close()
    assert two.b.process.wait(PATIENCE_S) == 0


def test_it_holds_no_rights(two: Two) -> None:
    lines = Path(f"/proc/{two.a.process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Uid"].split() == ["65534"] * 4
    assert "0" not in status["Gid"].split() and status["Groups"].strip() == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert os.stat(f"/proc/{two.a.process.pid}/mem").st_uid == 0, "not dumpable: its own user may not look"
