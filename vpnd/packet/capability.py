"""What a node's TUN device takes from a peer, announced when a stream opens."""

from __future__ import annotations

import enum

import msgspec


class Offload(enum.IntFlag):
    """Bits of a TUN's offloads; also Linux' TUN_F_* of TUNSETOFFLOAD (include/uapi/linux/if_tun.h)."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """`offloads`: the superpackets the node's TUN takes; without CSUM it takes finished checksums only.
    `max_record`: largest record in bytes, its length field included. `mtu`: of the node's TUN."""

    offloads: int
    max_record: int
    mtu: int
