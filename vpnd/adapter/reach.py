"""Whether a node can be dialed from outside: asked of another member, which tries it.

    who asks      dials a member, says Reach, and hears Seen: from where it comes, and whether it could be dialed there
    who is asked  dials back, from another port, to the address it sees and no other, and says Here over that connection

What Seen says is not believed: who asks has been reached when Here has come, from that member.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import trio
from libp2p.peer.id import ID

from vpnd.adapter.dial import DialError, Patience, dial_secured
from vpnd.adapter.framing import hear_untrusted, say
from vpnd.adapter.punch import FreshTcp
from vpnd.adapter.transport import raw_of, socket_of
from vpnd.endpoint import Endpoint, of_socket_address
from vpnd.endpoint import parse as parse_endpoint
from vpnd.nat.messages import REACH, TOKEN_BYTES, Here, Reach, Seen


class Observed(NamedTuple):
    """What came of one question. `local`: our end of the connection; `you`: where the member saw it; `reached`: whether
    it came back to the port in question."""

    local: Endpoint
    you: Endpoint
    reached: bool
    rtt_s: float


class Reaching:
    """Both sides of it. Owner: the host's trio loop. `tcp(port)`: dials from that port, or from a fresh one for 0.
    `allows(peer_id)`: whether a member may ask once more."""

    def __init__(self, swarm: Any, tcp: Callable[[int], FreshTcp], patience: Callable[[], Patience]) -> None:
        self._swarm, self._tcp, self._patience = swarm, tcp, patience
        self._awaited: dict[tuple[str, bytes], trio.Event] = {}
        self.allows: Callable[[str], bool] = lambda peer_id: False

    async def ask(self, address: str, peer_id: str, port: int, source_port: int = 0) -> Observed:
        """Ask the member at `address`. `port` 0: only where it sees us. Raises DialError."""
        nonce = secrets.token_bytes(TOKEN_BYTES)
        came = self._awaited[peer_id, nonce] = trio.Event()

        async def exchange(session: Any, _: str) -> Observed:
            local = of_socket_address(socket_of(raw_of(session)).socket.getsockname())
            begun_s = trio.current_time()
            await say(session, Reach(nonce, port))
            seen = await hear_untrusted(session, Seen)
            rtt_s = trio.current_time() - begun_s
            return Observed(local, parse_endpoint(seen.you), came.is_set(), rtt_s)

        try:
            patience = self._patience()
            twice = patience._replace(dial_s=2 * patience.dial_s)
            target, tcp = ID.from_string(peer_id), self._tcp(source_port)
            return await dial_secured(tcp, self._swarm.upgrader, address, target, [REACH], twice, exchange)
        finally:
            del self._awaited[peer_id, nonce]

    async def serve_untrusted(self, connection: Any, peer_id: str) -> None:
        """A member's connection for REACH, whichever side of it this is. Raises RemoteProtocolError, and what libp2p
        raises."""
        with trio.fail_after(self._patience().dial_s):
            message = await hear_untrusted(connection, Reach, Here)
        if isinstance(message, Here):
            if (came := self._awaited.get((peer_id, message.nonce))) is not None:
                came.set()
                await say(connection, message)
            return
        assert isinstance(message, Reach)
        seen = of_socket_address(socket_of(raw_of(connection)).socket.getpeername())
        reached = False
        if message.port and self.allows(peer_id):
            reached = await self._try(Endpoint(seen.ip, message.port), peer_id, message.nonce)
        await say(connection, Seen(str(seen), reached))

    async def _try(self, endpoint: Endpoint, peer_id: str, nonce: bytes) -> bool:
        async def exchange(session: Any, _: str) -> bool:
            await say(session, Here(nonce))
            return await hear_untrusted(session, Here) == Here(nonce)

        address, target = endpoint.multiaddr(), ID.from_string(peer_id)
        upgrader, patience = self._swarm.upgrader, self._patience()
        try:
            return await dial_secured(self._tcp(0), upgrader, address, target, [REACH], patience, exchange)
        except DialError:
            return False
