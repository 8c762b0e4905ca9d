"""The machine is looked over at every hint, and without one from time to time."""

from __future__ import annotations

import asyncio

import pytest

from supervisor.network.machine import Reconciler
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network


@pytest.mark.setting("network.reconcile_interval")
@pytest.mark.parametrize(("interval_s", "again"), [(0.01, True), (600.0, False)])
def test_the_machine_is_looked_over_without_a_hint(interval_s: float, again: bool) -> None:
    """The first look comes at once, in any case."""

    async def main() -> int:
        passes: list[None] = []
        network = Network(reconcile_interval=interval_s, change_settle=0.001, change_settle_max=0.001)
        reconciler = Reconciler(Live(Config(network=network)), [lambda: passes.append(None) or []])
        await asyncio.sleep(0.5)
        looked = len(passes)
        await reconciler.close()
        return looked

    assert (asyncio.run(main()) > 1) == again
