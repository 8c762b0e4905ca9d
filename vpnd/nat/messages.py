"""What members say to each other to meet at a relay: one msgpack array each, at most `MAX_MESSAGE` bytes.

    protocol          message   from, to          says
    ----------------  --------  ----------------  ---------------------------------------------------------------
    /vpnd/nat/1.0.0   Hello     hidden → relay    let me be called here; first on the stream, which stays open
                      Welcome   relay → hidden    where you are seen; whether you may stay
                      Call      relay → hidden    somebody wants to meet you: come with this token
                      Gone      hidden → relay    I am not coming
                      Hello     hidden → relay    what I said first has changed
    /vpnd/meet/1.0.0  Meet      member → relay    I am here for this token; first on a connection of its own, the leg
                      Met       relay → both      where the other is seen; if `relayed`, the leg is its from now on
                      Refused   relay → member    no meeting; the leg is closed
    /vpnd/reach/1.0.0 Reach     member → another  where do you see me, and can you dial me there at this port?
                      Here      back              over a connection to that port: yes
                      Seen      another → member  from where you come, and whether you could be dialed

A token is drawn by who calls. It is good once, for that caller, that callee, that relay, and for nat.meet_timeout.
After a relayed Met nobody says anything more on the leg's own Noise: the next byte is the other member's.

Arrays may have more fields than are known here, from a later version.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from vpnd import endpoint, peerid
from vpnd.config.multiaddrs import MAX_PORT
from vpnd.errors import RemoteProtocolError

NAT = "/vpnd/nat/1.0.0"
MEET = "/vpnd/meet/1.0.0"
REACH = "/vpnd/reach/1.0.0"

MAX_MESSAGE = 2048
TOKEN_BYTES = 16
MAX_CANDIDATES = 8
#: The longest endpoint: an IPv6 address in full, brackets, colon, port.
MAX_ENDPOINT = 47

#: What is wanted of a meeting: a relayed session and a direct one, only the direct one, or one question (`guests`) over
#: a relayed connection, which strangers may want, too, where the other takes guests.
BOTH, PUNCH, ASK = "both", "punch", "ask"
#: What a NAT makes of ports: the same outside as inside; another one, the same for every destination; another one for
#: each destination.
KEPT, MOVED, RANDOM, UNKNOWN = "kept", "moved", "random", "unknown"
NONE = "none"  # there is no NAT

#: Why a relay does not let two meet.
NOT_SERVING, NOT_HERE, FULL, TOO_OFTEN, ABSENT, NOT_MEMBER, NOT_YOURS = (
    "not_serving",  # relay.serve is off, or nobody can reach this node either
    "not_here",  # the callee keeps no stream to this relay
    "full",  # relay.max_sessions, or relay.max_sessions_per_member
    "too_often",  # relay.max_meets
    "absent",  # the callee did not come in time, or said that it would not
    "not_member",
    "not_yours",  # the token is somebody else's, or has been used
)
REFUSALS = (NOT_SERVING, NOT_HERE, FULL, TOO_OFTEN, ABSENT, NOT_MEMBER, NOT_YOURS)

Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
PeerId = Annotated[str, Meta(max_length=peerid.MAX_TEXT)]
Word = Annotated[str, Meta(max_length=32)]
Place = Annotated[str, Meta(max_length=MAX_ENDPOINT)]
Candidates = Annotated[tuple[Place, ...], Meta(max_length=MAX_CANDIDATES)]
Count = Annotated[int, Meta(ge=0, lt=1 << 48)]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages."""


class Hello(Message, frozen=True, tag=1):
    """`mapping`: what the NAT in front of the sender makes of ports, as far as it knows. `guests`: strangers may call
    it, for one question: it has invited some."""

    mapping: Word = UNKNOWN
    guests: bool = False


class Welcome(Message, frozen=True, tag=2):
    """`you`: where the stream's connection is seen to come from. `refused`: empty, or why the sender may not stay."""

    you: Place
    refused: Word = ""


class Call(Message, frozen=True, tag=3):
    """`caller` wants to meet. `mode`: BOTH, PUNCH or ASK."""

    token: Token
    caller: PeerId
    mode: Word = BOTH


class Gone(Message, frozen=True, tag=4):
    """The call with that token is not followed."""

    token: Token
    reason: Word = ""


class Meet(Message, frozen=True, tag=5):
    """`to`: the member to meet. `candidates`: where else the sender could be reached, endpoints. `birthday`: it would
    try many ports (vpnd.adapter.birthday)."""

    token: Token
    to: PeerId
    mode: Word = BOTH
    candidates: Candidates = ()
    mapping: Word = UNKNOWN
    birthday: bool = False


class Met(Message, frozen=True, tag=6):
    """`you`, `peer`: where the two legs are seen to come from. The rest is the other's Meet.

    `bytes_per_s`: what the relay lets through for these two in each direction; 0: no limit.
    """

    you: Place
    peer: Place
    candidates: Candidates = ()
    mapping: Word = UNKNOWN
    relayed: bool = False
    bytes_per_s: Count = 0
    birthday: bool = False


class Refused(Message, frozen=True, tag=7):
    """`reason`: one of REFUSALS."""

    reason: Word


class Reach(Message, frozen=True, tag=8):
    """`port` 0: only where the sender is seen."""

    nonce: Token
    port: Annotated[int, Meta(ge=0, le=MAX_PORT)] = 0


class Seen(Message, frozen=True, tag=9):
    """`you`: where the connection is seen to come from."""

    you: Place
    reached: bool = False


class Here(Message, frozen=True, tag=10):
    """`nonce`: of the Reach that is answered by coming; it is said back."""

    nonce: Token


Said = TypeVar("Said", bound=Message)
AnyMessage = Hello | Welcome | Call | Gone | Meet | Met | Refused | Reach | Seen | Here

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message)


def parse_untrusted(data: bytes, *expected: type[Said]) -> Said:
    """The message in `data`, one of the types `expected`. Raises RemoteProtocolError only."""
    if len(data) > MAX_MESSAGE:
        raise RemoteProtocolError(f"a message of a meeting has at most {MAX_MESSAGE} bytes")
    try:
        message = _decoder.decode(data)
        _check(message)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"a message of a meeting is malformed: {error}") from None
    if not isinstance(message, expected):
        raise RemoteProtocolError(f"{type(message).__name__} came where it has no place")
    return message


def _check(message: AnyMessage) -> None:
    """What types cannot say. Raises ValueError."""
    match message:
        case Welcome(you=you) | Seen(you=you):
            endpoint.parse(you)
        case Call(caller=peer_id, mode=mode) | Meet(to=peer_id, mode=mode):
            peerid.public_key_untrusted(peer_id)
            if mode not in (BOTH, PUNCH, ASK):
                raise ValueError(f"a meeting cannot be {mode!r}")
        case Met(you=you, peer=peer):
            endpoint.parse(you)
            endpoint.parse(peer)
    if isinstance(message, Meet | Met):
        for text in message.candidates:
            endpoint.parse(text)
