"""Whoever reaches the metrics port or the page, against a real node: the packets of others notice nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from attack_tools import arena, assert_unharmed, beside
from lab import Node, socket_in, wait_until

from vpnd.config.schema import Web

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

METRICS_PORT = 9586
PAGE_PORT = 9587
#: Browsers that keep the page open, each with its token.
OPEN_PAGES = 1000
SCRAPERS = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    listening = {"metrics": METRICS_PORT, "web": PAGE_PORT}
    with arena(2, **{table: {"listen": f"127.0.0.1:{port}"} for table, port in listening.items()}) as nodes:
        yield nodes


def test_scrapers_and_idle_clients_of_the_metrics_port_cost_packets_nothing(nodes: list[Node]) -> None:
    """Eight that ask as fast as they are answered, and more connections that say nothing than there are places."""
    a, b = nodes
    over, answers = threading.Event(), [0] * SCRAPERS

    def connected() -> socket.socket:
        sock = socket_in(a.namespace, "127.0.0.1", socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", METRICS_PORT))
        return sock

    def scrape(number: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), connected() as sock:
                sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                while sock.recv(1 << 16):
                    pass
                answers[number] += 1

    with contextlib.ExitStack() as idle, beside(a, b) as during:
        threads = [threading.Thread(target=scrape, args=(number,)) for number in range(SCRAPERS)]
        for thread in threads:
            thread.start()
        for _ in range(SCRAPERS):
            idle.enter_context(connected())
        over.wait(2.0)
        over.set()
        for thread in threads:
            thread.join()
    assert_unharmed(during)
    assert sum(answers) > SCRAPERS
    assert a.ask()["health"] == "healthy"


def test_a_thousand_open_pages_cost_packets_nothing(nodes: list[Node]) -> None:
    """As many as web.max_clients are told what the node does, the others are hung up on; and the next one is told when
    they have gone."""
    a, b = nodes
    token = (a.state_dir / "page.token").read_text().strip()
    request = f"GET /events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()

    def opened() -> socket.socket:
        sock = socket_in(a.namespace, "127.0.0.1", socket.SOCK_STREAM)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", PAGE_PORT))
        with contextlib.suppress(ConnectionError):
            sock.sendall(request)
        return sock

    def told(sock: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            return sock.recv(1 << 16).startswith(b"HTTP/1.0 200")
        return False

    with contextlib.ExitStack() as pages, beside(a, b) as during:
        begun_s = time.monotonic()
        sockets = [pages.enter_context(opened()) for _ in range(OPEN_PAGES)]
        print(f"opened within {time.monotonic() - begun_s:.1f} s")
        open_ones = sum(map(told, sockets))
    assert_unharmed(during)
    assert 1 <= open_ones <= Web().max_clients

    def is_told() -> bool:
        with opened() as sock:
            return told(sock)

    wait_until(is_told, 10, "there is a place again")
    assert a.ask()["health"] == "healthy"
