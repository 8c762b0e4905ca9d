"""The signed statements a network consists of, and their bytes.

    offset  bytes  field
    0       1      version, 1
    1       1      kind (`Kind`)
    2       64     ed25519 signature (RFC 8032) over the kind's domain and the body
    66      n      body: a msgpack array of the fields of the kind's Struct, in their order

A statement has at most `MAX_STATEMENT` bytes. The signature covers the very bytes that are kept and passed on;
nothing is ever encoded again to be verified. The domain ("vpnd membership 1" and a zero byte, say) keeps a signature
over one kind from being one over another, or over anything else the key signs.

Times are milliseconds since 1970, UTC. Whether a statement has any effect is judged by `directory`; here it is read,
and its signature verified.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import re
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from vpnd import peerid
from vpnd.config import multiaddrs
from vpnd.membership.refusal import MembershipRefused

#: RFC 1035 section 2.3.4.
MAX_LABEL = 63
#: RFC 1123 section 2.1 (a digit may come first), in lower case: DNS does not tell cases apart, so only one is stored.
LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"

_label = re.compile(LABEL_PATTERN, re.ASCII)
_other = re.compile(r"[^a-z0-9]+", re.ASCII)


def is_label(text: str) -> bool:
    """Whether `text` can be a name as it stands."""
    return _label.match(text) is not None


def to_label(text: str, fallback: str = "node") -> str:
    """The name nearest to what a person or a machine calls itself: "Ann's Laptop" is "ann-s-laptop"."""
    return _other.sub("-", text.lower())[:MAX_LABEL].strip("-") or fallback


def numbered(label: str, number: int) -> str:
    """`label` made different from its like: "laptop-2"; within the length of a label."""
    tail = f"-{number}"
    return label[: MAX_LABEL - len(tail)].rstrip("-") + tail


VERSION = 1
MAX_STATEMENT = 1024
SIGNATURE_BYTES = 64
HEADER_BYTES = 2 + SIGNATURE_BYTES
NETWORK_ID_BYTES = 16
KEY_BYTES = 32
DIGEST_BYTES = 16
#: Enough to tell the slots of some ten thousand statements apart; who could collide them could sign them as well.
SLOT_BYTES = 8
MAX_ADDRESSES = 4
MAX_ROUTES = 32
MAX_GROUPS = 16
MAX_MULTIADDRS = 8
MAX_RELAYS = 3
#: Until the year 6429; far from where times and their sums would leave 64 bits.
MAX_TIME_MS = 1 << 47
#: The longest a membership may be valid, so that nothing an authority signed holds for ever.
MAX_LIFETIME_MS = 400 * 24 * 3600 * 1000


class Kind(enum.IntEnum):
    """What a statement is about. In ascending order, each rests on those before it only."""

    GRANT = 1
    REVOKE = 2
    REMOVAL = 3
    MEMBERSHIP = 4
    PRESENCE = 5


NetworkId = Annotated[bytes, Meta(min_length=NETWORK_ID_BYTES, max_length=NETWORK_ID_BYTES)]
#: The bytes of a statement, where a message carries one.
Wire = Annotated[bytes, Meta(max_length=MAX_STATEMENT)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
PeerId = Annotated[str, Meta(max_length=peerid.MAX_TEXT)]
Label = Annotated[str, Meta(pattern=LABEL_PATTERN)]
Time = Annotated[int, Meta(ge=0, lt=MAX_TIME_MS)]
#: Orders what one signer says in the same millisecond.
Serial = Annotated[int, Meta(ge=0, lt=1 << 32)]
Text = Annotated[str, Meta(max_length=MAX_STATEMENT)]


class Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all bodies. `network`, the first field of each, is the id of the network it belongs to."""

    network: NetworkId


class Grant(Body, frozen=True):
    """`key` is an authority as well, and node `peer_id` holds it.

    `granted_ms`: since when; stays the same when the statement is issued again, and makes seniority.
    """

    signer: Key
    key: Key
    peer_id: PeerId
    granted_ms: Time
    issued_ms: Time
    serial: Serial = 0


class Revoke(Body, frozen=True):
    """`key` is no authority: what it signed at or after `since_ms` is void, for ever; 0 voids everything."""

    signer: Key
    key: Key
    since_ms: Time
    issued_ms: Time
    serial: Serial = 0


#: Serial of a removal that its subject asked for.
AT_ITS_WORD = 1


