"""`vpnd status` for people: a headline that says whether the node is healthy, then one table per part.

The status comes from a daemon that may be of another version, so every field may be missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from vpnd.cli.drops import DROP_MEANINGS
from vpnd.printable import printable

Fields = dict[str, Any]

_GAP = "  "
#: Of paragraphs; tables are as wide as they have to be.
_WIDTH = 100
_NONE = "-"


def render(status: Fields) -> str:
    """The whole text, without a final newline."""
    parts = [
        _headline(status),
        _node(status),
        _network(status),
        _notes(status),
        _peers(status),
        _troubles(status),
        _shards(status),
        _drops(status),
    ]
    return "\n\n".join(part for part in parts if part)


def ailments(status: Fields) -> list[str]:
    """What is wrong with the node, most serious first; empty for a healthy one."""
    found = []
    control = _part(status, "control")
    if control.get("state", "ready") not in ("ready", "up"):
        found.append(f"control is {control['state']}")
    meant = _part(status, "node").get("shards")
    # beyond that number are those that are coming or going at the moment
    shards = _list(status, "shards")[: meant if isinstance(meant, int) else None]
    down = [shard for shard in shards if shard.get("state", "ready") not in ("ready", "up")]
    if down:
        found.append(f"{len(down)} of {len(shards)} shards not running")
    if not status.get("ready") and not found:
        found.append("not ready yet")
    network = _part(status, "network")
    if network.get("state") in _OUT:
        found.append(f"{_OUT[network['state']]} network {network.get('name')}")
    peers = _list(status, "peers")
    if peers and not any(peer.get("state") == "connected" for peer in peers):
        found.append("no peer is connected")
    return found


def _headline(status: Fields) -> str:
    node = _part(status, "node")
    peers = _list(status, "peers")
    connected = sum(peer.get("state") == "connected" for peer in peers)
    wrong = ailments(status)
    health = f"NOT HEALTHY: {'; '.join(wrong)}" if wrong else "healthy"
    return printable(f"{node.get('name') or 'vpnd'}: {health} ({connected} of {len(peers)} peers connected)")


def _node(status: Fields) -> str:
    node, tun, control = _part(status, "node"), _part(status, "tun"), _part(status, "control")
    offloads = tun.get("offloads")
    rows = [
        ("version", status.get("version")),
        ("peer id", node.get("peer_id")),
        (
            "address",
            f"{_addresses(node)} on {text(tun.get('interface'))}, mtu {text(tun.get('mtu'))}",
        ),
        ("listens", " ".join(node.get("listen") or []) or "nowhere"),
        ("offloads", _offloads(offloads)),
        ("up for", duration(node.get("uptime_s"))),
        ("flows", _flows(status)),
        ("from tun", f"{count(tun.get('packets_read'))} packets, {size(tun.get('bytes_read'))}"),
        ("to tun", f"{count(tun.get('packets_written'))} packets, {size(tun.get('bytes_written'))}"),
        ("processes", _processes(_part(status, "supervisor"), control)),
    ]
    return table([("", "")], [(name, text(value)) for name, value in rows])


def _addresses(node: Fields) -> str:
    return " and ".join(map(text, node.get("addresses") or [node.get("virtual_ip")]))


#: What a node is that is no member (any more), and what its user can do.
_OUT = {"removed": "removed from", "expired": "its membership has expired in"}
_REMEDIES = {
    "removed": "An authority removed this node: no other takes its packets any more. To come back, ask for a new token "
    "(vpnd invite, on an authority) and run: vpnd stop, then vpnd start --join TOKEN",
    "expired": "This node could not renew its membership in time; it goes on trying. Does an authority run and can be "
    "reached, and are the clocks right?",
}


def _network(status: Fields) -> str:
    """Name, members and our own standing, when the node is in a network."""
    network = _part(status, "network")
    if not network.get("name"):
        return ""
    state = text(network.get("state"))
    if network.get("current") is False:
        state += " (as control said before it went away)"
    known = network.get("members"), network.get("authorities")
    role = ", may let others in" if network.get("authority") else ""
    rows = [
        ("network", f"{text(network.get('name'))}, id {text(network.get('network_id'))}"),
        ("this node", f"{text(network.get('label'))}, {state}{role}"),
        ("members", f"{count(known[0])}, {count(known[1])} of them authorities"),
    ]
    if network.get("state") == "member":
        rows.append(("membership", f"valid for another {duration(network.get('expires_s'))}, renewed before"))
    rows += [("conflict", text(conflict)) for conflict in network.get("conflicts") or []]
    lines = [table([("", "")], rows), _wrapped(_REMEDIES.get(str(network.get("state")), ""))]
    return "\n\n".join(filter(None, lines))


def _notes(status: Fields) -> str:
    """What does not work as wished while the node does, and hints; each a paragraph."""
    notes = _part(status, "node").get("warnings") or []
    return "\n".join(_wrapped(f"note: {text(note)}") for note in notes)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(
        paragraph, _WIDTH, subsequent_indent=_GAP, break_long_words=False, break_on_hyphens=False
    )


def _offloads(offloads: object) -> str:
    if isinstance(offloads, list | tuple):
        return " ".join(map(str, offloads)) or "none: one packet at a time"
    return text(offloads)


def _processes(supervisor: Fields, control: Fields) -> str:
    restarts = control.get("restarts") or 0
    again = f" (restarted {restarts} times)" if restarts else ""
    return f"supervisor {text(supervisor.get('pid'))}, control {text(control.get('pid'))}{again}"


def _flows(status: Fields) -> str:
    flows = _part(status, "flows")
    return ", ".join(f"{count(flows[state])} {state}" for state in flows if flows[state]) or "none"


def _peers(status: Fields) -> str:
    peers = _list(status, "peers")
    if not peers:
        return no_peers(status)
    return table(_PEER_HEAD, [_peer(peer) for peer in peers]) + left_out(status)


def left_out(status: Fields) -> str:
    """Below a table of peers: how many members status.max_peers keeps out of it. Empty when it has all."""
    others = (_part(status, "network").get("members") or 1) - 1
    missing = others - len(_list(status, "peers"))
    return f"\n… and {missing} members without a session (status.max_peers); all: vpnd members" * (
        missing > 0
    )


def no_peers(status: Fields) -> str:
    """What to do about having none."""
    network = _part(status, "network")
    if network.get("state") in _OUT:
        return "No peers: this node is not in the network."
    if network.get("name"):
        return "No other members: `vpnd invite`, on an authority, prints a token for the next one."
    return "No peers: add [[peers]] entries to the configuration."


_PEER_HEAD = [
    ("peer", "<"), ("address", "<"), ("state", "<"), ("circuit", "<"), ("opened", ">"), ("rtt", ">"),
    ("sessions", ">"), ("streams", ">"), ("waits", ">"), ("sent", ">"), ("received", ">"),
]  # fmt: skip


def _peer(peer: Fields) -> Sequence[str]:
    suspect = peer.get("suspect")
    return (
        text(peer.get("name")),
        text(peer.get("virtual_ip")),
        text(peer.get("state")),
        text(peer.get("circuit")).replace("_", "-"),
        count(peer.get("circuit_opened")),
        milliseconds(peer.get("rtt_ms")),
        count(peer.get("sessions")) + (f" ({suspect} suspect)" if suspect else ""),
        count(peer.get("streams")),
        milliseconds(peer.get("queue_delay_ms")),
        size(peer.get("bytes_sent")),
        size(peer.get("bytes_received")),
    )


def milliseconds(value: object) -> str:
    """0.254 as "0.25 ms"."""
    return f"{value:.2f} ms" if isinstance(value, int | float) else _NONE


def _troubles(status: Fields) -> str:
    """A line for each peer that does not work: why, and what happens next; and for each address that is not used."""
    peers = _list(status, "peers")
    lines = [
        f"{text(peer.get('name'))}: {reason}"
        for peer in peers
        if peer.get("state") != "connected" and (reason := why_not(peer))
    ]
    return "\n".join([*lines, *ownership(peers)])


def ownership(peers: Sequence[Fields]) -> list[str]:
    """A line for each address that a peer claims and the contract does not confirm."""
    return [
        f"{text(peer.get('name'))}: {text(line)}" for peer in peers for line in peer.get("ownership") or ()
    ]


def why_not(peer: Fields) -> str:
    """ "circuit open, next try in 0.7 s: connection refused", or as much of it as is known."""
    parts = []
    circuit = peer.get("circuit")
    if circuit == "open":
        parts.append("circuit open")
    elif circuit == "half_open":
        parts.append("circuit half-open, one try is under way")
    next_dial_s = peer.get("next_dial_s")
    if isinstance(next_dial_s, int | float) and next_dial_s >= 0:
        parts.append(f"next try in {next_dial_s:.1f} s")
    if peer.get("last_error"):
        return printable(": ".join(filter(None, [", ".join(parts), str(peer["last_error"])])))
    if "addresses" in peer and not peer["addresses"]:
        parts.append("no address to dial: waiting for its dial")
    return printable(", ".join(parts))


_SHARD_HEAD = [
    ("shard", ">"), ("pid", ">"), ("state", "<"), ("restarts", ">"), ("cpu", ">"), ("memory", ">"),
    ("from tun", ">"), ("to tun", ">"), ("drops", ">"), ("flows", ">"), ("streams", ">"), ("sessions", ">"),
    ("ring", ">"),
]  # fmt: skip


def _shards(status: Fields) -> str:
    return table(_SHARD_HEAD, [_shard(shard) for shard in _list(status, "shards")])


def _shard(shard: Fields) -> Sequence[str]:
    cpu = shard.get("cpu_percent")
    drops = shard.get("drops")
    return (
        text(shard.get("index")),
        text(shard.get("pid")),
        text(shard.get("state")),
        count(shard.get("restarts")),
        f"{cpu:.0f} %" if isinstance(cpu, int | float) else _NONE,
        size(shard.get("rss_bytes")),
        size(shard.get("bytes_from_tun")),
        size(shard.get("bytes_to_tun")),
        count(sum(drops.values()) if isinstance(drops, dict) else drops),
        count(shard.get("flows")),
        count(shard.get("streams")),
        count(shard.get("sessions")),
        _occupancy(shard.get("ring")),
    )


def _occupancy(ring: object) -> str:
    if not isinstance(ring, dict) or not ring.get("size"):
        return _NONE
    return f"{100 * (ring.get('used') or 0) / ring['size']:.0f} %"


def _drops(status: Fields) -> str:
    dropped = {reason: n for reason, n in _part(status, "dropped").items() if n}
    if not dropped:
        return "Nothing dropped."
    rows = [
        (count(n), reason, DROP_MEANINGS.get(reason, ""))
        for reason, n in sorted(dropped.items(), key=lambda item: -item[1])
    ]
    return table([("dropped", ">"), ("reason", "<"), ("", "<")], rows)


def table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; `head` is (title, "<" or ">") of each, without a line of titles when all are empty."""
    if not rows:
        return ""
    columns = len(rows[0])
    titles = [title for title, _ in head] + [""] * (columns - len(head))
    aligns = [align or "<" for _, align in head] + ["<"] * (columns - len(head))
    lines = [titles, *rows] if any(titles) else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(columns)]
    cells = ([f"{cell:{a}{w}}" for cell, a, w in zip(line, aligns, widths, strict=True)] for line in lines)
    return "\n".join(_GAP.join(line).rstrip() for line in cells)


def _part(status: Fields, name: str) -> Fields:
    part = status.get(name)
    return part if isinstance(part, dict) else {}


def _list(status: Fields, name: str) -> list[Fields]:
    part = status.get(name)
    return [entry for entry in part if isinstance(entry, dict)] if isinstance(part, list) else []


def text(value: object) -> str:
    """What is known, fit for a terminal; "-" for what is not."""
    return _NONE if value is None or value == "" else printable(str(value))


def count(value: object) -> str:
    """1234567 as "1,234,567"."""
    return f"{value:,}" if isinstance(value, int) else _NONE


def size(value: object) -> str:
    """Bytes with three digits or so: "512 B", "1.5 KiB", "20.0 GiB"."""
    if not isinstance(value, int | float):
        return _NONE
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def duration(seconds: object) -> str:
    """Seconds in the two largest units: "3 d 4 h", "1 m 5 s"."""
    if not isinstance(seconds, int | float):
        return _NONE
    left = int(seconds)
    shown: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, length)
        if amount or shown or unit == "s":
            shown.append(f"{amount} {unit}")
    return " ".join(shown[:2])
