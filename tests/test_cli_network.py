"""The commands of a network as a user meets them: what they ask for, what they print and where, their exit codes."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_daemon import daemon

from vpnd import errors, peerid
from vpnd.cli import main, memberview
from vpnd.config import paths
from vpnd.config.schema import Config, Network, Peer
from vpnd.membership import network as network_format
from vpnd.membership import token as tokens
from vpnd.membership.store import Store
from vpnd.mode import Mode, decide
from vpnd.printable import wrapped

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEER_ID = peerid.from_public_key(KEY.public_key().public_bytes_raw())
TOKEN = tokens.encode(
    tokens.Token(network=bytes(8), peer_id=PEER_ID, addresses=("/ip4/192.0.2.1/tcp/4001",), secret=bytes(16))
)
NETWORK = {
    "name": "home", "label": "a", "network_id": "00ff", "state": "member", "current": True, "authority": True,
    "authorities": 1, "members": 3, "expires_s": 3600.0, "neighbours": 2, "conflicts": [],
}  # fmt: skip
STATUS = {
    "ready": True,
    "node": {"name": "a", "virtual_ip": "10.86.0.1", "addresses": ["10.86.0.1", "fd00::1"]},
    "network": NETWORK,
    "peers": [
        {
            "name": "b", "peer_id": "B", "virtual_ip": "10.86.0.2", "virtual_ips": ["10.86.0.2", "fd00::2"],
            "state": "connected", "rtt_ms": 0.5, "sessions": 2, "routes": ["10.9.0.0/24"],
            "source": "membership", "addresses": ["/ip4/192.0.2.2/tcp/4001"],
        }
    ],
}  # fmt: skip
MEMBERS = [
    {
        "name": "a", "peer_id": "A", "addresses": ["10.86.0.1"], "routes": [], "groups": ["ops"],
        "state": "member", "expires_s": 7200.0, "connected": True, "authority": True,
    },
    {
        "name": "b\x1b[2J", "peer_id": "B", "addresses": ["10.86.0.2"], "routes": ["10.9.0.0/24"], "groups": [],
        "state": "removed", "expires_s": None, "connected": False, "authority": False,
    },
]  # fmt: skip


def asked(state_dir: Path) -> list[dict[str, Any]]:
    """What the fake daemon was asked for but status, without the patience."""
    lines = (state_dir / "vpnd.sock.asked").read_text().splitlines()
    requests = [json.loads(line) for line in lines]
    for request in requests:
        request.pop("patience_s", None)
    return requests


SAID = [
    # (sentence, command, what the daemon answers, what it is asked for, what stands on standard output)
    (
        "an invitation is a token and nothing else",
        ["invite"],
        {"token": "vpnd1abc", "expires_s": 3600.0, "uses": 1},
        {"command": "invite", "name": None, "uses": 1, "expires_s": None, "ip": None, "routes": None, "groups": None},
        "vpnd1abc\n",
    ),
    (
        "an invitation with everything",
        ["invite", "--name", "nas", "--uses", "2", "--expires", "2h", "--ip", "10.86.0.9", "--route", "10.9.0.0/24",
         "--route", "10.8.0.0/24", "--group", "ops"],
        {"token": "vpnd1abc", "expires_s": 7200.0, "uses": 2},
        {"command": "invite", "name": "nas", "uses": 2, "expires_s": 7200.0, "ip": "10.86.0.9",
         "routes": "10.9.0.0/24,10.8.0.0/24", "groups": "ops"},
        "vpnd1abc\n",
    ),
    (
        "a removal says who it was",
        ["remove", "10.86.0.2"],
        {"removed": "b", "peer_id": "B"},
        {"command": "remove", "who": "10.86.0.2"},
        "b (B) is removed; to let it in again: vpnd invite\n",
    ),
    (
        "another authority, by its name",
        ["authority", "add", "10.86.0.2"],
        {"name": "b"},
        {"command": "authority-add", "who": "10.86.0.2"},
        "b is an authority now\n",
    ),
    (
        "an authority less",
        ["authority", "revoke", "b"],
        {},
        {"command": "authority-revoke", "who": "b", "stolen": None, "keep": None, "keep_all": None},
        "b is no authority any more\n",
    ),
    (
        "a stolen authority",
        ["authority", "revoke", "b", "--stolen", "--keep", "c"],
        {"name": "b", "told": 0, "again": ["c", "d"], "out": ["x"], "back": [], "lapsed": ["e"]},
        {"command": "authority-revoke", "who": "b", "stolen": True, "keep": "c", "keep_all": None},
        "b is no authority any more; no other node is connected, they hear of it when one is\n"
        "c d: signed again, as other authorities made them\n"
        "x: out, for it alone vouched for them (those that were good: vpnd invite)\n"
        "e: no authorities any more, for it had named them (vpnd authority add)\n",
    ),
    (
        "an authority that is removed",
        ["remove", "b"],
        {"removed": "b", "peer_id": "B", "authority": True, "told": 3},
        {"command": "remove", "who": "b"},
        "b (B) is removed; to let it in again: vpnd invite\n"
        "It was an authority: whom it let in stays. If its key was stolen: vpnd authority revoke b --stolen\n",
    ),
    (
        "an invitation less",
        ["invitations", "--cancel", "3f2a91c0"],
        [],
        {"command": "invitations", "cancel": "3f2a91c0"},
        "No invitations.\n",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "command", "answer", "request_", "said"), SAID, ids=[row[0] for row in SAID]
)
def test_what_is_asked_and_printed(what, command, answer, request_, said, tmp_path, capsys):
    with daemon(tmp_path, {**STATUS, "commands": {request_["command"]: {"answer": answer}}}):
        assert main(["--state-dir", str(tmp_path), *command]) == 0
    assert capsys.readouterr().out == "".join(f"{wrapped(line)}\n" for line in said.splitlines())
    assert asked(tmp_path) == [request_]


def test_how_long_an_invitation_is_good_for_stands_beside_the_token(tmp_path, capsys):
    answer = {"token": "vpnd1abc", "expires_s": 3600.0, "uses": 3}
    with daemon(tmp_path, {"commands": {"invite": {"answer": answer}}}):
        assert main(["invite", "--state-dir", str(tmp_path)]) == 0
    assert "3 times, within 1 h" in capsys.readouterr().err


@pytest.mark.parametrize("expires", ["soon", "0s", "-1h", "7d"])
def test_a_wrong_lifetime_is_told_before_anybody_is_asked(expires, tmp_path, capsys):
    assert main(["invite", "--expires", expires, "--state-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("vpnd: error: --expires")


def test_members_are_a_table_and_json(tmp_path, capsys):
    with daemon(tmp_path, {"commands": {"members": {"answer": MEMBERS}}}):
        assert main(["members", "--state-dir", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert main(["members", "--json", "--state-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == MEMBERS
    head, first, second, _, _, more, other = shown.splitlines()
    assert head.split()[:2] == ["member", "address"]
    assert first.split() == ["a", "10.86.0.1", "member", "yes", "yes", "2", "h", "0", "m"]
    assert more.split() == ["a", "A", "-", "ops"]
    assert "\x1b" not in second and "removed" in second and "10.9.0.0/24" in other


def test_peers_are_those_of_the_status(tmp_path, capsys):
    with daemon(tmp_path, STATUS):
        assert main(["peers", "--state-dir", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert main(["peers", "--json", "--state-dir", str(tmp_path)]) == 0
    (told,), (peer,) = json.loads(capsys.readouterr().out), STATUS["peers"]
    assert told == told | peer and "circuit_opened" in told
    for part in ("10.86.0.2 fd00::2", "connected", "0.50 ms", "10.9.0.0/24", "membership", "192.0.2.2"):
        assert part in shown


def test_addresses_that_a_contract_does_not_confirm_are_named_with_the_reason(tmp_path, capsys):
    line = "10.86.0.2 is not used: the contract says that nobody owns it"
    (peer,) = STATUS["peers"]
    status = STATUS | {"peers": [peer | {"ownership": [line], "virtual_ips": ["fd00::2"]}]}
    with daemon(tmp_path, status):
        for command in ("peers", "status"):
            main([command, "--state-dir", str(tmp_path)])
            assert f"\nb: {line}\n" in capsys.readouterr().out


FOUND = {
    "what": "b",
    "steps": [
        {"source": "directory", "age_s": 3.25, "result": "b is B"},
        {"source": "dht", "age_s": None, "result": "nothing"},
    ],
    "peer_id": "B",
    "name": "b",
    "addresses": ["/ip4/192.0.2.2/tcp/4001"],
}


def test_resolve_shows_each_step_and_ends_with_1_when_nobody_was_found(tmp_path, capsys):
    place = ["--state-dir", str(tmp_path)]
    with daemon(tmp_path, {"commands": {"resolve": {"answer": FOUND}}}):
        assert main(["resolve", "b", *place]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"directory +3\.2 s +b is B\ndht +- +nothing", shown)
    assert "/ip4/192.0.2.2/tcp/4001" in shown
    (tmp_path / "vpnd.sock").unlink()
    nobody = {"what": "c", "steps": FOUND["steps"][1:], "peer_id": "", "addresses": []}
    with daemon(tmp_path, {"commands": {"resolve": {"answer": nobody}}}):
        assert main(["resolve", "c", *place]) == 1
    assert capsys.readouterr().out.endswith("Nobody is known as c.\n")


REFUSED = [
    ("an authority says no", "RefusedError", errors.RefusedError.exit_code),
    ("somebody else's key is not ours", "ConfigError", 2),
]


@pytest.mark.parametrize(("what", "kind", "code"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_refusal_is_one_line_and_its_exit_code(what, kind, code, tmp_path, capsys):
    with daemon(tmp_path, {"commands": {"remove": {"error": "not an authority", "kind": kind}}}):
        assert main(["remove", "b", "--state-dir", str(tmp_path)]) == code
    assert capsys.readouterr().err == "vpnd: error: not an authority\n"


def test_the_last_authority_does_not_leave_by_mistake(tmp_path, capsys):
    place = ["--state-dir", str(tmp_path)]
    with daemon(tmp_path, {**STATUS, "commands": {"leave": {"answer": {}}}}) as process:
        assert main(["leave", *place]) == errors.RefusedError.exit_code
        assert "only authority of network home" in capsys.readouterr().err
        assert main(["leave", "--force", *place]) == 0
        assert process.wait(5) == 0
    assert capsys.readouterr().out == "left the network home; the node has stopped\n"


@pytest.mark.root
def test_a_network_can_be_left_without_a_daemon(tmp_path, capsys):
    place = ["--state-dir", str(tmp_path)]
    assert main(["leave", *place]) == errors.NotRunningError.exit_code
    store = Store(tmp_path / "network")
    store.save_network(network_format.create("home", bytes(32), "10.86.0.0/16"))
    store.save_key(KEY)
    assert main(["leave", *place]) == errors.RefusedError.exit_code
    assert "authority key" in capsys.readouterr().err
    assert main(["leave", "--force", *place]) == 0
    assert capsys.readouterr().out == "the network home is forgotten; no node was running\n"
    assert os.listdir(tmp_path / "network") == []


@pytest.mark.root
@pytest.mark.parametrize(
    "token",
    ["hello", TOKEN[:-3], TOKEN[:20] + ("0" if TOKEN[20] != "0" else "1") + TOKEN[21:], ""],
    ids=["no token", "cut short", "a character wrong", "none"],
)
def test_a_mistyped_token_is_told_before_anything_is_made(token, tmp_path, capsys, monkeypatch):
    state = tmp_path / "state"
    if not token:
        monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["start", "--state-dir", str(state), "--join", token or "-"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vpnd: error: --join: ") and said.count("\n") == 1
    assert "vpnd invite" in said and (not token or token not in said)
    assert not state.exists()


def test_views_take_answers_of_other_versions():
    assert memberview.members([{}]) and memberview.authorities([{}]) and memberview.resolved({})
    assert memberview.removed({})


WITH_PEERS = Config(peers=(Peer(name="b", peer_id="B", virtual_ip="10.86.0.2"),))
WITH_ADDRESS = Config(network=Network(virtual_ip="10.86.0.1"))
MODES = [
    # (sentence, configuration, has a network, has a token, mode)
    ("nothing: it makes a network", Config(), False, False, Mode.NEW),
    ("a token: it joins", Config(), False, True, Mode.NEW),
    ("configured peers: as ever", WITH_PEERS, False, False, Mode.STATIC),
    ("an address of its own: its peers come with a reload", WITH_ADDRESS, False, False, Mode.STATIC),
    ("configured peers beside a network to join", WITH_PEERS, False, True, Mode.NEW),
    ("a member stays one, whatever peers are configured", WITH_PEERS, True, False, Mode.MEMBER),
    ("a token of a member changes nothing here", Config(), True, True, Mode.MEMBER),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "config", "member", "joining", "mode"), MODES, ids=[row[0] for row in MODES]
)
def test_how_a_node_knows_its_peers(what, config, member, joining, mode, tmp_path):
    config = msgspec.structs.replace(config, state_dir=str(tmp_path))
    if member:
        Store(paths.network_dir(config)).save_network(
            network_format.create("home", bytes(32), "10.86.0.0/16")
        )
    assert decide(config, joining=joining) is mode


@pytest.mark.parametrize("who", ["a", "10.86.0.1", "fd00:0::1", "nas"])
def test_who_asks_about_this_node_itself_is_told_so(tmp_path, capsys, who):
    """By the machine's name, by an address, and by its name in the network."""
    with daemon(tmp_path, {**STATUS, "network": {**NETWORK, "label": "nas"}}):
        for command in ("why", "ping"):
            assert main([command, who, "--state-dir", str(tmp_path)]) == errors.ConfigError.exit_code
            assert f"{who} is this node itself" in capsys.readouterr().err
