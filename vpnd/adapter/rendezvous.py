"""A relay's side of meetings: who may be called here, and legs that come in twos.

    a member keeps a stream of NAT open      it may be called
    a stranger's leg                         the same, for one question, where the callee takes guests
    a leg with a new token                   its callee is called, and has nat.meet_timeout to come with a leg
    a leg with a token that waits            both are told where the other was seen; where the relay has room, both
                                             sockets go to the process that joins them

Streams come from members only: a muxer was offered to nobody else. A guest gets no further than to the callee it names,
which lets it in by the token that it has been given (`vpnd.membership.token`), or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import trio

from vpnd.adapter.framing import hear_untrusted, say
from vpnd.adapter.transport import raw_of, socket_of
from vpnd.config.live import Live
from vpnd.endpoint import Endpoint, of_socket_address
from vpnd.errors import RemoteProtocolError
from vpnd.nat import messages
from vpnd.nat.messages import ASK, NOT_SERVING, PUNCH, Call, Gone, Hello, Meet, Met, Refused, Welcome


class Serving(Protocol):
    """What is decided elsewhere. See vpnd.control.relaying."""

    def stays(self, peer_id: str, seen: Endpoint, waiting: int) -> str:
        """Whether a member that dialed this node from `seen` may wait for calls beside `waiting` others: empty, or the
        reason it may not."""
        ...

    def is_member(self, peer_id: str) -> bool:
        """Whether it is one; others are guests."""
        ...

    def meets(self, caller: str, callee: str) -> str:
        """Whether the caller may meet the callee: empty, or the reason it may not."""
        ...

    async def room(self, caller: str, callee: str) -> bool:
        """Whether a session of the two can be relayed now."""
        ...

    def join(self, caller: str, callee: str, sockets: tuple[int, int]) -> int:
        """Relay between two sockets, of which the receiver gets duplicates; the number for `part`."""
        ...

    def part(self, number: int) -> None: ...


class _Leg:
    """`done`: nothing more is said on it from here."""

    def __init__(self, peer_id: str, connection: Any, request: Meet) -> None:
        self.peer_id, self.connection, self.request = peer_id, connection, request
        self.done = trio.Event()

    @property
    def fd(self) -> int:
        """Of its socket, which stays libp2p's."""
        return int(socket_of(raw_of(self.connection)).socket.fileno())

    def seen(self) -> Endpoint:
        """Where it comes from. Raises OSError when it has ended."""
        return of_socket_address(socket_of(raw_of(self.connection)).socket.getpeername())

    def quiet(self) -> bool:
        """Whether nothing was said behind the request, as it has to be."""
        return bool(self.connection.high_watermark <= self.connection.low_watermark)


class _Waiting:
    """A caller whose callee has been called, over `stream`. `leg`: the callee's; `gone`: why there will be none."""

    def __init__(self, caller: str, callee: str, stream: Any) -> None:
        self.caller, self.callee, self.stream = caller, callee, stream
        self.leg: _Leg | None = None
        self.gone = ""
        self.answered = trio.Event()


