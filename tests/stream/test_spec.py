"""The numbers of the wire, pinned; and what the engine may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from shards.stream import spec
from vpnd.config.schema import Session as Settings
from vpnd.packet.record import MAX_RECORD_BYTES

STREAM = Path(spec.__file__).parent

PINNED = {
    # Noise revision 34; libp2p noise framing
    "TAG_BYTES": 16,
    "MESSAGE_LENGTH_BYTES": 2,
    "MAX_MESSAGE_BYTES": 65535,
    "MAX_PLAINTEXT_BYTES": 65519,
    "MAX_WIRE_BYTES": 65537,
    "NONCE_LIMIT": 18446744073709551615,
    # Yamux
    "HEADER_BYTES": 12,
    "VERSION": 0,
    "TYPE_DATA": 0,
    "TYPE_WINDOW_UPDATE": 1,
    "TYPE_PING": 2,
    "TYPE_GO_AWAY": 3,
    "FLAG_SYN": 1,
    "FLAG_ACK": 2,
    "FLAG_FIN": 4,
    "FLAG_RST": 8,
    "SESSION_ID": 0,
    "FIRST_ID_INITIATOR": 1,
    "FIRST_ID_ACCEPTOR": 2,
    "ID_STEP": 2,
    "MAX_ID": 4294967295,
    "MAX_PING_VALUE": 4294967295,
    "INITIAL_WINDOW_BYTES": 262144,
    "MAX_WINDOW_BYTES": 4294967295,
    "GO_AWAY_NORMAL": 0,
    "GO_AWAY_PROTOCOL_ERROR": 1,
    "GO_AWAY_INTERNAL_ERROR": 2,
    "MAX_FRAME_PAYLOAD_BYTES": 65507,
    "DATA_OVERHEAD_BYTES": 30,
    "PLAIN_DATA": 0,
    # opening a stream
    "MULTISTREAM_ID": b"/multistream/1.0.0",
    "PACKET_PROTOCOL_ID": b"/vpnd/packet/1.0.0",
    "SUBNET_NODE_PROTOCOL_ID": b"/vpn/1.0.0",
    "SUBNET_NODE_MTU": 1400,
    "NOT_AVAILABLE": b"na",
    "LINE_END": b"\n",
    "MAX_LINE_BYTES": 1024,
    "MAX_VARINT_BYTES": 2,
    "HELLO_VERSION": 1,
    "MAX_HELLO_BYTES": 256,
    "MIN_MTU": 68,
    "MAX_MTU": 65535,
    "MAX_PORT": 65535,
}


@pytest.mark.parametrize("name", PINNED)
def test_a_number_of_the_wire_is_what_the_specification_says(name: str) -> None:
    assert getattr(spec, name) == PINNED[name]


def test_every_number_is_pinned() -> None:
    public = {name for name in vars(spec) if name.isupper()}
    layouts = {"MESSAGE_LENGTH", "NONCES", "HEADER", "HEADER_WORDS"}
    assert public - layouts == set(PINNED)


def test_layouts() -> None:
    assert spec.MESSAGE_LENGTH.pack(0x0102) == b"\x01\x02"
    assert spec.NONCES["chachapoly"].pack(1) == b"\0\0\0\0\x01\0\0\0\0\0\0\0"
    assert spec.NONCES["aesgcm"].pack(1) == b"\0\0\0\0\0\0\0\0\0\0\0\x01"
    assert spec.HEADER.pack(0, 1, 2, 3, 4) == b"\0\x01\0\x02\0\0\0\x03\0\0\0\x04"
    assert spec.HEADER_WORDS.pack(0x00010002, 3, 4) == spec.HEADER.pack(0, 1, 2, 3, 4)
    assert spec.MESSAGE_LENGTH.size == spec.MESSAGE_LENGTH_BYTES
    assert spec.HEADER.size == spec.HEADER_WORDS.size == spec.HEADER_BYTES


def test_settings_leave_room_for_what_must_fit() -> None:
    """With every setting at its least: a message, a whole record in half a window and in a send buffer."""

    limits = Settings.settings
    least_window = limits["window_bytes"].least
    assert least_window is not None
    assert least_window >= spec.INITIAL_WINDOW_BYTES
    assert least_window // 2 >= MAX_RECORD_BYTES
    assert limits["receive_buffer_bytes"].least >= spec.MAX_WIRE_BYTES
    # A superpacket's record takes two messages; a buffer that could never hold it would stop its stream for good.
    room = limits["send_buffer_bytes"].least - limits["control_reserve_bytes"].most
    assert room >= MAX_RECORD_BYTES + 2 * spec.DATA_OVERHEAD_BYTES


BANNED = {"asyncio", "socket", "time", "os", "logging", "trio", "libp2p", "selectors", "threading", "random"}


ENGINE = ("spec", "noise", "yamux", "negotiate", "events", "table", "session")


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_knows_no_io_and_no_clock(name: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((STREAM / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert not imported & BANNED
