"""The engine against py-libp2p's own Noise and Yamux, over a socket pair, in one process.

Both ends do py-libp2p's handshake; then the cipher states of one end are taken over by the engine, as
control does it for a shard, and the other end goes on as stock py-libp2p.
"""

from __future__ import annotations

import functools
import hashlib
import random
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

trio = pytest.importorskip("trio")
pytest.importorskip("libp2p")

from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: E402
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair  # noqa: E402
from libp2p.custom_types import TProtocol  # noqa: E402
from libp2p.io.trio import TrioTCPStream  # noqa: E402
from libp2p.network.connection.raw_connection import RawConnection  # noqa: E402
from libp2p.peer.id import ID  # noqa: E402
from libp2p.protocol_muxer.exceptions import MultiselectClientError  # noqa: E402
from libp2p.protocol_muxer.multiselect import Multiselect  # noqa: E402
from libp2p.protocol_muxer.multiselect_client import MultiselectClient  # noqa: E402
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator  # noqa: E402
from libp2p.security.noise.transport import Transport  # noqa: E402
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamReset  # noqa: E402
from libp2p.stream_muxer.yamux.yamux import Yamux  # noqa: E402

from shards.stream import spec  # noqa: E402
from shards.stream.events import CloseReason, Data, Event, GoneAway, Pong, StreamClosed, StreamReady  # noqa: E402
from shards.stream.negotiate import decode_hello_untrusted, encode_hello  # noqa: E402
from shards.stream.session import Session  # noqa: E402
from shards.stream.yamux import Stream  # noqa: E402
from stream.pair import HELLO_A, HELLO_B, SMALL, cuts, reset, sendable  # noqa: E402
from vpnd.config.schema import Session as Settings  # noqa: E402
from vpnd.errors import RemoteProtocolError  # noqa: E402
from vpnd.session import CHACHAPOLY, Established  # noqa: E402

PROTOCOL = TProtocol(spec.PACKET_PROTOCOL_ID.decode())
MEGABYTES = 5_000_000
DEADLINE_S = 30


class Link:
    """The thinnest shell: one task per session, trio's socket, events in a list."""

    def __init__(self, session: Session, stream: Any) -> None:
        self.session = session
        self.events: list[Event] = []
        self.received: dict[int, bytearray] = {}
        self.broken: RemoteProtocolError | None = None
        self._stream = stream
        self._news = trio.Event()
        self._to_send = trio.Event()

    async def receive(self) -> None:
        while True:
            data = await self._stream.receive_some(100_000)
            if not data:
                return
            while data:
                room = self.session.receive_buffer()
                part, data = data[: len(room)], data[len(room) :]
                room[: len(part)] = part
                self.session.received(len(part))
                try:
                    self._take_events()
                except RemoteProtocolError as error:
                    self.broken = error
                    self.wake()
                    return
            self.wake()

    def _take_events(self) -> None:
        while (event := self.session.next_event(trio.current_time())) is not None:
            if type(event) is Data:
                self.received.setdefault(event.stream.id, bytearray()).extend(event.view)
                self.session.consumed(event.stream, len(event.view))
            else:
                self.events.append(event)

    async def transmit(self) -> None:
        while True:
            while len(self.session.data_to_send()):
                part = bytes(self.session.data_to_send()[:70_000])
                self.session.data_sent(len(part))
                self._news.set()
                self._news = trio.Event()
                await self._stream.send_all(part)
            self._to_send = trio.Event()
            await self._to_send.wait()

    def wake(self) -> None:
        """Something was asked of the session, or has come."""
        self._to_send.set()
        self._news.set()
        self._news = trio.Event()

    async def until(self, true: Callable[[], Any]) -> Any:
        while not (value := true()):
            await self._news.wait()
        return value

    async def event(self, kind: type) -> Any:
        return await self.until(lambda: next((e for e in self.events if type(e) is kind), None))

    async def send(self, stream: Stream, payload: bytes) -> None:
        ring = memoryview(bytearray(12) + payload)
        at = 12
        while at < len(ring):
            end = min(at + await self.until(lambda: sendable(self.session, stream)), len(ring))
            # The engine overwrites what is in front: here that is sent already.
            self.session.send(stream, ring, at, cuts(at, end))
            at = end
            self.wake()


