"""Whether this machine's own firewall lets through what members send to the networks announced here, and the answers.

The rules are other programs', so they are read, never changed. Judged are the first packet of a connection out of the
tunnel and an answer into it, in every base chain at the hook forward: all of them have to let both pass, for what one
accepts another may still drop. A chain is told only when it drops one of them for certain. As soon as a rule might
accept it (a match that is not known here counts as one that might hold), the administrator has thought of something.

Docker is the usual case: its policy of FORWARD is drop.
"""

from __future__ import annotations

import enum
import ipaddress
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from supervisor.network.filter import NftError, nft, table_name
from supervisor.network.netlink import IPRoute, NetlinkError, converse
from supervisor.network.policy import RTN_UNICAST
from vpnd.config.live import Live
from vpnd.endpoint import IPNetwork

#: Families of tables that see forwarded packets of an IP version.
_FAMILIES = {4: ("ip", "inet"), 6: ("ip6", "inet")}
_VERDICTS = frozenset({"accept", "queue", "drop", "reject", "return", "jump", "goto"})
#: Statements that neither decide nor say of which packets; what is not known here says of some.
_PASSIVE = frozenset({"counter", "log", "mangle", "flow", "map", "set", "ct helper", "ct timeout"})
#: Chains do not lead to one another deeper in the kernel (NFT_JUMP_STACK_SIZE).
_DEEPEST = 16

Statement = dict[str, Any]
Chains = Mapping[str, Sequence[Sequence[Statement]]]


class Packet(NamedTuple):
    """One that is forwarded, of an address in `sources` to one in `destinations`. A device is "" where none is known.
    `state`: of its connection."""

    incoming: str
    outgoing: str
    sources: IPNetwork
    destinations: IPNetwork
    state: str


class End(enum.Enum):
    """What becomes of a packet in a chain; ON: the chain does not say."""

    MAY_PASS = enum.auto()
    DROPPED = enum.auto()
    ON = enum.auto()


class Forwarding:
    """What the firewall of one node drops. Owner: one thread at a time.

    `advertised`: the networks behind this node that it announces, `members`: those members send from; both may be
    replaced at any time. A firewall can be large: it is read once in network.reconcile_interval, or when they change,
    and not at all where nothing is announced.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self.advertised: tuple[str, ...] = ()
        self.members: tuple[str, ...] = ()
        self._judged: tuple[tuple[str, ...], ...] = ()
        self._looked_s = 0.0
        self._problems: list[str] = []

    def look(self) -> list[str]:
        """A line for each chain that is in the way. Blocks for some milliseconds."""
        asked = self.advertised, self.members
        network, now_s = self._live.config.network, time.monotonic()
        if asked != self._judged or now_s >= self._looked_s + network.reconcile_interval:
            self._problems = obstacles(network.interface, *asked)
            self._judged, self._looked_s = asked, now_s
        return self._problems


def obstacles(interface: str, advertised: Sequence[str], members: Sequence[str]) -> list[str]:
    """Chains that drop what `members`, networks, send to the networks `advertised`, or the answers, a line each. None
    where the rules cannot be read: then nothing is known."""
    if not advertised:
        return []
    found: dict[str, list[str]] = {}
    try:
        listed = json.loads(nft("--json", "list", "chains"))["nftables"]
        bases = [row["chain"] for row in listed if row.get("chain", {}).get("hook") == "forward"]
        bases = [base for base in bases if base["table"] != table_name(interface)]
        packets = converse(lambda netlink: _packets(netlink, interface, advertised, members)) if bases else {}
        for base in bases:
            chains = _chains(base["family"], base["table"])
            for text, there_and_back in packets.items():
                version = there_and_back[0].sources.version
                if base["family"] in _FAMILIES[version] and any(
                    drops(base, chains, one) for one in there_and_back
                ):
                    found.setdefault(_told(base, interface), []).append(text)
    except (NftError, NetlinkError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # of another form than is known: not judged
    return [line.format(", ".join(dropped)) for line, dropped in found.items()]


def _told(base: Mapping[str, Any], interface: str) -> str:
    place = f"{base['family']} {base['table']} {base['name']}"
    add = f"nft insert rule {place} {{}}ifname {interface} accept"
    if base["family"] != "inet" and (base["table"], base["name"]) == ("filter", "FORWARD"):
        add = (
            f"{'iptables' if base['family'] == 'ip' else 'ip6tables'} -I FORWARD -{{}} {interface} -j ACCEPT"
        )
    remedy = "; ".join(add.format(way) for way in "io")
    return f"the firewall of this machine ({place}) drops what members send to {{}} behind it, or the answers: {remedy}"


def _chains(family: str, table: str) -> dict[str, list[list[Statement]]]:
    """The rules of a table, by chain; of its sets only that they are there."""
    chains: dict[str, list[list[Statement]]] = {}
    for row in json.loads(nft("--json", "--terse", "list", "table", family, table))["nftables"]:
        if "rule" in row:
            chains.setdefault(row["rule"]["chain"], []).append(row["rule"]["expr"])
    return chains


def _packets(
    netlink: IPRoute, interface: str, advertised: Sequence[str], members: Sequence[str]
) -> dict[str, tuple[Packet, ...]]:
    """By network: what members of its IP version send there, and what answers."""
    packets: dict[str, tuple[Packet, ...]] = {}
    for text in advertised:
        here = ipaddress.ip_network(text)
        device = _device_to(netlink, here)
        for there in map(ipaddress.ip_network, members):
            if there.version == here.version and device != interface:
                packets[text] = (
                    Packet(interface, device, there, here, "new"),
                    Packet(device, interface, here, there, "established"),
                )
    return packets


def _device_to(netlink: IPRoute, network: IPNetwork) -> str:
    """Where the kernel sends what is for some of its first addresses, of which one may be this machine's own."""
    for place in (2, 3):
        try:
            (found,) = netlink.route("get", dst=str(network[min(place, network.num_addresses - 1)]))
        except NetlinkError:
            continue
        if found["type"] == RTN_UNICAST:
            return socket.if_indextoname(found.get_attr("RTA_OIF"))
    return ""


