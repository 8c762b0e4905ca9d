"""Who is let in by an introduction, who is not and why, and how often a member is asked."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path

import pytest
import trio
from membership_world import DAY, LIFETIME, NETWORK, NOW, World, key, peer, presence
from trio.testing import MockClock

from vpnd.adapter.dial import DialError
from vpnd.adapter.guests import BOTH, INTRODUCE
from vpnd.config.live import Live
from vpnd.config.schema import Config, Discovery
from vpnd.control.common import Common
from vpnd.control.introducing import Introducing
from vpnd.control.state import OwnNetwork
from vpnd.logs import Seldom
from vpnd.membership import enrolment, introduction, network
from vpnd.membership.introduction import Admitted, Introduction
from vpnd.membership.store import Store


class Member:
    """One node's part of the world `b`, `c` … are in; it has heard of nothing but itself and `known`."""

    def __init__(
        self, path: Path, world: World, name: str, *known: str, config: Config | None = None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.now_ms = NOW
        self.accepted: list[str] = []
        dice = random.Random(1)
        self.own = OwnNetwork(
            Config(), NETWORK, Store(path / name), peer_id=peer(name), node_name=name, identity=key(name),
            root=None, dice=dice,
        )  # fmt: skip
        for one in (name, *known):
            self.own.directory.merge(introduction.of_member(world.directory, peer(one)).statements, NOW)
        self.introducing = Introducing(
            self.own,
            Common(
                Live(config or Config()),
                lambda what: self.counts.update((what,)),
                Seldom(logging.getLogger("test"), Live(Config()), lambda: 0.0),
                lambda: 0.0,
                lambda: self.now_ms,
                dice,
            ),
            act=self._act,
        )

    def _act(self, outcome) -> None:
        self.counts.update(f"refused_{reason}" for reason in outcome.refused)
        self.accepted += [statement.kind.name for statement in outcome.accepted]

    def told(self, name: str, request: Introduction) -> str:
        """What it answers to that node's introduction: nothing, or the reason of the refusal."""
        assert self.introducing.admits(peer(name))
        data = self.introducing.answer_untrusted(peer(name), introduction.encode(request))
        answer = introduction.parse_answer_untrusted(data)
        assert isinstance(answer, Admitted) or not self.knows(name)
        return "" if isinstance(answer, Admitted) else answer.reason

    def knows(self, name: str) -> bool:
        return self.own.directory.find(peer(name), self.now_ms) is not None


@pytest.fixture
def world() -> World:
    """b was let in by an authority that c may not know; c by the root."""
    world = World()
    world.grant("second")
    world.enrol("b", by="second")
    world.enrol("c")
    world.put(presence("b"))
    return world


def said_by(world: World, name: str) -> Introduction:
    introduced = introduction.of_member(world.directory, peer(name))
    assert introduced is not None
    return introduced


def test_a_member_is_known_once_it_has_introduced_itself(world, tmp_path) -> None:
    c = Member(tmp_path, world, "c")
    assert not c.knows("b")
    assert c.told("b", said_by(world, "b")) == ""
    assert c.knows("b") and c.accepted == ["GRANT", "MEMBERSHIP", "PRESENCE"]
    assert c.told("b", said_by(world, "b")) == ""
    assert c.counts == {"introduced": 1}


def test_nobody_else_is_let_in_and_every_refusal_is_counted_once(world, tmp_path) -> None:
    c = Member(tmp_path, world, "c")
    b = said_by(world, "b")
    grant, membership, said = b.statements
    forged = bytes([*membership[:10], membership[10] ^ 1, *membership[11:]])
    other = network.create("other", b"o" * 32, "10.86.0.0/16")
    cases = {
        "wrong_network": ("b", Introduction(other.id, b.statements)),
        "not_member": ("stranger", b),  # the statements of another one
        "unknown_authority": ("late", Introduction(NETWORK.id, (_late(world),))),
        "forged": ("x", Introduction(NETWORK.id, (grant, forged))),
    }
    for reason, (name, request) in cases.items():
        before = Counter(c.counts)
        assert c.told(name, request) == reason
        assert c.counts - before == Counter({f"refused_{reason}": 1}), reason
    assert c.told("y", Introduction(NETWORK.id, ())) == "not_member"
    data = c.introducing.answer_untrusted(peer("x"), b"\xc1")
    assert introduction.parse_answer_untrusted(data).reason == "malformed"
    assert c.counts["refused_malformed"] == 1 and said


def _late(world: World) -> bytes:
    """A membership by an authority whose grant is not shown."""
    world.grant("third")
    world.enrol("late", by="third")
    return world.directory.membership(peer("late")).wire


def test_the_expired_stay_out(world, tmp_path) -> None:
    c = Member(tmp_path, world, "c")
    request = said_by(world, "b")
    c.now_ms = NOW + LIFETIME + DAY
    assert not c.introducing.admits(peer("b")), "it is no member itself any more"
    world.put(world.root.renew(peer("c"), NOW + DAY), now_ms=NOW + DAY)
    c.own.directory.merge([world.directory.membership(peer("c")).wire], NOW + DAY)
    c.now_ms = NOW + LIFETIME + DAY // 2
    assert c.told("b", request) == "expired"


def test_a_removed_member_stays_out_and_is_given_the_proof(world, tmp_path) -> None:
    c = Member(tmp_path, world, "c", "b")
    request = said_by(world, "b")
    world.put(removal := world.root.remove(peer("b"), NOW + 1), now_ms=NOW + 1)
    c.now_ms = NOW + 1
    c.own.directory.merge([removal.wire], NOW + 1)
    data = c.introducing.answer_untrusted(peer("b"), introduction.encode(request))
    answer = introduction.parse_answer_untrusted(data)
    assert isinstance(answer, enrolment.Refusal) and answer.reason == "removed"
    assert removal.wire in answer.statements
    assert c.counts == {"refused_removed": 1}
    assert c.told("b", request) == "removed" and not c.knows("b")


class Asked:
    """A host whose member answers `answer` to every introduction; None: it does not answer at all."""

    def __init__(self, answer: Admitted | enrolment.Refusal | None) -> None:
        self.answer = answer
        self.asked = 0
        self.question = INTRODUCE

    async def ask(self, addresses, peer_id, request, max_answer, question) -> bytes:
        assert question == self.question and introduction.parse_request_untrusted(request).statements
        self.asked += 1
        await trio.sleep(1.0)
        if self.answer is None:
            raise DialError("silence")
        return introduction.encode(self.answer)


def simulated(main) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


async def asks(member: Member, host: Asked, name: str) -> bool:
    return await member.introducing.introduce(host, ("/ip4/192.0.2.9/tcp/1",), peer(name))


def test_who_wants_to_know_at_once_asks_once(world, tmp_path) -> None:
    async def main() -> None:
        b, host = Member(tmp_path, world, "b", "c"), Asked(Admitted())
        found: list[bool] = []

        async def want() -> None:
            found.append(await asks(b, host, "c"))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(want)
        assert found == [True] * 4 and host.asked == b.counts["introductions"] == 1
        assert await asks(b, host, "c") and host.asked == 2, "it was said yes to, so it may ask again"

    simulated(main)


@pytest.mark.parametrize("answer", [enrolment.Refusal(reason="directory_full"), None])
def test_who_is_told_no_asks_less_and_less_often(world, tmp_path, answer) -> None:
    async def main() -> None:
        b, host = Member(tmp_path, world, "b", "c"), Asked(answer)
        for _ in range(1000):
            assert not await asks(b, host, "c")
            await trio.sleep(0.1)
        longest_s = Config().retry.max_interval
        assert 3 <= host.asked <= 20 + 2 * 100 / longest_s
        before = host.asked
        b.introducing.begin_anew()
        await asks(b, host, "c")
        assert host.asked == before + 1, "the network is another one, so it is tried at once"

    simulated(main)


def test_a_removed_node_learns_of_it_from_the_refusal(world, tmp_path) -> None:
    async def main() -> None:
        b = Member(tmp_path, world, "b", "c")
        world.put(removal := world.root.remove(peer("b"), NOW))
        host = Asked(enrolment.Refusal(reason="removed", statements=(removal.wire,)))
        assert not await asks(b, host, "c")
        assert not b.knows("b") and b.accepted == ["REMOVAL"]
        assert not await asks(b, host, "c") and host.asked == 1, "it has nothing to show any more"

    simulated(main)


def test_who_is_no_member_here_is_not_asked(world, tmp_path) -> None:
    async def main() -> None:
        b, host = Member(tmp_path, world, "b"), Asked(Admitted())
        assert not await asks(b, host, "c") and not host.asked

    simulated(main)


@pytest.mark.setting("discovery.bootstrap")
@pytest.mark.parametrize("configured", [True, False])
def test_nobody_is_asked_but_members_and_whom_the_operator_names(world, tmp_path, configured) -> None:
    address = f"/ip4/192.0.2.9/tcp/1/p2p/{peer('c')}"
    config = Config(discovery=Discovery(bootstrap=(address,) if configured else ()))

    async def main() -> None:
        b, host = Member(tmp_path, world, "b", config=config), Asked(Admitted())
        host.question = BOTH
        assert not b.knows("c")
        assert await asks(b, host, "c") == configured and host.asked == configured

    simulated(main)


def test_a_member_that_nobody_has_heard_of_is_known_from_its_answer_and_a_removed_one_is_not_asked(
    world, tmp_path
) -> None:
    address = f"/ip4/192.0.2.9/tcp/1/p2p/{peer('c')}"
    config = Config(discovery=Discovery(bootstrap=(address,)))
    shown = introduction.of_member(world.directory, peer("c")).statements

    async def main() -> None:
        b, host = Member(tmp_path, world, "b", config=config), Asked(introduction.Acquainted(shown))
        host.question = BOTH
        assert not b.knows("c") and await asks(b, host, "c") and b.knows("c")

        host.question = INTRODUCE
        removed = world.root.remove(peer("c"), NOW)
        b.own.directory.merge([removed.wire], NOW)
        assert not b.knows("c") and not await asks(b, host, "c") and host.asked == 1

    simulated(main)