def over_a_pair(
    test: Callable[[Link, Yamux], Awaitable[None]], *, engine_initiates: bool, settings: Settings
) -> None:
    """Run `test` with an engine and a stock Yamux that share a session."""

    async def main() -> None:
        ends = [trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()]
        pairs = [create_new_key_pair(bytes([n]) * 32) for n in (1, 2)]
        noise = [Transport(pair, noise_privkey=create_new_noise_key_pair().private_key) for pair in pairs]
        ids = [ID.from_pubkey(pair.public_key) for pair in pairs]
        raw = [RawConnection(TrioTCPStream(end), initiator=n == 0) for n, end in enumerate(ends)]
        secure: list[Any] = [None, None]

        async def dial() -> None:
            secure[0] = await noise[0].secure_outbound(raw[0], ids[1])

        async def accept() -> None:
            secure[1] = await noise[1].secure_inbound(raw[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            nursery.start_soon(accept)
        ours, theirs = (0, 1) if engine_initiates else (1, 0)
        state = secure[ours].conn.noise_state.noise_protocol
        established = Established(
            peer_id=str(ids[theirs]),
            cipher=CHACHAPOLY,
            initiator=engine_initiates,
            send_key=state.cipher_state_encrypt.k,
            send_nonce=state.cipher_state_encrypt.n,
            receive_key=state.cipher_state_decrypt.k,
            receive_nonce=state.cipher_state_decrypt.n,
            leftover=b"",
        )
        session = Session(established, HELLO_A, settings, trio.current_time())
        link = Link(session, ends[ours])
        muxer = Yamux(secure[theirs], ids[ours], is_initiator=not engine_initiates)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(muxer.start)
                nursery.start_soon(link.receive)
                nursery.start_soon(link.transmit)
                await muxer.event_started.wait()
                await test(link, muxer)
                nursery.cancel_scope.cancel()
        for end in ends:
            await end.aclose()

    trio.run(main)


async def read_exactly(stream: Any, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await stream.read(min(count - len(data), 1 << 18))
    return bytes(data)


async def opened(link: Link, muxer: Yamux, by_engine: bool) -> tuple[Stream, Any]:
    """A ready stream, as the engine and as py-libp2p see it; the HELLOs are checked on the way."""
    their_hello = encode_hello(HELLO_B)
    if by_engine:
        ours = link.session.open_stream(trio.current_time())
        link.wake()
        theirs = await muxer.accept_stream()

        async def handler(_: Any) -> None: ...

        chosen, _ = await Multiselect({PROTOCOL: handler}).negotiate(MultiselectCommunicator(theirs))
        assert chosen == PROTOCOL
        await theirs.write(their_hello)
    else:
        theirs = await muxer.open_stream()
        await MultiselectClient().select_one_of([PROTOCOL], MultiselectCommunicator(theirs))
        await theirs.write(their_hello)
    our_hello = encode_hello(HELLO_A)
    assert decode_hello_untrusted((await read_exactly(theirs, len(our_hello)))[1:])[0] == HELLO_A
    ready = await link.event(StreamReady)
    assert ready.hello == HELLO_B
    if by_engine:
        assert ready.stream is ours
    return ready.stream, theirs


SMALLEST = SMALL
DEFAULT = Settings()


@pytest.mark.parametrize("settings", [SMALLEST, DEFAULT], ids=["smallest buffers", "default buffers"])
@pytest.mark.parametrize("by_engine", [True, False], ids=["engine opens", "libp2p opens"])
@pytest.mark.parametrize("engine_initiates", [True, False], ids=["engine dials", "libp2p dials"])
def test_megabytes_both_ways_at_once(engine_initiates: bool, by_engine: bool, settings: Settings) -> None:
    rng = random.Random(9)
    out, back = rng.randbytes(MEGABYTES), rng.randbytes(MEGABYTES)

    async def conversation(link: Link, muxer: Yamux) -> None:
        ours, theirs = await opened(link, muxer, by_engine)
        digest = hashlib.sha256()

        async def read() -> None:
            digest.update(await read_exactly(theirs, MEGABYTES))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.send, ours, out)
            nursery.start_soon(read)
            nursery.start_soon(theirs.write, back)
        await link.until(lambda: len(link.received.get(ours.id, b"")) == MEGABYTES)
        assert digest.digest() == hashlib.sha256(out).digest()
        assert hashlib.sha256(link.received[ours.id]).digest() == hashlib.sha256(back).digest()
        # FIN of libp2p ends it on both sides.
        await theirs.close()
        closed = await link.event(StreamClosed)
        assert closed == StreamClosed(ours, CloseReason.CLOSED)
        with pytest.raises(MuxedStreamEOF):
            await theirs.read(1)

    over_a_pair(conversation, engine_initiates=engine_initiates, settings=settings)


run = functools.partial(over_a_pair, settings=DEFAULT)


@pytest.mark.parametrize("by_engine", [True, False], ids=["engine opens", "libp2p opens"])
def test_fin_of_the_engine(by_engine: bool) -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        ours, theirs = await opened(link, muxer, by_engine)
        await link.send(ours, b"last words")
        link.session.close_stream(ours)
        link.wake()
        assert await read_exactly(theirs, 10) == b"last words"
        with pytest.raises(MuxedStreamEOF):
            await theirs.read(1)
        await theirs.write(b"answer to a half-closed stream")
        await theirs.close()
        assert (await link.event(StreamClosed)).reason is CloseReason.CLOSED
        assert link.received[ours.id] == b"answer to a half-closed stream"

    run(conversation, engine_initiates=True)


@pytest.mark.parametrize("by_engine", [True, False], ids=["engine opens", "libp2p opens"])
def test_rst_of_both(by_engine: bool) -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        ours, theirs = await opened(link, muxer, by_engine)
        reset(link.session, ours)
        link.wake()
        with pytest.raises((MuxedStreamReset, MuxedStreamEOF)):
            await theirs.read(1)
        link.events.clear()
        ours, theirs = await opened(link, muxer, by_engine)
        await theirs.reset()
        await link.until(lambda: StreamClosed(ours, CloseReason.RESET_BY_PEER) in link.events)

    run(conversation, engine_initiates=False)


def test_ping_both_ways() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        link.session.ping(trio.current_time())
        link.wake()
        assert 0 <= (await link.event(Pong)).rtt_s < 5
        while not muxer.rtt():  # py-libp2p pings by itself half a second after it has started
            await trio.sleep(0.05)

    run(conversation, engine_initiates=True)


def test_libp2p_goes_away() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        await opened(link, muxer, True)
        await muxer.close()
        assert (await link.event(GoneAway)).code == spec.GO_AWAY_NORMAL

    run(conversation, engine_initiates=True)


def test_the_engine_goes_away() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        link.session.go_away()
        link.wake()
        await muxer.event_closed.wait()

    run(conversation, engine_initiates=True)


def test_libp2p_asks_for_a_protocol_that_is_not_there() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        stream = await muxer.open_stream()
        with pytest.raises(MultiselectClientError, match="not supported"):
            await MultiselectClient().select_one_of(
                [TProtocol("/other/1.0.0")], MultiselectCommunicator(stream)
            )
        assert (await link.event(StreamClosed)).reason is CloseReason.UNKNOWN_PROTOCOL

    run(conversation, engine_initiates=True)


def test_streams_side_by_side() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        pairs = []
        for n in range(10):
            link.events.clear()
            pairs.append(await opened(link, muxer, by_engine=n % 2 == 0))
        payloads = [random.Random(n).randbytes(100_000 + n) for n in range(10)]

        async def exchange(n: int) -> None:
            ours, theirs = pairs[n]
            await theirs.write(payloads[n])
            await link.send(ours, payloads[n])
            assert await read_exactly(theirs, len(payloads[n])) == payloads[n]

        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(exchange, n)
        for n, (ours, _) in enumerate(pairs):
            await link.until(functools.partial(lambda s, p: link.received.get(s.id) == p, ours, payloads[n]))

    run(conversation, engine_initiates=False)


def test_a_damaged_wire_ends_the_session() -> None:
    async def conversation(link: Link, muxer: Yamux) -> None:
        await opened(link, muxer, True)
        noise: Any = muxer.secured_conn
        await noise.conn.read_writer.write_msg(b"not sealed with the key")
        await link.until(lambda: link.broken)

    run(conversation, engine_initiates=True)
