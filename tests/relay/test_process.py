"""A relay process between sockets of the test."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from lab.relay_process import RelayProcess
from lab.sockets import tcp_on_loopback

from vpnd.api import messages
from vpnd.api.channel import Channel
from vpnd.config.schema import Config, Relay, Session

PATIENCE_S = 60.0


def joined(process: RelayProcess, number: int = 1) -> tuple[socket.socket, socket.socket]:
    (a, at_a), (b, at_b) = tcp_on_loopback(), tcp_on_loopback()
    for ours in (a, b):
        ours.settimeout(PATIENCE_S)
    with at_a, at_b:
        process.channel.send(
            messages.RelayPair(number=number, members=("a", "b")), (at_a.fileno(), at_b.fileno())
        )
    return a, b


def hear(channel: Channel, kind: type[messages.Message]) -> messages.Message:
    """The next message of a kind."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        if (received := channel.receive()) is not None:
            if isinstance(received[0], kind):
                return received[0]
        else:
            select.select([channel.fileno()], [], [], 0.1)
    raise AssertionError(f"no {kind.__name__} came")


def read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := sock.recv(1 << 16)):
        data += part
    return bytes(data)


@contextlib.contextmanager
def relay(limits: Relay, session: Session | None = None) -> Iterator[RelayProcess]:
    with RelayProcess(Config(relay=limits, session=session or Session())) as process:
        yield process


def reported(process: RelayProcess) -> int:
    """The bytes the next report has."""
    message = hear(process.channel, messages.RelayMoved)
    assert isinstance(message, messages.RelayMoved)
    return message.bytes


@pytest.mark.setting("relay.report_interval")
def test_bytes_go_both_ways_whole_and_are_counted_and_an_end_goes_through() -> None:
    with relay(Relay(report_interval=0.05)) as process:
        assert hear(process.channel, messages.RelayHeld) == messages.RelayHeld(pairs=())
        a, b = joined(process)
        data = os.urandom(3 << 20)
        for one, other in ((a, b), (b, a)):
            thread = threading.Thread(target=one.sendall, args=(data,))
            thread.start()
            assert read(other, len(data)) == data
            thread.join()
        moved = 0
        while moved < 2 * len(data):
            moved += reported(process)
        assert moved == 2 * len(data)
        pauses_s = []
        for _ in range(4):
            begun_s = time.monotonic()
            a.sendall(b"x")
            assert read(b, 1) == b"x" and reported(process) == 1
            pauses_s.append(time.monotonic() - begun_s)
        assert min(pauses_s) < 0.9
        b.sendall(b"the last word")
        b.shutdown(socket.SHUT_WR)
        assert read(a, 100) == b"the last word"
        a.sendall(b"not yet")
        assert read(b, 7) == b"not yet"
        a.close()
        ended = hear(process.channel, messages.RelayPairEnded)
        assert ended == messages.RelayPairEnded(number=1, reason="both ends have closed")
        b.close()


def test_a_reset_right_behind_what_is_said_ends_the_pair() -> None:
    with relay(Relay()) as process:
        hear(process.channel, messages.RelayHeld)
        for number in range(1, 6):
            a, b = joined(process, number)
            b.sendall(b"hello")
            assert read(a, 5) == b"hello"
            os.kill(process.process.pid, signal.SIGSTOP)  # both come to it at once
            time.sleep(0.05)
            a.sendall(b"the last word")
            a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            a.close()
            os.kill(process.process.pid, signal.SIGCONT)
            ended = hear(process.channel, messages.RelayPairEnded)
            assert isinstance(ended, messages.RelayPairEnded) and ended.number == number
            b.close()


def test_one_that_reads_nothing_holds_up_nobody_else() -> None:
    with relay(Relay()) as process:
        stuck, unread = joined(process, 1)
        stuck.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                stuck.send(bytes(1 << 16))
        a, b = joined(process, 2)
        for _ in range(50):
            begun_s = time.monotonic()
            a.sendall(b"ping")
            assert read(b, 4) == b"ping"
            assert time.monotonic() - begun_s < PATIENCE_S
        for sock in (stuck, unread, a, b):
            sock.close()


@pytest.mark.setting("relay.idle_timeout")
def test_a_pair_in_which_nothing_moves_is_ended() -> None:
    with relay(Relay(idle_timeout=1.0, report_interval=0.1)) as process:
        a, b = joined(process)
        for _ in range(4):
            time.sleep(0.4)
            a.sendall(b"x")
            assert b.recv(1) == b"x"
        assert a.recv(1) == b"" and b.recv(1) == b""
        ended = hear(process.channel, messages.RelayPairEnded)
        assert isinstance(ended, messages.RelayPairEnded) and "1 s" in ended.reason


def throughput(process: RelayProcess, pairs: int, seconds: float) -> list[float]:
    """Bytes a second that each of some pairs gets through while all send."""
    ends = [joined(process, number) for number in range(1, pairs + 1)]
    over = time.monotonic() + seconds
    got = [0] * pairs

    def send(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while time.monotonic() < over:
                sock.sendall(bytes(1 << 14))

    def receive(place: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while time.monotonic() < over:
                got[place] += len(sock.recv(1 << 16))

    threads = [threading.Thread(target=send, args=(a,)) for a, _ in ends]
    threads += [threading.Thread(target=receive, args=(place, b)) for place, (_, b) in enumerate(ends)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    for a, b in ends:
        for sock in (a, b):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    for a, b in ends:
        a.close()
        b.close()
    return [each / seconds for each in got]


@pytest.mark.setting("relay.bytes_per_s")
def test_a_session_has_its_limit() -> None:
    with relay(Relay(bytes_per_s=1_000_000)) as process:
        (rate,) = throughput(process, 1, 1.5)
        assert 0.5e6 < rate < 1.5e6


@pytest.mark.setting("relay.total_bytes_per_s")
def test_all_together_have_theirs_in_equal_parts() -> None:
    with relay(Relay(total_bytes_per_s=2_000_000)) as process:
        rates = throughput(process, 4, 2.0)
        assert 1e6 < sum(rates) < 3e6
        assert max(rates) < 2 * min(rates)


def test_a_pair_that_is_not_permitted_any_more_ends_and_a_new_control_hears_of_the_others() -> None:
    with relay(Relay()) as process:
        (a, b), (c, d) = joined(process, 1), joined(process, 2)
        c.sendall(b"x")
        assert d.recv(1) == b"x"
        process.channel.send(messages.RelayLeave(number=1))
        assert a.recv(1) == b"" and b.recv(1) == b""
        process.channel.close()
        process.channel = process.meet()
        assert hear(process.channel, messages.RelayHeld) == messages.RelayHeld(pairs=((2, "a", "b"),))
        d.sendall(b"y")
        assert c.recv(1) == b"y"
        for sock in (a, b, c, d):
            sock.close()
