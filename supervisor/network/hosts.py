"""Names of members in a hosts file, for machines whose resolver does not ask this node (dns.hosts_file).

A block of lines between two marks belongs to the node; the rest of the file is somebody else's and stays as it is. It
is written in place: /etc/hosts may be mounted by itself, where it cannot be replaced. At the end the block goes; after
kill -9 the janitor's shell takes it away (`cleanup_commands`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import shlex
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import ProtocolViolation, VpndError
from vpnd.names.origins import origin_of

log = logging.getLogger("supervisor")

#: What a hosts file may have as one label of a name.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class _Row(msgspec.Struct):
    """What is used of a row of `vpnd members`."""

    name: str
    addresses: tuple[str, ...]


class HostsFile:
    """Owner: supervisor loop; `close` once. `members` gives what control answers to the request of that name."""

    def __init__(
        self, live: Live, members: Callable[[], Awaitable[bytes]], own: Callable[[], OwnAddresses]
    ) -> None:
        self._live, self._members, self._own = live, members, own
        self._marks = marks(live.config.network.interface)
        self._path = Path(live.config.dns.hosts_file)
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Take the block away."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self._write([])

    async def _follow(self) -> None:
        before: list[str] | None = None
        while True:
            try:
                said = await self._members()
                # thousands of members would hold up packets
                lines = await asyncio.to_thread(lines_untrusted, said, self._own())
                if lines != before and self._write(lines):
                    before = lines
            except VpndError as error:
                log.debug("%s is left as it is: %s", self._path, error)
            await asyncio.sleep(self._live.config.dns.hosts_interval)

    def _write(self, lines: Sequence[str]) -> bool:
        try:
            replace_block(self._path, self._marks, lines)
        except (OSError, UnicodeDecodeError) as error:
            log.warning("dns.hosts_file = %s: %s", self._path, error)
            return False
        return True


def lines_untrusted(said: bytes, own: OwnAddresses) -> list[str]:
    """The lines for the members that control told, each within the network's own subnets and its own domain.

    Raises ProtocolViolation for what is no such answer.
    """
    try:
        rows = msgspec.json.decode(said, type=list[_Row])
        addresses = [
            (row.name.lower(), [ipaddress.ip_address(each) for each in row.addresses]) for row in rows
        ]
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProtocolViolation(f"members are malformed: {error}") from None
    subnets = [ipaddress.ip_network(each) for each in own.subnets]
    return sorted(
        f"{address}\t{name}.{origin_of(own.network)}"
        for name, held in addresses
        for address in held
        if _LABEL.fullmatch(name) and any(address in subnet for subnet in subnets)
    )


def marks(interface: str) -> tuple[str, str]:
    """The lines around the block of the node with this device."""
    return f"# BEGIN vpnd {interface}", f"# END vpnd {interface}"


def replace_block(path: Path, marks: tuple[str, str], lines: Sequence[str]) -> None:
    """Have these lines between the marks, at the end of the file; without lines no marks either. Raises OSError."""
    begin, end = marks
    text = path.read_text(encoding="utf-8")
    block = re.compile(rf"^{re.escape(begin)}$.*?^{re.escape(end)}$\n?", re.M | re.S)
    rest = block.sub("", text)
    if lines:
        rest = f"{rest}{'' if rest.endswith(chr(10)) or not rest else chr(10)}"
        rest += "\n".join([begin, *lines, end, ""])
    if rest == text:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        data = rest.encode()
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def cleanup_commands(config: Config) -> list[str]:
    """What a shell does to take the block away."""
    if not config.dns.hosts_file:
        return []
    path = shlex.quote(config.dns.hosts_file)
    begin, end = (re.escape(mark).replace("/", r"\/") for mark in marks(config.network.interface))
    return [
        f"kept=$(sed {shlex.quote(f'/^{begin}$/,/^{end}$/d')} {path}) && printf '%s\\n' \"$kept\" > {path}"
    ]
