"""Everybody who looks at a node at once: Prometheus once a second, an open page, `vpnd status --watch`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from .network import wait_until
from .node import Node
from .sockets import socket_in

INTERVAL_S = 1.0
SOON_S = 15.0
METRICS, PAGE = ("127.0.0.1", 9586), ("127.0.0.1", 9587)
#: What a node needs for it.
ENVIRONMENT = {
    "VPND_METRICS_LISTEN": f"{METRICS[0]}:{METRICS[1]}", "VPND_WEB_LISTEN": f"{PAGE[0]}:{PAGE[1]}"
}  # fmt: skip


@contextlib.contextmanager
def watched(node: Node) -> Iterator[None]:
    """Within the block all of them look at it, and each has been told something."""
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
        yield
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
