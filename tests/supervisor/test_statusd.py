"""The status socket: requests with parameters, refusals with the class they stand for, slow commands, lost clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervisor.statusd import StatusServer
from vpnd.config.live import Live
from vpnd.config.schema import Config, Status
from vpnd.errors import ConfigError

TIMEOUT_S = 0.05
SETTINGS = Live(Config(status=Status(timeout=TIMEOUT_S)))


async def exchange(path: Path, request: bytes) -> Any:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return json.loads(answer) if answer else None


def serve(path: Path, talk: Any, **commands: Any) -> None:
    async def run() -> None:
        server = StatusServer(str(path), SETTINGS, commands)
        await server.start()
        try:
            await talk()
        finally:
            await server.stop()

    asyncio.run(run())


async def double(request: Mapping[str, Any]) -> object:
    return {"doubled": 2 * request["number"]}


async def refuse(request: Mapping[str, Any]) -> object:
    raise ConfigError("one\ntwo")


async def slow(request: Mapping[str, Any]) -> object:
    await asyncio.sleep(4 * TIMEOUT_S)
    return {"done": True}


def test_a_command_gets_its_parameters(tmp_path: Path):
    async def talk() -> None:
        assert await exchange(tmp_path / "s", b'{"command": "double", "number": 21}\n') == {"doubled": 42}

    serve(tmp_path / "s", talk, double=double)


def test_a_refusal_names_its_class_and_has_every_problem(tmp_path: Path):
    async def talk() -> None:
        told = await exchange(tmp_path / "s", b'{"command": "refuse"}\n')
        assert told == {"error": "one\ntwo", "kind": "ConfigError"}

    serve(tmp_path / "s", talk, refuse=refuse)


def test_a_command_may_take_longer_than_a_client_may_take_to_ask(tmp_path: Path):
    async def talk() -> None:
        assert await exchange(tmp_path / "s", b'{"command": "slow"}\n') == {"done": True}

    serve(tmp_path / "s", talk, slow=slow)


def test_a_client_that_says_nothing_is_left(tmp_path: Path):
    async def talk() -> None:
        assert await exchange(tmp_path / "s", b"") is None

    serve(tmp_path / "s", talk)


def test_a_loop_that_ends_while_a_command_runs_logs_no_bug(tmp_path: Path, caplog):
    async def never(request: Mapping[str, Any]) -> object:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("it is cancelled")

    async def run() -> None:
        server = StatusServer(str(tmp_path / "s"), SETTINGS, {"never": never})
        await server.start()
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(b'{"command": "never"}\n')
        await begun.wait()
        await server.stop()
        writer.close()

    begun = asyncio.Event()
    asyncio.run(run())
    assert not caplog.records
