"""The cell that settings are delivered by."""

from __future__ import annotations

from vpnd.config.live import Live
from vpnd.config.schema import Config, Health, Log, Status


def test_who_watches_a_part_is_called_when_that_part_changes_and_finds_all_of_the_new_configuration():
    live = Live(Config())
    heard: list[tuple[str, Config]] = []
    live.watch(lambda config: config.health, lambda: heard.append(("health", live.config)))
    live.watch(lambda config: config.log.level, lambda: heard.append(("level", live.config)))
    live.take(Config(status=Status(timeout=9.0)))
    assert heard == [] and live.config.status.timeout == 9.0
    both = Config(health=Health(interval=1.0), log=Log(level="debug"))
    live.take(both)
    assert heard == [("health", both), ("level", both)]
    live.take(Config(health=Health(interval=1.0)))
    assert heard[2:] == [("level", live.config)]
