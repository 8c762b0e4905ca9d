"""`vpnd reload` and `vpnd scale` as a user meets them: what they print, and their exit codes."""

from __future__ import annotations

import json

import pytest
from fake_daemon import daemon

from vpnd.cli import main

RELOADED = {
    "applied": [{"key": "health.interval", "old": 5.0, "new": 2.0}],
    "needs_restart": [
        {"key": "network.mtu", "old": 1400, "new": 1280, "remedy": "stop it and start it again"}
    ],
    "peers_added": [{"name": "c", "peer_id": "C"}],
    "peers_removed": [{"name": "b", "peer_id": "B"}],
}
SAID = [
    (
        "a reload",
        ["reload"],
        RELOADED,
        'applied: health.interval = "2s" (was "5s")\n'
        "peer added: c\n"
        "peer removed: b\n"
        "not applied: network.mtu = 1280 (is 1400): stop it and start it again\n",
    ),
    ("a reload of nothing", ["reload"], {"applied": [], "needs_restart": []}, "nothing has changed\n"),
    (
        "fewer shards",
        ["scale", "1"],
        {"before": 3, "shards": 1, "flows_moved": 7},
        "1 shard, there were 3; 7 flows moved\n",
    ),
    ("more shards", ["scale", "3"], {"before": 1, "shards": 3}, "3 shards, there was 1\n"),
    ("as many", ["scale", "2"], {"before": 2, "shards": 2}, "2 shards, as before\n"),
]


@pytest.mark.parametrize(("what", "command", "answer", "said"), SAID, ids=[row[0] for row in SAID])
def test_what_has_changed_is_said_for_people_and_machines(what, command, answer, said, tmp_path, capsys):
    with daemon(tmp_path, answer):
        assert main([*command, "--state-dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == said
        assert main([*command, "--json", "--state-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out).items() >= answer.items()


REFUSED = [
    ("a bad configuration", "ConfigError", 2),
    ("a shard that does not start", "ChildError", 7),
    ("a class of another version", "NewError", 1),
    ("no class of ours", "Path", 1),
]


@pytest.mark.parametrize(("what", "kind", "code"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_refusal_ends_with_its_own_exit_code_and_a_line_for_each_problem(
    what, kind, code, tmp_path, capsys
):
    with daemon(tmp_path, {"error": "one\ntwo", "kind": kind}):
        assert main(["reload", "--state-dir", str(tmp_path)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].endswith("one") and lines[1] == "vpnd: error: two"


def test_scale_takes_a_number(capsys):
    assert main(["scale", "many"]) == 2
    assert main(["scale"]) == 2
