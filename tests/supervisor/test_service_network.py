"""VPNService in a network: it makes one, keeps it, refuses a token that is none, and leaves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, inside

from supervisor.service import VPNService
from vpnd.config.schema import P2P, Config, Worker
from vpnd.errors import RefusedError

pytestmark = pytest.mark.root


async def over_the_socket(config: Config, command: str) -> Any:
    reader, writer = await asyncio.open_unix_connection(str(Path(config.state_dir, config.status.socket)))
    writer.write(json.dumps({"command": command}).encode() + b"\n")
    answer = json.loads(await reader.read())
    writer.close()
    return answer


def test_a_program_makes_a_network_comes_back_to_it_and_leaves_it() -> None:
    async def main(lab: Lab) -> None:
        config = Config(
            state_dir=str(lab.directory / "state"),
            p2p=P2P(listen=(f"/ip4/{lab.nodes[0].address}/tcp/4001",)),
            worker=Worker(shards=1),
        )
        async with VPNService(config) as service:
            first = await service.status()
        assert first.network is not None and first.network.authority and len(first.node.addresses) == 2
        async with VPNService(config) as service:
            second = await service.status()
            assert second.network is not None
            assert second.network.network_id == first.network.network_id
            assert second.node.addresses == first.node.addresses
            assert not (await service.reload(config))["needs_restart"]
            assert await over_the_socket(config, "leave") == {"answer": {"told": False}}
            assert await service.wait_stopped() == "left the network by command"
        with pytest.raises(RefusedError, match="not a token"):
            await VPNService(config, join="hello").start()

    with Lab(2) as lab:
        with inside(lab.nodes[0]):
            asyncio.run(main(lab))
        assert not lab.leaks()
