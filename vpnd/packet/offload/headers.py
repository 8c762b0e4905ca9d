"""Numbers of IPv4, IPv6, TCP, UDP and Linux' offloads, and the way to the transport header."""

from __future__ import annotations

from vpnd.packet.record import GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Offload

TCP = 6
UDP = 17
#: What carries packets of other protocols: IPv4, IPv6, GRE (IANA); UDP does as well (VXLAN, Geneve, …).
IPIP, IPV6_IN_IP, GRE = 4, 41, 47
GRE_BYTES = 4
#: Stands for the protocol of a fragment: whatever it carries, it has no transport header to speak of.
FRAGMENT = -1

IPV4_BYTES = 20
IPV6_BYTES = 40
TCP_BYTES = 20
UDP_BYTES = 8
#: Place of the checksum in the header.
TCP_CHECKSUM = 16
UDP_CHECKSUM = 6
#: Place of data offset and of flags in the TCP header.
TCP_DATA_OFFSET = 12
TCP_FLAGS = 13
#: More-fragments flag and offset, in IPv4's third 16-bit word pair (RFC 791).
IPV4_FRAGMENT_MASK = 0x3FFF

#: Extension headers a kernel segments behind: hop-by-hop, routing, destination options (RFC 8200).
IPV6_EXTENSIONS = frozenset({0, 43, 60})
IPV6_FRAGMENT = 44

#: Segments of one UDP superpacket. Linux before 6.9 takes no more than this, later ones 128: nobody is sent
#: more.
UDP_MAX_SEGMENTS = 64
#: Linux include/net/tcp.h, TCP_MIN_GSO_SIZE: the smallest segment its TCP makes. Bounds the number of
#: segments.
TCP_MIN_GSO_SIZE = 8

#: The offload that a superpacket of this IP version and gso_type needs at the receiver.
NEEDED = {
    (4, GSO_TCPV4): Offload.TSO4,
    (6, GSO_TCPV6): Offload.TSO6,
    (4, GSO_TCPV4 | GSO_ECN): Offload.TSO4 | Offload.TSO_ECN,
    (6, GSO_TCPV6 | GSO_ECN): Offload.TSO6 | Offload.TSO_ECN,
    (4, GSO_UDP_L4): Offload.USO4,
    (6, GSO_UDP_L4): Offload.USO6,
}


def transport(buffer: memoryview, packet: int, size: int) -> tuple[int, int]:
    """(place of the transport header from the packet's begin, protocol) of the IP packet at `packet`.

    `size` is the packet's; its IP header, less extension headers, is known to be sound. The protocol is
    FRAGMENT for any fragment, and that of the first header not understood otherwise. The place may be behind
    the end of a packet that lies about its extension headers.
    """
    first = buffer[packet]
    if first >> 4 == 4:
        if (buffer[packet + 6] << 8 | buffer[packet + 7]) & IPV4_FRAGMENT_MASK:
            return (first & 0x0F) * 4, FRAGMENT
        return (first & 0x0F) * 4, buffer[packet + 9]
    place, protocol = IPV6_BYTES, buffer[packet + 6]
    while protocol in IPV6_EXTENSIONS and place + 2 <= size:
        protocol, place = buffer[packet + place], place + (buffer[packet + place + 1] + 1) * 8
    return place, FRAGMENT if protocol == IPV6_FRAGMENT else protocol
