"""Commands of the user that others than the supervisor carry out: checked here, asked of control or of a shard.

On the status socket a request is {"command": name, "patience_s": seconds, argument: value, …}, the answer
{"answer": what control said}. Of a shard:

    {"command": "probe", "address": IP}   →  {"shard": index, "session": {…}, "why": ""}

the shard and the session that carry pings to an address, measured. `session` is null where none carries them, its
`rtt_ms` is null where it did not answer, and `why` says so in words.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from supervisor.fleet import Fleet
from supervisor.pump import Pump
from supervisor.questions import Argument
from vpnd.api.reports import SessionProbe
from vpnd.config.live import Live
from vpnd.errors import ConfigError, VpndError
from vpnd.packet.flow import echo_key

#: Command -> its arguments; every one may be missing. The first group needs a network.
MEMBERSHIP: dict[str, frozenset[str]] = {
    "invite": frozenset({"name", "uses", "expires_s", "ip", "routes", "groups"}),
    "members": frozenset({"all"}),
    "remove": frozenset({"who"}),
    "leave": frozenset(),
    "join": frozenset({"token"}),
    "invitations": frozenset({"cancel"}),
    "authority-add": frozenset({"who"}),
    "authority-list": frozenset(),
    "authority-revoke": frozenset({"who", "stolen", "keep", "keep_all"}),
}
LOOKUP: dict[str, frozenset[str]] = {
    "resolve": frozenset({"what"}),
    "ping": frozenset({"who", "count"}),
    "netcheck": frozenset(),
}
#: No client waits longer than this.
MOST_PATIENCE_S = 3600.0
#: Of a text argument; the longest are lists of networks.
MAX_ARGUMENT = 4096


class Asked(Protocol):
    """What this needs of the node."""

    @property
    def in_network(self) -> bool:
        """Whether the node is a member of one."""

    async def request(self, command: str, arguments: dict[str, Argument], timeout_s: float) -> bytes:
        """See Questions.request."""

    def left(self) -> None:
        """The node is in no network any more."""

    def moved(self) -> None:
        """The node is in another network, from its next start on."""


def handlers(node: Asked, live: Live) -> dict[str, Callable[[Mapping[str, Any]], Awaitable[object]]]:
    """For the status server. status.timeout is the patience of clients that name none."""

    def handler(command: str) -> Callable[[Mapping[str, Any]], Awaitable[object]]:
        async def handle(request: Mapping[str, Any]) -> object:
            return {"answer": await carry_out(node, command, request, live.config.status.timeout)}

        return handle

    return {command: handler(command) for command in (*MEMBERSHIP, *LOOKUP)}


async def carry_out(node: Asked, command: str, request: Mapping[str, Any], timeout_s: float) -> msgspec.Raw:
    """What control answers, as JSON. `timeout_s`: where the request has no patience_s. Raises VpndError."""
    if command in MEMBERSHIP and not node.in_network:
        raise VpndError(
            f"this node is in no network, so there is no `{command.replace('-', ' ')}`: its configuration names "
            "[[peers]] or network.virtual_ip. Take them out and start it again, and it makes a network; or join one "
            "with --join"
        )
    patience_s = _number(request.get("patience_s"), timeout_s)
    known = MEMBERSHIP.get(command) or LOOKUP.get(command) or frozenset()
    arguments = {name: _argument(name, request[name]) for name in sorted(known) if name in request}
    said = await node.request(command, arguments, patience_s)
    if command in ("leave", "join"):
        asyncio.get_running_loop().call_soon(node.left if command == "leave" else node.moved)
    # Passed on as it is: taking the rows of 10,000 members apart here would hold up packets.
    return msgspec.Raw(said)


def _argument(name: str, value: object) -> Argument:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and len(value) <= MAX_ARGUMENT:
        return value
    raise VpndError(f"{name}: must be a number or a text of at most {MAX_ARGUMENT} characters")


def _number(value: object, otherwise: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_PATIENCE_S:
        return float(value)
    return otherwise


async def probe(request: Mapping[str, Any], fleet: Fleet, pump: Pump, timeout_s: float) -> dict[str, Any]:
    """The answer. `timeout_s`: of the shard, which itself waits for health.timeout. Raises ConfigError for what is no
    address."""
    try:
        address = ipaddress.ip_address(str(request.get("address")))
    except ValueError:
        raise ConfigError("address: must be an IP address") from None
    index = pump.shard_of(echo_key(address))
    if index < 0:
        return {"shard": None, "session": None, "why": "no shard is up"}
    told = await fleet.questions.probe(fleet.shards[index], str(address), timeout_s)
    if told is None:
        return {"shard": index, "session": None, "why": f"shard {index} does not answer"}
    session = _row(told.session) if told.session is not None else None
    return {"shard": index, "session": session, "why": told.why}


def _row(session: SessionProbe) -> dict[str, Any]:
    return {
        "id": f"{session.session_id:x}",
        "peer_id": session.peer_id,
        "local": session.local,
        "remote": session.remote,
        "rtt_ms": session.rtt_ms,
    }
