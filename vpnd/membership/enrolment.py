"""What a node and an authority say to each other: one request, one answer, on a stream whose peer ids are proven.

    request    Join     let me in, here is my token's secret         Renew    my membership, once more
               Leave    I go: end my membership
    answer     Welcome  the network and the statements to start with Refusal  no, and why; `removed`: you are out

A Welcome to a Join carries the charter (what there is room for), the node's own membership and where some members
are; everybody else it learns by gossip. Any member may refuse one that was removed, for it sends the proof.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from vpnd.membership import network
from vpnd.membership.refusal import REASONS, MembershipRefused, decode_untrusted
from vpnd.membership.statements import NetworkId, Wire
from vpnd.membership.token import SECRET_BYTES

MAX_REQUEST = 512
#: Room for the charter of a network with many authorities.
MAX_ANSWER = 1 << 18
#: What of it statements may take, their lengths and the rest of the answer aside.
MAX_STATEMENTS_BYTES = MAX_ANSWER * 9 // 10
MAX_REASON = 32
MAX_REFUSAL_TEXT = 256
#: Longest name a node may go by; it is made a label anyway.
MAX_WISHED_NAME = 255


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages. The version of them is that of the protocol they are spoken under."""


class Join(Message, frozen=True, tag=1):
    """`secret`: the token's. `name`: what the node calls itself."""

    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    name: Annotated[str, Meta(max_length=MAX_WISHED_NAME)] = ""

    def __repr__(self) -> str:  # the secret never reaches a log
        return f"Join(name={self.name!r})"


class Renew(Message, frozen=True, tag=2):
    """Renew the membership of the node that asks."""

    network: NetworkId


class Leave(Message, frozen=True, tag=5):
    """End the membership of the node that asks, so that its name and addresses are free."""

    network: NetworkId


Request = Join | Renew | Leave


class Welcome(Message, frozen=True, tag=3):
    """`network`: its description (`network.parse_untrusted`). `statements`: for the directory, in this order."""

    network: Annotated[bytes, Meta(max_length=network.MAX_BYTES)]
    statements: tuple[Wire, ...]


class Refusal(Message, frozen=True, tag=4):
    """`reason`: one of `refusal.REASONS`. `text`: for the user, untrusted as everything that came from elsewhere.

    `statements`: what proves it, of a removed member the removal and the grants it rests on.
    """

    reason: Annotated[str, Meta(max_length=MAX_REASON)]
    text: Annotated[str, Meta(max_length=MAX_REFUSAL_TEXT)] = ""
    statements: tuple[Wire, ...] = ()


Answer = TypeVar("Answer")

_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Welcome | Refusal] = msgspec.msgpack.Decoder(Welcome | Refusal)


def encode(message: Request | Welcome | Refusal) -> bytes:
    return msgspec.msgpack.encode(message)


def refusal(error: MembershipRefused, statements: Iterable[bytes] = ()) -> Refusal:
    """The answer that stands for an error, with what proves it."""
    return Refusal(reason=error.reason, text=str(error)[:MAX_REFUSAL_TEXT], statements=tuple(statements))


def parse_request_untrusted(data: bytes) -> Request:
    """A request. Raises MembershipRefused only."""
    return decode_untrusted(_requests, data, MAX_REQUEST, "a request", secret=True)


def parse_answer_untrusted(data: bytes) -> Welcome | Refusal:
    """An answer; see `decode_answer_untrusted`."""
    return decode_answer_untrusted(_answers, data)


def decode_answer_untrusted(decoder: msgspec.msgpack.Decoder[Answer], data: bytes) -> Answer:
    """An answer, to this or another question; the reason in a Refusal is a known one. Raises MembershipRefused only."""
    answer = decode_untrusted(decoder, data, MAX_ANSWER, "an answer")
    if isinstance(answer, Refusal) and answer.reason not in REASONS:
        raise MembershipRefused("malformed", "an answer refuses for a reason that is unknown here")
    return answer
