"""The program of docs/embedding.md, as it stands there, beside another machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from lab import Lab, wait_until
from lab.joining import machine

from supervisor.service import peer_events
from vpnd.status import Peer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "embedding.md").read_text(), re.S)[0]
SOON_S = 40.0


@pytest.mark.root
def test_the_program_of_the_documentation_does_what_it_says() -> None:
    with Lab(2) as lab:
        other = machine(lab, 1)
        output, state = lab.directory / "program.log", lab.directory / "program"
        environment = {"PYTHONPATH": str(ROOT), "VPND_STATE_DIR": str(state)}
        program = lab.spawn(lab.nodes[0], sys.executable, "-c", PROGRAM, output=output, env=environment)

        def said(pattern: str) -> str:
            found = re.search(pattern, output.read_text(), re.M)
            assert program.poll() is None or found, output.read_text()
            return found[1] if found else ""

        wait_until(lambda: said(r"^token (\S+)$"), SOON_S, "it prints a token")
        other.start("--join", said(r"^token (\S+)$"))
        for line in (
            r"^(up nas direct .*)$",
            r"^(answered in [\d.]+ ms)$",
            r"^(members \S+ nas|members nas \S+)$",
            r"^(down nas)",
        ):
            wait_until(lambda line=line: said(line), SOON_S, line)
        wait_until(lambda: program.poll() is not None, SOON_S, "it ends")
        assert program.returncode == 0, output.read_text()
        assert "Traceback" not in output.read_text()


def test_events_are_what_lies_between_two_looks() -> None:
    a, b = Peer(peer_id="a", paths=("direct 1", "direct 1")), Peer(peer_id="b", paths=("relayed via a",))
    assert [(event.kind, event.peer) for event in peer_events({}, {"a": a})] == [("up", a)]
    assert list(peer_events({"a": a}, {"a": Peer(peer_id="a", paths=("direct 1",))})) == []
    better = Peer(peer_id="b", paths=("direct 2",))
    assert [(event.kind, event.peer) for event in peer_events({"a": a, "b": b}, {"b": better})] == [
        ("down", a),
        ("path", better),
    ]
