"""Paths on a made-up network: found, lost, moved, measured; and how fast datagrams go out over them."""

from __future__ import annotations

from random import Random

import pytest
from packet.builder import V4, record, udp, vnet

from datagram.pair import HERE, THERE, Net
from shards.datagram import spec
from shards.datagram.pace import Pace
from shards.datagram.path import Path
from vpnd.config.live import Live
from vpnd.config.schema import Carrier, Config

PACKET = record(vnet(udp(V4, bytes(1000))))


def up(seed: int = 1, **more: object) -> Net:
    """A way on which both ends have found each other."""
    net = Net(Random(seed), **more)
    net.run(3.0)
    assert all(end.path.alive for end in net.ends)
    return net


def test_a_silent_path_tries_first_what_the_peer_has_said_last_and_remembers_little() -> None:
    path = Path(Live(Config()), (("192.0.2.2", 4001),), lambda: 1, 0.0)
    for port in range(5000, 5050):
        path.consider((("192.0.2.2", port), ("192.0.2.2", 4001)), 0.0)
        assert path.address == ("192.0.2.2", port)
    tried = set()
    for _ in range(100):
        path.step(path.next_s, used=False)
        tried.add(path.address)
    assert len(tried) == 8


def test_both_find_each_other_and_measure_the_way() -> None:
    net = up(delay_s=0.02)
    a, b = net.ends
    assert b.path.address == HERE, "who does not know where the other is answers to where it asks from"
    assert [end.path.rtt_s for end in net.ends] == [pytest.approx(0.04, abs=0.001)] * 2
    assert a.path.jitter_s < 0.001
    net.jitter_s = 0.02
    net.run(20.0, used=True)
    assert a.path.jitter_s > 0.003


@pytest.mark.parametrize(("most", "found"), [(1472, 1472), (1450, 1444), (1300, 1272), (1210, 1200)])
@pytest.mark.parametrize("loss", [0.0, 0.3])
def test_the_largest_datagram_that_passes_is_found(most: int, found: int, loss: float) -> None:
    net = Net(Random(1), loss=0.0)
    net.most, net.loss = most, loss
    for _ in range(100):
        net.run(0.2, used=True)
        if all(end.path.alive and end.path.size == found for end in net.ends):
            return
    raise AssertionError([end.path.size for end in net.ends])


@pytest.mark.setting("carrier.largest_datagram")
def test_no_larger_datagrams_than_the_setting_says() -> None:
    assert [end.path.size for end in up(largest_datagram=1400).ends] == [1400, 1400]


@pytest.mark.setting("carrier.search_interval")
def test_a_path_that_has_become_wider_is_noticed() -> None:
    net = Net(Random(1), search_interval=20.0)
    net.most = 1300
    net.run(3.0)
    net.most = 1472
    net.run(10.0, used=True)
    assert net.ends[0].path.size == 1272
    net.run(20.0, used=True)
    assert net.ends[0].path.size == 1472


def test_a_path_that_has_become_narrower_is_found_again_at_its_size() -> None:
    net = up()
    net.most = 1300
    net.run(5.0, used=True)
    assert all(end.path.alive and end.path.size == 1272 for end in net.ends)


def test_a_refused_size_is_not_used_again() -> None:
    net = up()
    path = net.ends[0].path
    path.refused(1472)
    assert path.alive and path.size == spec.BASE_BYTES


@pytest.mark.parametrize("which", [0, 1], ids=["there", "back"])
@pytest.mark.setting("carrier.probe_timeout")
def test_a_path_in_use_that_ends_is_noticed_soon_by_both(which: int) -> None:
    net = up(probe_interval=0.05, probe_timeout=0.15)
    net.run(0.2, used=True)
    net.blocked = {net.ends[which]}
    net.run(0.25, used=True)
    assert not any(end.path.alive for end in net.ends)
    net.blocked = set()
    net.run(3.0)
    assert all(end.path.alive for end in net.ends)


@pytest.mark.setting("carrier.probe_interval")
def test_a_path_in_use_is_probed_as_often_as_the_setting_says() -> None:
    net = up(probe_interval=1.0, probe_timeout=2.0)
    before = net.sent
    net.run(20.0, used=True)
    assert 76 <= net.sent - before <= 90, "a probe and its answer each way, each second"


def test_by_default_it_is_noticed_within_a_second() -> None:
    net = up()
    net.run(1.0, used=True)
    net.blocked = {net.ends[0]}
    net.run(0.99, used=True)
    assert not any(end.path.alive for end in net.ends)


@pytest.mark.parametrize("seed", range(4))
def test_loss_alone_does_not_end_a_path(seed: int) -> None:
    net = up(seed)
    net.loss = 0.05
    for _ in range(100):
        net.run(0.1, used=True)
        assert all(end.path.alive for end in net.ends)


@pytest.mark.setting("carrier.keepalive")
def test_a_path_nobody_uses_is_kept_open_and_costs_little() -> None:
    net = up(keepalive=4.0)
    net.run(10.0)
    before = net.sent
    net.run(40.0)
    assert 18 <= net.sent - before <= 32, "a probe and its answer, by one of the two"


@pytest.mark.setting("carrier.retry_interval")
def test_a_peer_that_does_not_answer_is_asked_less_and_less_often() -> None:
    net = Net(Random(1), retry_interval=2.0)
    net.blocked = set(net.ends)
    net.run(10.0)
    before = net.sent
    net.run(20.0)
    assert net.sent - before == 10


