"""What a stranger may do: ask one question, on a connection that has no streams.

A node that may let others in, or has to tell them something, lets strangers finish the Noise handshake. Then nothing is
offered to them but `ENROL`, in the place of a muxer: one request and one answer (`vpnd.adapter.framing`) straight on
the secured connection, and its end. So a stranger never gets at a muxer, identify or anything else of libp2p, and
costs a socket, a task and one request for a bounded time. Members ask in the same way.

More guests than membership.max_guests: the one that came first has to go, as with handshakes, for an honest one takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.adapter.guards import Count, HandedOver
from vpnd.adapter.transport import UnknownPeer

ENROL = "/vpnd/enrol/1.0.0"

#: A request of a peer id, proven by Noise, to its answer; at once, and without raising.
Answer = Callable[[str, bytes], bytes]


class Desk:
    """Answers those who chose `ENROL`. Owner: the host's trio loop.

    `is_member`: who gets muxers too. `answer` and `max_request` (bytes) come with `open`; before, and while
    `admits` says no, strangers are refused where they always were: at the handshake.
    """

    def __init__(
        self,
        is_member: Callable[[str], bool],
        refused: Callable[[str], None],
        *,
        max_guests: int,
        timeout_s: float,
        count: Count,
    ) -> None:
        """`refused` is told the peer id of a stranger that wanted something else."""
        self._is_member = is_member
        self._refused = refused
        self._max_guests = max_guests
        self._timeout_s = timeout_s
        self._count = count
        self._answer: Answer | None = None
        self._admits: Callable[[str], bool] = lambda peer_id: False
        self._max_request = 0
        self._guests: dict[trio.CancelScope, None] = {}  # the first one longest here

    def open(self, answer: Answer, admits: Callable[[str], bool], max_request: int) -> None:
        """From now on requests are answered; strangers of whom `admits` says so may ask."""
        self._answer, self._admits, self._max_request = answer, admits, max_request

    def lets_in(self, peer_id: str) -> bool:
        """Whether the handshake with that peer may end well."""
        return self._is_member(peer_id) or (self._answer is not None and self._admits(peer_id))

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
            else:
                await self._receive_stranger(conn, str(peer_id))
            await self._serve_untrusted(conn, str(peer_id))
            raise HandedOver

        muxers.new_conn = new_conn

    async def _receive_stranger(self, conn: Any, peer_id: str) -> None:
        """Returns when the stranger wants to ask. Raises UnknownPeer."""
        try:
            await Multiselect({TProtocol(ENROL): None}).negotiate(MultiselectCommunicator(conn))
        except MultiselectError as error:
            self._refused(peer_id)
            raise UnknownPeer(f"{peer_id} is not a member") from error

    async def _serve_untrusted(self, conn: Any, peer_id: str) -> None:
        if self._answer is None:
            return
        if len(self._guests) >= self._max_guests:
            oldest = next(iter(self._guests))
            del self._guests[oldest]
            oldest.cancel()
            self._count("refused_guest_limit")
        with trio.move_on_after(self._timeout_s) as scope:
            self._guests[scope] = None
            try:
                request = await read_message_untrusted(conn, self._max_request)
                await write_message(conn, self._answer(peer_id, request))
            finally:
                self._guests.pop(scope, None)


class Asking:
    """What stands where libp2p expects a muxer, when a member chose `ENROL`."""

    def __init__(self, connection: Any, peer_id: ID) -> None:
        return
