"""Programs that talk to nobody, or to a machine that is down, are told so at once instead of waiting for minutes."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket

import pytest
from lab import Lab, Node, wait_until
from lab.joining import network_of
from lab.sockets import socket_in

pytestmark = pytest.mark.root

#: Long after any answer of the node itself, and long before TCP gives up (two minutes).
PATIENCE_S = 20.0


def connect(node: Node, address: str) -> int:
    """errno of a TCP connection to `address`; ETIMEDOUT when nobody says anything."""
    with socket_in(node.namespace, address, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            return sock.connect_ex((address, 9))
        except TimeoutError:
            return errno.ETIMEDOUT


def test_nobody_is_there_and_programs_hear_it() -> None:
    with Lab(2) as lab:
        a, b = network_of(lab)
        theirs = b.ask()["node"]["addresses"]
        nobodys = [str(ipaddress.ip_address(int(ipaddress.ip_address(each)) ^ 0x70)) for each in theirs]
        for address in nobodys:
            assert connect(a, address) == errno.EHOSTUNREACH, address
        wait_until(lambda: connect(a, theirs[0]) == errno.ECONNREFUSED, PATIENCE_S, "b is there, and refuses")
        b.kill(signal.SIGKILL)
        b.wait_ended()
        wait_until(
            lambda: a.ask()["peers"][0]["circuit"] == "open",
            60.0,
            f"the circuit opens: {a.ask()['peers']}",
        )
        for address in theirs:
            assert connect(a, address) == errno.EHOSTUNREACH, address
        said = a.vpnd("ping", "b", "-c", "1", check=False)
        assert said.returncode == 1 and "unreachable" in said.stdout, said
        told = sum(shard["unreachables_told"] for shard in a.ask()["shards"])
        assert told >= 4
        assert a.stop() == 0