class Removal(Body, frozen=True):
    """`peer_id` is out: every membership of it with `enrolled_ms` up to `issued_ms` is void, renewed ones too.

    `serial`: AT_ITS_WORD when it left by itself.
    """

    signer: Key
    peer_id: PeerId
    issued_ms: Time
    serial: Serial = 0


class Membership(Body, frozen=True):
    """`peer_id` is a member until `expires_ms`.

    `addresses`: its own inside the VPN, IPv4 and IPv6. `routes`: networks it may announce. `enrolled_ms`: when it was
    let in; a renewal keeps it, so that a removal also holds against a renewal by an authority that has not heard
    of it, and the older of two claims on an address is known.
    """

    signer: Key
    peer_id: PeerId
    name: Label
    addresses: Annotated[tuple[Text, ...], Meta(max_length=MAX_ADDRESSES)]
    routes: Annotated[tuple[Text, ...], Meta(max_length=MAX_ROUTES)]
    groups: Annotated[tuple[Label, ...], Meta(max_length=MAX_GROUPS)]
    enrolled_ms: Time
    issued_ms: Time
    expires_ms: Time
    serial: Serial = 0


class Presence(Body, frozen=True, forbid_unknown_fields=False):
    """Where `peer_id` can be dialed, by its own word: signed by the key in the peer id.

    `routes`: networks behind it that it announces; its membership has to permit them. `relays`: peer ids of members
    that can call it, where it cannot be dialed. A later version may say more of itself: fields behind these are kept
    with the signed bytes, and not read.
    """

    peer_id: PeerId
    addresses: Annotated[tuple[Text, ...], Meta(max_length=MAX_MULTIADDRS)]
    sequence_ms: Time
    routes: Annotated[tuple[Text, ...], Meta(max_length=MAX_ROUTES)] = ()
    relays: Annotated[tuple[PeerId, ...], Meta(max_length=MAX_RELAYS)] = ()


AnyBody = Grant | Revoke | Removal | Membership | Presence

_BODIES: dict[int, type[AnyBody]] = {
    Kind.GRANT: Grant,
    Kind.REVOKE: Revoke,
    Kind.REMOVAL: Removal,
    Kind.MEMBERSHIP: Membership,
    Kind.PRESENCE: Presence,
}
_KINDS = {body: Kind(kind) for kind, body in _BODIES.items()}
_DOMAINS = {kind: f"vpnd {kind.name.lower()} {VERSION}\0".encode() for kind in Kind}
_DECODERS = {kind: msgspec.msgpack.Decoder(body) for kind, body in _BODIES.items()}
_encoder = msgspec.msgpack.Encoder()


class Statement(msgspec.Struct, frozen=True):
    """A statement whose signature is good. `wire`: its bytes. `digest`: names this version of it among all statements.

    `slot`: what it says something about and who says it; of the statements in one slot the newest counts.
    """

    kind: Kind
    body: AnyBody
    wire: bytes
    digest: bytes
    slot: bytes

    @property
    def signer(self) -> bytes:
        """The public key it is signed with, 32 bytes."""
        return signer_of(self.body)

    @property
    def issued_ms(self) -> int:
        """When it was signed, by the signer's clock."""
        return signed_ms(self.body)

    @property
    def rank(self) -> tuple[int | bytes, ...]:
        """Grows from older to newer within a slot; never equal for two different statements."""
        body = self.body
        if isinstance(body, Membership):
            return (body.enrolled_ms, body.issued_ms, body.serial, self.digest)
        if isinstance(body, Revoke):  # the one that voids more
            return (-body.since_ms, body.issued_ms, body.serial, self.digest)
        if isinstance(body, Presence):
            return (body.sequence_ms, self.digest)
        return (body.issued_ms, body.serial, self.digest)


def signer_of(body: AnyBody) -> bytes:
    """The key that has to sign a body."""
    return peerid.public_key_untrusted(body.peer_id) if isinstance(body, Presence) else body.signer


def signed_ms(body: AnyBody) -> int:
    """When a body was signed, by the signer's clock."""
    return body.sequence_ms if isinstance(body, Presence) else body.issued_ms


def sign(key: Ed25519PrivateKey, body: AnyBody) -> Statement:
    """The statement of `body`.

    Raises MembershipRefused when the key is not its signer's, or it is malformed or too long.
    """
    kind = _KINDS[type(body)]
    fields = msgspec.structs.astuple(body)
    if isinstance(body, Presence) and not body.relays:
        fields = fields[:-1]  # versions that do not know the field take it for hostile
    data = _encoder.encode(fields)
    head = bytes([VERSION, kind])
    return parse_untrusted(head + key.sign(_DOMAINS[kind] + data) + data)


