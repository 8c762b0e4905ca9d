"""Registering with systemd-resolved: exactly these commands, all or nothing, and never without resolved."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import pytest

from vpnd.names.resolved import CommandFailed, Link, Resolved, commands, hint, resolved_reachable, run_command

LINK = Link(
    interface="vpnd0",
    origin="home.vpn",
    prefixes=(ipaddress.ip_network("10.86.0.0/16"), ipaddress.ip_network("fd00::/8")),
    servers=("10.86.0.1", "fd00::1"),
    port=53,
)
REQUIRED = [
    "default-route vpnd0 no",
    "domain vpnd0 ~home.vpn ~86.10.in-addr.arpa ~d.f.ip6.arpa",
    "dns vpnd0 10.86.0.1 fd00::1",
]
OPTIONAL = [f"{verb} vpnd0 no" for verb in ("dnssec", "dnsovertls", "llmnr", "mdns")]


class Machine:
    """Stands for resolvectl: writes down what it is told and fails where `refuses` says so."""

    def __init__(self, tmp_path: Path, refuses: tuple[str, ...] = (), nameserver: str = "127.0.0.53") -> None:
        self.said: list[str] = []
        self._refuses = refuses
        conf = tmp_path / "resolv.conf"
        conf.write_text(f"# made by a test\nnameserver\nnameserver {nameserver}\nsearch lan\n")
        self.resolved = Resolved(1.5, self.run, lambda: True, conf)

    def run(self, command, timeout_s: float) -> None:
        assert command[:2] == ("resolvectl", "--") and timeout_s == 1.5
        self.said.append(" ".join(command[2:]))
        if command[2] in self._refuses:
            raise CommandFailed("no")


def test_what_is_said_and_taken_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.resolved.register(LINK) == (True, "")
    assert machine.said == REQUIRED + OPTIONAL
    machine.resolved.undo()
    machine.resolved.undo()
    assert machine.said[len(REQUIRED + OPTIONAL) :] == ["revert vpnd0"]


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ("default-route", [*REQUIRED[:1], "revert vpnd0"]),
        ("domain", [*REQUIRED[:2], "revert vpnd0"]),
        ("dns", [*REQUIRED, "revert vpnd0"]),
    ],
)
def test_half_a_registration_is_taken_back(tmp_path: Path, refused: str, said: list[str]) -> None:
    machine = Machine(tmp_path, (refused, "revert"))
    assert machine.resolved.register(LINK) == (False, hint(LINK))
    assert machine.said == said
    machine.resolved.undo()
    assert machine.said == said


def test_a_resolved_without_the_extras_is_good_enough(tmp_path: Path) -> None:
    machine = Machine(tmp_path, ("dnssec", "dnsovertls", "llmnr", "mdns"))
    assert machine.resolved.register(LINK) == (True, "")
    assert machine.said == REQUIRED + OPTIONAL


def test_a_resolved_that_nobody_asks_is_told_and_the_user_too(tmp_path: Path) -> None:
    assert Machine(tmp_path, nameserver="192.0.2.1").resolved.register(LINK) == (True, hint(LINK))


def test_nothing_is_run_where_resolved_is_not(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    resolved = Resolved(1.5, machine.run, lambda: False)
    assert resolved.register(LINK) == (False, hint(LINK))
    resolved.undo()
    assert machine.said == []


def test_another_port_is_said(tmp_path: Path) -> None:
    link = LINK._replace(port=5353)
    assert commands(link)[2] == ("dns", "vpnd0", "10.86.0.1:5353", "[fd00::1]:5353")
    assert "dig -p 5353 @10.86.0.1 NAME.home.vpn" in hint(link)
    assert "server=/home.vpn/10.86.0.1#5353" in hint(link)


def test_a_machine_without_resolvectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.defpath", str(tmp_path))
    resolved = Resolved(
        5.0, lambda command, timeout_s: run_command(("no-resolvectl-here", *command[1:]), timeout_s)
    )
    resolved._reachable = lambda: True
    assert resolved.register(LINK) == (False, hint(LINK))
    assert not resolved_reachable() or Path("/run/systemd/resolve").is_dir()


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("import sys; sys.exit('x\\nFailed to \\x1b set')", r"Failed to \\u001b set"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "did not end within 0.5 s"),
    ],
)
def test_a_command_that_fails_says_why_on_one_line(script: str, text: str) -> None:
    with pytest.raises(CommandFailed, match=text):
        run_command((sys.executable, "-c", script), 0.5 if "sleep" in script else 20.0)


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(CommandFailed, match="cannot be run"):
        run_command(("/nonexistent/resolvectl",), 1.0)
