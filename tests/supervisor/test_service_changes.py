"""VPNService changed while it runs, from inside its own program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab import Lab, inside

from supervisor.service import VPNService
from vpnd.config.schema import P2P, Config, Health, Log, Network, Retry, Worker
from vpnd.errors import AlreadyRunningError, ConfigError, VpndError

pytestmark = pytest.mark.root


def config_in(lab: Lab) -> Config:
    return Config(
        state_dir=str(lab.directory / "state"),
        network=Network(virtual_ip="10.86.0.1"),
        p2p=P2P(listen=(f"/ip4/{lab.nodes[0].address}/tcp/4001",)),
        worker=Worker(shards=1),
    )


def run(
    body: Callable[[VPNService, Config], Any],
    settings: dict[str, dict[str, Any]] | None = None,
    **options: Any,
) -> None:
    """`body(service, config)` with a node of its own, of other `settings`; it must stop cleanly."""

    async def main(lab: Lab) -> None:
        config = config_in(lab)
        for table, keys in (settings or {}).items():
            changed = msgspec.structs.replace(getattr(config, table), **keys)
            config = msgspec.structs.replace(config, **{table: changed})
        async with VPNService(config, **options) as service:
            await body(service, config)

    with Lab(2) as lab:
        with inside(lab.nodes[0]):
            asyncio.run(main(lab))
        assert not lab.leaks()


@contextlib.asynccontextmanager
async def goes_on(service: VPNService) -> AsyncIterator[None]:
    """The same processes before and after."""
    before = await service.status()
    yield
    after = await service.status()
    assert after.ready
    for name in ("control", "supervisor"):
        assert getattr(after, name).pid == getattr(before, name).pid


def test_a_second_start_says_that_this_service_runs() -> None:
    async def body(service: VPNService, config: Config) -> None:
        with pytest.raises(AlreadyRunningError, match="this service is running already"):
            await service.start()

    run(body)


def test_reload_takes_over_what_it_can_and_leaves_the_programs_log_alone() -> None:
    async def body(service: VPNService, config: Config) -> None:
        level = logging.getLogger().level
        wanted = msgspec.structs.replace(
            config,
            log=Log(level="debug"),
            health=Health(interval=1.0),
            network=Network(virtual_ip="10.86.0.1", mtu=1300),
        )
        async with goes_on(service):
            result = await service.reload(wanted)
            assert {row["key"] for row in result["applied"]} == {"log.level", "health.interval"}
            assert [row["key"] for row in result["needs_restart"]] == ["network.mtu"]
            assert not (await service.reload(wanted))["applied"], "it is in force"
        assert logging.getLogger().level == level

    run(body)


def test_what_is_wrong_is_refused_whoever_made_it() -> None:
    async def body(service: VPNService, config: Config) -> None:
        async with goes_on(service):
            with pytest.raises(ConfigError, match=r"health\.interval"):
                await service.reload(msgspec.structs.replace(config, health=Health(interval=-1.0)))
            with pytest.raises(ConfigError, match=r"retry\.initial_interval"):
                await service.reload(msgspec.structs.replace(config, retry=Retry(max_interval=0.1)))
            for shards in (0, 65, True, "2"):
                with pytest.raises(ConfigError, match="1 to 64"):
                    await service.scale(shards)  # type: ignore[arg-type]

    run(body)


async def over_the_socket(config: Config, request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(str(Path(config.state_dir, config.status.socket)))
    writer.write(json.dumps(request).encode() + b"\n")
    answer: dict[str, Any] = json.loads(await reader.read())
    writer.close()
    return answer


def test_the_command_asks_the_program_for_the_configuration() -> None:
    asked: list[Config] = []
    told: list[Config] = []

    def reread() -> Config:
        if not asked:
            raise VpndError("not yet")
        return asked[-1]

    async def body(service: VPNService, config: Config) -> None:
        refused = await over_the_socket(config, {"command": "reload"})
        assert refused == {"error": "not yet", "kind": "VpndError"}
        asked.append(msgspec.structs.replace(config, health=Health(interval=1.0)))
        answer = await over_the_socket(config, {"command": "reload"})
        assert [row["key"] for row in answer["applied"]] == ["health.interval"]
        assert [each.health.interval for each in told] == [1.0]

    run(body, reread=reread, reloaded=told.append)


def test_without_a_way_to_read_it_again_the_command_is_refused() -> None:
    async def body(service: VPNService, config: Config) -> None:
        answer = await over_the_socket(config, {"command": "reload"})
        assert "part of another program" in answer["error"]

    run(body)


def test_scaling_is_refused_while_it_goes_on_and_a_lost_caller_does_not_stop_it() -> None:
    async def body(service: VPNService, config: Config) -> None:
        first = asyncio.create_task(service.scale(3))
        await asyncio.sleep(0)
        with pytest.raises(VpndError, match="being changed already"):
            await service.scale(2)
        first.cancel()
        async with asyncio.timeout(20):
            while (await service.status()).node.shards != 3:
                await asyncio.sleep(0.05)
        status = await service.status()
        assert [shard.state for shard in status.shards] == ["up"] * 3
        assert not (await service.reload(config))["needs_restart"], "the configuration is what it was"
        for wanted, kept in ((3, []), (2, [("worker.shards", 3, 2)])):
            worker = msgspec.structs.replace(config.worker, shards=wanted)
            answer = await service.reload(msgspec.structs.replace(config, worker=worker))
            assert [(row["key"], row["old"], row["new"]) for row in answer["needs_restart"]] == kept
        result = await service.scale(1)
        assert result["removed"] == [1, 2]
        assert [row.index for row in (await service.status()).retired] == [1, 2]
        again = await service.reload(config)
        assert not again["needs_restart"], "as many as the configuration says"

    run(body)


#: What no default is, and shows in a node's status or on its machine.
OTHERWISE = {
    "node": {"name": "attic"},
    "network": {"virtual_ip": "10.86.0.1", "interface": "vpnt7", "mtu": 1300, "offloads": False},
    "p2p": {"identity_file": "other.pem"},
    "worker": {"shards": 3, "ring_bytes": 1 << 20},
    "status": {"socket": "other.sock"},
    "metrics": {"listen": "127.0.0.1:9477"},
}


@pytest.mark.setting(
    "node.name", "network.interface", "network.mtu", "network.offloads", "p2p.identity_file",
    "worker.shards", "worker.ring_bytes", "status.socket", "metrics.listen",
)  # fmt: skip
def test_a_node_is_what_its_settings_say() -> None:
    async def body(service: VPNService, config: Config) -> None:
        reader, writer = await asyncio.open_unix_connection(str(Path(config.state_dir, "other.sock")))
        writer.write(b'{"command": "status"}\n')
        status = json.loads(await reader.read())
        writer.close()
        tun = status["tun"]
        assert (status["node"]["name"], len(status["shards"])) == ("attic", 3)
        assert (tun["interface"], tun["mtu"], tun["offloads"]) == ("vpnt7", 1300, [])
        assert {row["ring"]["size"] for row in status["shards"]} == {1 << 20}
        assert Path(config.state_dir, "other.pem").exists()
        reader, writer = await asyncio.open_connection("127.0.0.1", 9477)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"vpnd_ready 1" in await reader.read()
        writer.close()

    run(body, settings=OTHERWISE)


@pytest.mark.setting("network.coalesce_udp")
@pytest.mark.parametrize("coalesce", [True, False])
def test_datagrams_read_in_one_go_are_merged_if_set(coalesce: bool) -> None:
    async def body(service: VPNService, config: Config) -> None:
        before = (await service.status()).tun
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for _ in range(20):  # nothing is read meanwhile: this is the loop's own thread
                sock.sendto(bytes(100), ("10.86.0.9", 9))
        async with asyncio.timeout(5.0):
            while (after := (await service.status()).tun).reads < before.reads + 20:
                await asyncio.sleep(0.01)
        if "USO4" not in after.offloads:
            pytest.skip("this kernel takes no superpackets of UDP")
        assert (after.merged > before.merged) == coalesce

    run(body, settings={"network": {"virtual_ip": "10.86.0.1", "coalesce_udp": coalesce}})


def test_a_shorter_idle_timeout_is_not_waited_for_by_the_one_before() -> None:
    async def body(service: VPNService, config: Config) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", ("10.86.0.9", 9))
        async with asyncio.timeout(5.0):
            while not (await service.status()).tun.flows:
                await asyncio.sleep(0.01)
            await service.reload(msgspec.structs.replace(config, worker=Worker(shards=1, idle_timeout=0.1)))
            while (await service.status()).tun.flows:
                await asyncio.sleep(0.01)

    run(body)


@pytest.mark.alone
def test_a_status_with_131072_flows_holds_up_no_packet_for_a_millisecond() -> None:
    async def body(service: VPNService, config: Config) -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            for flow in range(131_072):
                sock.sendto(b"x", (f"10.86.1.{flow % 4}", 1 + flow // 4))
                if not flow % 64:
                    await asyncio.sleep(0)
        pauses = []
        for _ in range(5):
            asking, longest_s = asyncio.ensure_future(service.status()), 0.0
            while not asking.done():
                before_s = time.thread_time()
                await asyncio.sleep(0)
                longest_s = max(longest_s, time.thread_time() - before_s)
            assert asking.result().tun.flows >= 130_000
            pauses.append(longest_s)
        assert min(pauses) < 0.001

    run(body)
