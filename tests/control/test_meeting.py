"""Two members meet at a third: a relayed session, a direct one, and what others may not do there."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from control_nodes import Node, eventually, running
from lab.relay_process import RelayProcess

from vpnd.adapter import punch
from vpnd.adapter.dial import DialError, Patience
from vpnd.adapter.framing import say
from vpnd.adapter.guests import ENROL, Question
from vpnd.adapter.handoff import Detached
from vpnd.adapter.meeting import MeetingRefused
from vpnd.config.live import Live
from vpnd.config.schema import Config, Nat
from vpnd.control import relaying
from vpnd.control.common import Common
from vpnd.control.relaying import Relaying
from vpnd.control.traversal import Traversal
from vpnd.discovery.registry import Member
from vpnd.endpoint import Endpoint
from vpnd.nat import messages
from vpnd.nat.messages import BOTH, MEET, NAT, PUNCH, Meet
from vpnd.nat.paths import PUNCHED, RELAYED, Path, RelayAt
from vpnd.session import Established

PATIENCE = Patience(5.0, 2.0)


class Registry:
    """The nodes of a test."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)

    def members(self) -> list[Member]:
        return [self._member(node) for node in self.nodes]

    def find(self, peer_id: str) -> Member | None:
        return next((self._member(node) for node in self.nodes if node.peer_id == peer_id), None)

    def _member(self, node: Node) -> Member:
        addresses = (node.address,) if getattr(node, "reachable", False) else ()
        return Member(peer_id=node.peer_id, name=node.peer_id[-4:], prefixes=(), addresses=addresses)


class Page(Counter[str]):
    """Counters by name."""

    def add(self, name: str, amount: int = 1) -> None:
        self[name] += amount

    def set(self, name: str, value: int) -> None:
        self[name] = value


class Meeting:
    """Hidden nodes a and b, and r, which relays for them."""

    def __init__(self, config: Config, nursery: trio.Nursery, process: RelayProcess | None) -> None:
        self.config, self.live = config, Live(config)
        self.a, self.b, self.r = Node(), Node(), Node()
        self.r.reachable = True
        self.registry = Registry(self.a, self.b, self.r)
        self.page, self.counts = Page(), Counter()
        self.relaying = Relaying(self.live, self.registry, self.page, trio.current_time, lambda: None)
        self.process = process
        self.nursery = nursery

    def traversal(self, node: Node) -> Traversal:
        return Traversal(
            node.peer_id,
            Common(self.live, lambda name: self.counts.update((name,)), None, trio.current_time),
            self.registry,
            node.host,
            self.nursery,
            without=lambda: ("10.86.0.0/16",),
        )

    async def start(self) -> None:
        rendezvous = self.relaying.rendezvous
        self.r.host.serve(NAT, rendezvous.serve_stream, float("inf"))
        self.r.host.desk.serve(MEET, rendezvous.serve_leg_untrusted)
        if self.process is not None:
            self.nursery.start_soon(self.relaying.serve, self.process.channel)
        for node in (self.a, self.b):
            node.host.ends._addresses_with = lambda port: []  # loopback is all there is
        self.of_a, self.of_b = self.traversal(self.a), self.traversal(self.b)
        for traversal in (self.of_a, self.of_b):
            self.nursery.start_soon(traversal.run)
        await eventually(lambda: bool(self.of_a.relays() and self.of_b.relays()))
        if self.process is not None:
            await eventually(lambda: self.relaying._channel is not None)

    async def meet(self, mode: str = BOTH) -> list[Established]:
        """What a gets of a meeting with b."""
        got: list[Established] = []

        def deliver(detached: Detached) -> bool:
            detached.close()
            got.append(detached.session)
            return True

        member = self.registry.find(self.b.peer_id)
        assert member is not None
        await self.of_a.meet(member, mode, deliver)
        return got


