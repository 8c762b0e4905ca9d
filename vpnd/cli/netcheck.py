"""`vpnd netcheck`: what is between this machine and the others, and what to do about it."""

from __future__ import annotations

from typing import Any

import typer

from vpnd.cli.command import JsonOption, Where, ask_control, command, show
from vpnd.cli.statusview import milliseconds, table, text
from vpnd.printable import span, wrapped

app = typer.Typer()

#: What the NAT makes of ports, in words.
_MAPPING = {
    "none": "there is none",
    "kept": "keeps ports: direct connections come about",
    "moved": "moves ports, the same way for every destination: direct connections come about",
    "random": "takes another port for each destination (symmetric): direct connections come about only with members "
    "that can be dialed, or by nat.birthday",
    "unknown": "not known: it takes two members that can be dialed to tell",
}
_REACHABLE = {
    "yes": "yes",
    "no": "no: they dialed, and nothing came through",
    "unknown": "not known: there is no member that could try it",
}


@command(app)
def netcheck(place: Where, as_json: JsonOption = False) -> None:
    """Check how this node can be reached: the NAT in front of it, its router's port, and members that relay.

    Other members are asked now: from where they see this node, and whether they can dial it. Exit code 1 when members
    of the network can reach it neither directly nor by a relay.
    """
    found = ask_control(place, "netcheck")
    found["remedy"] = remedy(found)
    show(found, as_json, report)
    raise typer.Exit(1 if found["reachable"] == "no" and not found["relays"] else 0)


def remedy(found: dict[str, Any]) -> str:
    """What would make it better; empty where nothing has to."""
    port = next((text.rpartition("/")[2] for text in found["listen"]), "4001")
    forward = (
        f"forward TCP port {port} on the router to this machine, or switch on UPnP, NAT-PMP or PCP there"
    )
    if found["reachable"] == "yes":
        return ""
    if not found["asked"]:
        return (
            "a network needs one member that others can dial: " + forward + ", or let a rented machine join"
        )
    if all(row["error"] for row in found["asked"]):
        return "no member answers: does a firewall keep this machine from dialing out? TCP to their ports has to pass"
    if found["reachable"] == "no" and not found["relays"]:
        return f"no member relays for this one: {forward}"
    return f"for direct connections with everybody, {forward}" if found["mapping"] == "random" else ""


def report(found: dict[str, Any]) -> str:
    """For people."""
    rows = [
        ("NAT", _MAPPING.get(found["mapping"], text(found["mapping"]))),
        ("seen from outside as", ", ".join(found["outside"]) or "nobody said"),
        ("others can dial it", _REACHABLE.get(found["reachable"], text(found["reachable"]))),
        ("at", ", ".join(found["reached_at"]) or "-"),
        ("the router's port", _router(found)),
        ("IPv6", _ipv6(found["listen"])),
        ("relays of this node", ", ".join(found["relays"]) or "none"),
        ("blocked", _blocked(found["asked"])),
    ]
    parts = [table((), [(name, text(value)) for name, value in rows])]
    answered = [row for row in found["asked"] if not row["error"]]
    if answered:
        head = ["asked", "at", "saw this node at", ">rtt"]
        columns = [
            (text(row["name"]), text(row["address"]), text(row["you"]), milliseconds(row["rtt_ms"]))
            for row in answered
        ]
        parts.append(table(head, columns))
    if found["remedy"]:
        parts.append(wrapped(f"To do: {text(found['remedy'])}"))
    return "\n\n".join(parts)


def _router(found: dict[str, Any]) -> str:
    if found["port_map"]:
        return f"{found['port_map']}, for another {span(found['map_s'])}"
    if not found["map_ports"]:
        return "not asked for: nat.map_ports is false"
    return f"none: {found['no_port'] or 'there is no router'}"


def _ipv6(listen: list[str]) -> str:
    own = [text.split("/")[2] for text in listen if text.startswith("/ip6/")]
    return ", ".join(own) or "this node has no address of it"


def _blocked(asked: list[dict[str, Any]]) -> str:
    failed = [f"{row['name']} at {row['address']} ({row['error']})" for row in asked if row["error"]]
    return "; ".join(failed) or "nothing that was tried"
