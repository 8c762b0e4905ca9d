"""Random schedules of traffic, faults and changes. What must hold is in `world`, what happens in `schedule`.

    VPND_SIMULATION_RUNS    how many runs, 100 if not set
    VPND_SIMULATION_SEED    the first seed, 0 if not set

A run that fails is named by its seed; `cd tests && python -m simulation SEED` plays it again and prints what happened.
"""

from __future__ import annotations

import os

import pytest

from simulation.schedule import play

#: Read at once: variables of the shell are gone when the tests run.
RUNS = int(os.environ.get("VPND_SIMULATION_RUNS", "100"))
FIRST_SEED = int(os.environ.get("VPND_SIMULATION_SEED", "0"))
#: As many tests share the runs, so that one that fails does not end the others.
PARTS = 8


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_no_schedule_breaks_a_rule(part: int) -> None:
    failed = {}
    for seed in range(FIRST_SEED + part, FIRST_SEED + RUNS, PARTS):
        try:
            play(seed)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}"
    assert not failed


@pytest.mark.parametrize("seed", [401, 631])
def test_datagrams_that_fall_silent_as_their_session_ends_do_not_keep_a_flow(seed: int) -> None:
    """Its packets went round between the batch's end and a lane that gave them back, for ever."""
    play(seed)


def test_a_run_is_the_same_each_time() -> None:
    first, second = play(11), play(11)
    assert first.log == second.log
    assert first.packets == second.packets
