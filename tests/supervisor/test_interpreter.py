"""Interpreters of children, one of which begins before it is wanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from supervisor import interpreter
from vpnd import cli
from vpnd.cli import app

#: It waits for its first message, and ends when there will be none.
MODULE = "vpnd.relay"
EARLY = f"from supervisor import interpreter as i; i.begin_early({MODULE!r}); print(i._early[{MODULE!r}].process.pid)"
#: Both programs of one process say the pid, the second one also how the interpreter ended.
AFTER = f"""
import sys
from supervisor import interpreter as i
i.take_over(eval(sys.argv[1]))
got = i.begin({MODULE!r})
got.channel.close()
print(got.process.pid, got.process.wait())
"""
BEFORE = f"""{EARLY}
import os, sys
sys.stdout.flush()
os.execv(sys.executable, [sys.executable, "-c", {AFTER!r}, repr(i.hand_over())])
"""


def ended(*begun: interpreter.Interpreter) -> None:
    for each in begun:
        each.channel.close()
        assert each.process.wait() == 0


def test_what_began_early_is_the_first_that_is_wanted() -> None:
    interpreter.begin_early(MODULE)
    early = interpreter._early[MODULE].process.pid
    first, second = interpreter.begin(MODULE), interpreter.begin(MODULE)
    assert first.process.pid == early != second.process.pid
    ended(first, second)


@pytest.mark.parametrize("waited_for", [True, False])
def test_one_that_has_died_is_none(waited_for: bool) -> None:
    interpreter.begin_early(MODULE)
    early = interpreter._early[MODULE].process
    os.kill(early.pid, signal.SIGKILL)
    if waited_for:
        early.wait()
    else:
        os.waitid(os.P_PID, early.pid, os.WEXITED | os.WNOWAIT)
    got = interpreter.begin(MODULE)
    assert got.process.pid != early.pid
    ended(got)


def test_one_that_nobody_wants_ends_with_the_supervisor() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(done.stdout))


def test_what_began_early_is_there_for_the_program_that_the_process_becomes() -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE], capture_output=True, text=True, check=True)
    early, taken, code = map(int, done.stdout.split())
    assert (early, code) == (taken, 0)


def test_start_in_the_foreground_begins_control_early_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(interpreter, "begin_early", begun.append)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(app, "run", lambda words: 0)

    def runs(words: str) -> list[str]:
        begun.clear()
        monkeypatch.setattr(sys, "argv", ["vpnd", *words.split()])
        assert cli.main() == 0
        return begun

    for words in ("status", "start --detach", "start --help", "--version", "ping start", "--config start"):
        assert runs(words) == [], words
    for words in ("start", "--config a.toml start --shards 2", "--state-dir=b start"):
        assert runs(words) == ["vpnd.control"], words
