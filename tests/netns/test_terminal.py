"""Commands of real nodes on a terminal of 80 columns, one and two of everything."""

from __future__ import annotations

import re

import pytest
from lab import Lab, check_logs
from lab.joining import all_reach_all, invite, machine

pytestmark = pytest.mark.root

COLUMNS = 80
SETTLE_S = 10.0
COMMANDS = [
    "status", "peers", "members --all", "invitations", "authority list", "netcheck", "doctor", "resolve nas",
    "why nas", "why nas:9", "why 192.0.2.1", "ping -c 1 nas", "ping nas --sweep", "reload", "scale 1", "top --once",
]  # fmt: skip
#: One, and an s behind what is counted.
ONE_OF_MANY = re.compile(r"(?<![\w=.,:])1 (?!is\b|was\b)[a-z]+s\b")


def test_nothing_is_wider_than_the_terminal_and_one_is_no_plural() -> None:
    with Lab(2) as lab:
        a, b = (machine(lab, place) for place in range(2))
        a.start()
        a.wait_ready()
        b.start("--join", invite(a, "--name", "nas"))
        b.wait_ready()
        all_reach_all([a, b], SETTLE_S)
        said = {words: a.vpnd(*words.split(), check=False).stdout for words in COMMANDS}
        said["invite"] = a.vpnd("invite").stderr
        said["start"] = "".join(
            line for line in a.log_file.read_text().splitlines(keepends=True) if not line.startswith("20")
        )
        assert said["start"].startswith("vpnd is ready: a in home\n")
        assert said["status"].partition(":")[0] == "a in home"
        assert "streams" in said["status"], "what carries packets to the peer"
        for words, text in said.items():
            assert text, words
            for line in text.splitlines():
                shown = re.sub(r"\x1b\[\d*m", "", line)
                assert len(shown) <= COLUMNS, f"vpnd {words}: {shown}"
                assert not ONE_OF_MANY.search(shown), f"vpnd {words}: {shown}"
        refused = a.vpnd("join", "foo", check=False)
        assert refused.returncode == 2 and "TOKEN: " in refused.stderr and "--join" not in refused.stderr
        # who leaves by itself was not removed
        assert b.vpnd("leave").returncode == 0
        assert re.search(r"nas +10\.86\S+ +left, \d+ s ago", a.vpnd("members", "--all").stdout)
        why = a.vpnd("why", "nas", check=False).stdout
        assert "left the network" in why and "vpnd invite" in why
        assert a.stop() == 0
        check_logs([a])
