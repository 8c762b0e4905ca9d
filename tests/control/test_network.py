"""A network of real control processes: made, joined, and outliving the node that made it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from control_harness import eventually
from network_harness import NetworkNode

from vpnd.config.schema import Discovery
from vpnd.errors import RefusedError
from vpnd.membership import token as tokens

pytestmark = pytest.mark.root


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[NetworkNode]]:
    """Three nodes that are not started."""
    tmp_path.chmod(0o755)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(NetworkNode(tmp_path, name)) for name in ("a", "b", "c")]


def test_two_join_by_token_and_all_have_sessions_with_all(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    assert a.own is not None and a.own.network == "home" and a.own.label == "a"
    assert a.own.subnets[0] == "10.86.0.0/16" and len(a.own.addresses) == 2
    b.start(a.invite())
    c.start(a.invite(name="printer", ip="10.86.3.4"))
    eventually(lambda: a.knows(b, c) and b.knows(a, c) and c.knows(a, b))
    assert c.address == "10.86.3.4" and len(c.own.addresses) == 2
    assert len({a.address, b.address, c.address}) == 3
    assert b.peers[c.peer_id].name == "printer"
    assert b.peers[c.peer_id].prefixes == ("10.86.3.4/32", f"{c.own.addresses[1]}/128")
    for node in nodes:
        assert node.members() == {"a", "b", "printer"}
        report = node.report()
        assert (report.state, report.members, report.authorities) == ("member", 3, 1)
        assert report.authority == (node is a)


def joined(nodes: list[NetworkNode]) -> list[NetworkNode]:
    """All in one network of which the first is the authority."""
    first, *others = nodes
    first.start()
    for node in others:
        node.start(first.invite())
    eventually(lambda: all(node.knows(*(one for one in nodes if one is not node)) for node in nodes))
    return nodes


def test_the_network_goes_on_without_the_node_that_made_it(nodes: list[NetworkNode]) -> None:
    a, b, c = joined(nodes)
    a.kill()
    b.stop()
    c.kill()
    before = b.own, c.own
    b.start()
    c.start()
    assert (b.own, c.own) == before
    eventually(lambda: b.reaches(c) and c.reaches(b))
    assert b.report().members == 3
    a.start()
    eventually(lambda: a.knows(b, c) and b.reaches(a))


def test_a_removed_member_is_out_at_once_knows_it_and_stays_out(nodes: list[NetworkNode]) -> None:
    a, b, c = joined(nodes)
    eventually(lambda: a.report().neighbours == 2)
    gone = {"removed": "b", "peer_id": b.peer_id, "authority": False, "told": 2}
    assert a.do("remove", who="b") == gone
    eventually(lambda: a.knows(c) and c.knows(a), 3.0)
    eventually(lambda: b.report().state == "removed", 3.0)
    eventually(lambda: b.knows())
    for node in (a, b, c):
        node.stop()
    for node in (a, b, c):
        node.start()
    assert b.report().state == "removed" and b.own.addresses
    eventually(lambda: a.knows(c) and c.knows(a))
    b.pump(1.0)
    assert not b.peers and not b.sessions
    b.stop()
    assert "removed from the network home" in b.control.stderr()
    # and is in again with a new token only, at its old address
    address = b.address
    b.start(a.invite())
    assert b.address == address
    eventually(lambda: a.knows(b, c) and b.knows(a, c) and c.knows(a, b))


def test_who_was_removed_while_it_was_away_finds_out(nodes: list[NetworkNode]) -> None:
    a, b, c = joined(nodes)
    eventually(lambda: all(peer.addresses for peer in b.status().peers))  # or it could ask nobody
    b.stop()
    a.do("remove", who=b.peer_id)
    eventually(lambda: c.knows(a))
    a.kill()  # the proof is enough, whoever has it
    b.start()
    eventually(lambda: b.report().state == "removed")
    eventually(lambda: b.knows())


def test_two_that_do_not_know_each_other_meet_without_a_third(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    c.start(a.invite())
    eventually(lambda: a.knows(c) and c.knows(a))
    eventually(lambda: a.status().peers[0].addresses)
    c.stop()
    b.start(a.invite())
    eventually(lambda: b.reaches(a) and c.peer_id in b.peers)
    a.kill()
    c.start()
    eventually(lambda: b.reaches(c) and c.reaches(b))
    assert c.members() == {"a", "b", "c"}
    assert c.control.counter("introduced") == 1 and b.control.counter("introductions") >= 1
    b.stop()
    c.stop()
    assert "has shown that it is a member" in c.control.stderr()


def test_used_expired_mistyped_and_forged_tokens_are_refused(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    token = a.invite()
    b.start(token)
    expired = a.invite(expires_s=0.001)
    other = a.invite()
    forged = tokens.encode(
        msgspec.structs.replace(tokens.parse_untrusted(token), secret=bytes(tokens.SECRET_BYTES))
    )
    for text, said, reason in (
        (token, "used already", "used_token"),
        (expired, "has expired", "expired_token"),
        (other[:-1], "cut short", "mistyped"),
        (forged, "no invitation", "unknown_token"),
    ):
        with c.launch(text) as process:
            failed = process.failed()
            assert failed.kind == "RefusedError" and said in failed.error
            assert process.process.wait(5.0) == RefusedError.exit_code
            assert process.counter(f"refused_{reason}") == 1
        assert not list(c.directory.iterdir())
    counters = a.control.page.read()
    assert counters["refused_used_token"] == counters["refused_expired_token"] == 1
    assert counters["refused_unknown_token"] == counters["enrolled"] == 1
    c.start(other)
    eventually(lambda: c.knows(a, b))


def test_what_others_say_of_a_network_cannot_be_joined(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    b.start()
    # another network is there, this node is in one, and a node that is away
    mine, theirs = tokens.parse_untrusted(a.invite()), tokens.parse_untrusted(b.invite())
    for token, said in (
        (msgspec.structs.replace(theirs, network=mine.network), "another network"),
        (msgspec.structs.replace(mine, addresses=theirs.addresses), "another node answers there"),
        (msgspec.structs.replace(mine, addresses=("/ip4/127.0.0.1/tcp/1",)), "could not be joined"),
    ):
        with c.launch(tokens.encode(token)) as process:
            assert said in process.failed().error
        assert not list(c.directory.iterdir())
    b.stop()
    with b.launch(a.invite()) as process:
        assert "leave it first" in process.failed().error


@pytest.mark.alone
def test_invitations_are_the_authoritys_and_it_can_be_shared(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    b.start(a.invite())
    assert "no authority" in b.ask("invite").error
    a.do("authority-add", who="b")
    eventually(lambda: b.report().authority)
    a.kill()
    c.start(b.invite())
    eventually(lambda: c.reaches(b))
    b.do("remove", who="c")
    eventually(lambda: c.report().state == "removed")
    # the one that made the network cannot be revoked by a later one, the other way it can
    assert "nobody is senior" in b.ask("authority-revoke", who="a").error
    a.start()
    eventually(lambda: len(a.do("members")) == 2)
    a.do("authority-revoke", who="b")
    eventually(lambda: not b.report().authority)
    assert [row["revoked"] for row in a.do("authority-list")] == [False, True]


def test_a_damaged_directory_is_completed_by_the_others(nodes: list[NetworkNode]) -> None:
    a, b, _ = nodes
    a.start()
    b.start(a.invite())
    eventually(lambda: a.status().peers[0].addresses and b.knows(a))
    b.stop()
    path = b.directory / "directory.bin"
    path.write_bytes(path.read_bytes()[:-5])  # a power cut, and a file system that lies
    b.start()
    eventually(lambda: b.knows(a))


@pytest.mark.setting("discovery.bootstrap")
def test_a_node_that_knows_nobodys_address_finds_the_others_by_bootstrap(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with NetworkNode(tmp_path, "a") as a, NetworkNode(tmp_path, "b") as b:
        a.start()
        b.start(a.invite())
        eventually(lambda: b.knows(a))
        for node in (a, b):
            node.stop()
        a.moves()
        b.moves()
        b.config = msgspec.structs.replace(
            b.config,
            discovery=Discovery(bootstrap=(f"/ip4/127.0.0.1/tcp/{a.port}/p2p/{a.peer_id}",), mdns=False),
        )
        a.start()
        b.start()
        eventually(lambda: a.knows(b) and b.knows(a))


def test_an_address_given_out_twice_goes_to_the_senior_authoritys_member(
    nodes: list[NetworkNode], tmp_path: Path
) -> None:
    a, b, c = nodes
    with NetworkNode(tmp_path, "d") as d:
        a.start()
        b.start(a.invite())
        a.do("authority-add", who="b")
        eventually(lambda: b.report().authority and b.knows(a))
        a.stop()
        c.start(b.invite(ip="10.86.5.5"))
        eventually(lambda: b.reaches(c) and b.status().peers[1].addresses)
        for node in (b, c):
            node.stop()
        a.start()
        d.start(a.invite(ip="10.86.5.5"))
        assert c.address == d.address
        b.start()
        c.start()
        # an authority gives the other one another address as soon as it hears of it
        eventually(lambda: c.pump() or c.report().addresses[0] != "10.86.5.5")
        eventually(lambda: a.pump() or a.peers.keys() == {b.peer_id, c.peer_id, d.peer_id})
        eventually(lambda: not any(node.report().conflicts for node in (a, b, c, d)))
        for node in (a, b, c):
            assert node.do("resolve", what="10.86.5.5")["peer_id"] == d.peer_id
        c.pump(0.5)
        assert c.own.addresses[0] == c.report().addresses[0] != "10.86.5.5"


@pytest.mark.setting("membership.record_lifetime")
def test_memberships_are_renewed_before_they_end(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    quick = {"record_lifetime": 4.0, "clock_skew": 0.0, "forget_after": 60.0}
    with NetworkNode(tmp_path, "a", **quick) as a, NetworkNode(tmp_path, "b", **quick) as b:
        a.start()
        b.start(a.invite())
        eventually(lambda: a.knows(b) and b.knows(a))
        end = time.monotonic() + 6.0
        while time.monotonic() < end:
            assert a.report().state == b.report().state == "member"
            time.sleep(0.2)
        assert b.control.counter("renewals") >= 2
        # without its authority it ends, and is taken up again by it
        a.stop()
        eventually(lambda: any("could not be renewed" in line for line in b.report().warnings))
        eventually(lambda: b.report().state == "expired")
        eventually(lambda: b.knows())
        a.start()
        b.pump(1.0)
        eventually(lambda: b.report().state == "member")
        assert not any("could not be renewed" in line for line in b.report().warnings)
        eventually(lambda: a.knows(b) and b.knows(a))


@pytest.mark.setting("network.advertise")
def test_announced_networks_reach_others_as_far_as_they_are_permitted(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with (
        NetworkNode(tmp_path, "a") as a,
        NetworkNode(tmp_path, "b", advertise=("192.168.7.0/24", "192.168.9.0/24")) as b,
        NetworkNode(tmp_path, "c", accept_routes=False) as c,
    ):
        a.start()
        b.start(a.invite(routes="192.168.7.0/24,0.0.0.0/0"))
        c.start(a.invite())
        eventually(lambda: a.knows(b, c) and c.knows(a, b))
        assert b.own.advertised == ("192.168.7.0/24",)
        eventually(lambda: "192.168.7.0/24" in (a.pump() or a.peers[b.peer_id].prefixes))
        eventually(lambda: a.report() and a.routes is not None and a.routes.routes == ("192.168.7.0/24",))
        assert len(c.peers[b.peer_id].prefixes) == 2
        status = {peer.name: peer for peer in a.status().peers}
        assert status["b"].routes == ("192.168.7.0/24",) and status["b"].source == "membership"
        assert status["b"].virtual_ips == b.own.addresses


def test_a_node_is_found_by_name_address_and_peer_id_and_answers_pings(nodes: list[NetworkNode]) -> None:
    a, b, _ = nodes
    a.start()
    b.start(a.invite())
    eventually(lambda: a.knows(b) and b.knows(a))
    for what in ("b", "b.home.vpn", b.address, b.peer_id, b.own.addresses[1]):
        found = a.do("resolve", what=what)
        assert (found["peer_id"], found["name"]) == (b.peer_id, "b")
        assert found["addresses"] == [f"/ip4/127.0.0.1/tcp/{b.port}"]
        assert found["steps"][0]["source"] == "directory"
    assert a.do("resolve", what="nobody")["peer_id"] == ""
    trips = a.do("ping", who="b", count=3)
    assert [row["seq"] for row in trips] == [1, 2, 3]
    assert all(row["rtt_ms"] > 0 and not row["error"] for row in trips)
    assert "no peer" in a.ask("ping", who="nobody").error
    b.stop()
    (silent,) = a.do("ping", who="b", count=1)
    assert silent["rtt_ms"] is None and silent["error"]


def test_who_leaves_keeps_nothing(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    b.start(a.invite())
    eventually(lambda: b.knows(a))
    address = b.address
    assert b.do("leave") == {"told": True}
    b.stop()
    assert not list(b.directory.iterdir())
    # and its name and address are free at once
    assert a.members() == {"a"}
    (gone,) = [row for row in a.do("members", all=True) if row["name"] == "b"]
    assert gone["state"] == "left" and gone["by"] == ""
    c.start(a.invite(name="b", ip=address))
    assert c.address == address
    c.stop()


def test_who_leaves_while_no_authority_is_there_says_so(nodes: list[NetworkNode]) -> None:
    a, b, _ = joined(nodes)
    a.stop()
    assert b.do("leave") == {"told": False}


def test_invitations_are_listed_and_taken_back(nodes: list[NetworkNode]) -> None:
    a, b, c = nodes
    a.start()
    b.start(a.invite(name="b"))
    token, other = a.invite(groups="staff", uses=2), a.invite()
    rows = a.do("invitations")
    assert sorted((row["state"], row["uses"], *row["joined"]) for row in rows) == [
        ("open", 1),
        ("open", 2),
        ("used", 0, "b"),
    ]
    (cancelled,) = [row["id"] for row in rows if row["groups"]]
    assert len(a.do("invitations", cancel=cancelled)) == 2
    assert "no invitation" in a.ask("invitations", cancel=cancelled).error
    a.stop()
    a.start()
    assert len(a.do("invitations")) == 2
    with c.launch(token) as process:
        assert "no invitation" in process.failed().error
    c.start(other)


def test_one_identity_on_two_machines_is_noticed_by_both(nodes: list[NetworkNode], tmp_path: Path) -> None:
    a, b, _ = joined(nodes)
    b.stop()
    with NetworkNode(tmp_path, "twin") as twin:  # a copy of the disk
        twin.identity = b.identity
        for path in b.directory.iterdir():
            copy = twin.directory / path.name
            copy.write_bytes(path.read_bytes())
            os.chown(copy, path.stat().st_uid, -1)
        b.start()
        eventually(lambda: a.pump() or b.peer_id in a.peers)
        twin.start()
        for node, other in ((b, twin), (twin, b)):
            eventually(lambda node=node: node.pump() or node.report().warnings, 30.0)
            (line,) = node.report().warnings
            assert "another machine runs with this node's identity" in line
            assert f"/{other.port}" in line and f"/{node.port}" in line
        assert not a.report().warnings
