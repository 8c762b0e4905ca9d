"""What the kernel tells about links, addresses and routes, boiled down to what changes a connection's way.

Pure: bytes of rtnetlink in, reasons out. The kernel repeats itself (every router advertisement renews addresses that
are there, every scan of a wireless card reports its link), so what is known is remembered and only news counts.
Formats: rtnetlink(7), netlink(7), Linux include/uapi/linux/rtnetlink.h; all in native byte order.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
import sys
from collections.abc import Callable, Iterator

# nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32
NLMSGHDR = struct.Struct("=IHHII")
# ifinfomsg: family u8, pad, type u16, index i32, flags u32, change u32
IFINFOMSG = struct.Struct("=BxHiII")
# ifaddrmsg: family u8, prefix length u8, flags u8, scope u8, index u32
IFADDRMSG = struct.Struct("=BBBBI")
# rtmsg: family, destination length, source length, tos, table, protocol, scope, type: u8 each; flags u32
RTMSG = struct.Struct("=8BI")
# rtattr: length u16, type u16
RTATTR = struct.Struct("=HH")
ALIGNMENT = 4

RTM_NEWLINK, RTM_DELLINK = 16, 17
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE = 24, 25
RTM_NEWRULE, RTM_DELRULE = 32, 33
RTM_NEWNETCONF = 80
NLM_F_REQUEST, NLM_F_DUMP = 0x001, 0x300

#: Multicast groups of a netlink socket that these messages come from, as bits of its address: LINK, IPV4_IFADDR,
#: IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, IPV4_NETCONF, IPV6_NETCONF.
GROUPS = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000 | 0x800000 | 0x1000000
#: The group of nfnetlink that tells of nftables (NFNLGRP_NFTABLES), likewise; another family of netlink.
NFT_GROUPS = 0x40

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
#: Not usable: duplicate address detection is under way, or has failed.
UNUSABLE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
RTA_OIF, RTA_TABLE = 4, 15
RTM_F_CLONED = 0x200
#: Routes of addresses of this machine; those come as addresses too.
RT_TABLE_LOCAL = 255
#: The flags of a link that decide whether packets pass: IFF_UP, IFF_RUNNING, IFF_LOWER_UP.
CARRIES = 0x1 | 0x40 | 0x10000
IFF_UP, IFF_RUNNING = 0x1, 0x40

Address = tuple[int, str]


class Of(enum.Enum):
    """What a change is of: the machine, whose ways to others may be different now, or what this node has put on it."""

    MACHINE = enum.auto()
    OURS = enum.auto()


def dump_addresses() -> bytes:
    """The request for all addresses of all links."""
    length = NLMSGHDR.size + IFADDRMSG.size
    header = NLMSGHDR.pack(length, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 0, 0)
    return header + IFADDRMSG.pack(0, 0, 0, 0, 0)


class NetworkState:
    """The machine's addresses and links, as far as told. Owner: supervisor loop.

    `own`: index of our own device, and `own_table` our routing table, changes of which are `Of.OURS`, as are those of
    all rules. `port`: the netlink port the answers to our own requests carry (the notice of a change carries that of
    whoever made it). `name_of` gives a link's name by its index.
    """

    def __init__(self, own: int, own_table: int, port: int, name_of: Callable[[int], str]) -> None:
        self._own, self._own_table, self._port, self._name_of = own, own_table, port, name_of
        self._usable: set[Address] = set()
        self._links: dict[int, int] = {}

    def addresses(self) -> tuple[str, ...]:
        """All usable addresses but loopback's and those of our own device."""
        texts = {text for index, text in self._usable if index != self._own}
        return tuple(sorted(text for text in texts if not ipaddress.ip_address(text).is_loopback))

    def forget(self) -> None:
        """Messages were lost: what was known may be wrong. Follow with `dump_addresses`."""
        self._usable.clear()
        self._links.clear()

    def take(self, data: bytes) -> Iterator[tuple[Of, str]]:
        """One datagram of the kernel: a reason for each thing that changed. Answers to our requests are taken over
        silently."""
        for kind, port, body in messages(data):
            if kind in (RTM_NEWLINK, RTM_DELLINK):
                of, reason = self._link(kind, body)
            elif kind in (RTM_NEWADDR, RTM_DELADDR):
                of, reason = self._address(kind, body)
            elif kind in (RTM_NEWROUTE, RTM_DELROUTE):
                of, reason = self._route(kind, body)
            elif kind in (RTM_NEWRULE, RTM_DELRULE):
                of, reason = Of.OURS, "a routing rule changed"
            elif kind == RTM_NEWNETCONF:
                of, reason = Of.OURS, "forwarding or source filters changed"
            else:
                continue
            if reason and port != self._port:
                yield of, reason

    def _link(self, kind: int, body: bytes) -> tuple[Of, str]:
        _, _, index, flags, _ = IFINFOMSG.unpack_from(body)
        if index == self._own:
            return Of.OURS, "the device changed"
        before = self._links.pop(index, None)
        if kind == RTM_DELLINK:
            return Of.MACHINE, f"interface {index} is gone"
        now = self._links[index] = flags & CARRIES
        if now == before:
            return Of.MACHINE, ""
        state = "up" if now & IFF_UP and now & IFF_RUNNING else "down"
        return Of.MACHINE, f"{self._name_of(index)} is {state}"

    def _address(self, kind: int, body: bytes) -> tuple[Of, str]:
        family, _, flags, _, index = IFADDRMSG.unpack_from(body)
        attributes = dict(attributes_of(body[IFADDRMSG.size :]))
        # IFA_ADDRESS is the other side's on a point-to-point link, IFA_LOCAL is always ours
        packed = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
        if index == self._own:
            return Of.OURS, "an address of the device changed"
        if packed is None or len(packed) not in (4, 16):
            return Of.MACHINE, ""
        if wide := attributes.get(IFA_FLAGS):
            flags = int.from_bytes(wide, sys.byteorder)
        address = index, str(ipaddress.ip_address(packed))
        known = address in self._usable
        if kind == RTM_DELADDR or flags & UNUSABLE:
            self._usable.discard(address)
            return Of.MACHINE, f"{address[1]} left {self._name_of(index)}" if known else ""
        self._usable.add(address)
        return Of.MACHINE, "" if known else f"{address[1]} came to {self._name_of(index)}"

    def _route(self, kind: int, body: bytes) -> tuple[Of, str]:
        _, _, _, _, table, _, _, _, flags = RTMSG.unpack_from(body)
        attributes = dict(attributes_of(body[RTMSG.size :]))
        out, wide = (int.from_bytes(attributes.get(key, b""), sys.byteorder) for key in (RTA_OIF, RTA_TABLE))
        if out == self._own or wide == self._own_table:
            return Of.OURS, "a route of the tunnel changed"
        if flags & RTM_F_CLONED or table == RT_TABLE_LOCAL:
            return Of.MACHINE, ""
        return Of.MACHINE, "a route came" if kind == RTM_NEWROUTE else "a route went"


def messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, port, body) of each message of a datagram."""
    place = 0
    while place + NLMSGHDR.size <= len(data):
        length, kind, _, _, port = NLMSGHDR.unpack_from(data, place)
        if length < NLMSGHDR.size:
            return
        yield kind, port, data[place + NLMSGHDR.size : place + length]
        place += -(-length // ALIGNMENT) * ALIGNMENT


def attributes_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute."""
    place = 0
    while place + RTATTR.size <= len(data):
        length, kind = RTATTR.unpack_from(data, place)
        if length < RTATTR.size:
            return
        yield kind, data[place + RTATTR.size : place + length]
        place += -(-length // ALIGNMENT) * ALIGNMENT
