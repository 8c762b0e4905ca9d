"""Everybody who looks at a node at once: a scraper once a second, an open page, `vpnd status --watch`.

A scraper and a browser run elsewhere, as a rule; here they share the node's machine, and so do the CPUs they take. As
little as they can: what is told is read and thrown away.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from .network import wait_until
from .node import Node
from .processes import cpu_seconds
from .sockets import socket_in

INTERVAL_S = 1.0
SOON_S = 15.0
METRICS, PAGE = ("127.0.0.1", 9586), ("127.0.0.1", 9587)
#: What a node needs for it.
ENVIRONMENT = {
    "VPND_METRICS_LISTEN": f"{METRICS[0]}:{METRICS[1]}", "VPND_WEB_LISTEN": f"{PAGE[0]}:{PAGE[1]}"
}  # fmt: skip


class Watchers:
    """Those that look at one node."""

    def __init__(self, pid: int, threads: Sequence[threading.Thread]) -> None:
        self._pid, self._threads = pid, threads

    def cpu_s(self) -> float:
        """CPU that they took themselves so far, the node's own not in it."""
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in self._threads if thread.ident]
        return cpu_seconds([self._pid]) + sum(map(time.clock_gettime, clocks))


@contextlib.contextmanager
def watched(node: Node) -> Iterator[Watchers]:
    """Within the block all of them look at it, and each has been told something."""
    node.wait_ready()  # packets pass before the page is there
    over, told = threading.Event(), {"scrapes": 0, "events": 0}

    def scrape() -> None:
        while not over.is_set():
            text = b""
            with contextlib.suppress(OSError), _asked(node, METRICS, "/metrics") as answer:
                text = b"".join(iter(lambda: answer.recv(1 << 16), b""))
            told["scrapes"] += b"vpnd_tun_bytes_read_total" in text
            over.wait(INTERVAL_S)

    def look() -> None:
        token = (node.state_dir / "page.token").read_text().strip()
        with _asked(node, PAGE, "/events", f"Authorization: Bearer {token}\r\n") as answer:
            while not over.is_set():
                told["events"] += answer.recv(1 << 16).count(b"data: ")

    threads = [threading.Thread(target=scrape), threading.Thread(target=look)]
    shown = node.lab.directory / f"{node.namespace.label}.watch"
    command = (*node.command, "status", "--watch", str(INTERVAL_S))
    status = node.lab.spawn(node.namespace, *command, output=shown, env=node.env)
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(told.values()) and shown.stat().st_size, SOON_S, f"all look: {told}")
        yield Watchers(status.pid, threads)
    finally:
        over.set()
        status.terminate()
        status.wait()
        for thread in threads:
            thread.join()
        shown.unlink()


def _asked(node: Node, address: tuple[str, int], path: str, header: str = "") -> socket.socket:
    sock = socket_in(node.namespace, address[0], socket.SOCK_STREAM)
    sock.connect(address)
    sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{header}\r\n".encode())
    return sock
