"""`vpnd top`: which flows send and receive how much, from the TUN device itself, as `vpnd capture` takes packets.

A flow is what two addresses and ports say to each other, both ways. Only the head of each packet is looked at, and the
daemon has no part in it.
"""

from __future__ import annotations

import functools
import ipaddress
import select
import socket
import time
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import typer

from vpnd.cli.capture import PACKET_OUTGOING, Head, head_untrusted, packet_socket
from vpnd.cli.command import JsonOption, Where, command, json_of, read_status
from vpnd.cli.statusview import CLEAR, size, table, text

#: An IPv4 header with all options, or IPv6's, and the ports behind it.
_HEAD_BYTES = 64
#: Flows whose addresses need not be written again.
MOST_REMEMBERED = 4096
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp", 132: "sctp"}

app = typer.Typer()


class Flow(NamedTuple):
    """Ours first: `local` is the end on this side of the tunnel. Ports 0: the protocol has none."""

    protocol: int
    local: str
    local_port: int
    remote: str
    remote_port: int


class Moved:
    """What a flow moved: packets (superpackets as one) and their bytes, into the tunnel and out of it."""

    __slots__ = ("bytes_in", "bytes_out", "packets_in", "packets_out")

    def __init__(self) -> None:
        self.bytes_in = self.bytes_out = self.packets_in = self.packets_out = 0

    def add(self, length: int, outgoing: bool) -> None:
        """One packet."""
        if outgoing:
            self.bytes_out += length
            self.packets_out += 1
        else:
            self.bytes_in += length
            self.packets_in += 1


@command(app)
def top(
    place: Where,
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="S", min=0.1, help="Seconds from one to the next.")
    ] = 2.0,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=1, help="So many flows.")] = 20,
    once: Annotated[bool, typer.Option("--once", help="One interval, then end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the flows through the tunnel that move most, over and over until Ctrl-C.

    Rates are of the last interval. It costs the node nothing while it does not run. Needs root.
    """
    settings = place.load("status").config
    try:
        with packet_socket(read_status(settings).tun.interface) as sock:
            while True:
                flows = counted(sock, interval)
                names = {
                    ip: peer.name
                    for peer in read_status(settings, interval / 2).peers
                    for ip in peer.virtual_ips
                }
                rows = rates(flows, interval, names)[:lines]
                if as_json:
                    typer.echo(json_of(rows))
                else:
                    typer.echo(("" if once else CLEAR) + rendered(rows))
                if once:
                    return
    except KeyboardInterrupt:
        pass  # the end, as for ping


def counted(sock: socket.socket, seconds: float) -> dict[Flow, Moved]:
    """What the packets of so many seconds come to."""
    flows: dict[Flow, Moved] = {}
    head = memoryview(bytearray(_HEAD_BYTES))
    deadline = time.monotonic() + seconds
    while (left_s := deadline - time.monotonic()) > 0:
        if select.select([sock], [], [], left_s)[0]:
            length, address = sock.recvfrom_into(head, _HEAD_BYTES, socket.MSG_TRUNC)
            outgoing = address[2] == PACKET_OUTGOING
            flow = flow_untrusted(head[: min(length, _HEAD_BYTES)], outgoing)
            if flow is not None:
                flows.setdefault(flow, Moved()).add(length, outgoing)
    return flows


def flow_untrusted(packet: memoryview, outgoing: bool) -> Flow | None:
    """The flow of an IP packet, of which the head is enough; None for what is none. `outgoing`: into the tunnel,
    so its source is on this side."""
    head = head_untrusted(packet)
    return None if head is None else _flow(head, outgoing)


@functools.lru_cache(maxsize=MOST_REMEMBERED)
def _flow(head: Head, outgoing: bool) -> Flow:
    """To write an address takes longer than all else that is done for a packet."""
    ends = [(str(ipaddress.ip_address(end)), port) for end, port in zip(head.ends, head.ports, strict=True)]
    local, remote = ends if outgoing else reversed(ends)
    return Flow(head.protocol, *local, *remote)


def rates(flows: Mapping[Flow, Moved], seconds: float, names: Mapping[str, str]) -> list[dict[str, object]]:
    """A row for each flow, those that move most first. `names`: of peers, by address."""
    rows = sorted(flows.items(), key=lambda item: -(item[1].bytes_in + item[1].bytes_out))
    return [
        {
            "protocol": _PROTOCOLS.get(flow.protocol, str(flow.protocol)),
            "local": _end(flow.local, flow.local_port),
            "remote": _end(flow.remote, flow.remote_port),
            "peer": names.get(flow.remote, ""),
            "sent_bytes_per_s": round(moved.bytes_out / seconds),
            "received_bytes_per_s": round(moved.bytes_in / seconds),
            "sent_packets_per_s": round(moved.packets_out / seconds, 1),
            "received_packets_per_s": round(moved.packets_in / seconds, 1),
        }
        for flow, moved in rows
    ]


def _end(address: str, port: int) -> str:
    if not port:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def rendered(rows: list[dict[str, object]]) -> str:
    """For people."""
    head = ["proto", "local", "remote", "peer", ">sent/s", ">received/s"]
    shown = [
        (
            text(row["protocol"]),
            text(row["local"]),
            text(row["remote"]),
            text(row["peer"]),
            size(float(str(row["sent_bytes_per_s"]))),
            size(float(str(row["received_bytes_per_s"]))),
        )
        for row in rows
    ]
    return table(head, shown) or "nothing moves"
