"""Two engines under random orders of everything a caller can do, against a naive twin.

The twin of a stream's direction is a bytearray of what was sent and has not come out yet: what comes out
must be its front, and everything must have come out once the bytes are carried, unless a side gave up.
"""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shards.stream.events import Data, Pong, StreamClosed, StreamReady, WindowOpened
from shards.stream.session import Session
from shards.stream.yamux import Stream, StreamState
from stream.pair import HELLO_A, HELLO_B, engine, reset, send, sendable
from vpnd.config.schema import Session as Settings

SETTINGS = Settings(
    window_bytes=1 << 18, send_buffer_bytes=1 << 17, receive_buffer_bytes=1 << 17, max_streams=3
)
NOISE = random.Random(3).randbytes(1 << 19)
SIDES = st.sampled_from(["a", "b"])
CHOICE = st.integers(0, 1 << 30)


class Conversation(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.session: dict[str, Session] = {"a": engine(True, SETTINGS), "b": engine(False, SETTINGS)}
        self.wire = {"a": bytearray(), "b": bytearray()}  # left that side, not arrived yet
        self.streams: dict[str, dict[int, Stream]] = {"a": {}, "b": {}}
        self.ready: dict[str, set[int]] = {"a": set(), "b": set()}
        self.closed: dict[str, set[int]] = {"a": set(), "b": set()}
        self.given_up: set[int] = set()  # reset by somebody: what was on its way may be lost
        self.sent: dict[tuple[str, int], bytearray] = {}
        self.unconsumed: dict[tuple[str, int], int] = {}
        self.pinged: dict[str, list[int]] = {"a": [], "b": []}

    def pick(self, side: str, choice: int) -> Stream | None:
        ids = sorted(self.ready[side] - self.closed[side])
        return self.streams[side][ids[choice % len(ids)]] if ids else None

    @staticmethod
    def other(side: str) -> str:
        return "b" if side == "a" else "a"

    # --- what a caller does

    @rule(side=SIDES)
    def open(self, side: str) -> None:
        ours = sum(stream.ours and stream.state is not StreamState.CLOSED for stream in self.all(side))
        if ours < SETTINGS.max_streams:
            stream = self.session[side].open_stream(self.now_s)
            self.streams[side][stream.id] = stream

    def all(self, side: str) -> list[Stream]:
        return list(self.streams[side].values())

    @rule(side=SIDES, choice=CHOICE, size=st.one_of(st.integers(1, 3000), st.integers(1, 1 << 19)))
    def send(self, side: str, choice: int, size: int) -> None:
        stream = self.pick(side, choice)
        if stream is None:
            return
        size = min(size, sendable(self.session[side], stream))
        if size:
            start = choice % (len(NOISE) - size + 1)
            send(self.session[side], stream, NOISE[start : start + size])
            self.sent.setdefault((side, stream.id), bytearray()).extend(NOISE[start : start + size])

    @rule(side=SIDES, choice=CHOICE, count=st.integers(0, 1 << 18))
    def consume(self, side: str, choice: int, count: int) -> None:
        stream = self.pick(side, choice)
        if stream is not None:
            self.consume_of(side, stream, count)

    def consume_of(self, side: str, stream: Stream, count: int) -> None:
        count = min(count, self.unconsumed.get((side, stream.id), 0))
        self.session[side].consumed(stream, count)
        if count:
            self.unconsumed[side, stream.id] -= count

    @rule(side=SIDES, choice=CHOICE)
    def close(self, side: str, choice: int) -> None:
        stream = self.pick(side, choice)
        if stream is not None:
            self.session[side].close_stream(stream)

    @precondition(lambda self: len(self.streams["a"]) > 2)
    @rule(side=SIDES, choice=CHOICE)
    def reset(self, side: str, choice: int) -> None:
        streams = [stream for stream in self.all(side) if stream.state is not StreamState.CLOSED]
        if streams:
            stream = streams[choice % len(streams)]
            self.given_up.add(stream.id)
            reset(self.session[side], stream)

    @rule(side=SIDES)
    def ping(self, side: str) -> None:
        self.pinged[side].append(self.session[side].ping(self.now_s))

    # --- what the world does

    @rule(side=SIDES, most=st.one_of(st.integers(0, 100), st.integers(0, 1 << 18)))
    def socket_takes(self, side: str, most: int) -> None:
        part = bytes(self.session[side].data_to_send()[:most])
        self.session[side].data_sent(len(part))
        self.wire[self.other(side)] += part

    @rule(side=SIDES, most=st.one_of(st.integers(0, 100), st.integers(0, 1 << 18)))
    def bytes_arrive(self, side: str, most: int) -> None:
        self.now_s += 0.001
        session, wire = self.session[side], self.wire[side]
        room = session.receive_buffer()
        assert len(room) > 0
        count = min(len(room), len(wire), most)
        room[:count] = wire[:count]
        del wire[:count]
        session.received(count)
        while (event := session.next_event(self.now_s)) is not None:
            self.check(side, event)

    def check(self, side: str, event: Any) -> None:
        if type(event) is Pong:
            assert self.pinged[side].pop(0) == event.value and event.rtt_s >= 0
            return
        stream = event.stream
        assert stream.id not in self.closed[side], "an event after StreamClosed"
        assert self.streams[side].setdefault(stream.id, stream) is stream
        if type(event) is StreamReady:
            assert stream.id not in self.ready[side]
            assert event.hello == (HELLO_B if side == "a" else HELLO_A)
            self.ready[side].add(stream.id)
        elif type(event) is Data:
            assert stream.id in self.ready[side]
            twin = self.sent[self.other(side), stream.id]
            assert event.view == twin[: len(event.view)]
            del twin[: len(event.view)]
            self.unconsumed[side, stream.id] = self.unconsumed.get((side, stream.id), 0) + len(event.view)
        elif type(event) is StreamClosed:
            self.closed[side].add(stream.id)
        else:
            assert type(event) is WindowOpened and stream.id in self.ready[side]

    @rule()
    def settle(self) -> None:
        """Carry everything, consuming everything: then both sides agree on every stream."""
        for _ in range(1000):
            for side in ("a", "b"):
                self.socket_takes(side, 1 << 20)
                self.bytes_arrive(side, 1 << 20)
                for stream in self.all(side):
                    self.consume_of(side, stream, 1 << 30)
            if not any(len(s.data_to_send()) for s in self.session.values()) and not any(self.wire.values()):
                break
        else:
            raise AssertionError("they never fall silent")
        for (side, stream_id), twin in self.sent.items():
            # A side that closed hears no more from a stream it has also been reset on, or that both closed.
            if stream_id not in self.given_up:
                assert not twin, f"stream {stream_id} of {side} lost {len(twin)} bytes"
        live_a, live_b = self.session["a"]._streams, self.session["b"]._streams
        assert live_a.keys() == live_b.keys()
        for stream_id, one in live_a.items():
            two = live_b[stream_id]
            assert one.state is two.state is StreamState.READY
            assert one.send_window == two.receive_window
            assert two.send_window == one.receive_window

    @invariant()
    def buffers_are_bounded(self) -> None:
        for session in self.session.values():
            assert len(session.data_to_send()) <= SETTINGS.send_buffer_bytes

    @invariant()
    def windows_are_never_negative(self) -> None:
        for side in ("a", "b"):
            for stream in self.all(side):
                assert stream.send_window >= 0 and stream.receive_window >= 0
                assert sendable(self.session[side], stream) >= 0


Conversation.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestConversation = Conversation.TestCase
