"""Every number of the datagrams' wire, apart from our choices, which are settings (`[carrier]`).

    0    u8    socket of the receiver, by which its kernel finds the shard ┐ receiver id, chosen by the receiver
    1    u24   which session of that shard                                 ┘ and told in the HELLO of each stream
    4    u64   counter, big-endian; its upper 36 bits are the epoch of the key
    12   sealed body │ tag 16                 nonce: bytes 0 to 11; no further data are authenticated

A body begins with a u32 whose upper byte says what it is:

    0x00   records, whole, as many as fit: the u32 is the first one's length
    0x01   a slice of a superpacket (vpnd/packet/offload/slices.py)
    0x02   a probe: u32, token u64, highest counter that has come u64, datagrams that have come u64, port u16, padding;
           of the u32 bit 0: it is the answer to the probe of that token; bit 1: the sender's session has ended, and is
           to end at the receiver too. An answer's port is that from which the probe came, as a NAT has made it

Keys: HKDF-SHA256 of the session's key of the same direction with a label, for each further epoch of the key before.
"""

from __future__ import annotations

import struct

from vpnd.packet.offload.slices import SLICE

#: Receiver id, counter.
HEADER = struct.Struct(">IQ")
HEADER_BYTES = 12
RECEIVER = struct.Struct(">I")
RECEIVER_BYTES = 4
#: Of a receiver id: where the socket's number begins, and the largest number of a session.
SOCKET_SHIFT = 24
MAX_SESSION = (1 << SOCKET_SHIFT) - 1
TAG_BYTES = 16
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES
#: Datagrams under one key: few enough for AES-GCM with 1,500 bytes each (RFC 9001, appendix B).
EPOCH_BITS = 28
#: Counters below the highest that may still come.
WINDOW = 4096

#: The first byte of a body.
RECORDS, SLICED, PROBED = 0, SLICE >> 24, 2
PROBE = struct.Struct(">IQQQH")
PROBE_BYTES = PROBE.size
PROBE_WORD = PROBED << 24
ANSWER, ALONE = 1, 2
MAX_TOKEN = (1 << 64) - 1

#: UDP payloads. Every path carries the first (RFC 8899, 5.1.2); the others are what common links take: Ethernet's jumbo
#: frames, Ethernet, PPPoE and tunnels of several kinds, over IPv4 and IPv6.
BASE_BYTES = 1200
PATH_BYTES = (8952, 1472, 1464, 1452, 1444, 1432, 1412, 1392, 1372, 1332, 1272, 1232)
#: The largest payload of UDP over IPv4, which one call of the kernel takes too, and how many datagrams of it.
MAX_BATCH_BYTES = 65_507
MAX_BATCH = 64

FIRST_LABEL = b"vpnd datagram key, version 1"
NEXT_LABEL = b"vpnd datagram key, next epoch"
