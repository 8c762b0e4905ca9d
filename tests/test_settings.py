"""Every setting matters: there is a test in which another value changes what happens, and that is no mere claim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from settings_shown import SETTINGS, TESTS, claims, frozen

from vpnd.config.schema import Worker

CLAIMS = claims()
#: Where waiting costs nothing. The others take minutes: pytest --freeze-settings
QUICK = ("shards/test_fair.py", "shards/test_flows.py", "shards/test_health.py", "shards/test_sockets.py", "simulation",
         "stream", "control/test_planner.py", "control/test_planner_circuits.py")  # fmt: skip


@pytest.mark.parametrize("path", SETTINGS)
def test_a_test_shows_what_the_setting_changes(path: str) -> None:
    assert CLAIMS.get(path), f'which test has @pytest.mark.setting("{path}")?'


def test_only_settings_are_claimed() -> None:
    assert CLAIMS.keys() <= SETTINGS.keys()


def test_a_frozen_setting_is_its_default_until_it_thaws() -> None:
    table = Worker(buffer_size=7)
    with frozen("worker.buffer_size"):
        assert table.buffer_size == Worker().buffer_size
    assert table.buffer_size == 7


def freeze(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest --freeze-settings"""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--freeze-settings"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=TESTS.parent, env=environment
    )


def test_tests_on_made_up_clocks_fail_with_their_settings_frozen() -> None:
    done = freeze(*(str(TESTS / name) for name in QUICK))
    assert done.returncode == 0, done.stdout[-2000:]


CHEAT = """
import pytest
from vpnd.config.schema import Worker

@pytest.mark.setting("worker.buffer_size", "worker.shards")
@pytest.mark.parametrize("size", [4096, 7])
def test_of_the_size(size):
    assert Worker(buffer_size=size, shards=9).buffer_size == size

def test_of_nothing():
    raise AssertionError
"""


def test_a_test_that_does_not_notice_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "test_cheat.py").write_text(CHEAT)
    done = freeze("-p", "conftest", str(tmp_path))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_of_the_size passes although worker.shards always is its default" in done.stdout
    assert "although worker.buffer_size" not in done.stdout and "test_of_nothing" not in done.stdout
