"""What a stranger may do: ask one question, on a connection that has no streams.

A node in a network lets strangers finish the Noise handshake. Then nothing is offered to them but `QUESTIONS`, in the
place of a muxer: one request and one answer (`vpnd.adapter.framing`) straight on the secured connection, and its end.
So a stranger never gets at a muxer, identify or anything else of libp2p, and costs a socket, a task and one request for
a bounded time. Members ask in the same way.

    ENROL       let me in, or renew my membership     where somebody may be let in, or has to be told that it is out
    INTRODUCE   this shows that I am a member         at every member
    BOTH        the same, and what shows it of you?   at every member newer than 0.1.0

More guests than membership.max_guests: who has to go is decided as with handshakes (`vpnd.adapter.arrivals`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import trio
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from vpnd.adapter.arrivals import Arrival, Places
from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.adapter.guards import Count, HandedOver
from vpnd.adapter.noise import UnknownPeer
from vpnd.adapter.transport import raw_of

ENROL = "/vpnd/enrol/1.0.0"
INTRODUCE = "/vpnd/introduce/1.0.0"
BOTH = "/vpnd/introduce/1.1.0"
QUESTIONS = (ENROL, INTRODUCE, BOTH)


#: What is done with the secured connection of a member; it is closed afterwards.
Service = Callable[[Any, str], Awaitable[None]]


class Question(NamedTuple):
    """What may be asked under a protocol of `QUESTIONS`, in at most `max_request` bytes.

    `answer`: a request of a peer id, proven by Noise, to its answer; at once, and without raising. `admits`: which
    strangers may ask; members always may.
    """

    protocol: str
    answer: Callable[[str, bytes], bytes]
    admits: Callable[[str], bool]
    max_request: int


class Desk:
    """Answers those who chose a question. Owner: the host's trio loop.

    `is_member`: who gets muxers too. Before `open`, and those whom no question admits, strangers are refused where
    they always were: at the handshake.
    """

    def __init__(
        self,
        is_member: Callable[[str], bool],
        refused: Callable[[str], None],
        *,
        places: Places,
        timeout_s: float,
        count: Count,
    ) -> None:
        """`refused` is told the peer id of a stranger that wanted something else."""
        self._is_member = is_member
        self._refused = refused
        self._places = places
        self._timeout_s = timeout_s
        self._count = count
        self._questions: tuple[Question, ...] = ()
        self._services: dict[str, tuple[Service, Callable[[str], bool]]] = {}
        self._guests: dict[Arrival, trio.CancelScope] = {}

    def open(self, *questions: Question) -> None:
        """From now on these are answered."""
        self._questions = questions

    def serve(
        self, protocol: str, service: Service, admits: Callable[[str], bool] = lambda peer_id: False
    ) -> None:
        """Members that choose `protocol` in the place of a muxer get `service`; strangers it admits, for as long as a
        question may take."""
        self._services[protocol] = service, admits

    def lets_in(self, peer_id: str) -> bool:
        """Whether the handshake with that peer may end well."""
        return self._is_member(peer_id) or any(admits(peer_id) for _, admits in self._offers())

    def _offers(self) -> Iterator[tuple[str, Callable[[str], bool]]]:
        """Protocols, and which strangers may choose them."""
        yield from ((question.protocol, question.admits) for question in self._questions)
        yield from ((protocol, admits) for protocol, (_, admits) in self._services.items())

    def install(self, swarm: Any) -> None:
        """Stand in front of the muxers of a swarm. Before it listens."""
        muxers = swarm.upgrader.muxer_multistream
        stock = muxers.new_conn

        async def new_conn(conn: Any, peer_id: ID) -> Any:
            if conn.is_initiator or self._is_member(str(peer_id)):
                was_member = self._is_member(str(peer_id))
                muxed = await stock(conn, peer_id)
                if was_member and not self._is_member(str(peer_id)):
                    # Removed meanwhile: what closes its connections does not know of this one yet.
                    self._refused(str(peer_id))
                    raise UnknownPeer(f"{peer_id} is not a member any more")
                if not isinstance(muxed, Asking):
                    return muxed
                if conn.is_initiator:  # we proposed muxers first, so we are a stranger there
                    raise MultiselectError("no muxer is offered to us")
                await self._serve_untrusted(conn, str(peer_id), muxed.protocol)
            else:
                await self._receive_stranger_untrusted(conn, str(peer_id))
            raise HandedOver

        muxers.new_conn = new_conn

    async def _receive_stranger_untrusted(self, conn: Any, peer_id: str) -> None:
        """Answer a stranger. Raises UnknownPeer when it asks nothing that it may."""
        offered = Multiselect()
        for protocol, admits in self._offers():
            if admits(peer_id):
                offered.add_handler(TProtocol(protocol), None)
        try:
            chosen, _ = await offered.negotiate(MultiselectCommunicator(conn))
            await self._serve_untrusted(conn, peer_id, str(chosen))
        except (MultiselectError, IOException) as error:
            # It hung up without a question: what it came for was not offered.
            self._refused(peer_id)
            raise UnknownPeer(f"{peer_id} is not a member") from error

    async def _serve_untrusted(self, conn: Any, peer_id: str, protocol: str) -> None:
        service, _ = self._services.get(protocol, (None, None))
        if service is not None and self._is_member(peer_id):
            await service(conn, peer_id)
            return
        question = next((one for one in self._questions if one.protocol == protocol), None)
        if question is None and service is None:
            return
        arrival = raw_of(conn)
        gone = self._places.enter(arrival)
        if gone is not None:
            self._guests[gone].cancel()
            self._count("refused_guest_limit")
        with trio.move_on_after(self._timeout_s) as scope:
            self._guests[arrival] = scope
            try:
                if service is not None:
                    await service(conn, peer_id)
                elif question is not None:
                    request = await read_message_untrusted(conn, question.max_request)
                    await write_message(conn, question.answer(peer_id, request))
            finally:
                del self._guests[arrival]
                self._places.leave(arrival)


class Asking:
    """What stands where libp2p expects a muxer, when a member chose a question, `protocol`."""

    def __init__(self, protocol: str, connection: Any, peer_id: ID) -> None:
        self.protocol = protocol