@contextlib.asynccontextmanager
async def meeting(config: Config, process: RelayProcess | None = None) -> AsyncIterator[Meeting]:
    async with trio.open_nursery() as nursery:
        here = Meeting(config, nursery, process)
        async with running(here.a, here.b, here.r):
            await here.start()
            yield here
            nursery.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def members_are_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is where nobody needs a relay, and nothing is dialed: here it stands for the Internet."""
    from vpnd.nat import paths

    monkeypatch.setattr(relaying, "local_networks", list)
    monkeypatch.setattr(paths, "_means_one_machine", lambda endpoint, without: True)


def keys(session: Established) -> tuple[bytes, bytes]:
    return session.send_key, session.receive_key


def test_two_hidden_members_get_a_relayed_session_then_a_direct_one() -> None:
    async def main(process: RelayProcess) -> None:
        async with meeting(Config(), process) as here:
            got = await here.meet()
            # On loopback the direct one may be there first, and then no relayed one is made any more.
            assert got[-1].path.kind == PUNCHED and got[-1].initiator
            # a is there first: what b makes of it comes behind
            await eventually(lambda: keys(got[-1])[::-1] in [keys(session) for session in here.b.taken])
            await eventually(lambda: here.counts["punches_won"] == 2)
            assert {session.path.kind for session in here.b.taken} <= {RELAYED, PUNCHED}
            assert here.page["meets"] == 1

    with RelayProcess(Config()) as process:
        trio.run(main, process)


def test_what_is_relayed_is_the_other_members_own_session() -> None:
    async def main(process: RelayProcess) -> None:
        async with meeting(Config(nat=Nat(punch_timeout=0.1)), process) as here:
            kept: list[socket.socket] = []
            member = here.registry.find(here.b.peer_id)
            assert member is not None
            b_sockets: list[socket.socket] = []
            here.b._take = here.b.host._take_session = lambda detached: (  # type: ignore[method-assign,assignment]
                here.b.taken.append(detached.session),
                b_sockets.append(socket.socket(fileno=os.dup(detached.fd))),
            )

            def deliver(detached: Detached) -> bool:
                here.a.taken.append(detached.session)
                kept.append(socket.socket(fileno=os.dup(detached.fd)))
                detached.close()
                return True

            await here.of_a.meet(member, BOTH, deliver)
            relayed = next(session for session in here.a.taken if session.path.kind == RELAYED)
            assert relayed.path.relay == here.r.peer_id and relayed.peer_id == here.b.peer_id
            assert keys(relayed)[::-1] == keys(
                next(session for session in here.b.taken if session.path.kind == RELAYED)
            )
            assert here.page["relay_pairs"] == 1
            for one, other in ((kept[0], b_sockets[0]), (b_sockets[0], kept[0])):
                one.setblocking(True)
                other.setblocking(True)
                other.settimeout(5.0)
                one.sendall(b"sealed")
                assert await trio.to_thread.run_sync(other.recv, 100) == b"sealed"
            # who is removed is not relayed any more
            here.registry.nodes.remove(here.b)
            here.relaying.members_changed()
            await eventually(lambda: here.page["relay_pairs"] == 0)
            assert await trio.to_thread.run_sync(kept[0].recv, 100) == b""
            for sock in (*kept, *b_sockets):
                sock.close()

    # Without a direct way: the two may not punch here.
    with RelayProcess(Config()) as process, pytest.MonkeyPatch.context() as patch:
        from vpnd.nat import paths

        patch.setattr(paths, "_means_one_machine", lambda endpoint, without: False)
        trio.run(main, process)


def test_where_a_member_says_it_is_is_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both listen nowhere there: the two SYNs have to cross, from the very ports that were told."""
    from vpnd.nat import paths

    async def main() -> None:
        async with meeting(Config()) as here:
            for node in (here.a, here.b):
                node.host.ends._addresses_with = lambda port: [Endpoint(ipaddress.ip_address("::1"), port)]
            got = await here.meet(PUNCH)
            assert [session.path.address.startswith("[::1]:") for session in got] == [True]

    monkeypatch.setattr(paths, "to_punch", lambda you, peer, candidates, *_: candidates)
    trio.run(main)


@pytest.mark.setting("nat.punch_timeout", "nat.punch_interval")
def test_a_direct_connection_is_tried_again_and_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[float] = []
    stock = punch.reserve

    def reserve(*where: Any) -> Any:
        tries.append(trio.current_time())
        return stock(*where)

    async def main() -> None:
        async with meeting(Config(nat=Nat(punch_timeout=1.0, punch_interval=0.2))) as here:

            async def come_and_go(*_: Any) -> None:
                return

            here.of_b._conclude = come_and_go  # type: ignore[method-assign]
            monkeypatch.setattr(punch, "reserve", reserve)
            begun_s = trio.current_time()
            assert await here.meet(PUNCH) == []
            assert trio.current_time() - begun_s < 3.0
            # every 200 ms, and the one that listens
            assert 4 <= len(tries) <= 7

    trio.run(main)


def leg_request(to: str, token: bytes | None = None) -> Meet:
    return Meet(token or secrets.token_bytes(16), to, PUNCH)


async def refused(here: Meeting, node: Node, request: Meet) -> str:
    with pytest.raises(MeetingRefused) as caught:
        leg = await node.host.ends.meet(here.r.address, here.r.peer_id, request, PATIENCE)
        leg.close()
    return caught.value.reason


@pytest.mark.setting("nat.meet_timeout")
def test_tokens_are_of_one_caller_and_one_callee() -> None:
    async def main() -> None:
        config = Config(nat=Nat(meet_timeout=0.5))
        async with meeting(config) as here:
            c = Node()
            here.registry.nodes.append(c)
            async with running(c):
                assert await refused(here, here.a, leg_request(c.peer_id)) == messages.NOT_HERE
                assert await refused(here, here.a, leg_request(here.a.peer_id)) == messages.NOT_MEMBER
                # b does not come: it is not asked by its own traversal any more
                here.of_b._follows = lambda call: messages.ABSENT  # type: ignore[method-assign]
                assert await refused(here, here.a, leg_request(here.b.peer_id)) == messages.ABSENT
                # a third one cannot take the callee's place
                token, answers = secrets.token_bytes(16), []
                here.of_b._follows = lambda call: answers.append(call) or ""  # type: ignore[method-assign,func-returns-value]

                async def come(*_: Any) -> None:
                    return

                here.of_b._come = come  # type: ignore[method-assign]
                async with trio.open_nursery() as nursery:

                    async def call() -> None:
                        begun_s = trio.current_time()
                        assert (
                            await refused(here, here.a, leg_request(here.b.peer_id, token)) == messages.ABSENT
                        )
                        assert trio.current_time() - begun_s < 2.0

                    nursery.start_soon(call)
                    await eventually(lambda: bool(answers))
                    stolen = await refused(here, c, leg_request(here.a.peer_id, token))
                    assert stolen == messages.NOT_YOURS

    trio.run(main)


