"""A link that loses packets at random: a session's stream is held up by each of them, and not for long."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import Ping, lossy, ping, running_nodes

from shards.session.transport import TCP_RTO_MIN_US

pytestmark = [pytest.mark.root, pytest.mark.slow]

LOSS = 0.08
PINGS = 60
#: So far apart that each is alone on its way: nothing behind it tells that it was lost.
INTERVAL_S = 0.25
SOON, SYSTEMS = "10ms", "200ms"


def answers(retransmit_min: str) -> Ping:
    settings = {
        "session": {"retransmit_min": retransmit_min},
        # Beside datagrams a session is given up when the same packet is lost three times in a row, as happens here.
        "carrier": {"choice": "streams"},
    }
    with running_nodes(settings=settings) as (a, b), lossy(a.lab, LOSS):
        return ping(a.lab, a.namespace, b.virtual_ip, PINGS, INTERVAL_S)


@pytest.mark.setting("session.retransmit_min")
def test_what_a_link_loses_is_sent_again_soon() -> None:
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MIN_US)
        except OSError:
            pytest.skip("this kernel is older than Linux 6.15")
    with ThreadPoolExecutor(2) as pool:
        soon, late = pool.map(answers, (SOON, SYSTEMS))
    print(f"{LOSS:.0%} lost each way, at {SOON}: {soon}, at {SYSTEMS}: {late}")
    assert soon.loss == late.loss == 0
    assert late.max_ms > 200
    assert soon.avg_ms < late.avg_ms / 2
