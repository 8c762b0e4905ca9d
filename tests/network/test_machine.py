"""When the machine is looked after: at once, again and again, never twice at once, and not after the end."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from supervisor.network import filter
from supervisor.network.filter import KillSwitch
from supervisor.network.machine import Reconciler
from vpnd.config import paths
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network

PATIENCE_S = 20.0


class Part:
    """Counts its passes; what it returns is what it could not do."""

    def __init__(self, took_s: float = 0.0) -> None:
        self.passes, self.problems, self._took_s = 0, ["x: do y"], took_s
        self._lock = threading.Lock()

    def __call__(self) -> list[str]:
        assert self._lock.acquire(blocking=False), "two passes at once"
        self.passes += 1
        time.sleep(self._took_s)
        self._lock.release()
        return self.problems


@pytest.mark.parametrize(("switch", "problems"), [(None, 0), (KillSwitch(user=1, table=7669), 1)])
def test_a_machine_without_nft_is_healthy_unless_there_is_a_kill_switch(
    monkeypatch: pytest.MonkeyPatch, switch: KillSwitch | None, problems: int
) -> None:
    monkeypatch.setattr(paths, "PROGRAMS", "/nowhere")
    wanted = filter.Filter("tn0", switch)
    said = wanted.mend()
    assert len(said) == problems and bool(wanted.hint) is not bool(problems)
    assert "install" in (*said, wanted.hint)[0]


NO_NAT = """#!/bin/sh
# nft, in a kernel without NAT
rules=$(cat)
case "$rules" in *masquerade*) echo "Error: no NAT here" >&2; exit 1 ;; esac
[ "$1" = -f ] && printf %s "$rules" > {kept}
[ "$1" = -f ] || cat {kept}
"""


def test_where_the_kernel_has_no_nat_the_other_rules_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, program = tmp_path / "rules", tmp_path / "nft"
    program.write_text(NO_NAT.format(kept=kept))
    program.chmod(0o755)
    monkeypatch.setattr(paths, "PROGRAMS", str(tmp_path) + ":/bin:/usr/bin")
    wanted = filter.Filter("tn0", None)
    wanted.own, wanted.masqueraded = ("10.86.0.1",), ("192.168.7.0/24",)
    for _ in range(2):
        (said,) = wanted.mend()
        assert "network.masquerade" in said and "no NAT here" in said
        assert "10.86.0.1" in kept.read_text()
    wanted.masqueraded = ()
    assert wanted.mend() == []


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def settings(**keys: float) -> Live:
    return Live(Config(network=Network(**keys)))


@pytest.mark.setting("network.reconcile_interval")
def test_it_is_looked_after_in_an_interval() -> None:
    async def run() -> None:
        part = Part()
        looking = Reconciler(settings(reconcile_interval=0.1, change_settle_max=0.0), [part])
        await until(lambda: part.passes >= 4)
        assert looking.problems == ["x: do y"]
        part.problems = []
        await until(lambda: not looking.problems)
        await looking.close()
        passes = part.passes
        looking.look()
        await asyncio.sleep(0.3)
        assert part.passes == passes

    asyncio.run(run())


def test_a_change_is_looked_at_at_once_and_a_fight_ever_less_often() -> None:
    async def run() -> None:
        part = Part(took_s=0.01)
        looking = Reconciler(settings(change_settle=0.02, change_settle_max=4.0), [part])
        await until(lambda: part.passes == 1 and not looking.busy)
        await asyncio.sleep(0.5)
        assert part.passes == 1
        asked_s = time.monotonic()
        looking.look()
        await until(lambda: part.passes == 2)
        assert time.monotonic() - asked_s < 2.0
        for _ in range(200):
            looking.look()
            await asyncio.sleep(0.005)
        # pauses of 0.02, 0.04, ... 2.56 s: the tenth comes after 5 s
        await until(lambda: part.passes >= 4)
        assert part.passes <= 10
        await looking.close()

    asyncio.run(run())
