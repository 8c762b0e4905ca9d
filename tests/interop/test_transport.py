"""The ping test of libp2p's unified testing (TCP, Noise, Yamux) on loopback, against peers of another make."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foreign import Foreign
from lab import wait_until
from transport_app import ADDRESS, HAVE, ask, wait_for

APP = Path(__file__).with_name("transport_app.py")
PATIENCE_S = 20.0
LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Where a Redis server of the test's own listens."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = str(free_port())
    words = ("redis-server", "--port", port, "--bind", LOOPBACK, "--save", "", "--dir", str(tmp_path))
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    address = f"{LOOPBACK}:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError):
            ask(address, "PING")
            return True
        return False

    try:
        wait_until(answers, PATIENCE_S, "Redis answers")
        yield address
    finally:
        server.kill()
        server.wait()


def environment(redis: str, key: str, *, dialer: bool) -> dict[str, str]:
    return {
        **os.environ,
        **HAVE,
        "IS_DIALER": str(dialer).lower(),
        "REDIS_ADDR": redis,
        "TEST_KEY": key,
        "LISTENER_IP": LOOPBACK,
    }


def foreign(command: tuple[str, ...], directory: Path, listen: str = "none") -> contextlib.closing[Foreign]:
    return contextlib.closing(Foreign(command, Ed25519PrivateKey.generate(), directory, listen))


def test_as_listener(redis: str, command: tuple[str, ...], tmp_path: Path) -> None:
    key = secrets.token_hex(4)
    listener = subprocess.Popen([sys.executable, "-P", APP], env=environment(redis, key, dialer=False))
    try:
        address = wait_for(redis, f"{key}_{ADDRESS}")
        with foreign(command, tmp_path) as dialer:
            assert dialer.do("ping", address=address, times=1)["worst_ms"] < 1000
    finally:
        listener.kill()
        listener.wait()


def test_as_dialer(redis: str, command: tuple[str, ...], tmp_path: Path) -> None:
    key, port = secrets.token_hex(4), free_port()
    with foreign(command, tmp_path, f"/ip4/{LOOPBACK}/tcp/{port}") as listener:
        ask(redis, "SET", f"{key}_{ADDRESS}", f"/ip4/{LOOPBACK}/tcp/{port}/p2p/{listener.peer_id}")
        env = environment(redis, key, dialer=True)
        done = subprocess.run(
            [sys.executable, "-P", APP], env=env, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    measured = dict(line.strip().split(": ") for line in done.stdout.splitlines()[1:])
    assert done.stdout.startswith("latency:\n") and measured["unit"] == "ms"
    assert 0 < float(measured["ping_rtt"]) < float(measured["handshake_plus_one_rtt"])


def test_a_transport_that_is_not_there_is_said_so(redis: str) -> None:
    env = {**environment(redis, "none", dialer=True), "TRANSPORT": "quic-v1"}
    done = subprocess.run([sys.executable, "-P", APP], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "quic-v1" in done.stderr