def drops(base: Mapping[str, Any], chains: Chains, packet: Packet) -> bool:
    """Whether a base chain, as nft tells it, drops a packet for certain."""
    end = _end(chains, base["name"], packet, 0)
    return end is End.DROPPED or (end is End.ON and base.get("policy") == "drop")


def _end(chains: Chains, name: str, packet: Packet, depth: int) -> End:
    sure = True  # that it comes as far
    for statements in chains.get(name, ()):
        for certain, verdict, target in _verdicts(statements, packet):
            end = End.ON
            if verdict in ("jump", "goto") and depth < _DEEPEST:
                end = _end(chains, target, packet, depth + 1)
            elif verdict in ("drop", "reject"):
                end = End.DROPPED
            elif verdict != "return":
                end = End.MAY_PASS
            if end is End.MAY_PASS or (end is End.DROPPED and certain and sure):
                return end
            if verdict in ("return", "goto"):
                if certain:
                    return End.ON
                sure = False
    return End.ON


def _verdicts(statements: Sequence[Statement], packet: Packet) -> Iterator[tuple[bool, str, str]]:
    """What a rule may decide of a packet: whether it is certain to, the verdict, the chain it leads to."""
    certain = True
    for statement in statements:
        ((kind, content),) = statement.items()
        if kind == "match":
            held = _holds(content, packet)
            if held is False:
                return
            certain &= held is True
        elif kind in _VERDICTS:
            yield certain, kind, content["target"] if kind in ("jump", "goto") else ""
            return
        elif kind == "vmap":
            data = content["data"]
            for key, verdict in data["set"] if isinstance(data, dict) else [("@", {"accept": None})]:
                held = _holds({"op": "==", "left": content["key"], "right": key}, packet)
                if held is not False:
                    for _, decided, target in _verdicts([verdict], packet):
                        yield certain and held is True, decided, target
        elif kind not in _PASSIVE:
            certain = False


def _holds(match: Mapping[str, Any], packet: Packet) -> bool | None:
    """Whether a packet is one of those a rule is for; None where that is not known."""
    left, right = match["left"], match["right"]
    version = packet.sources.version
    ((kind, what),) = left.items()
    if (
        kind == "payload"
        and what.get("protocol") in ("ip", "ip6")
        and what["protocol"] != _PROTOCOLS[version]
    ):
        return False  # whatever is compared, it has no such header
    values = right.get("set", [right]) if isinstance(right, dict) else right
    found = {_is(kind, what, value, packet) for value in (values if isinstance(values, list) else [values])}
    held = True if True in found else None if None in found else False
    if match["op"] == "!=":
        return None if held is None else not held
    return held if match["op"] in ("==", "in") else None


_PROTOCOLS = {4: "ip", 6: "ip6"}


def _is(kind: str, what: Mapping[str, Any], value: Any, packet: Packet) -> bool | None:
    """Whether what a rule looks at is `value` in that packet."""
    version = packet.sources.version
    if isinstance(value, str) and value.startswith("@"):
        return None  # a set by name
    match kind, what.get("key", what.get("field", what.get("result"))):
        case "meta", ("iifname" | "iif" | "oifname" | "oif") as key:
            device = packet.incoming if key.startswith("i") else packet.outgoing
            if not device or not isinstance(value, str):
                return None
            return device.startswith(value[:-1]) if value.endswith("*") else device == value
        case "meta", "nfproto":
            return bool(value == f"ipv{version}")
        case "meta", "protocol":
            return bool(value == _PROTOCOLS[version])
        case "ct", "state" if isinstance(value, str):
            return value == packet.state
        case "ct", "status" if value == "dnat":
            return False
        case "fib", "type" if value == "local" and what.get("flags") == ["daddr"]:
            return False
        case "payload", "saddr":
            return _within(packet.sources, value)
        case "payload", "daddr":
            return _within(packet.destinations, value)
    return None


def _within(network: IPNetwork, value: Any) -> bool | None:
    """Whether all of its addresses are among those of a rule; None: some."""
    if isinstance(value, dict) and "range" in value:
        first, last = map(ipaddress.ip_address, value["range"])
        named = [*ipaddress.summarize_address_range(first, last)]
    else:
        prefix = value["prefix"] if isinstance(value, dict) else {"addr": value, "len": None}
        text = prefix["addr"] if prefix["len"] is None else f"{prefix['addr']}/{prefix['len']}"
        named = [ipaddress.ip_network(text)]
    if any(network.subnet_of(each) for each in named):
        return True
    return None if any(network.overlaps(each) for each in named) else False