def parse_untrusted(wire: bytes) -> Statement:
    """The statement in `wire`, its signature verified (a quarter of a millisecond, with all that is checked). Raises
    MembershipRefused only."""
    return _parse(wire, verify=True)


def parse_verified(wire: bytes) -> Statement:
    """As parse_untrusted, of bytes this program has got through that before, and nobody has changed since: it is not
    done again."""
    return _parse(wire, verify=False)


def _parse(wire: bytes, *, verify: bool) -> Statement:
    if len(wire) > MAX_STATEMENT:
        raise MembershipRefused("too_long", f"a statement has at most {MAX_STATEMENT} bytes")
    if len(wire) <= HEADER_BYTES:
        raise MembershipRefused("malformed", "a statement is cut short")
    if wire[0] != VERSION:
        raise MembershipRefused("unknown_version", f"a statement is of version {wire[0]}")
    if wire[1] not in _BODIES:
        raise MembershipRefused("malformed", f"there is no statement of kind {wire[1]}")
    kind, data = Kind(wire[1]), wire[HEADER_BYTES:]
    try:
        body = _DECODERS[kind].decode(data)
        if verify:
            _check(body)
            key = Ed25519PublicKey.from_public_bytes(signer_of(body))
            key.verify(wire[2:HEADER_BYTES], _DOMAINS[kind] + data)
    except InvalidSignature:
        raise MembershipRefused("forged", "the signature is not that of its signer") from None
    except (msgspec.MsgspecError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise MembershipRefused("malformed", f"a {kind.name.lower()} is malformed: {error}") from None
    return Statement(kind, body, wire, digest_of(wire), _slot(kind, body))


def digest_of(wire: bytes) -> bytes:
    return hashlib.sha256(wire).digest()[:DIGEST_BYTES]


def _slot(kind: Kind, body: AnyBody) -> bytes:
    subject = body.key if isinstance(body, Grant | Revoke) else body.peer_id.encode()
    signer = b"" if isinstance(body, Presence) else body.signer
    return hashlib.sha256(bytes([kind]) + signer + subject).digest()[:SLOT_BYTES]


def _check(body: AnyBody) -> None:
    """What types cannot say. Raises ValueError."""
    if not isinstance(body, Revoke):
        peerid.public_key_untrusted(body.peer_id)
    if isinstance(body, Membership):
        _check_membership(body)
    elif isinstance(body, Grant):
        if body.granted_ms > body.issued_ms:
            raise ValueError("it grants from a time after its issue")
    elif isinstance(body, Presence):
        for text in body.addresses:
            check_multiaddr(text)
        _check_routes(body.routes)
        for relay in body.relays:
            peerid.public_key_untrusted(relay)


def _check_membership(body: Membership) -> None:
    if not body.enrolled_ms <= body.issued_ms < body.expires_ms <= body.issued_ms + MAX_LIFETIME_MS:
        raise ValueError("enrolment, issue and expiry are not in order, or too far apart")
    for values in (body.addresses, body.routes, body.groups):
        if len(set(values)) != len(values):
            raise ValueError("it names something twice")
    if not body.addresses:
        raise ValueError("it has no address")
    for text in body.addresses:
        address = ipaddress.ip_address(text)
        if str(address) != text or "%" in text or address.is_multicast or address.is_unspecified:
            raise ValueError(f"{text} is no member's address")
        if address.is_loopback or address.is_link_local:
            raise ValueError(f"{text} means something else on every machine")
    _check_routes(body.routes)


def _check_routes(routes: tuple[str, ...]) -> None:
    for text in routes:
        if str(ipaddress.ip_network(text)) != text or "%" in text:
            raise ValueError(f"{text} is not written as networks are")


def check_multiaddr(text: str) -> None:
    """Raises ValueError unless others can dial `text`: a TCP endpoint in its usual spelling, without /p2p."""
    endpoint = multiaddrs.parse(text)
    if str(endpoint) != text or endpoint.peer_id or not endpoint.port:
        raise ValueError(f"{text} is not an address to dial")
    if endpoint.kind in ("ip4", "ip6") and ipaddress.ip_address(endpoint.host).is_unspecified:
        raise ValueError(f"{text} is not an address to dial")