@pytest.mark.timeout(50)
@pytest.mark.parametrize("again", [False, True], ids=["is gone", "has begun anew"])
def test_who_calls_a_member_that_ends_hears_it_at_once(again: bool) -> None:
    async def main() -> None:
        async with meeting(Config(nat=Nat(meet_timeout=60.0, relay_retry=60.0))) as here:
            called = trio.Event()

            async def answer(*_: Any) -> None:
                called.set()

            here.of_b._answer = answer  # type: ignore[method-assign]
            async with trio.open_nursery() as nursery:

                async def call() -> None:
                    assert await refused(here, here.a, leg_request(here.b.peer_id)) == messages.ABSENT

                nursery.start_soon(call)
                await called.wait()
                if again:
                    stream = await here.b.host.open_stream((here.r.address,), here.r.peer_id, NAT)
                    await say(stream, messages.Hello(messages.UNKNOWN))
                else:
                    (relay,) = here.of_b._relays.values()
                    await relay.stream.reset()

    trio.run(main)


def test_who_comes_to_a_meeting_is_who_was_called() -> None:
    """A relay that joins others than it said gets nobody a session."""

    async def main() -> None:
        a, b, c = Node(), Node(), Node()
        async with running(a, b, c):
            for expected, taken in ((b, 0), (c, 1)):
                with socket.create_server(("127.0.0.1", 0)) as listening:
                    one = socket.create_connection(listening.getsockname())
                    other, _ = listening.accept()
                path = Path(kind=RELAYED)
                answers: list[bool] = []

                async def respond(sock: socket.socket = one, peer_id: str = expected.peer_id) -> None:
                    answers.append(await a.host.ends.respond(sock, path, peer_id))  # noqa: B023

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(respond)
                    with contextlib.suppress(Exception):
                        (await c.host.ends.initiate(other, path, a.peer_id, 5.0)).close()
                assert answers == [bool(taken)] and len(a.taken) == taken

    trio.run(main)


def test_a_stranger_asks_who_takes_guests_over_a_relay_and_nobody_else() -> None:
    """What an invited machine does whose authority is behind a NAT; the relay cannot answer in its place."""

    async def main(process: RelayProcess) -> None:
        async with meeting(Config(), process) as here:
            stranger, guests = Node(), set[str]()
            members = {here.a.peer_id, here.b.peer_id, here.r.peer_id}
            for node in (here.a, here.b, here.r):
                node.members = members
            rendezvous = here.relaying.rendezvous
            here.r.host.desk.serve(MEET, rendezvous.serve_leg_untrusted, rendezvous.takes_guests)
            here.of_b._takes_guests = lambda peer_id: bool(guests) if not peer_id else peer_id in guests

            def answer(peer_id: str, request: bytes) -> bytes:
                return request + peer_id.encode()

            here.b.host.desk.open(Question(ENROL, answer, lambda peer_id: peer_id in guests, 100))
            relay = RelayAt(here.r.address, here.r.peer_id)

            async def ask(peer_id: str) -> bytes:
                return await stranger.host.ask((), peer_id, b"let me in, ", 1000, relays=(relay,))

            async with running(stranger):
                with pytest.raises(DialError, match="closed after the handshake"):
                    await ask(here.b.peer_id)  # nobody takes guests
                guests.add(stranger.peer_id)
                here.of_b.guests_changed()
                await eventually(lambda: rendezvous.takes_guests(""))
                assert await ask(here.b.peer_id) == b"let me in, " + stranger.peer_id.encode()
                with pytest.raises(DialError, match=messages.NOT_MEMBER):
                    await ask(here.a.peer_id)
                guests.clear()
                guests.add("somebody else")
                with pytest.raises(DialError):
                    await ask(here.b.peer_id)
                # and no session, whatever it says
                with pytest.raises(MeetingRefused, match=messages.NOT_MEMBER):
                    await stranger.host.ends.meet(
                        here.r.address, here.r.peer_id, Meet(bytes(16), here.b.peer_id, BOTH), PATIENCE
                    )
                here.of_b._takes_guests = lambda peer_id: False
                here.of_b.guests_changed()
                await eventually(lambda: not rendezvous.takes_guests(""))

    with RelayProcess(Config()) as process:
        trio.run(main, process)
