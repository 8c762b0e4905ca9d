"""Who owns a virtual address, according to an Ethereum contract: questions, answers and what is remembered of them.

The contract is an ERC-721 registry of addresses whose tokens are IPv4 addresses as numbers: 10.86.0.1 is token
0x0a560001. Its owner binds a peer id to it; vpnd reads

    function getPeer(uint256 tokenId) view returns (string)

with one eth_call (https://ethereum.org/developers/docs/apis/json-rpc/#eth_call). The string is empty for an
address without an owner. Whoever runs the endpoint can answer anything: it is trusted as far as its URL is.

No I/O and no clock in here: `vpnd.adapter.contract` does the asking.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

import msgspec

from vpnd import peerid
from vpnd.config.schema import Registry
from vpnd.errors import VpndError
from vpnd.printable import printable

#: The first four bytes of keccak256("getPeer(uint256)"): Solidity's function selector.
GET_PEER = "67ebb6b2"
#: The ABI pads everything to words of so many bytes
#: (https://docs.soliditylang.org/en/latest/abi-spec.html).
WORD = 32
#: Text of an endpoint is shown up to so many characters.
MAX_SHOWN = 200


class RegistryError(VpndError):
    """The contract gave no usable answer. Nothing is known of the address; ask again later."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one address.

    `peer_id` "" when nobody owns it. `confirmed_s`: when the contract said so. `stale`: its lifetime is over, and
    it stands only because look-ups fail.
    """

    peer_id: str
    confirmed_s: float
    stale: bool = False


class _Answer(msgspec.Struct):
    """A JSON-RPC 2.0 response. `result` of an eth_call: 0x and the returned bytes in hex."""

    jsonrpc: str
    id: int | None
    result: str | None = None
    error: _Error | None = None


class _Error(msgspec.Struct):
    code: int
    message: str


_decoder = msgspec.json.Decoder(_Answer)


def token_id(address: ipaddress.IPv4Address) -> int:
    """The token of an address. IPv6 addresses have none."""
    return int(address)


def request(contract_address: str, address: ipaddress.IPv4Address, serial: int) -> bytes:
    """The body of the POST that asks for the owner of `address`; `serial` comes back in the answer."""
    call = f"0x{GET_PEER}{token_id(address):0{2 * WORD}x}"
    return msgspec.json.encode(
        {
            "jsonrpc": "2.0",
            "id": serial,
            "method": "eth_call",
            "params": [{"to": contract_address, "data": call}, "latest"],
        }
    )


def parse_answer_untrusted(body: bytes, serial: int) -> str:
    """The owner's peer id from the body of the answer to `request(…, serial)`; "" when there is none.

    Raises RegistryError, which says what the endpoint did instead.
    """
    try:
        answer = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RegistryError("the endpoint's answer is not a JSON-RPC response to eth_call") from None
    if answer.error is not None:
        raise RegistryError(f"the endpoint refused: {_shown(answer.error.message)} ({answer.error.code})")
    if answer.id != serial or answer.jsonrpc != "2.0" or answer.result is None:
        raise RegistryError("the endpoint's answer is not one to the question")
    text = answer.result
    try:
        if not text.startswith("0x"):
            raise ValueError
        returned = bytes.fromhex(text[2:])
    except ValueError:
        raise RegistryError("the endpoint's result is not hex") from None
    if not returned:
        raise RegistryError("there is no contract with getPeer at registry.contract_address")
    return _peer_id_untrusted(_string_untrusted(returned))


def _string_untrusted(returned: bytes) -> str:
    """The one string a function returned: a word with the offset of (a word with its length, its bytes)."""
    offset = int.from_bytes(returned[:WORD], "big")
    start = offset + WORD
    if len(returned) < 2 * WORD or offset < WORD or start > len(returned):
        raise RegistryError("the contract did not return a string")
    length = int.from_bytes(returned[offset:start], "big")
    if length > len(returned) - start:
        raise RegistryError("the contract did not return a string")
    try:
        return returned[start : start + length].decode()
    except UnicodeDecodeError:
        raise RegistryError("the contract's peer id is not text") from None


def _peer_id_untrusted(text: str) -> str:
    if text:
        try:
            peerid.public_key_untrusted(text)
        except ValueError as error:
            raise RegistryError(f"the contract has {_shown(text)!r}, which {error}") from None
    return text


def _shown(text: str) -> str:
    return printable(text[:MAX_SHOWN])


class OwnerCache:
    """What the contract said and for how long it holds. Time is an argument, in seconds of one clock.

    A failed look-up does not forget an owner: until registry.stale_lifetime after it was confirmed it stands, so
    that an endpoint's outage is not the network's. Over registry.max_entries the address not asked for longest goes.
    Owner: control; not thread-safe.
    """

    def __init__(self, settings: Registry) -> None:
        self._settings = settings
        self._entries: OrderedDict[ipaddress.IPv4Address, Owner] = OrderedDict()
        self._failures: OrderedDict[ipaddress.IPv4Address, tuple[float, str]] = OrderedDict()

    def get(self, address: ipaddress.IPv4Address, now_s: float) -> Owner | None:
        """What is known; None: ask. Raises RegistryError when asking has just failed and nothing else is known."""
        entry = self._entries.get(address)
        if entry is not None:
            self._entries.move_to_end(address)
            if self._fresh(entry, now_s):
                return entry
        failed_s, reason = self._failures.get(address, (-float("inf"), ""))
        if now_s >= failed_s + self._settings.failure_lifetime:
            return None
        standing = self.standing(address, now_s)
        if standing is None:
            raise RegistryError(reason)
        return standing

    def standing(self, address: ipaddress.IPv4Address, now_s: float) -> Owner | None:
        """What is believed though look-ups fail; None when there is nothing, or it is too old."""
        entry = self._entries.get(address)
        if entry is None:
            return None
        if self._fresh(entry, now_s):
            return entry
        # that there is no owner is not worth keeping
        if entry.peer_id and now_s < entry.confirmed_s + self._settings.stale_lifetime:
            return msgspec.structs.replace(entry, stale=True)
        return None

    def confirmed(self, address: ipaddress.IPv4Address, peer_id: str, now_s: float) -> Owner:
        """The contract named an owner, or "" for nobody."""
        self._failures.pop(address, None)
        entry = self._entries[address] = Owner(peer_id=peer_id, confirmed_s=now_s)
        self._entries.move_to_end(address)
        if len(self._entries) > self._settings.max_entries:
            self._entries.popitem(last=False)
        return entry

    def failed(self, address: ipaddress.IPv4Address, reason: str, now_s: float) -> None:
        self._failures[address] = (now_s, reason)
        self._failures.move_to_end(address)
        if len(self._failures) > self._settings.max_entries:
            self._failures.popitem(last=False)

    def _fresh(self, entry: Owner, now_s: float) -> bool:
        lifetime = self._settings.positive_lifetime if entry.peer_id else self._settings.negative_lifetime
        return now_s < entry.confirmed_s + lifetime
