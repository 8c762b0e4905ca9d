"""What `vpnd ping` prints: the way, a line for each echo, and what all of them come to.

A trip has        seq; of the echo rtt_ms, why, sent; shard, session (id, local, remote, rtt_ms), session_why, nodes_ms
The result has    name, address, pings (the trips), what `sums` gives; of a peer whose session does not answer also
                  peer (its row of status, None where it has none), control (rtt_ms, error, asked: false where our
                  control could not)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpnd.cli.statusview import milliseconds, text, why_not
from vpnd.printable import printable, wrapped

Fields = dict[str, Any]


def trip(name: str, address: str, trip: Fields, before: Fields | None) -> str:
    """The line of one trip; in front of it the way, where it is the first or another than that of the one before."""
    lines = []
    if before is None:
        lines.append(f"PING {name} ({address}) through {_way(trip)}")
    elif _carrier(trip) != _carrier(before):
        lines.append(f"   now through {_way(trip)}")
    echo = text(trip.get("why")) if trip.get("rtt_ms") is None else milliseconds(trip["rtt_ms"])
    lines.append(f"{trip.get('seq')}  {echo}   {_session(trip)}")
    return "\n".join(wrapped(printable(line)) for line in lines)


def session_answers(trip: Fields) -> bool:
    """Whether the session of a trip was measured."""
    return (trip.get("session") or {}).get("rtt_ms") is not None


def sums(trips: Sequence[Fields]) -> Fields:
    """sent, received, loss (0 to 1, of all trips), min_ms, avg_ms, max_ms: None when nothing came back."""
    times = [trip["rtt_ms"] for trip in trips if trip.get("rtt_ms") is not None]
    return {
        "sent": sum(bool(trip.get("sent", True)) for trip in trips),
        "received": len(times),
        "loss": 1 - len(times) / len(trips) if trips else 0.0,
        "min_ms": min(times, default=None),
        "avg_ms": sum(times) / len(times) if times else None,
        "max_ms": max(times, default=None),
    }


def summary(result: Fields) -> str:
    """The last lines: sums, and what it means when something did not answer."""
    name = result["name"]
    line = f"{result['sent']} sent, {result['received']} came back, {result['loss']:.0%} lost"
    if result["received"]:
        line += "; " + ", ".join(
            f"{what} {milliseconds(result[f'{what}_ms'])}" for what in ("min", "avg", "max")
        )
    lines = [line]
    last = result["pings"][-1] if result["pings"] else {}
    if session_answers(last) and last.get("sent") and not result["received"]:
        lines.append(
            f"the session to {name} answers, {result['address']} does not: a firewall, on {name} or here, drops pings"
        )
    if result.get("peer") is not None:
        state, reason = text(result["peer"].state), why_not(result["peer"])
        lines.append(f"{name} is {state}" + (f": {reason}" if reason else ""))
    if "control" in result:
        lines.append(_daemon(result["control"]))
    return "\n".join(wrapped(printable(line)) for line in lines)


def swept(result: Fields) -> str:
    """What `--sweep` found: `largest`, an IP packet in bytes, 0 for none; `mtu` is what the device takes."""
    name, largest, mtu = result["name"], result["largest"], result["mtu"]
    if largest == mtu:
        said = f"packets to {name} come through up to the MTU of the VPN, {mtu} bytes"
    elif largest:
        said = (
            f"packets to {name} of {largest} bytes come through, larger ones do not, though the VPN's MTU is {mtu}: "
            "what is between drops them; set network.mtu lower, here and there"
        )
    else:
        said = f"{name} does not answer even the smallest packet; see vpnd ping {name}"
    return wrapped(printable(said))


def _daemon(control: Fields) -> str:
    if control.get("rtt_ms") is not None:
        return f"its daemon answers: {milliseconds(control['rtt_ms'])} by a libp2p connection between the controls"
    said = "does not answer" if control.get("asked", True) else "could not be asked"
    return f"its daemon {said}" + (f": {control['error']}" if control.get("error") else "")


def _way(trip: Fields) -> str:
    session, shard = trip.get("session"), trip.get("shard")
    where = "no shard" if shard is None else f"shard {shard}"
    if not session:
        return f"{where}, no session"
    ends = f"{text(session.get('local'))} -> {text(session.get('remote'))}"
    return f"{where}, session {text(session.get('id'))}, {ends}"


def _carrier(trip: Fields) -> tuple[object, object]:
    return trip.get("shard"), (trip.get("session") or {}).get("id")


def _session(trip: Fields) -> str:
    if not trip.get("session"):
        return f"no session: {text(trip.get('session_why'))}"
    if not session_answers(trip):
        return f"session: {text(trip.get('session_why'))}"
    measured = f"session {milliseconds(trip['session']['rtt_ms'])}"
    if trip.get("nodes_ms") is None:
        return measured
    return f"{measured}, both nodes {milliseconds(trip['nodes_ms'])}"
