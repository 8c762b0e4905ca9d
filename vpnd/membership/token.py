"""The token that lets one machine into a network: one word to copy, nothing to look up.

    vpnd1 │ characters in groups of 20: 19 of data and one that checks the group

    offset  bytes  field of the data
    0       1      number of bytes that follow, so that a token cut short is known as such
    1       8      first half of the network id
    9       32     public key of the authority's node: its peer id
    41      16     the secret
    57      n      addresses of that node: kind (`_KINDS`); 4 or 16 bytes, or length and name; port, 2 bytes; and
                   members that relay for it: the same with `_RELAYS` added to the kind, and 32 bytes, the public key
    57+n    4      checksum: SHA-256 of the bytes before

The alphabet is Crockford's base32: no two characters look alike, capitals do not matter. The network id is cut because
it only tells networks apart: what is trusted is the authority's node, and its key is here whole.

A token is as good as the secret in it: whoever has it can join until it is used or has expired.
"""

from __future__ import annotations

import hashlib
import ipaddress

import msgspec

from vpnd import peerid
from vpnd.config import multiaddrs
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import NETWORK_ID_BYTES, check_multiaddr
from vpnd.nat.paths import RelayAt

PREFIX = "vpnd1"
SECRET_BYTES = 16
HINT_BYTES = NETWORK_ID_BYTES // 2
CHECKSUM_BYTES = 4
#: More would make the token long; one that can be reached is enough.
MAX_ADDRESSES, MAX_RELAYS = 4, 2
MAX_DATA = 255
#: What a terminal may hand over in one paste, white space included.
MAX_TEXT = 1024

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUES = {character: value for value, character in enumerate(_ALPHABET)} | {"o": 0, "i": 1, "l": 1}
_GROUP = 19
_FIXED = HINT_BYTES + peerid.PUBLIC_KEY_BYTES + SECRET_BYTES
_KINDS = {1: "ip4", 2: "ip6", 3: "dns", 4: "dns4", 5: "dns6"}
_RELAYS = 16
_KIND_NUMBERS = {kind: number for number, kind in _KINDS.items()}


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What a token says.

    `network`: 8 bytes, how the network's id begins. `peer_id`, `addresses`: whom to ask, and where. `relays`: where it
    is called as well.
    """

    network: bytes
    peer_id: str
    addresses: tuple[str, ...]
    secret: bytes
    relays: tuple[RelayAt, ...] = ()

    def __repr__(self) -> str:  # the secret never reaches a log
        return f"Token(network={self.network.hex()}, peer_id={self.peer_id!r})"

    def is_for(self, network_id: bytes) -> bool:
        return network_id.startswith(self.network)


def encode(token: Token) -> str:
    """The token as text. What is beyond `MAX_ADDRESSES` and `MAX_RELAYS`, or no longer fits, is left out, the last ones
    first."""
    body = token.network + peerid.public_key_untrusted(token.peer_id) + token.secret
    places = [_pack(text) for text in token.addresses[:MAX_ADDRESSES]]
    places += [_pack_relay(relay) for relay in token.relays[:MAX_RELAYS]]
    for packed in places:
        if len(body) + len(packed) + CHECKSUM_BYTES <= MAX_DATA:
            body += packed
    data = bytes([len(body) + CHECKSUM_BYTES]) + body
    return _text_of(data + hashlib.sha256(data).digest()[:CHECKSUM_BYTES])


def parse_untrusted(text: str) -> Token:
    """The token a user typed or pasted; white space and capitals do not matter. Raises MembershipRefused only.

    The error of a mistyped one says about where, as far as that can be known; it never repeats the token.
    """
    if len(text) > MAX_TEXT:
        raise _mistyped("is too long for a token")
    word = "".join(text.split()).lower()
    if not word.startswith(PREFIX):
        raise _mistyped(f"is not a token: those start with {PREFIX}")
    typed = word[len(PREFIX) :]
    for place, character in enumerate(typed):
        if character not in _VALUES:
            raise _mistyped(f"has a character no token has, {character!r}, at {len(PREFIX) + place + 1}")
    plain = ""
    for place, start in enumerate(range(0, len(typed), _GROUP + 1)):
        group = "".join(map(_canonical, typed[start : start + _GROUP + 1]))
        if len(group) == _GROUP + 1 and _check_character(place, group[:-1]) != group[-1]:
            first = len(PREFIX) + start + 1
            raise _mistyped(f"has a typing error between characters {first} and {first + _GROUP}")
        plain += group[:-1]
    data = _bytes_of(plain)
    found = _parse_data(data, len(word))
    if (
        "".join(map(_canonical, typed)) != _text_of(data)[len(PREFIX) :]
    ):  # its last check character, or padding
        raise _mistyped("has a typing error at its end")
    return found


def _parse_data(data: bytes, characters: int) -> Token:
    length = data[0] if data else 0
    if length < _FIXED + CHECKSUM_BYTES:
        raise _mistyped("is cut short" if not data else "has a typing error at its start")
    if len(data) < 1 + length:
        raise _mistyped(f"is cut short: {characters} characters are not all of it")
    if len(data) > 1 + length:
        raise _mistyped("has too many characters at its end")
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest()[:CHECKSUM_BYTES] != checksum:
        raise _mistyped("has a typing error")
    network, key, secret, rest = _cut(body[1:], HINT_BYTES, peerid.PUBLIC_KEY_BYTES, SECRET_BYTES)
    addresses, relays = [], []
    try:
        while rest:
            relayed = rest[0] > _RELAYS
            text, rest = _unpack(bytes([rest[0] - _RELAYS * relayed]) + rest[1:])
            check_multiaddr(text)
            if relayed:
                public, rest = _cut(rest, peerid.PUBLIC_KEY_BYTES)
                relays.append(RelayAt(text, peerid.from_public_key(public)))
            else:
                addresses.append(text)
    except (ValueError, IndexError, KeyError):
        raise MembershipRefused("malformed", "the token holds an address that cannot be dialed") from None
    return Token(
        network=network,
        peer_id=peerid.from_public_key(key),
        addresses=tuple(addresses),
        secret=secret,
        relays=tuple(relays),
    )


def secret_hash(secret: bytes) -> bytes:
    """What an authority keeps of a secret. It is 128 random bits, so a plain hash cannot be undone."""
    return hashlib.sha256(b"vpnd invitation 1\0" + secret).digest()


def _mistyped(text: str) -> MembershipRefused:
    return MembershipRefused("mistyped", f"the token {text}; copy it again, whole")


def _text_of(data: bytes) -> str:
    bits = int.from_bytes(data) << (-len(data) * 8 % 5)
    count = -(-len(data) * 8 // 5)
    plain = "".join(_ALPHABET[bits >> 5 * (count - 1 - place) & 31] for place in range(count))
    groups = [plain[start : start + _GROUP] for start in range(0, count, _GROUP)]
    return PREFIX + "".join(group + _check_character(place, group) for place, group in enumerate(groups))


def _canonical(character: str) -> str:
    return _ALPHABET[_VALUES[character]]


def _check_character(place: int, group: str) -> str:
    return _ALPHABET[hashlib.sha256(f"{place} {group}".encode()).digest()[0] & 31]


def _bytes_of(plain: str) -> bytes:
    """The whole bytes in base32 characters; bits that fill no byte are padding."""
    bits = 0
    for character in plain:
        bits = bits << 5 | _VALUES[character]
    spare = len(plain) * 5 % 8
    return (bits >> spare).to_bytes(len(plain) * 5 // 8)


def _cut(data: bytes, *lengths: int) -> tuple[bytes, ...]:
    """Pieces of these lengths, and the rest."""
    pieces = []
    for length in lengths:
        pieces.append(data[:length])
        data = data[length:]
    return (*pieces, data)


def _pack(multiaddr: str) -> bytes:
    endpoint = multiaddrs.parse(multiaddr)
    if endpoint.kind in ("ip4", "ip6"):
        host = ipaddress.ip_address(endpoint.host).packed
    else:
        host = bytes([len(endpoint.host)]) + endpoint.host.encode()
    return bytes([_KIND_NUMBERS[endpoint.kind]]) + host + endpoint.port.to_bytes(2)


def _pack_relay(relay: RelayAt) -> bytes:
    packed = _pack(relay.address)
    return bytes([packed[0] + _RELAYS]) + packed[1:] + peerid.public_key_untrusted(relay.peer_id)


def _unpack(data: bytes) -> tuple[str, bytes]:
    """One multiaddr, and what is behind it. Raises KeyError, IndexError or ValueError."""
    kind = _KINDS[data[0]]
    start, length = (1, 4 if kind == "ip4" else 16) if kind in ("ip4", "ip6") else (2, data[1])
    host, port = data[start : start + length], data[start + length : start + length + 2]
    if len(host) != length or len(port) != 2:
        raise ValueError("cut short")
    name = str(ipaddress.ip_address(host)) if kind in ("ip4", "ip6") else host.decode("ascii")
    return f"/{kind}/{name}/tcp/{int.from_bytes(port)}", data[start + length + 2 :]
