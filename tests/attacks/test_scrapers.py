"""Whoever reaches the metrics port, against a real node: the packets of others notice nothing."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from attack_tools import arena, assert_unharmed, beside
from lab import socket_in

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

METRICS_PORT = 9586
SCRAPERS = 8


def test_scrapers_and_idle_clients_of_the_metrics_port_cost_packets_nothing() -> None:
    """Eight that ask as fast as they are answered, and more connections that say nothing than there are places."""
    with arena(2, metrics={"listen": f"127.0.0.1:{METRICS_PORT}"}) as (a, b):
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
