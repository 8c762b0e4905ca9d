"""`vpnd status` for people: whether the node is healthy and why not, then one table per part; 80 columns wide."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

import typer

from vpnd.api.reports import ReachReport
from vpnd.metrics import DROPS
from vpnd.printable import WIDTH, many, printable, span, wrapped
from vpnd.status import DOWN, HEALTHY, NOT_IN, NetworkPart, Peer, Shard, Status, connected, known_as

_GAP = "  "
#: To the upper left of an empty terminal.
CLEAR = "\x1b[H\x1b[2J"
#: What is left for a column that is wrapped, however wide the others are.
_LEAST_WRAPPED = 10
_NONE = "-"


def render(status: Status) -> str:
    """The whole text, with colours, without a final newline."""
    parts = [
        _headline(status),
        _node(status),
        _network(status.network) if status.network is not None else "",
        _peers(status),
        _troubles(status.peers),
        _shards(status.shards),
        _drops(status),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(status: Status) -> str:
    """Health, why not, and what does not work as wished while the node does."""
    health = status.health or "of another version"
    colour = {HEALTHY: "green", DOWN: "red"}.get(health, "yellow")
    name = text(known_as(status) or "vpnd")
    lines = [f"{name}: {typer.style(health, fg=colour, bold=True)}, {connected(status)}"]
    for ailment in status.ailments:
        remedy = f": {ailment.remedy}" if ailment.remedy else ""
        lines.append(
            typer.style(wrapped(f"! {text(ailment.what)}{text(remedy) if remedy else ''}"), fg=colour)
        )
    lines += [wrapped(f"note: {text(note)}") for note in status.node.warnings]
    return "\n".join(lines)


def _node(status: Status) -> str:
    node, tun, control, books = status.node, status.tun, status.control, status.books
    shards = (*status.shards, *status.retired)
    addresses = " and ".join(node.addresses or (node.virtual_ip,))
    again = f" (restarted {many(control.restarts, 'time')})" if control.restarts else ""
    flows = [f"{count(number)} {state}" for state, number in _items(status.flows) if number]
    rows = [
        ("version", status.version),
        ("peer id", node.peer_id),
        ("address", f"{text(addresses)} on {text(tun.interface)}, mtu {tun.mtu}"),
        ("listens", " ".join(node.listen) or "nowhere"),
        ("reachable", _reach(status.reach)),
        ("offloads", " ".join(tun.offloads) or "none: one packet at a time"),
        ("up for", duration(node.uptime_s)),
        ("flows", ", ".join(flows) or "none"),
        (
            "from tun",
            f"{size(tun.bytes_read)}; {many(books.out.sent_packets, 'packet')} sent"
            + _share(books.out.sent_packets, books.out.sent, "in a record")
            + _share(
                sum(each.packets_from_tun for each in shards),
                sum(each.batches for each in shards),
                "records in a batch",
            ),
        ),
        (
            "to tun",
            f"{size(tun.bytes_written)}; {many(books.into.received_packets, 'packet')} received"
            + _share(books.into.received_packets, books.into.received, "in a record"),
        ),
        ("processes", f"supervisor {status.supervisor.pid}, control {control.pid}{again}"),
    ]
    return table((), [(name, text(value)) for name, value in rows])


def _share(number: int, of: int, what: str) -> str:
    """How many of something there are in another, on average: ", 31.0 in a record"."""
    return f", {number / of:.1f} {what}" if of else ""


def _reach(reach: ReachReport) -> str:
    """Whether others can dial this node, how, and by whom they call it otherwise."""
    parts = [reach.reachable if reach.reachable != "unknown" else "not known: no member was there to try it"]
    if reach.port_map:
        parts.append(f"the router gives {reach.port_map}")
    if reach.reachable != "yes" and reach.relays:
        parts.append(f"others call it by {' and '.join(reach.relays)}")
    return "; ".join(parts)


def _items(struct: object) -> list[tuple[str, int]]:
    return [(name, getattr(struct, name)) for name in type(struct).__struct_fields__]  # type: ignore[attr-defined]


def _network(network: NetworkPart) -> str:
    """Name, members and our own standing."""
    state = text(network.state)
    if not network.current:
        state += " (as control said before it went away)"
    role = ", may let others in" if network.authority else ""
    rows = [
        ("network", f"{text(network.name)}, id {text(network.network_id)}"),
        ("this node", f"{text(network.label)}, {state}{role}"),
        (
            "members",
            f"{count(network.members)}, of them {many(network.authorities, 'authority', 'authorities')}",
        ),
    ]
    if network.state == "member":
        rows.append(("membership", f"valid for another {duration(network.expires_s)}, renewed before"))
    rows += [("conflict", text(conflict)) for conflict in network.conflicts]
    rows += [("warning", text(warning)) for warning in network.warnings]
    return table((), rows)


def _peers(status: Status) -> str:
    if not status.peers:
        return no_peers(status)
    head = ["peer", "address", "state", ">rtt", ">sessions", ">sent", ">received"]
    return table(head, [_peer(peer) for peer in status.peers]) + left_out(status) + _paths(status.peers)


#: What carries packets to a peer, by the state of its datagrams.
_CARRIED = {
    "used": "streams, datagrams",
    "unused": "streams; datagrams are not needed",
    "silent": "streams; datagrams do not arrive",
    "alone": "datagrams; no stream carries",
}


def _paths(peers: Sequence[Peer]) -> str:
    """A line for each way by which sessions reach a peer, and what of them carries packets."""
    ways = [
        (
            text(peer.name),
            text(path) + (f", {times} sessions" if times > 1 else ""),
            _CARRIED.get(peer.datagrams, "streams"),
        )
        for peer in peers
        for path, times in Counter(peer.paths).items()
    ]
    return "\n\n" + table(["peer", "path", "carried by"], ways) if ways else ""


def _peer(peer: Peer) -> Sequence[str]:
    return (
        text(peer.name),
        text(peer.virtual_ip),
        text(peer.state),
        milliseconds(peer.rtt_ms),
        f"{peer.sessions}" + (f" ({peer.suspect}?)" if peer.suspect else ""),
        size(peer.bytes_sent),
        size(peer.bytes_received),
    )


def left_out(status: Status) -> str:
    """Below a table of peers: how many members status.max_peers keeps out of it. Empty when it has all."""
    others = status.network.members - 1 if status.network is not None else 0
    missing = others - len(status.peers)
    return f"\n… and {many(missing, 'member')} without a session (status.max_peers); all: vpnd members" * (
        missing > 0
    )


def no_peers(status: Status) -> str:
    """What to do about having none."""
    if status.network is None:
        return "No peers: add [[peers]] entries to the configuration."
    if status.network.state in NOT_IN:
        return "No peers: this node is not in the network."
    return wrapped("No other members: `vpnd invite`, on an authority, prints a token for the next one.")


def _troubles(peers: Sequence[Peer]) -> str:
    """A line for each peer that does not work: why, and what happens next; and for each address that is not used."""
    lines = [
        wrapped(f"{text(peer.name)}: {reason}")
        for peer in peers
        if peer.state != "connected" and (reason := why_not(peer))
    ]
    lines += [
        wrapped(
            f"{text(peer.name)}: {peer.suspect} of {many(peer.sessions, 'session')} suspect, a probe failed"
        )
        for peer in peers
        if peer.suspect
    ]
    lines += [
        wrapped(f"{text(peer.name)}: comes too often, {many(peer.refused, 'handshake')} refused")
        for peer in peers
        if peer.refused
    ]
    return "\n".join([*lines, *ownership(peers)])


def ownership(peers: Sequence[Peer]) -> list[str]:
    """A line for each address that a peer claims and the contract does not confirm."""
    return [wrapped(f"{text(peer.name)}: {text(line)}") for peer in peers for line in peer.ownership]


def why_not(peer: Peer) -> str:
    """ "circuit open, next try in 0.7 s: connection refused", or as much of it as is known."""
    parts = []
    if peer.circuit == "open":
        times = f" (for the {peer.circuit_opened}. time)" if peer.circuit_opened > 1 else ""
        parts.append(f"circuit open{times}")
    elif peer.circuit == "half_open":
        parts.append("circuit half-open, one try is under way")
    if peer.seen_s >= 0:
        parts.append(f"last seen {duration(peer.seen_s)} ago")
    if peer.next_dial_s >= 0:
        parts.append(f"next try in {peer.next_dial_s:.1f} s")
    if peer.last_error:
        return printable(": ".join(filter(None, [", ".join(parts), peer.last_error])))
    if not peer.addresses and peer.state == "waiting":
        parts.append("no address to dial: waiting for its dial")
    return printable(", ".join(parts))


def _shards(shards: Sequence[Shard]) -> str:
    traffic = [">from tun", ">to tun", ">drops", ">flows", ">sessions", ">ring"]
    return table([">shard", "state", ">cpu", ">memory", *traffic], [_shard(shard) for shard in shards])


def _shard(shard: Shard) -> Sequence[str]:
    again = f" (restarted {many(shard.restarts, 'time')})" if shard.restarts else ""
    return (
        f"{shard.index}",
        text(shard.state) + again,
        f"{shard.cpu_percent:.0f} %",
        size(shard.rss_bytes),
        size(shard.bytes_from_tun),
        size(shard.bytes_to_tun),
        count(sum(shard.drops.values())),
        count(shard.flows),
        count(shard.sessions),
        f"{100 * shard.ring.used / shard.ring.size:.0f} %" if shard.ring.size else _NONE,
    )


def _drops(status: Status) -> str:
    rows = [
        (count(n), reason, DROPS[reason].meaning if reason in DROPS else "")
        for reason, n in sorted(status.dropped_packets.items(), key=lambda item: -item[1])
        if n
    ]
    return table([">packets", "dropped", ""], rows) or "Nothing dropped."


def rates(before: Status, after: Status) -> str:
    """What moved between two statuses of a node, a second: with each peer, and drops. Empty where no time passed."""
    seconds = after.node.uptime_s - before.node.uptime_s
    if seconds <= 0:
        return ""
    earlier = {peer.peer_id: peer for peer in before.peers}
    rows = []
    for peer in after.peers:
        was = earlier.get(peer.peer_id, Peer())
        sent, received = peer.bytes_sent - was.bytes_sent, peer.bytes_received - was.bytes_received
        packets = peer.packets_sent - was.packets_sent
        lost = sum(peer.drops.values()) - sum(was.drops.values())
        share = f"{lost / (lost + packets):.1%}" if lost + packets else _NONE
        rows.append((text(peer.name), f"{size(sent / seconds)}/s", f"{size(received / seconds)}/s", share))
    dropping = [
        (reason, f"{(count - before.dropped_packets.get(reason, 0)) / seconds:,.1f}/s")
        for reason, count in after.dropped_packets.items()
        if count > before.dropped_packets.get(reason, 0)
    ]
    parts = [
        table(["peer", ">sends", ">receives", ">dropped here"], rows),
        table(["dropping", ">packets"], dropping),
    ]
    return "\n\n".join(filter(None, parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, at most WIDTH wide, below the titles in `head`, or without any. ">" in front of a title: aligned
    to the right. What is too wide is wrapped: the widest column that is aligned to the left."""
    if not rows:
        return ""
    head = head or [""] * len(rows[0])
    titles = [title.removeprefix(">") for title in head]
    aligns = [">" if title.startswith(">") else "<" for title in head]
    lines = [titles, *rows] if any(titles) else list(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    while sum(widths) + len(_GAP) * (len(head) - 1) > WIDTH:
        place = max((at for at in range(len(head)) if aligns[at] == "<"), key=lambda at: widths[at])
        if widths[place] <= _LEAST_WRAPPED:
            break
        widths[place] -= 1
    return "\n".join(_line(cells, aligns, widths) for cells in lines)


def _line(cells: Sequence[str], aligns: Sequence[str], widths: Sequence[int]) -> str:
    """One row, of several lines where a cell does not fit."""
    wrapped = [
        textwrap.wrap(cell, width or 1, break_on_hyphens=False) or [""]
        for cell, width in zip(cells, widths, strict=True)
    ]
    lines = []
    for number in range(max(map(len, wrapped))):
        parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
        shown = (f"{part:{a}{w}}" for part, a, w in zip(parts, aligns, widths, strict=True))
        lines.append(_GAP.join(shown).rstrip())
    return "\n".join(lines)


def text(value: object) -> str:
    """What is known, fit for a terminal; "-" for what is not."""
    return _NONE if value is None or value == "" else printable(str(value))


def count(value: int) -> str:
    """1234567 as "1,234,567"."""
    return f"{value:,}"


def milliseconds(value: object) -> str:
    """0.254 as "0.25 ms", 1500 as "1.50 s"."""
    if not isinstance(value, int | float):
        return _NONE
    return f"{value:.2f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def size(amount: float) -> str:
    """Bytes with three digits or so: "512 B", "1.5 KiB", "20.0 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"


def duration(seconds: object) -> str:
    """Seconds as `vpnd.printable.span` writes them; a dash for what is no number."""
    return span(seconds) if isinstance(seconds, int | float) else _NONE