def test_a_peer_is_followed_to_its_new_address() -> None:
    net = up()
    a, b = net.ends
    a.address = ("198.51.100.9", 777)
    net.send(a, [PACKET])
    net.run(0.1)
    assert b.path.address == a.address and b.path.alive and len(b.records) == 1
    net.send(b, [PACKET])
    net.run(0.1)
    assert len(a.records) == 1


def test_nobody_else_moves_a_path() -> None:
    """Who has seen a datagram sends it on first, from its own address, but cannot answer what is asked there."""
    net = up()
    a, b = net.ends
    thief = ("203.0.113.66", 6)
    (sent,) = a.seal([PACKET])
    b.take([sent], thief, net.now_s)
    assert [(each.address, each.size) for each in b.path.probes] == [(thief, 28 + spec.PROBE_BYTES)], (
        "no more is sent there than came from there"
    )
    net.run(3.0, used=True)
    assert b.path.address == HERE and b.path.alive


def test_an_answer_to_nothing_or_from_elsewhere_says_nothing() -> None:
    net = up()
    path = net.ends[0].path
    path.step(net.now_s + 1, True)
    token = path.probes[0].token
    path.answered(("203.0.113.66", 6), token, net.now_s + 1)
    path.answered(THERE, 12345, net.now_s + 1)
    net.blocked = set(net.ends)
    path.probes.clear()
    net.run(3.0, used=True)
    assert not path.alive


def test_a_peer_that_is_everywhere_is_not_followed_everywhere() -> None:
    path = up().ends[0].path
    for number in range(1000):
        path.heard(("203.0.113.1", number + 1), 3.0)
    assert len(path.probes) == len(path._sent) <= 64


def test_a_peer_cannot_have_more_answers_at_once_than_a_few() -> None:
    path = up().ends[0].path
    for token in range(1000):
        path.asked(THERE, token + 1, 1.0)
    assert len(path.probes) <= 64


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.2])
def test_the_loss_towards_the_peer_is_known(loss: float) -> None:
    net = up()
    net.loss = loss
    a = net.ends[0]
    for _ in range(400):
        net.send(a, [PACKET] * 10)
        net.run(0.02)
    assert a.path.loss == pytest.approx(loss, abs=0.01 + loss / 2)
    opener = net.ends[1].association.opener
    assert opener.top + 1 == opener.received + opener.missed - opener.late


# --- pace


def pace(**carrier: float) -> Pace:
    return Pace(Live(Config(carrier=Carrier(**carrier))))


def flooded(each: Pace, now_s: float) -> tuple[float, int]:
    """A quarter of a second of all that it lets through; the time then, and the bytes."""
    out = 0
    for _ in range(250):
        now_s += 0.001
        while each.wait_s(now_s) == 0.0 and out < 2_500_000:
            each.spent(1000, 1)
            out += 1000
    return now_s, out


def test_nothing_is_held_back_on_a_path_that_loses_little() -> None:
    each = pace()
    for _ in range(50):
        each.spent(1_000_000, 1000)
        each.learn(1000, 0.02, 0.25)
        assert each.wait_s(1.0) == 0.0


@pytest.mark.setting("carrier.loss_limit")
def test_a_flood_is_brought_down_to_what_the_path_takes() -> None:
    each, now_s, takes = pace(loss_limit=0.05), 0.0, 500_000.0
    sent = lost = 0.0
    for number in range(200):
        now_s, out = flooded(each, now_s)
        arrived = min(out, takes / 4)
        each.learn(out // 1000, 1 - arrived / out, 0.25)
        if number >= 20:
            sent, lost = sent + out, lost + out - arrived
    assert lost / sent < 0.08 and sent / (180 * 0.25) > takes * 0.7


@pytest.mark.parametrize(("more", "least", "most"), [(True, 0.35, 0.55), (False, 0.7, 1.1)])
def test_a_flood_leaves_half_of_the_way_to_streams_that_have_more(
    more: bool, least: float, most: float
) -> None:
    """Both are dropped alike in the way's queue, and the streams take what they get."""
    each, now_s, takes, streams = pace(), 0.0, 500_000.0, 400_000.0
    shares = []
    for _ in range(120):
        now_s, out = flooded(each, now_s)
        offered = out * 4
        through = min(1.0, takes / (offered + streams))
        each.beside = streams * through if more else None
        each.learn(out // 1000, 1 - through, 0.25)
        shares.append(offered * through / takes)
        streams = max(20_000.0, min(takes - offered * through, streams * 1.25)) if more else 1000.0
    assert least < sum(shares[40:]) / 80 < most


def test_a_call_is_never_held_back_for_the_loss_of_a_few() -> None:
    each = pace()
    each.spent(32 * 200, 32)
    each.learn(32, 0.4, 0.6)
    assert each.rate is None


def test_the_pace_is_forgotten_when_it_holds_nothing_back() -> None:
    each = pace()
    each.spent(10_000_000, 10_000)
    each.learn(10_000, 0.5, 0.25)
    assert each.rate is not None and each.wait_s(1.0) == 0.0
    each.spent(1000, 1)
    each.learn(1, 0.0, 0.25)
    assert each.rate is None
