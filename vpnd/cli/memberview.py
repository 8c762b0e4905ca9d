"""What the commands of a network print for people. Names come from other nodes, so everything is made printable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpnd.cli.statusview import duration, left_out, milliseconds, no_peers, ownership, table, text
from vpnd.printable import printable, wrapped
from vpnd.status import Status

Fields = dict[str, Any]


def members(rows: Sequence[Fields]) -> str:
    """`vpnd members`."""
    if not rows:
        return "No members."
    head = ["member", "address", "state", "connected", "authority", "valid for"]
    shown = [
        (
            text(row.get("name")),
            _first(row.get("addresses")),
            _standing(row),
            _yes(row.get("connected")),
            _yes(row.get("authority")),
            duration(row.get("expires_s")),
        )
        for row in rows
    ]
    besides = [
        (text(row.get("name")), text(row.get("peer_id")), _all(row.get("routes")), _all(row.get("groups")))
        for row in rows
    ]
    more = ["member", "peer id", "routes", "groups"]
    return f"{table(head, shown)}\n\n{table(more, besides)}"


def invitations(rows: Sequence[Fields]) -> str:
    """`vpnd invitations`."""
    if not rows:
        return "No invitations."
    head = ["id", "state", ">uses left", "valid for", "for", "joined", "routes", "groups"]
    return table(
        head,
        [
            (
                text(row.get("id")),
                text(row.get("state")),
                text(row.get("uses")),
                duration(row.get("expires_s")),
                _all([row.get("name"), *(row.get("addresses") or [])]),
                _all(row.get("joined")),
                _all(row.get("routes")),
                _all(row.get("groups")),
            )
            for row in rows
        ],
    )


def authorities(rows: Sequence[Fields]) -> str:
    """`vpnd authority list`."""
    if not rows:
        return "No authorities."
    head = ["authority", "state", "peer id", "key"]
    return table(
        head,
        [
            (
                text(row.get("name")),
                "revoked" if row.get("revoked") else "root" if row.get("root") else "valid",
                text(row.get("peer_id")),
                text(row.get("key")),
            )
            for row in rows
        ],
    )


def removed(answer: Fields) -> str:
    """`vpnd remove`."""
    name = answer.get("removed")
    lines = [f"{name} ({answer.get('peer_id')}) is removed; to let it in again: vpnd invite"]
    if answer.get("told") == 0:
        lines.append("No other node is connected: they hear of it when one is.")
    if answer.get("authority"):
        lines.append(
            f"It was an authority: whom it let in stays. If its key was stolen: vpnd authority revoke {name} --stolen"
        )
    return "\n".join(wrapped(printable(line)) for line in lines)


def appointed(answer: Fields, who: str) -> str:
    """`vpnd authority add`."""
    return wrapped(printable(f"{answer.get('name') or who} is an authority now{_unheard(answer)}"))


def revoked(answer: Fields, who: str) -> str:
    """`vpnd authority revoke`; with --stolen also what came of all that was signed with the stolen key."""
    consequences = (
        ("again", "signed again, as other authorities made them"),
        ("out", "out, for it alone vouched for them (those that were good: vpnd invite)"),
        ("back", "in again, for it alone had removed them (vpnd remove)"),
        ("lapsed", "no authorities any more, for it had named them (vpnd authority add)"),
        ("authorities_back", "authorities again, for it had revoked them"),
    )
    lines = [printable(f"{answer.get('name') or who} is no authority any more{_unheard(answer)}")]
    lines += [f"{_all(answer[key])}: {meaning}" for key, meaning in consequences if answer.get(key)]
    return "\n".join(map(wrapped, lines))


def _unheard(answer: Fields) -> str:
    """Nobody else knows of it while no other node is connected."""
    return "; no other node is connected, they hear of it when one is" if answer.get("told") == 0 else ""


def peers(status: Status) -> str:
    """`vpnd peers`: a row for each, and below it where it is reached and what is behind it."""
    if not status.peers:
        return no_peers(status)
    head = ["peer", "addresses", "state", ">rtt", ">sessions"]
    rows = [
        (
            text(peer.name),
            _all(peer.virtual_ips or (peer.virtual_ip,)),
            text(peer.state),
            milliseconds(peer.rtt_ms),
            str(peer.sessions),
        )
        for peer in status.peers
    ]
    places = [
        (text(peer.name), text(peer.source), _all(peer.addresses), _all(peer.routes)) for peer in status.peers
    ]
    parts = [
        table(head, rows) + left_out(status),
        table(["peer", "known from", "dialed at", "routes"], places),
        "\n".join(ownership(status.peers)),
    ]
    return "\n\n".join(filter(None, parts))


def resolved(answer: Fields) -> str:
    """`vpnd resolve`: the steps, then what they came to."""
    steps = [
        (text(step.get("source")), _age(step.get("age_s")), text(step.get("result")))
        for step in answer.get("steps") or []
    ]
    lines = [table(["looked in", ">age", "result"], steps)] if steps else []
    if answer.get("peer_id"):
        rows = [("name", text(answer.get("name"))), ("peer id", text(answer.get("peer_id")))]
        rows.append(("reached at", _all(answer.get("addresses"))))
        lines.append(table((), rows))
    else:
        lines.append(printable(f"Nobody is known as {answer.get('what')}."))
    return "\n\n".join(lines)


def _standing(row: Fields) -> str:
    """What a member is, or why it is none any more."""
    if row.get("ago_s") is None:
        return text(row.get("state"))
    by = f" by {text(row.get('by'))}" if row.get("by") else ""
    return f"{text(row.get('state'))}{by}, {duration(row.get('ago_s'))} ago"


def _first(values: object) -> str:
    found = list(values) if isinstance(values, list | tuple) else []
    return text(found[0]) if found else text(None)


def _all(values: object) -> str:
    found = [text(value) for value in values if value] if isinstance(values, list | tuple) else []
    return " ".join(found) or text(None)


def _yes(value: object) -> str:
    return "yes" if value else text(None)


def _age(value: object) -> str:
    return f"{value:.1f} s" if isinstance(value, int | float) and value >= 0 else text(None)


def ways(invited: Fields) -> str:
    """How this node is reached by those that it has invited."""
    places = [endpoint.rpartition("/tcp/") for endpoint in invited.get("addresses", ())]
    at = ", ".join(f"{text(host.rpartition('/')[2])} port {port}" for host, _, port in places)
    relays = " and ".join(map(text, invited.get("relays", ())))
    if invited.get("reachable") != "no" or not at:
        return f"It asks this node at {at or 'no address of its own'}" + (
            f", or over {relays}" if relays else ""
        )
    if relays:
        return f"It asks this node over {relays}, or at {at} in the same local network"
    return (
        f"Only a machine of the same local network can use it, at {at}: nobody else could dial this node, and no "
        "member relays for it; vpnd netcheck says what to do"
    )
