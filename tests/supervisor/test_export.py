"""What a process that answers HTTP is told, and at what cost to the packets."""

from __future__ import annotations

import asyncio
from typing import Any

from supervisor.export import EXPORTER, Exporter
from vpnd.api import messages, parts
from vpnd.config.live import Live
from vpnd.config.schema import Config, Metrics


def test_a_long_status_is_told_with_a_turn_for_packets_before_each_part() -> None:
    content = bytes(range(256)) * 4096
    sent: list[tuple[int, Any]] = []
    turns = 0

    async def told(max_age_s: float) -> bytes:
        return content

    async def body() -> None:
        nonlocal turns
        live = Live(Config(metrics=Metrics(listen="127.0.0.1:0", max_age=0.01)))
        exporter: Any = Exporter(EXPORTER, live, None, None, told)  # type: ignore[arg-type]
        exporter.child.send = lambda part: sent.append((turns, part))
        for _ in range(2):  # the second time while it is being told
            exporter._said(exporter.child, messages.StatusWanted())
        while exporter._telling is not None:
            await asyncio.sleep(0)
            turns += 1
        exporter._slot.close()

    asyncio.run(body())
    assert parts.joined([part for _, part in sent]).content == content
    assert len(sent) == len(parts.split(messages.StatusTold(content=content))) > 4
    assert len({turn for turn, _ in sent}) == len(sent)
