"""The supervisor's side of names: sockets on each virtual address, and what is told to systemd-resolved."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from supervisor.network.dns_sockets import Names
from vpnd.api import messages
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Dns
from vpnd.names import resolved
from vpnd.names.resolved import CommandFailed, Resolved

#: Addresses of loopback stand for virtual ones: they are there on every machine.
OWN = OwnAddresses(
    network="home", label="me", addresses=("127.0.0.11", "127.0.0.12"), subnets=("127.0.0.0/16",)
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.11", 0))
        return int(probe.getsockname()[1])


class Machine:
    """A machine with a resolved that says yes, unless it is told not to; and who sockets are given to."""

    def __init__(self, tmp_path: Path, *, refuses: bool = False) -> None:
        self.commands: list[str] = []
        self.refuses = refuses
        self.given: list[tuple[int, list[tuple[str, int, int]]]] = []
        conf = tmp_path / "resolv.conf"
        conf.write_text("nameserver 127.0.0.53\n")
        self.resolved = Resolved(1.0, self.run, lambda: True, conf)

    def run(self, command, timeout_s: float) -> None:
        self.commands.append(" ".join(command[2:]))
        if self.refuses:
            raise CommandFailed("no")

    def give(self, message: messages.Message, descriptors: tuple[int, ...]) -> None:
        assert isinstance(message, messages.NameSockets)
        rows = []
        for fd in descriptors:
            with socket.fromfd(fd, socket.AF_INET, socket.SOCK_DGRAM) as bound:
                kind = bound.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
                rows.append((bound.getsockname()[0], bound.getsockname()[1], kind))
        self.given.append((message.udp, rows))


def test_there_is_a_socket_of_each_kind_on_each_address(tmp_path: Path) -> None:
    machine, port = Machine(tmp_path), free_port()

    async def main() -> None:
        names = Names("vpnd0", Dns(port=port), machine.resolved)
        names.apply(OWN)
        names.give(machine.give)
        names.give(machine.give)  # to the next control
        await names.registered()
        assert names.warnings == []
        await names.close()
        names.give(machine.give)

    asyncio.run(main())
    rows = [(ip, port, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM) for ip in OWN.addresses]
    assert machine.given == [(2, rows), (2, rows), (0, [])]
    assert machine.commands[:3] == [
        "default-route vpnd0 no",
        "domain vpnd0 ~home.vpn ~0.127.in-addr.arpa",
        f"dns vpnd0 127.0.0.11:{port} 127.0.0.12:{port}",
    ]
    assert machine.commands[-1] == "revert vpnd0"


def test_other_addresses_are_bound_and_told_the_former_given_up(tmp_path: Path) -> None:
    machine, port = Machine(tmp_path), free_port()

    async def main() -> None:
        names = Names("vpnd0", Dns(port=port), machine.resolved)
        names.apply(OWN)
        names.apply(OWN)  # nothing is different
        await names.registered()
        first = len(machine.commands)
        changed = ("127.0.0.12", "127.0.0.13")
        names.apply(OwnAddresses(network="home", label="me", addresses=changed, subnets=OWN.subnets))
        names.give(machine.give)
        await names.registered()
        assert len(machine.commands) == 2 * first
        with socket.socket() as probe:
            probe.bind(("127.0.0.11", port))
        await names.close()

    asyncio.run(main())
    assert {ip for ip, _, _ in machine.given[0][1]} == {"127.0.0.12", "127.0.0.13"}


@pytest.mark.setting("dns.port")
def test_a_port_in_use_is_a_warning(tmp_path: Path) -> None:
    machine, port = Machine(tmp_path), free_port()

    async def main() -> None:
        names = Names("vpnd0", Dns(port=port), machine.resolved)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.11", port))
            names.apply(OWN)
            names.give(machine.give)
            (warning,) = names.warnings
            assert "127.0.0.11" in warning
        names.apply(OWN)
        assert names.warnings == [], "it is free now"
        await names.close()

    asyncio.run(main())
    assert {ip for ip, _, _ in machine.given[0][1]} == {"127.0.0.12"}


@pytest.mark.setting("dns.enabled", "dns.register")
@pytest.mark.parametrize(
    ("settings", "commands", "hint"),
    [
        ({"enabled": False}, False, False),
        ({"register": False}, False, False),
        ({}, True, True),
    ],
    ids=["no names at all", "nothing is to be told", "resolved refuses: the user has to"],
)
def test_what_the_user_switched_off_is_off(tmp_path: Path, settings, commands: bool, hint: bool) -> None:
    machine = Machine(tmp_path, refuses=True)

    async def main() -> None:
        names = Names("vpnd0", Dns(port=free_port(), **settings), machine.resolved)
        names.apply(OWN)
        await names.registered()
        assert bool(names.warnings) == hint
        await names.close()

    asyncio.run(main())
    assert bool(machine.commands) == commands


@pytest.mark.setting("dns.register_timeout")
def test_a_command_to_resolved_may_take_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(resolved, "resolved_reachable", lambda: True)
    monkeypatch.setattr(resolved, "run_command", lambda command, timeout_s: given.append(timeout_s))

    async def main() -> None:
        names = Names("vpnd0", Dns(port=free_port(), register_timeout=0.7))
        names.apply(OWN)
        await names.registered()
        await names.close()

    asyncio.run(main())
    assert given and set(given) == {0.7}
