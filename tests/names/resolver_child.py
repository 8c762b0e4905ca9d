"""Run by test_system_resolver: serves names at 127.0.0.1:53 and asks the C library for them, printing what it says."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import trio
import trio.testing

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path.cwd())]

from names_tools import make_zone  # noqa: E402

from vpnd.config.schema import Dns  # noqa: E402
from vpnd.control.dns_service import NameServer  # noqa: E402

TIMEOUT_S = 30


async def getent(database: str, key: str) -> list[list[str]]:
    run = partial(
        subprocess.run, ["getent", database, key], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    done = await trio.to_thread.run_sync(run)
    return [line.split() for line in done.stdout.splitlines()]


async def main() -> None:
    udp, tcp = socket.socket(type=socket.SOCK_DGRAM), socket.socket()
    for bound in (udp, tcp):
        bound.bind(("127.0.0.1", 53))
    counts: Counter[str] = Counter()
    server = NameServer(make_zone(), Dns(), lambda name: counts.update([name]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, [udp], [tcp])
        await trio.testing.wait_all_tasks_blocked()
        for name in ("a.home.vpn", "b.home.vpn"):
            print(f"{name}: {(await getent('hosts', name))[0][0]}")
        for address in ("10.86.0.1", "fd12:3456:789a::6"):
            print(f"{address}: {(await getent('hosts', address))[0][1]}")
        for name in ("c.home.vpn", "silent.home.vpn"):
            print(f"{name}: {(await getent('hosts', name)) or 'nothing'}")
        before = counts["dns_queries"]
        find = partial(socket.getaddrinfo, "many.home.vpn", None, socket.AF_INET, socket.SOCK_STREAM)
        many = await trio.to_thread.run_sync(find)
        # a cut answer over UDP, then the whole one
        print(f"many.home.vpn: {len(many)} over {'TCP' if counts['dns_queries'] >= before + 2 else 'UDP'}")
        nursery.cancel_scope.cancel()


trio.run(main)
