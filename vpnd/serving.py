"""HTTP of a process without rights, with what the supervisor tells it: what the exporter and the page have in common.

A thread for each connection, at most so many; the process's first thread has the channel. All clients together cost the
supervisor one status in `Limits.max_age_s`. Of a request only its head is read, in one go and within `timeout_s`: there
is no body to any, and who sends slowly keeps its place no longer than who sends nothing.
"""

from __future__ import annotations

import http.server
import io
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from select import select
from typing import NamedTuple, NoReturn

import msgspec

from vpnd import logs, metrics, privileges, seccomp
from vpnd.api import messages, parts
from vpnd.api.channel import Channel, first_message, run_child
from vpnd.config.schema import Config
from vpnd.status import Status

log = logging.getLogger(__name__)

#: What all of them are to the supervisor.
ROLE = "exporter"
#: Forms of one status that are kept for who asks for the same.
MOST_KINDS = 4
#: Of a request line with all its headers; browsers send one or two kilobytes.
MAX_HEAD_BYTES = 16_384


class Limits(NamedTuple):
    """What one of these processes takes: from a status's age on it asks for a new one; of each client, and how many."""

    max_age_s: float
    timeout_s: float
    max_clients: int


def serve(name: str, limits: Callable[[Config], Limits], handler: type[Handler]) -> NoReturn:
    """The life of such a process, from its first message on until it is stopped."""

    def body(channel: Channel, parent_pid: int) -> None:
        start, (listening, page_fd) = first_message(channel, messages.ExporterStart)
        page = metrics.CounterPage((), page_fd)
        os.close(page_fd)
        logs.configure(start.config.log, name)
        # Below this line nothing is imported: the files of vpnd may be readable by root alone.
        privileges.drop(start.config.process.user, parent_pid)
        told = Told(channel, start.config, limits, start.token, page)
        server = Server(socket.socket(fileno=listening), told, handler)
        if start.config.process.seccomp:
            seccomp.confine(seccomp.EXPORTER)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told.serve()

    run_child(ROLE, body)


class Told:
    """What the supervisor told last. `serve` is the first thread's, `status` any other's."""

    def __init__(
        self,
        channel: Channel,
        config: Config,
        limits: Callable[[Config], Limits],
        token: str,
        page: metrics.CounterPage,
    ) -> None:
        self._channel, self._limits, self._page = channel, limits, page
        self.config, self.token = config, token
        self._news = threading.Condition()
        self._asked = False
        self._status: Status | None = None
        self._at_s = 0.0
        self._making = threading.Lock()
        self._made: dict[str, bytes] = {}
        self._made_of: Status | None = None

    @property
    def limits(self) -> Limits:
        """By the configuration in force."""
        return self._limits(self.config)

    def status(self) -> Status | None:
        """A status not older than max_age_s; None when the supervisor does not tell within status.timeout."""
        with self._news:
            if not self._fresh():
                if not self._asked:
                    self._asked = True
                    self._channel.send(messages.StatusWanted())
                if not self._news.wait_for(self._fresh, self.config.status.timeout):
                    self._asked = False  # it may have been lost: whoever comes next asks again
                    return None
            return self._status

    def made(self, status: Status, kind: str, make: Callable[[], bytes]) -> bytes:
        """`status` in another form: what `make` made of it for the first who asked for this kind."""
        with self._making:
            if self._made_of is not status or len(self._made) > MOST_KINDS:
                self._made_of, self._made = status, {}
            if kind not in self._made:
                self._made[kind] = make()
            return self._made[kind]

    def _fresh(self) -> bool:
        return self._status is not None and time.monotonic() < self._at_s + self.limits.max_age_s

    def serve(self) -> None:
        """Until Stop. Raises ChannelClosed when the supervisor is gone."""
        said: list[messages.StatusTold] = []
        self._channel.send(messages.Ready())
        while True:
            self._page.beat()
            received = self._channel.receive()
            if received is None:
                select([self._channel.fileno()], [], [], metrics.heartbeat_s(self.config.process.watchdog))
                continue
            match received[0]:
                case messages.Stop():
                    return
                case messages.Reconfigure(config=config):
                    self.config = config
                    logs.set_level(config.log.level)
                case messages.StatusTold() as part:
                    said.append(part)
                    if not part.more:
                        status = msgspec.json.decode(parts.joined(said).content, type=Status)
                        said = []
                        with self._news:
                            self._status, self._at_s, self._asked = status, time.monotonic(), False
                            self._news.notify_all()


class Server(http.server.ThreadingHTTPServer):
    """Serves on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, told: Told, handler: type[Handler]) -> None:
        super().__init__(listening.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.told = listening, told
        self._clients = threading.BoundedSemaphore(told.limits.max_clients)

    def process_request(self, request: object, client_address: object) -> None:
        """A thread for it, while there are not too many."""
        if self._clients.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._clients.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or sent what is no HTTP, is none of ours."""
        log.debug("%s: %s", client_address, sys.exc_info()[1])


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    rfile: io.BufferedIOBase
    server_version, sys_version = "vpnd", ""

    def setup(self) -> None:
        super().setup()
        timeout_s = self.server.told.limits.timeout_s
        self.rfile = io.BufferedReader(io.BytesIO(_head(self.connection, timeout_s)))
        self.connection.settimeout(timeout_s)

    def answer(
        self, code: int, body: str | bytes, kind: str = "text/plain; charset=utf-8", **headers: str
    ) -> None:
        """All of an answer. In names of headers "_" stands for "-"."""
        content = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: whoever asks often would fill the log."""


def _head(connection: socket.socket, timeout_s: float) -> bytes:
    """What comes up to the first empty line. Raises TimeoutError when that takes longer, ConnectionError when it is too
    much."""
    deadline_s = time.monotonic() + timeout_s
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("no request in time")
        if len(head) > MAX_HEAD_BYTES:
            raise ConnectionError(f"a request of more than {MAX_HEAD_BYTES} bytes")
        connection.settimeout(left_s)
        part = connection.recv(4096)
        if not part:
            break
        head += part
    return head
