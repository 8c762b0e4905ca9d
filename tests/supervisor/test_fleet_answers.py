"""What children answer, put together where it comes in parts."""

from __future__ import annotations

import asyncio
from typing import Any

from supervisor.fleet import Fleet
from supervisor.traffic import Traffic
from vpnd.api import messages, parts
from vpnd.api.reports import PeerTraffic


def test_an_answer_in_parts_is_one_answer() -> None:
    rows = tuple(PeerTraffic(peer_id=f"{number:052}", bytes_sent=number) for number in range(10_000))
    status = messages.ShardStatus(serial=5, sessions=(), traffic=rows)
    said = parts.split(status)
    assert len(said) > 1

    async def main() -> Any:
        fleet = Fleet.__new__(Fleet)  # without any process
        answer = asyncio.get_running_loop().create_future()
        fleet._answers, fleet._parts = {("shard 0", 5): answer}, {}
        for part in said:
            assert not answer.done()
            fleet._on_answer("shard 0", part)
            fleet._on_answer("shard 1", part)  # nobody asked that one
        assert fleet._parts.keys() == {("shard 0", 5)}
        return await answer

    assert asyncio.run(main()) == status
    traffic = Traffic()
    for part in said:
        traffic.told(part.traffic)
    assert traffic.of(f"{7:052}")["bytes_sent"] == 7
