"""The process that answers Prometheus, with this test as its supervisor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving_harness import Supervisor, served

from vpnd.config.schema import Config, Metrics
from vpnd.config.schema import Status as StatusSettings
from vpnd.status import Ailment, Peer, Spread, Status, judged

STATUS = judged(
    Status(ready=True, peers=(Peer(name="b", state="connected", rtt_ms=2.0),)),
    (Ailment(what="no route", remedy="make one"),),
)


@contextlib.contextmanager
def exporter(status: dict[str, Any] | None = None, **settings: Any) -> Iterator[Supervisor]:
    config = Config(metrics=Metrics(**settings), status=StatusSettings(**(status or {})))
    with served("vpnd.exporter", config, STATUS) as supervisor:
        yield supervisor


def test_health_and_metrics_are_those_of_the_status():
    with exporter() as supervisor:
        assert supervisor.get("/healthz") == (200, "ok\n")
        assert supervisor.get("/readyz")[0] == 503
        assert "no route: make one\n" in supervisor.get("/readyz")[1]
        code, body = supervisor.get("/metrics?name[]=x")
        assert code == 200 and 'vpnd_peer_rtt_seconds{peer="b",peer_id=""} 0.002' in body
        assert supervisor.get("/metrics", "HEAD") == (200, "")
        assert supervisor.get("/")[0] == 404 and supervisor.get("/metrics", "POST")[0] == 501


def test_sessions_are_told_by_their_path():
    paths = ("direct 192.0.2.1:4001", "direct 192.0.2.1:40123 (punched)", "relayed via vm", "relayed via nas")
    with exporter() as supervisor:
        supervisor.status = Status(peers=(Peer(name="b", paths=paths[:1]), Peer(name="c", paths=paths)))
        body = supervisor.get("/metrics")[1]
    for kind, count in (("direct", 2), ("punched", 1), ("relayed", 2)):
        assert f'vpnd_sessions{{path="{kind}"}} {count}.0' in body


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
    with exporter(timeout=1.0) as supervisor:
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


@pytest.mark.setting("metrics.peer_histograms")
def test_round_trips_are_told_of_so_many_peers():
    rtt = Spread(buckets=(0, 0, 3, 1, *(0,) * 8), sum_s=0.01)
    peers = (Peer(name="silent"), *(Peer(name=f"m{number}", rtt=rtt) for number in range(3)))
    with exporter(peer_histograms=2) as supervisor:
        supervisor.status = Status(peers=peers)
        body = supervisor.get("/metrics")[1]
    name = "vpnd_peer_round_trip_seconds"
    assert f'{name}_bucket{{le="0.003",peer="m1",peer_id=""}} 4.0' in body
    assert f'{name}_sum{{peer="m0",peer_id=""}} 0.01' in body
    assert body.count(f"{name}_count{{") == 2 and f'{name}_count{{peer="silent"' not in body


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


def test_who_asks_slowly_is_hung_up_on_as_well():
    with exporter(timeout=0.5) as supervisor, supervisor.connect() as sock:
        begun_s = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < begun_s + 10:
                sock.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < begun_s + 10, "each byte would win it time"


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
