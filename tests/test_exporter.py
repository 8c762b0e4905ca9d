"""The process that answers Prometheus, with this test as its supervisor."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from select import select
from typing import Any

import msgspec
import pytest

from vpnd.api import channel, messages, parts
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.schema import Config, Metrics
from vpnd.config.schema import Status as StatusSettings
from vpnd.metrics import create_page
from vpnd.status import Ailment, Peer, Status, judged

STATUS = judged(
    Status(ready=True, peers=(Peer(name="b", state="connected", rtt_ms=2.0),)),
    (Ailment(what="no route", remedy="make one"),),
)


class Supervisor:
    """Tells the exporter `status` whenever it asks, in a thread of its own; `asked` counts. With `status` None it says
    nothing."""

    def __init__(self, status: dict[str, Any], **settings: Any) -> None:
        self.status: Status | None = STATUS
        self.asked = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ours, theirs = channel.pair()
        command = [sys.executable, "-P", "-m", "vpnd.exporter", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._channel = Channel(self._ours, "supervisor", "exporter")
        start = messages.ExporterStart(
            config=Config(metrics=Metrics(**settings), status=StatusSettings(**status))
        )
        self.page, page_fd = create_page((), "heartbeat")
        self._channel.send(start, (self._listening.fileno(), page_fd))
        os.close(page_fd)
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(10)

    def _serve(self) -> None:
        with contextlib.suppress(ChannelClosed, OSError):
            while True:
                select([self._ours], [], [])
                received = self._channel.receive()
                if received is not None and isinstance(received[0], messages.Ready):
                    self._ready.set()
                elif received is not None:
                    self.asked += 1
                    if self.status is not None:
                        told = messages.StatusTold(content=msgspec.json.encode(self.status))
                        for part in parts.split(told):
                            self._channel.send(part)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(self._listening.getsockname(), timeout=3)
        return sock

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        with self.connect() as sock:
            sock.sendall(f"{method} {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), body

    def stop(self) -> int:
        self._channel.send(messages.Stop())
        code = self.process.wait(10)
        self._listening.close()
        self._ours.close()
        return code


@contextlib.contextmanager
def exporter(status: dict[str, Any] | None = None, **settings: Any) -> Iterator[Supervisor]:
    supervisor = Supervisor(status or {}, **settings)
    try:
        yield supervisor
    finally:
        assert supervisor.stop() == 0


def test_health_and_metrics_are_those_of_the_status():
    with exporter() as supervisor:
        assert supervisor.get("/healthz") == (200, "ok\n")
        assert supervisor.get("/readyz")[0] == 503
        assert "no route: make one\n" in supervisor.get("/readyz")[1]
        code, body = supervisor.get("/metrics?name[]=x")
        assert code == 200 and 'vpnd_peer_rtt_seconds{peer="b",peer_id=""} 0.002' in body
        assert supervisor.get("/metrics", "HEAD") == (200, "")
        assert supervisor.get("/")[0] == 404 and supervisor.get("/metrics", "POST")[0] == 501


def test_a_supervisor_that_does_not_tell_is_asked_again():
    with exporter(status={"timeout": 0.2}) as supervisor:
        supervisor.status = None
        for path in ("/metrics", "/healthz", "/readyz"):
            assert supervisor.get(path)[0] == 503
        supervisor.status = STATUS
        assert supervisor.get("/healthz") == (200, "ok\n")


def test_thousands_of_peers_are_told_in_parts():
    peers = tuple(Peer(name=f"m{number}", peer_id=f"{number:052}") for number in range(5000))
    with exporter() as supervisor:
        supervisor.status = Status(peers=peers)
        assert (
            f'vpnd_peer_connected{{peer="m4999",peer_id="{4999:052}"}} 0.0' in supervisor.get("/metrics")[1]
        )


def test_what_is_no_http_harms_nobody():
    with exporter() as supervisor:
        for nonsense in (b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
            with supervisor.connect() as sock, contextlib.suppress(OSError):
                sock.sendall(nonsense)
                sock.recv(65536)
        assert supervisor.get("/healthz")[0] == 200
        assert supervisor.process.poll() is None


@pytest.mark.setting("metrics.per_peer")
def test_series_of_peers_are_left_out_if_set():
    with exporter(per_peer=False) as supervisor:
        code, body = supervisor.get("/metrics")
    assert code == 200 and "vpnd_peers 1.0" in body and "vpnd_peer_" not in body


@pytest.mark.setting("metrics.max_age")
def test_the_supervisor_is_asked_once_in_max_age():
    with exporter(max_age=0.5) as supervisor:
        begun_s = time.monotonic()
        while time.monotonic() < begun_s + 0.8:
            supervisor.get("/healthz")
        assert supervisor.asked == 2


@pytest.mark.setting("metrics.timeout")
def test_who_asks_nothing_is_hung_up_on():
    with exporter(timeout=0.2) as supervisor, supervisor.connect() as sock:
        assert sock.recv(1) == b""


@pytest.mark.setting("metrics.max_clients")
def test_one_client_more_than_set_is_hung_up_on():
    with exporter(max_clients=2) as supervisor:
        idle = [supervisor.connect() for _ in range(2)]
        with supervisor.connect() as sock:
            assert sock.recv(1) == b""
        for each in idle:
            each.close()
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            with contextlib.suppress(IndexError, OSError):
                assert supervisor.get("/healthz")[0] == 200
                break
        else:
            pytest.fail("no place becomes free")