class Rendezvous:
    """Owner: the host's trio loop. `count` counts under names of vpnd.metrics."""

    def __init__(self, live: Live, serving: Serving, count: Callable[[str], None]) -> None:
        self._live, self._serving, self._count = live, serving, count
        self._streams: dict[str, Any] = {}
        self._hosts: set[str] = set()  # those that take guests
        self._waiting: dict[bytes, _Waiting] = {}

    def takes_guests(self, peer_id: str) -> bool:
        """Whether a stranger could want to meet somebody here."""
        return bool(self._hosts)

    # --- streams of those that may be called

    async def serve_stream(self, stream: Any) -> None:
        """A member's NAT stream, for as long as it lasts. It takes the place of one it had before."""
        peer_id = str(stream.muxed_conn.peer_id)
        hello = await hear_untrusted(stream, Hello)
        muxed = stream.muxed_conn
        seen = of_socket_address(socket_of(raw_of(muxed.secured_conn)).socket.getpeername())
        # Where this node has dialed, nothing shows that it can be dialed itself.
        refused = NOT_SERVING
        if not muxed.is_initiator:
            refused = self._serving.stays(peer_id, seen, len(self._streams.keys() - {peer_id}))
        await say(stream, Welcome(str(seen), refused))
        if refused:
            await stream.close()
            return
        self._let_go(self._streams.get(peer_id))
        self._streams[peer_id] = stream
        try:
            self._note(peer_id, hello)
            while True:
                self._note(peer_id, await hear_untrusted(stream, Gone, Hello))
        finally:
            self._let_go(stream)
            if self._streams.get(peer_id) is stream:
                del self._streams[peer_id]
                self._hosts.discard(peer_id)

    def _let_go(self, stream: Any) -> None:
        """Nobody comes who was called over it: their callers need not wait, and can be called themselves."""
        for waiting in self._waiting.values():
            if waiting.stream is stream:
                waiting.answered.set()

    def _note(self, peer_id: str, said: messages.Message) -> None:
        if isinstance(said, Hello):
            (self._hosts.add if said.guests else self._hosts.discard)(peer_id)
        elif isinstance(said, Gone):
            waiting = self._waiting.get(said.token)
            if waiting is not None and waiting.callee == peer_id:
                waiting.gone = said.reason or messages.ABSENT
                waiting.answered.set()

    # --- legs

    async def serve_leg_untrusted(self, connection: Any, peer_id: str) -> None:
        """A leg, of a member or a guest. When this returns the caller closes the connection; a duplicate of its socket
        may live on. Raises RemoteProtocolError, and what libp2p raises."""
        live = self._live.config
        with trio.fail_after(live.p2p.handshake_timeout):
            request = await hear_untrusted(connection, Meet)
        leg = _Leg(peer_id, connection, request)
        waiting = self._waiting.get(request.token)
        if waiting is None:
            refused, pair = await self._call(leg)
            if pair is not None and not self._serving.is_member(peer_id):
                try:
                    await trio.sleep_forever()  # for as long as the desk lets a guest stay
                finally:
                    self._serving.part(pair)
        elif (waiting.caller, waiting.callee) == (request.to, peer_id) and not waiting.answered.is_set():
            waiting.leg = leg
            waiting.answered.set()
            await leg.done.wait()
            return
        else:
            refused = messages.NOT_YOURS
        if refused:
            self._count(f"meets_refused_{refused}")
            await say(connection, Refused(refused))

    async def _call(self, leg: _Leg) -> tuple[str, int | None]:
        """Get the callee, and introduce both. Why not, if not; and the number of their pair, if one is relayed."""
        caller, request, live = leg.peer_id, leg.request, self._live.config
        stream = self._streams.get(request.to)
        refused = self._serving.meets(caller, request.to) or (messages.NOT_HERE if stream is None else "")
        if not self._serving.is_member(caller) and (request.mode != ASK or request.to not in self._hosts):
            refused = messages.NOT_MEMBER
        if refused:
            return refused, None
        waiting = self._waiting[request.token] = _Waiting(caller, request.to, stream)
        try:
            with trio.move_on_after(live.nat.meet_timeout):
                await say(stream, Call(request.token, caller, request.mode))
                await waiting.answered.wait()
        finally:
            del self._waiting[request.token]
        if waiting.leg is None:
            return (waiting.gone if waiting.gone in messages.REFUSALS else messages.ABSENT), None
        try:
            return "", await self._introduce(leg, waiting.leg)
        finally:
            waiting.leg.done.set()

    async def _introduce(self, leg: _Leg, other: _Leg) -> int | None:
        if not (leg.quiet() and other.quiet()):
            raise RemoteProtocolError("something was said on a leg before Met")
        names = leg.peer_id, other.peer_id
        wanted = leg.request.mode == other.request.mode != PUNCH
        relayed = wanted and await self._serving.room(*names)
        # The callee first: it has to be there when the caller begins.
        for here, there in ((other, leg), (leg, other)):
            met = Met(
                str(here.seen()),
                str(there.seen()),
                there.request.candidates,
                there.request.mapping,
                relayed,
                self._live.config.relay.bytes_per_s,
                there.request.birthday,
            )
            await say(here.connection, met)
        self._count("meets")
        if relayed:
            return self._serving.join(*names, (leg.fd, other.fd))
        # While a leg is open its NAT keeps the outside port for it; it is closed by who needs it no more.
        with trio.move_on_after(self._live.config.nat.punch_timeout):
            async with trio.open_nursery() as nursery:
                for fd in (leg.fd, other.fd):
                    nursery.start_soon(_until_readable, fd, nursery.cancel_scope)
        return None


async def _until_readable(fd: int, scope: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(fd)
    scope.cancel()
