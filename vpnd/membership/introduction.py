"""What a member says to one that has not heard of it yet, on a connection whose peer ids are proven: one request, one
answer.

    request    Introduction   the statements that make me a member: grants from the root key down to the authority that
                              signed my membership, the membership, and where I am
    answer     Admitted       you are a member here, too     Refusal (`enrolment`)   you are not, and why

The statements are of the kind that gossip brings, and are judged like those; whose connection brought them counts for
nothing. The answer has no secret in it, only to a removed member the proof that it was removed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from vpnd.membership.directory import Directory
from vpnd.membership.enrolment import Message, Refusal, decode_answer_untrusted
from vpnd.membership.refusal import decode_untrusted
from vpnd.membership.statements import MAX_STATEMENT, NetworkId, Wire

#: Of a chain of authority longer than this, those nearest to the root are left out: they are the best known.
MAX_GRANTS = 16
#: Beside them the membership and the presence.
MAX_STATEMENTS = MAX_GRANTS + 2
#: What a request has besides its statements: tags, lengths, the network.
_OVERHEAD = 128
MAX_REQUEST = MAX_STATEMENTS * MAX_STATEMENT + _OVERHEAD

Statements = Annotated[tuple[Wire, ...], Meta(max_length=MAX_STATEMENTS)]


class Introduction(Message, frozen=True, tag=1):
    """The node that sends this is a member of `network`, as these statements show."""

    network: NetworkId
    statements: Statements


class Admitted(Message, frozen=True, tag=2):
    """The node that introduced itself is a member here."""


class Acquainted(Message, frozen=True, tag=3):
    """The same, and these statements show that the node that answers is one too."""

    statements: Statements


_requests = msgspec.msgpack.Decoder(Introduction)
Answer = Admitted | Acquainted | Refusal
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Introduction | Answer) -> bytes:
    return msgspec.msgpack.encode(message)


def of_member(directory: Directory, peer_id: str) -> Introduction | None:
    """What introduces a member to anybody of its network; None for whom `directory` knows no membership of."""
    membership = directory.membership(peer_id)
    if membership is None:
        return None
    statements = [*directory.vouching(membership.signer)[-MAX_GRANTS:], membership]
    if (presence := directory.presence(peer_id)) is not None:
        statements.append(presence)
    return Introduction(directory.network.id, tuple(statement.wire for statement in statements))


def parse_request_untrusted(data: bytes) -> Introduction:
    """A request. Raises MembershipRefused only."""
    return decode_untrusted(_requests, data, MAX_REQUEST, "an introduction")


def parse_answer_untrusted(data: bytes) -> Answer:
    """An answer; see `enrolment.decode_answer_untrusted`."""
    return decode_answer_untrusted(_answers, data)
