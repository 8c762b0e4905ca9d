"""The command `probe` of the status socket: the shard and the session that carry pings to an address, measured.

    {"command": "probe", "address": IP}   →  {"shard": index, "session": {…}, "why": ""}

`session` is null where none carries them, its `rtt_ms` is null where it did not answer, and `why` says so in words.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

from supervisor.fleet import Fleet
from supervisor.pump import Pump
from vpnd.api.reports import SessionProbe
from vpnd.errors import ConfigError
from vpnd.packet.flow import echo_key


async def measure(request: Mapping[str, Any], fleet: Fleet, pump: Pump, timeout_s: float) -> dict[str, Any]:
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
