"""A member's side of meetings: its leg to the relay, and sessions over what comes of it.

The leg is a TCP connection of its own, so the relay sees which outside port it has; the direct connection is then tried
from that port. When the relay joins two legs, each end leaves the Noise it has with the relay: from there on the socket
is the other member's, and a session is made on it as on any other, by who called as the one that dials.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from msgspec.structs import replace

from vpnd.adapter.dial import DialError, Patience, asking, dial_secured, patiently, secured
from vpnd.adapter.framing import hear_untrusted, say
from vpnd.adapter.handoff import Detached, detach
from vpnd.adapter.muxer import SESSION_MUXERS
from vpnd.adapter.punch import FreshTcp, way
from vpnd.adapter.transport import raw_of, socket_of
from vpnd.endpoint import Endpoint, of_socket_address
from vpnd.nat import messages
from vpnd.nat.messages import ASK, TOKEN_BYTES, Meet, Met, Refused
from vpnd.nat.paths import RELAYED, Path, RelayAt


class MeetingRefused(DialError):
    """The relay did not let two meet; `reason` is one of vpnd.nat.messages.REFUSALS."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the relay refused: {reason}")
        self.reason = reason


class Leg:
    """One leg after Met. `places`: our end of it, and where else this machine has its port. Close it."""

    def __init__(self, met: Met, sock: socket.socket, places: Sequence[Endpoint]) -> None:
        self.met = met
        self.places = places
        self.relay: Endpoint = of_socket_address(sock.getpeername())
        self._sock: socket.socket | None = sock

    def take(self, relay_id: str) -> tuple[socket.socket, Path]:
        """The socket on which the other member is, where the relay joins legs; once, and the caller's then."""
        sock, self._sock = self._sock, None
        assert sock is not None
        return sock, Path(kind=RELAYED, address=str(self.relay), relay=relay_id)

    def close(self) -> None:
        """Idempotent."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class Ends:
    """Makes legs and sessions. `addresses_with(port)`: where this machine is, the most useful first. Owner: the host's
    trio loop."""

    def __init__(
        self,
        swarm: Any,
        ciphers: Sequence[str],
        tcp: FreshTcp,
        addresses_with: Callable[[int], Sequence[Endpoint]],
    ) -> None:
        self._swarm = swarm
        self._muxers = {SESSION_MUXERS[cipher]: cipher for cipher in ciphers}
        self._tcp, self._addresses_with = tcp, addresses_with

    async def meet(self, address: str, relay_id: str, request: Meet, patience: Patience) -> Leg:
        """Meet at the relay that listens at `address`; it is told where else this machine can be tried. Raises
        MeetingRefused, DialError."""

        async def exchange(session: Any, _: str) -> Leg | str:
            local = of_socket_address(socket_of(raw_of(session)).socket.getsockname())
            others = self._addresses_with(local.port)[: messages.MAX_CANDIDATES]
            if request.mode == ASK:
                others = []
            asked = replace(request, candidates=tuple(map(str, others)))
            await say(session, asked)
            answer = await hear_untrusted(session, Met, Refused)
            if isinstance(answer, Refused):
                return answer.reason
            assert isinstance(answer, Met)
            if session.high_watermark > session.low_watermark:
                raise DialError("the relay said something behind Met")
            fd = os.dup(socket_of(raw_of(session)).socket.fileno())
            return Leg(answer, socket.socket(fileno=fd), tuple(dict.fromkeys((local, *others))))

        upgrader, target = self._swarm.upgrader, ID.from_string(relay_id)
        got = await dial_secured(self._tcp, upgrader, address, target, [messages.MEET], patience, exchange)
        if isinstance(got, str):
            raise MeetingRefused(got)
        return got

    async def initiate(self, sock: socket.socket, path: Path, peer_id: str, timeout_s: float) -> Detached:
        """A session with `peer_id`, which waits for it at the other end of `sock`. Owns the socket. Raises DialError,
        or whatever libp2p raises."""

        async def take_out(session: Any, chosen: str) -> Detached:
            return detach(session, self._muxers[chosen])

        stream = way(sock, path, peer_id)
        self._tcp.watch(stream.stream)
        raw = RawConnection(stream, True)
        target = ID.from_string(peer_id)
        with trio.move_on_after(timeout_s):
            return await secured(raw, self._swarm.upgrader, target, list(self._muxers), timeout_s, take_out)
        raise DialError(f"no session within {timeout_s:g} s")

    async def ask(
        self, relay: RelayAt, peer_id: str, question: str, request: bytes, max_answer: int, patience: Patience
    ) -> bytes:
        """What `peer_id` answers, met at a relay, to one request; see vpnd.adapter.guests. Raises DialError."""
        meet = Meet(secrets.token_bytes(TOKEN_BYTES), peer_id, ASK)
        leg = await self.meet(relay.address, relay.peer_id, meet, patience)
        if not leg.met.relayed:
            leg.close()
            raise DialError("the relay has no room for one more")
        sock, path = leg.take(relay.peer_id)
        stream = way(sock, path, peer_id)
        self._tcp.watch(stream.stream)

        async def end_to_end() -> bytes:
            target, raw = ID.from_string(peer_id), RawConnection(stream, True)
            return await secured(
                raw, self._swarm.upgrader, target, [question], patience.dial_s, asking(request, max_answer)
            )

        return await patiently(relay.address, patience.dial_s, end_to_end)

    async def respond(self, sock: socket.socket, path: Path, peer_id: str) -> bool:
        """Wait for the session that `peer_id` makes on `sock`; it is handed over as inbound ones are. Owns the socket.
        Whether there was one."""
        stream = way(sock, path, peer_id)
        self._tcp.watch(stream.stream)
        await self._swarm._do_handle_inbound_connection(stream, None, None)
        return stream.taken
