"""Commands of the user that control carries out: checked here, asked of control.

On the status socket a request is {"command": name, "patience_s": seconds, argument: value, …}, the answer
{"answer": what control said}.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from supervisor.questions import Argument
from vpnd.config.live import Live
from vpnd.errors import VpndError

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
LOOKUP: dict[str, frozenset[str]] = {"resolve": frozenset({"what"}), "ping": frozenset({"who", "count"})}
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
            return {"answer": await _carry_out(node, command, request, live.config.status.timeout)}

        return handle

    return {command: handler(command) for command in (*MEMBERSHIP, *LOOKUP)}


async def _carry_out(node: Asked, command: str, request: Mapping[str, Any], timeout_s: float) -> Any:
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
