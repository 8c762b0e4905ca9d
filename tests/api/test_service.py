"""VPNService in a program of its own, as somebody would embed it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab

import vpnd

pytestmark = pytest.mark.root

ROOT = str(Path(vpnd.__file__).resolve().parents[1])
HEAD = """
import asyncio, json, os, sys
from vpnd import VPNService
from vpnd.config.schema import Config, Network, P2P, Peer, Worker
from vpnd import errors
import msgspec

state_dir, address = sys.argv[1:]
config = Config(
    state_dir=state_dir,
    network=Network(virtual_ip="10.86.0.1"),
    p2p=P2P(listen=(f"/ip4/{address}/tcp/4001",)),
    worker=Worker(shards=1),
)

def tell(**said):
    print(json.dumps(said))

def descriptors():
    return len(os.listdir("/proc/self/fd"))

async def raises(awaitable):
    try:
        await awaitable
    except errors.VpndError as error:
        return type(error).__name__
    return "nothing"

async def main():
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(2) as opened:
        yield opened
        assert not opened.leaks()


def run(lab: Lab, body: str) -> dict[str, object]:
    """Run a program whose `main` is `body`; what it told last. It must end well and say nothing bad."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    program = f"{HEAD}{lines}\n\nasyncio.run(main())\n"
    state = lab.directory / "state"
    command = (sys.executable, "-c", program, str(state), lab.nodes[0].address)
    done = lab.run(lab.nodes[0], *command, env={"PYTHONPATH": ROOT}, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "never" not in done.stderr, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_it_starts_tells_its_status_and_stops_without_a_trace(lab: Lab) -> None:
    told = run(
        lab,
        """
loop_before = descriptors()
service = VPNService(config)
early = await raises(service.status())
await service.start()
status = await service.status()
await service.stop()
await service.stop()
late = await raises(service.status())
tell(ready=status.ready, pid=status.supervisor.pid == os.getpid(), early=early, late=late,
     left=descriptors() - loop_before, socket=os.path.exists(os.path.join(state_dir, "vpnd.sock")))
""",
    )
    assert told == {
        "ready": True, "pid": True, "early": "VpndError", "late": "VpndError",
        "left": told["left"], "socket": False,
    }  # fmt: skip
    assert int(str(told["left"])) <= 1, "descriptors left in the embedding program"


def test_as_a_context_manager_it_stops_when_the_block_ends_or_fails(lab: Lab) -> None:
    told = run(
        lab,
        """
async with VPNService(config) as service:
    first = (await service.status()).node.peer_id
try:
    async with VPNService(config) as service:
        second = (await service.status()).node.peer_id
        raise KeyError("the program's own trouble")
except KeyError:
    pass
tell(same=first == second, after=await raises(service.status()))
""",
    )
    assert told == {"same": True, "after": "VpndError"}


def test_a_second_start_and_a_second_node_are_refused_and_harm_nobody(lab: Lab) -> None:
    told = run(
        lab,
        """
async with VPNService(config) as service:
    again = await raises(service.start())
    twin = await raises(VPNService(config).start())
    other = msgspec.structs.replace(config, state_dir=state_dir + "/other",
        network=Network(virtual_ip="10.99.0.1"), p2p=P2P(listen=(f"/ip4/{address}/tcp/4002",)))
    interface = await raises(VPNService(other).start())
    overlap = await raises(VPNService(msgspec.structs.replace(other, network=Network(
        interface="vpnd9", virtual_ip="10.86.4.4"))).start())
    port = await raises(VPNService(msgspec.structs.replace(other, p2p=config.p2p, network=Network(
        interface="vpnd9", virtual_ip="10.99.0.1"))).start())
    tell(again=again, twin=twin, interface=interface, overlap=overlap, port=port,
        ready=(await service.status()).ready)
""",
    )
    assert told == {
        "again": "AlreadyRunningError",
        "twin": "AlreadyRunningError",
        "interface": "AlreadyRunningError",
        "overlap": "ConfigError",
        "port": "AlreadyRunningError",
        "ready": True,
    }


def test_a_start_that_is_cancelled_leaves_nothing(lab: Lab) -> None:
    told = run(
        lab,
        """
for after_s in (0.0, 0.05, 0.3):
    starting = asyncio.create_task(VPNService(config).start())
    await asyncio.sleep(after_s)
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled(), starting
async with VPNService(config) as service:
    tell(ready=(await service.status()).ready)
""",
    )
    assert told == {"ready": True}


def test_wait_stopped_tells_that_the_command_line_stopped_it(lab: Lab) -> None:
    told = run(
        lab,
        """
async with VPNService(config) as service:
    reader, writer = await asyncio.open_unix_connection(os.path.join(state_dir, "vpnd.sock"))
    writer.write(b'{"command": "stop"}\\n')
    answer = json.loads(await reader.read())
    reason = await asyncio.wait_for(service.wait_stopped(), 10)
    writer.close()
tell(reason=reason, stopping=answer["stopping"])
""",
    )
    assert told == {"reason": "stopped by command", "stopping": True}
