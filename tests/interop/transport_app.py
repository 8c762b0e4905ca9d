"""vpnd's libp2p host as a transport test application of libp2p's unified testing: it listens, or dials and measures.

By environment: IS_DIALER, REDIS_ADDR, TEST_KEY, LISTENER_IP; and TRANSPORT, SECURE_CHANNEL and MUXER, of which a node
has one each. The listener puts its multiaddr under TEST_KEY_listener_multiaddr; the dialer prints YAML of what it
measured.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "control"))

from control_nodes import Node

HAVE = {"TRANSPORT": "tcp", "SECURE_CHANNEL": "noise", "MUXER": "yamux"}
ADDRESS = "listener_multiaddr"
PATIENCE_S = 60.0
POLL_S = 0.05
MILLISECONDS = 1000


def ask(server: str, *words: str) -> str:
    """One command to a Redis server (RESP 2), answered by a status or a string; empty for none."""
    host, _, port = server.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
        connection.sendall(f"*{len(parts)}\r\n{''.join(parts)}".encode())
        with connection.makefile("rb") as answer:
            head = answer.readline().decode().strip()
            if head.startswith("-"):
                raise ConnectionError(head)
            if head.startswith("$") and head != "$-1":
                return answer.read(int(head[1:])).decode()
    return ""


def wait_for(server: str, key: str) -> str:
    """What is under a key, once there is something. Raises TimeoutError."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := ask(server, "GET", key)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody has set {key}")
        time.sleep(POLL_S)
    return value


async def run(env: Mapping[str, str]) -> None:
    """One side of one test."""
    server, key = env["REDIS_ADDR"], f"{env['TEST_KEY']}_{ADDRESS}"
    dialer = env["IS_DIALER"] == "true"
    node = Node(listen=f"/ip4/{'127.0.0.1' if dialer else env['LISTENER_IP']}/tcp/0")
    async with node.host.running():
        if not dialer:
            ask(server, "SET", key, f"{node.address}/p2p/{node.peer_id}")
            await trio.sleep_forever()
        address, _, peer_id = wait_for(server, key).rpartition("/p2p/")
        begun_s = time.monotonic()
        (rtt_ms,) = await node.host.ping(peer_id, (address,), 1)
        took_ms = (time.monotonic() - begun_s) * MILLISECONDS
        print(
            f"latency:\n  handshake_plus_one_rtt: {took_ms:.3f}\n  ping_rtt: {rtt_ms:.3f}\n  unit: ms",
            flush=True,
        )


def main() -> int:
    lacking = [
        f"{name}={os.environ[name]}" for name, have in HAVE.items() if os.environ.get(name, have) != have
    ]
    if lacking:
        print(f"not spoken: {', '.join(lacking)}", file=sys.stderr)
        return 1
    trio.run(run, os.environ)
    return 0


if __name__ == "__main__":
    sys.exit(main())
