"""Interpreters of children, one of which begins before it is wanted."""

from __future__ import annotations

import subprocess
import sys

import psutil

from supervisor import interpreter

#: It waits for its first message, and ends when there will be none.
MODULE = "vpnd.relay"
EARLY = f"from supervisor import interpreter as i; i.begin_early({MODULE!r}); print(i._early[{MODULE!r}].process.pid)"


def test_what_began_early_is_the_first_that_is_wanted() -> None:
    interpreter.begin_early(MODULE)
    early = interpreter._early[MODULE].process.pid
    first, second = interpreter.begin(MODULE), interpreter.begin(MODULE)
    assert first.process.pid == early != second.process.pid
    for each in (first, second):
        each.channel.close()
        assert each.process.wait(60.0) == 0


def test_one_that_has_died_is_none() -> None:
    interpreter.begin_early(MODULE)
    early = interpreter._early[MODULE].process
    early.kill()
    early.wait()
    got = interpreter.begin(MODULE)
    assert got.process.pid != early.pid
    got.channel.close()
    assert got.process.wait(60.0) == 0


def test_one_that_nobody_wants_ends_with_the_supervisor() -> None:
    done = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(done.stdout))
