"""Every number of the session's wire, apart from our choices, which are settings (`[session]`).

A session, outermost first:

    Noise transport message   length u16 big-endian | ciphertext | tag 16
    └ Yamux frames            version u8 | type u8 | flags u16 | stream id u32 | length u32 [| payload]
      └ stream                multistream-select lines, HELLO, then records, opaque here

Sources: Noise revision 34, sections 3, 5.1, 12.3 (https://noiseprotocol.org/noise.html) with the framing of
libp2p (https://github.com/libp2p/specs/tree/master/noise); Yamux
(https://github.com/hashicorp/yamux/blob/master/spec.md); multistream-select 1.0.0
(https://github.com/multiformats/multistream-select); unsigned varints
(https://github.com/multiformats/unsigned-varint).
"""

from __future__ import annotations

import struct

from vpnd import session

# --- Noise transport messages

TAG_BYTES = 16
#: Length in front of a message, not counting itself; the ciphertext includes the tag.
MESSAGE_LENGTH = struct.Struct(">H")
MESSAGE_LENGTH_BYTES = 2
MAX_MESSAGE_BYTES = 65_535
MAX_PLAINTEXT_BYTES = MAX_MESSAGE_BYTES - TAG_BYTES
#: A message with its length, as it lies in a socket's buffer.
MAX_WIRE_BYTES = MESSAGE_LENGTH_BYTES + MAX_MESSAGE_BYTES
#: Nonces: four zero bytes, then the counter: little-endian for ChaCha20-Poly1305 (Noise 12.3), big-endian for
#: AES-256-GCM (Noise 12.4). Both have 32 bytes of key and 16 of tag.
NONCES = {session.CHACHAPOLY: struct.Struct("<4xQ"), session.AESGCM: struct.Struct(">4xQ")}
#: 2^64-1 is reserved (Noise 5.1): a message is never sealed or opened under it.
NONCE_LIMIT = 2**64 - 1

# --- Yamux

#: version u8, type u8, flags u16, stream id u32, length u32.
HEADER = struct.Struct(">BBHII")
#: The same twelve bytes with version, type and flags as one word, which is 0 for plain data.
HEADER_WORDS = struct.Struct(">III")
HEADER_BYTES = 12
PLAIN_DATA = 0

VERSION = 0

TYPE_DATA = 0
TYPE_WINDOW_UPDATE = 1
TYPE_PING = 2
TYPE_GO_AWAY = 3

FLAG_SYN = 1
FLAG_ACK = 2
FLAG_FIN = 4
FLAG_RST = 8

SESSION_ID = 0
FIRST_ID_INITIATOR = 1
FIRST_ID_ACCEPTOR = 2
ID_STEP = 2
MAX_ID = 2**32 - 1

#: What both sides may send on a new stream before any window update.
INITIAL_WINDOW_BYTES = 256 * 1024
#: A window is a u32 in every implementation; more is an overflow there.
MAX_WINDOW_BYTES = 2**32 - 1
MAX_PING_VALUE = 2**32 - 1

GO_AWAY_NORMAL = 0
GO_AWAY_PROTOCOL_ERROR = 1
GO_AWAY_INTERNAL_ERROR = 2

#: Payload of a data frame that fills one Noise message, and what such a message adds around a payload.
MAX_FRAME_PAYLOAD_BYTES = MAX_PLAINTEXT_BYTES - HEADER_BYTES
DATA_OVERHEAD_BYTES = MESSAGE_LENGTH_BYTES + HEADER_BYTES + TAG_BYTES

# --- opening a stream

MULTISTREAM_ID = b"/multistream/1.0.0"
PACKET_PROTOCOL_ID = b"/vpnd/packet/1.0.0"
#: Of the subnet node, whose streams carry bare packets without a HELLO, up to the MTU it is always set to.
SUBNET_NODE_PROTOCOL_ID = b"/vpn/1.0.0"
SUBNET_NODE_MTU = 1400
NOT_AVAILABLE = b"na"
LINE_END = b"\n"
#: Longest line taken from a peer, its end included. Protocol ids are far shorter; go's limit is the same.
MAX_LINE_BYTES = 1024
#: Lines and HELLO are shorter than 2^14, so their length never takes a third byte.
MAX_VARINT_BYTES = 2

#: HELLO: varint length | msgpack map {version, offloads, max_record, mtu}, and {receiver, port, outside} where
#: datagrams are taken; other keys are ignored, so a later version may add some. A
#: version is at least 1; two nodes speak the lower of theirs.
HELLO_VERSION = 1
MAX_HELLO_BYTES = 256
#: Smallest MTU of IPv4 (RFC 791, section 3.1); the largest datagram of it.
MIN_MTU = 68
MAX_MTU = 65_535
#: Of UDP.
MAX_PORT = 65_535
