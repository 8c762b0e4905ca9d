"""A process that answers HTTP, with this test as its supervisor."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from select import select

import msgspec

from vpnd.api import ends, messages, parts
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.schema import Config
from vpnd.metrics import create_page
from vpnd.status import Status

TOKEN = "the-token"


class Supervisor:
    """Tells the process `status` whenever it asks, in a thread of its own; `asked` counts. With `status` None it says
    nothing."""

    def __init__(self, module: str, config: Config, status: Status) -> None:
        self.status: Status | None = status
        self.asked = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ours, theirs = ends.pair()
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._channel = Channel(self._ours, "supervisor", "exporter")
        start = messages.ExporterStart(config=config, token=TOKEN)
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
        sock = socket.create_connection(self._listening.getsockname(), timeout=10)
        return sock

    def get(self, path: str, method: str = "GET", *headers: str) -> tuple[int, str]:
        with self.connect() as sock:
            sock.sendall("\r\n".join([f"{method} {path} HTTP/1.0", *headers, "", ""]).encode())
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
def served(module: str, config: Config, status: Status) -> Iterator[Supervisor]:
    supervisor = Supervisor(module, config, status)
    try:
        yield supervisor
    finally:
        assert supervisor.stop() == 0
