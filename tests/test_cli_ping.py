"""`vpnd ping` as a user meets it: who is pinged, what is printed, exit codes. The peer is this machine's loopback."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_daemon import daemon

from vpnd import errors, status
from vpnd.cli import main, pinging, pingview
from vpnd.printable import wrapped

ROOT = Path(__file__).resolve().parent.parent
#: linux/prctl.h, linux/capability.h
PR_CAPBSET_DROP, CAP_NET_RAW = 24, 13

SESSION = {
    "id": "3fa2", "peer_id": "B", "local": "192.0.2.1:41234", "remote": "192.0.2.2:4001", "rtt_ms": 0.31
}  # fmt: skip
SILENT = {**SESSION, "rtt_ms": None}
BACK = {
    "seq": 1, "rtt_ms": 0.92, "why": "", "sent": True, "nodes_ms": 0.61, "shard": 1, "session": SESSION,
    "session_why": "",
}  # fmt: skip
LOST = {**BACK, "rtt_ms": None, "why": "no answer within 2 s", "nodes_ms": None}
WAY = "shard 1, session 3fa2, 192.0.2.1:41234 -> 192.0.2.2:4001"

TRIPS = [
    # (sentence, the trip, the one before, what is printed)
    (
        "the first says which way it went",
        BACK,
        None,
        [f"PING nas (10.86.0.2) through {WAY}", "1  0.92 ms   session 0.31 ms, both nodes 0.61 ms"],
    ),
    ("the next does not say it again", {**BACK, "seq": 2}, BACK, ["2  0.92 ms   session 0.31 ms, both nodes 0.61 ms"]),
    (
        "another way is told",
        {**BACK, "seq": 2, "session": {**SESSION, "id": "9"}},
        BACK,
        [
            f"   now through {WAY.replace('3fa2', '9')}",
            "2  0.92 ms   session 0.31 ms, both nodes 0.61 ms",
        ],
    ),
    ("the echo alone is lost", LOST, LOST, ["1  no answer within 2 s   session 0.31 ms"]),
    (
        "the session alone says nothing",
        {**BACK, "session": SILENT, "session_why": "no answer within 2 s", "nodes_ms": None},
        BACK,
        ["1  0.92 ms   session: no answer within 2 s"],
    ),
    (
        "there is no session",
        {**LOST, "session": None, "session_why": "packets wait for one"},
        None,
        [
            "PING nas (10.86.0.2) through shard 1, no session",
            "1  no answer within 2 s   no session: packets wait for one",
        ],
    ),
    (
        "there is not even a shard",
        {**LOST, "shard": None, "session": None, "session_why": "no shard is up"},
        None,
        ["PING nas (10.86.0.2) through no shard, no session", "1  no answer within 2 s   no session: no shard is up"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "trip", "before", "said"), TRIPS, ids=[row[0] for row in TRIPS])
def test_a_trip_is_a_line(sentence, trip, before, said):
    assert pingview.trip("nas", "10.86.0.2", trip, before) == "\n".join(map(wrapped, said))


def result(*trips: dict[str, Any], **besides: Any) -> dict[str, Any]:
    return {"name": "nas", "address": "10.86.0.2", **pingview.sums(trips), "pings": list(trips), **besides}


NOBODY = {**LOST, "session": None, "session_why": "packets wait for one"}
PEER = status.Peer(state="backoff", circuit="open", next_dial_s=1.0, last_error="connection refused")
SUMMARIES = [
    # (sentence, the result, what is printed)
    (
        "all came back",
        result(BACK, {**BACK, "rtt_ms": 1.08}),
        ["2 sent, 2 came back, 0% lost; min 0.92 ms, avg 1.00 ms, max 1.08 ms"],
    ),
    (
        "some were lost, which the session need not explain",
        result(BACK, LOST, LOST, LOST),
        ["4 sent, 1 came back, 75% lost; min 0.92 ms, avg 0.92 ms, max 0.92 ms"],
    ),
    (
        "the session answers, the echo is filtered",
        result(LOST, LOST),
        [
            "2 sent, 0 came back, 100% lost",
            "the session to nas answers, 10.86.0.2 does not: a firewall, on nas or here, drops pings",
        ],
    ),
    (
        "this machine does not even send it",
        result({**LOST, "sent": False, "why": "not sent: Operation not permitted"}),
        ["0 sent, 0 came back, 100% lost"],
    ),
    (
        "no session, but the daemon answers",
        result(NOBODY, peer=PEER, control={"rtt_ms": 1.5, "error": ""}),
        [
            "1 sent, 0 came back, 100% lost",
            "nas is backoff: circuit open, next try in 1.0 s: connection refused",
            "its daemon answers: 1.50 ms by a libp2p connection between the controls",
        ],
    ),
    (
        "nothing answers",
        result(
            NOBODY, peer=status.Peer(state="waiting"), control={"rtt_ms": None, "error": "connection refused"}
        ),
        [
            "1 sent, 0 came back, 100% lost",
            "nas is waiting: no address to dial: waiting for its dial",
            "its daemon does not answer: connection refused",
        ],
    ),
    (
        "our control is away",
        result(NOBODY, peer=None, control={"rtt_ms": None, "error": "control is restarting", "asked": False}),
        [
            "1 sent, 0 came back, 100% lost",
            "its daemon could not be asked: control is restarting",
        ],
    ),
    ("broken off before the first", result(), ["0 sent, 0 came back, 0% lost"]),
]


@pytest.mark.parametrize(("sentence", "told", "said"), SUMMARIES, ids=[row[0] for row in SUMMARIES])
def test_the_last_lines_say_what_it_means(sentence, told, said):
    assert pingview.summary(told) == "\n".join(map(wrapped, said))


def test_what_other_nodes_are_called_cannot_move_the_cursor():
    assert "\x1b" not in pingview.trip("b\x1b[2J", "10.86.0.2", BACK, None)
    assert "\x1b" not in pingview.summary({**result(LOST), "name": "b\x1b[2J"})


def test_views_take_answers_of_other_versions():
    assert pingview.trip("b", "10.86.0.2", {}, None) and pingview.trip("b", "10.86.0.2", {}, {})


# --- the command: the loopback device is the tunnel, a peer at one of its addresses the other end

NODE = {"name": "a", "peer_id": "A", "addresses": ["127.0.0.1", "::1"]}
PEERS = [
    {"name": "b", "peer_id": "B", "virtual_ips": ["::1", "127.0.0.2", "127.0.0.3"], "state": "connected"},
    {"name": "four", "peer_id": "C", "virtual_ips": ["127.0.0.4"], "state": "connected"},
    {"name": "none", "peer_id": "D", "virtual_ips": [], "state": "waiting"},
]
STATUS: dict[str, Any] = {
    "node": NODE,
    "peers": PEERS,
    "tun": {"interface": "lo"},
    "commands": {
        "probe": {"shard": 1, "session": {**SESSION, "rtt_ms": 0.0001}, "why": ""},
        "resolve": {"answer": {"what": "x", "peer_id": "", "steps": []}},
    },
}


def ping(state_dir: Path, *words: str, **status: Any) -> int:
    with daemon(state_dir, {**STATUS, **status}):
        code = main(["ping", *words, "--state-dir", str(state_dir), "-i", "0"])
    (state_dir / "vpnd.sock").unlink()
    return code


def asked(state_dir: Path) -> list[dict[str, Any]]:
    """What the daemon was asked for but status."""
    return [json.loads(line) for line in (state_dir / "vpnd.sock.asked").read_text().splitlines()]


WHOM = [
    ("a name: IPv4 before IPv6", ["b"], "127.0.0.2"),
    ("a peer id", ["B"], "127.0.0.2"),
    ("one of its addresses", ["127.0.0.3"], "127.0.0.3"),
    ("IPv6 on demand", ["b", "-6"], "::1"),
    ("IPv6 on demand, whatever it was called by", ["127.0.0.3", "--ipv6"], "::1"),
]


@pytest.mark.root
@pytest.mark.parametrize(("sentence", "words", "address"), WHOM, ids=[row[0] for row in WHOM])
def test_who_is_pinged_where(sentence, words, address, tmp_path, capsys):
    assert ping(tmp_path, *words, "-c", "1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["address"], said["received"]) == ("b", address, 1)
    assert [request["address"] for request in asked(tmp_path)] == [address]


NOT = [
    # (sentence, command, what is different in status, exit code, what is said)
    ("nobody", ["x"], {}, errors.ConfigError, "x is no peer of this node"),
    ("this node by name", ["a"], {}, errors.ConfigError, "a is this node itself"),
    ("this node by address", ["127.0.0.1"], {}, errors.ConfigError, "127.0.0.1 is this node itself"),
    ("no IPv6 there", ["four", "-6"], {}, errors.ConfigError, "four has no IPv6 address in the VPN"),
    ("no address at all", ["none"], {}, errors.ConfigError, "none has no address in the VPN"),
    ("no IPv6 here", ["b", "-6"], {"node": {"addresses": ["127.0.0.1"]}}, errors.ConfigError, "no such address"),
    ("another namespace: no device", ["b"], {"tun": {"interface": "vpnd-none"}}, errors.MachineError, "nsenter -n -t"),
    (
        "another namespace: a device of that name",
        ["b"],
        {"node": {"addresses": ["192.0.2.1"]}},
        errors.MachineError,
        "lo with 192.0.2.1 is not here",
    ),
]  # fmt: skip


@pytest.mark.root
@pytest.mark.parametrize(("sentence", "words", "status", "error", "said"), NOT, ids=[row[0] for row in NOT])
def test_what_cannot_be_pinged_is_told(sentence, words, status, error, said, tmp_path, capsys):
    assert ping(tmp_path, *words, **status) == error.exit_code
    assert said in capsys.readouterr().err


@pytest.mark.root
def test_without_the_right_to_a_raw_socket_it_says_what_to_do(tmp_path):
    def drop_net_raw() -> None:
        assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_NET_RAW, 0, 0, 0) == 0

    with daemon(tmp_path, STATUS):
        done = subprocess.run(
            [sys.executable, "-m", "vpnd", "ping", "b", "--state-dir", str(tmp_path)],
            preexec_fn=drop_net_raw, capture_output=True, text=True, cwd=ROOT, timeout=30,
        )  # fmt: skip
    assert done.returncode == errors.PrivilegeError.exit_code
    assert "raw socket" in done.stderr and "sudo vpnd ping" in done.stderr and not done.stdout


@pytest.mark.root
def test_one_line_for_each_and_a_summary(tmp_path, capsys):
    assert ping(tmp_path, "b", "-c", "3") == 0
    head, more, *lines, last = capsys.readouterr().out.splitlines()
    assert f"{head} {more.strip()}" == f"PING b (127.0.0.2) through {WAY}"
    assert [re.sub(r"\d+\.\d+", "T", line) for line in lines] == [
        f"{seq}  T ms   session T ms, both nodes T ms" for seq in (1, 2, 3)
    ]
    assert last.startswith("3 sent, 3 came back, 0% lost; min ")


ELSEWHERE = [
    (
        "its daemon answers",
        {"answer": [{"seq": 1, "rtt_ms": 1.5, "error": ""}]},
        "its daemon answers: 1.50 ms",
    ),
    ("it does not", {"answer": [{"seq": 1, "rtt_ms": None, "error": "refused"}]}, "does not answer: refused"),
    (
        "our control is away",
        {"error": "control is gone", "kind": "VpndError"},
        "not be asked: control is gone",
    ),
]


@pytest.mark.root
@pytest.mark.parametrize(("sentence", "answer", "said"), ELSEWHERE, ids=[row[0] for row in ELSEWHERE])
def test_without_a_session_its_daemon_is_tried(sentence, answer, said, tmp_path, capsys):
    probe = {"shard": 0, "session": None, "why": "packets wait for one"}
    assert ping(tmp_path, "b", "-c", "1", commands={"probe": probe, "ping": answer}) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "PING b (127.0.0.2) through shard 0, no session"
    assert shown[1].endswith("ms   no session: packets wait for one")
    assert shown[-2] == "b is connected" and said in shown[-1]
    assert {request["command"] for request in asked(tmp_path)} == {"probe", "ping"}


@pytest.mark.root
def test_a_route_past_the_tunnel_is_told(tmp_path, capsys):
    """No socket is bound to anything: what is measured is what programs get."""
    assert ping(tmp_path, "b", "-c", "1", node={**NODE, "addresses": ["127.0.0.9"]}) == 0
    assert capsys.readouterr().out.startswith(
        "note: this machine sends to 127.0.0.2 from 127.0.0.1, not through lo: see ip route get 127.0.0.2\n"
    )


@pytest.mark.root
@pytest.mark.parametrize("words", [["-s", "1000"], ["--size", "60000"], ["-6", "-s", "2000"]])
def test_requests_are_as_large_as_wanted(words, tmp_path, capsys):
    assert ping(tmp_path, "b", "-c", "1", "--json", *words) == 0
    assert json.loads(capsys.readouterr().out)["received"] == 1


@pytest.mark.root
def test_a_sweep_ends_with_what_comes_through(tmp_path, capsys):
    assert ping(tmp_path, "b", "--sweep", tun={"interface": "lo", "mtu": 1400}) == 0
    assert capsys.readouterr().out == "packets to b come through up to the MTU of the VPN, 1400 bytes\n"


@pytest.mark.parametrize("largest", [0, 44, 45, 1199, 1200, 1399, 1400])
def test_the_largest_that_passes_is_found_in_a_few_tries(largest):
    tried = []

    def passes(size: int) -> bool:
        tried.append(size)
        return size <= largest

    assert pinging.largest_that(passes, 44, 1400) == largest
    assert len(tried) <= 13
