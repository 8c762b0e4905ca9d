"""The process that serves the page, with this test as its supervisor; and what the page is told."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_harness import TOKEN, Supervisor, served

from vpnd.cli import main
from vpnd.config.schema import Config, Web
from vpnd.page.process import FILES, Refused, check_host_untrusted, check_token_untrusted
from vpnd.page.view import view
from vpnd.status import Peer, Shard, Status

STATUS = Status(
    ready=True,
    health="healthy",
    peers=tuple(Peer(name=f"p{number}", peer_id=f"id{number}", state="connected") for number in range(5)),
    shards=(Shard(index=0),),
)
AUTHORIZED = ("Host: localhost", f"Authorization: Bearer {TOKEN}")


@contextlib.contextmanager
def page(**settings: Any) -> Iterator[Supervisor]:
    with served("vpnd.page", Config(web=Web(**settings)), STATUS) as supervisor:
        yield supervisor


def events(supervisor: Supervisor, count: int, within_s: float = 10.0) -> list[Any]:
    """What an open page is told at first."""
    with supervisor.connect() as sock:
        sock.sendall("\r\n".join(["GET /events HTTP/1.1", *AUTHORIZED, "", ""]).encode())
        read, deadline_s = b"", time.monotonic() + within_s
        while read.count(b"\n\ndata: ") + read.count(b"\r\n\r\ndata: ") < count or not read.endswith(b"\n\n"):
            assert time.monotonic() < deadline_s
            read += sock.recv(65536)
    return [json.loads(line[6:]) for line in read.split(b"\n") if line.startswith(b"data: ")]


def test_the_page_is_everybodys_and_what_the_node_does_is_for_who_has_the_token():
    with page(interval=0.1) as supervisor:
        for path in FILES:
            code, body = supervisor.get(path, "GET", "Host: 127.0.0.1:1")
            assert code == 200 and body and TOKEN not in body
        for headers in (
            (),
            ("Authorization: Bearer",),
            ("Authorization: Bearer wrong",),
            (f"Authorization: Basic {TOKEN}",),
            (f"Cookie: token={TOKEN}",),
        ):
            assert supervisor.get("/events", "GET", "Host: localhost", *headers)[0] == 401
        assert supervisor.get(f"/events?token={TOKEN}", "GET", "Host: localhost")[0] == 401
        assert supervisor.get("/page/../page.js", "GET", *AUTHORIZED)[0] == 404
        first, second = events(supervisor, 2)[:2]
        assert first["health"] == "healthy" and len(first["peers"]) == 5 and first.keys() == second.keys()


def test_a_site_whose_name_leads_here_is_refused():
    with page() as supervisor:
        for host in ("evil.example", "evil.example:9587", "127.0.0.1.evil.example", "", "[evil]"):
            assert supervisor.get("/", "GET", f"Host: {host}")[0] == 421
            assert supervisor.get("/events", "GET", f"Host: {host}", AUTHORIZED[1])[0] == 421
        for host in ("localhost:9587", "127.0.0.1", "[::1]:9587", "10.86.0.1:80", "LOCALHOST"):
            assert supervisor.get("/", "GET", f"Host: {host}")[0] == 200


def test_nothing_comes_from_elsewhere_or_stands_inside_the_page():
    for content, _ in FILES.values():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert (
            "http:" not in text and "https:" not in text and "innerHTML" not in text and " style=" not in text
        )
    with page() as supervisor, supervisor.connect() as sock:
        sock.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        head = sock.recv(4096).decode()
    assert "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'" in head


@pytest.mark.setting("web.listen")
def test_the_host_it_listens_on_is_a_good_one():
    check_host_untrusted("vpn.example:1", Web(listen="vpn.example:1").listen)
    with page(listen="vpn.example:1") as supervisor:
        assert supervisor.get("/", "GET", "Host: vpn.example:1")[0] == 200


@pytest.mark.parametrize("token", ["", "x"])
def test_an_empty_token_opens_nothing(token):
    with pytest.raises(Refused):
        check_token_untrusted("Bearer ", token)


@pytest.mark.setting("web.max_peers")
def test_so_many_peers_are_shown():
    with page(interval=0.1, max_peers=3) as supervisor:
        shown = events(supervisor, 1)[0]
    assert (len(shown["peers"]), shown["known"], shown["connected"]) == (3, 5, "5 of 5 peers connected")


@pytest.mark.setting("web.interval")
def test_a_page_is_told_every_interval_and_nobody_is_asked_without_one():
    with page(interval=0.1) as supervisor:
        assert supervisor.get("/", "GET", "Host: localhost")[0] == 200
        assert supervisor.asked == 0
        begun_s = time.monotonic()
        events(supervisor, 6)
        assert time.monotonic() - begun_s < 4 and supervisor.asked >= 4, (
            "six intervals of the default take 5 s"
        )


@pytest.mark.setting("web.timeout")
def test_who_asks_nothing_is_hung_up_on():
    with page(timeout=0.2) as supervisor, supervisor.connect() as sock:
        sock.settimeout(4)
        assert sock.recv(1) == b""


@pytest.mark.setting("web.max_clients")
def test_one_client_more_than_set_is_hung_up_on():
    with page(max_clients=2) as supervisor:
        idle = [supervisor.connect() for _ in range(2)]
        with supervisor.connect() as sock:
            sock.settimeout(4)
            assert sock.recv(1) == b""
        for each in idle:
            each.close()


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        ((), ("", "")),
        (("direct 192.0.2.1:4001",), ("direct", "")),
        (("relayed via nas",), ("relayed", "nas")),
        (("relayed via nas (next punch in 30 s)",), ("relayed", "nas")),
        (("direct 192.0.2.1:4001 (punched)", "relayed via nas"), ("punched", "")),
        (("direct 192.0.2.1:4001 (punched)", "direct 192.0.2.1:4001"), ("direct", "")),
    ],
)
def test_the_kind_of_a_path_is_that_of_its_best_session(paths, shown):
    (peer,) = view(Status(peers=(Peer(state="connected", paths=paths),)), 1)["peers"]
    assert (peer["kind"], peer["via"]) == shown


def test_vpnd_page_prints_the_address_or_what_is_missing(tmp_path: Path, capsys, monkeypatch):
    assert main(["page", "--state-dir", str(tmp_path)]) == 2
    assert "web.listen is empty" in capsys.readouterr().err
    monkeypatch.setenv("VPND_WEB_LISTEN", "127.0.0.1:9587")
    assert main(["page", "--state-dir", str(tmp_path)]) == 3
    (tmp_path / "page.token").write_text("secret\n")
    assert main(["page", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "http://127.0.0.1:9587/#secret\n"
