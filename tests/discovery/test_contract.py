"""Owners of addresses by contract: the bytes of question and answer, and how long an answer is believed."""

from __future__ import annotations

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vpnd import peerid
from vpnd.config.load import from_mapping
from vpnd.config.schema import Registry
from vpnd.discovery.contract import (
    GET_PEER,
    OwnerCache,
    RegistryError,
    parse_answer_untrusted,
    request,
    token_id,
)
from vpnd.errors import ConfigError

CONTRACT = "0x" + "ab" * 20
PEERS = [peerid.from_public_key(bytes([number]) * 32) for number in range(4)]
A, B = ipaddress.IPv4Address("10.86.0.1"), ipaddress.IPv4Address("10.86.0.2")


def abi_string(data: bytes) -> bytes:
    """What a Solidity function returning one string gives back."""
    padded = data + bytes(-len(data) % 32)
    return (32).to_bytes(32, "big") + len(data).to_bytes(32, "big") + padded


def answer(returned: bytes, serial: int = 1) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": serial, "result": "0x" + returned.hex()}).encode()


def test_the_selector_is_the_hash_of_the_signature() -> None:
    keccak = pytest.importorskip("Crypto.Hash.keccak", reason="pycryptodome is not there")
    assert keccak.new(digest_bits=256, data=b"getPeer(uint256)").hexdigest()[:8] == GET_PEER


def test_a_question_is_the_call_of_the_address_as_a_number() -> None:
    assert token_id(A) == 0x0A560001
    assert json.loads(request(CONTRACT, A, 7)) == {
        "jsonrpc": "2.0",
        "id": 7,
        "method": "eth_call",
        "params": [{"to": CONTRACT, "data": "0x67ebb6b2" + "0" * 56 + "0a560001"}, "latest"],
    }


@pytest.mark.parametrize("peer_id", ["", PEERS[0], PEERS[3]])
def test_an_answer_is_the_owner(peer_id: str) -> None:
    assert parse_answer_untrusted(answer(abi_string(peer_id.encode())), 1) == peer_id


WORD = (32).to_bytes(32, "big")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(b"", "not a JSON-RPC response", id="nothing"),
        pytest.param(b"<html>", "not a JSON-RPC response", id="a web page"),
        pytest.param(b"[" * 100_000, "not a JSON-RPC response", id="deep nesting"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"result":{}}', "not a JSON-RPC response", id="another result"),
        pytest.param(b'{"jsonrpc":"2.0","id":1}', "not one to the question", id="neither result nor error"),
        pytest.param(
            answer(abi_string(b""), 2), "not one to the question", id="the answer to another question"
        ),
        pytest.param(
            b'{"jsonrpc":"2.0","id":1,"error":{"code":3,"message":"execution \\u001b[1m reverted"}}',
            r"refused: execution \\u001b\[1m reverted \(3\)",
            id="an error of the chain, made printable",
        ),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"result":"zz"}', "not hex", id="no hex"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"result":"0x123"}', "not hex", id="half a byte"),
        pytest.param(answer(b""), "no contract", id="nothing is deployed there"),
        pytest.param(answer(WORD), "not return a string", id="a number"),
        pytest.param(answer(bytes(64)), "not return a string", id="an offset into itself"),
        pytest.param(answer(b"\xff" * 64), "not return a string", id="an offset far behind the end"),
        pytest.param(answer(WORD + b"\xff" * 32), "not return a string", id="a length far behind the end"),
        pytest.param(answer(WORD + WORD + bytes(31)), "not return a string", id="one byte is missing"),
        pytest.param(answer(abi_string(b"\xff")), "not text", id="no UTF-8"),
        pytest.param(answer(abi_string(b"Qm123\n")), "is not a peer id", id="no peer id"),
        pytest.param(
            answer(abi_string(b"QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N")),
            "ed25519",
            id="an RSA peer id",
        ),
    ],
)
def test_answers_that_are_no_use(body: bytes, reason: str) -> None:
    with pytest.raises(RegistryError, match=reason):
        parse_answer_untrusted(body, 1)


def parses_or_refuses(body: bytes) -> None:
    """Invariant: a peer id, "" or RegistryError; nothing else."""
    try:
        owner = parse_answer_untrusted(body, 1)
    except RegistryError as error:
        assert str(error).isprintable()
    else:
        assert owner == "" or peerid.public_key_untrusted(owner)


@given(st.binary(max_size=300))
def test_any_bytes(body: bytes) -> None:
    parses_or_refuses(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("jsonrpc", "id", "result", "error"), JSON)))
def test_any_json(value: object) -> None:
    parses_or_refuses(json.dumps(value).encode())


@given(st.text(max_size=50) | st.builds(lambda data: "0x" + data.hex(), st.binary(max_size=200)))
def test_any_result(result: str) -> None:
    parses_or_refuses(json.dumps({"jsonrpc": "2.0", "id": 1, "result": result}).encode())


@given(st.integers(0, 2**256 - 1), st.integers(0, 2**256 - 1), st.binary(max_size=100))
def test_any_offset_and_length(offset: int, length: int, rest: bytes) -> None:
    parses_or_refuses(answer(offset.to_bytes(32, "big") + length.to_bytes(32, "big") + rest))


def cache(**settings) -> OwnerCache:
    values = {"positive_lifetime": 100.0, "negative_lifetime": 10.0, "failure_lifetime": 2.0}
    return OwnerCache(Registry(**values | {"stale_lifetime": 1000.0, "max_entries": 3} | settings))


@pytest.mark.setting("registry.positive_lifetime")
def test_an_owner_is_remembered_for_its_lifetime() -> None:
    owners = cache()
    assert owners.get(A, 0.0) is None
    owners.confirmed(A, PEERS[1], 0.0)
    known = owners.get(A, 99.0)
    assert known is not None and (known.peer_id, known.confirmed_s, known.stale) == (PEERS[1], 0.0, False)
    assert owners.get(A, 100.0) is None


@pytest.mark.setting("registry.negative_lifetime")
def test_nobody_is_remembered_for_less() -> None:
    owners = cache()
    owners.confirmed(A, "", 0.0)
    known = owners.get(A, 9.0)
    assert known is not None and known.peer_id == ""
    assert owners.get(A, 10.0) is None


@pytest.mark.setting("registry.failure_lifetime")
def test_a_failure_is_told_again_and_then_tried_again() -> None:
    owners = cache(failure_lifetime=3.0)
    owners.failed(A, "down", 0.0)
    assert owners.standing(A, 0.0) is None
    with pytest.raises(RegistryError, match="down"):
        owners.get(A, 2.9)
    assert owners.get(A, 3.0) is None


@pytest.mark.setting("registry.max_entries")
def test_so_many_addresses_are_remembered() -> None:
    owners = cache(max_entries=2)
    for number, address in enumerate((A, B, A + 7)):
        owners.confirmed(address, PEERS[number], float(number))
    assert owners.get(A, 3.0) is None and owners.get(B, 3.0) is not None


@pytest.mark.setting("registry.stale_lifetime")
def test_an_owner_outlives_an_outage_but_not_for_ever() -> None:
    owners = cache()
    owners.confirmed(A, PEERS[1], 0.0)
    owners.failed(A, "down", 150.0)
    standing = owners.standing(A, 150.0)
    assert standing is not None and standing.stale
    known = owners.get(A, 151.0)
    assert known is not None and known.stale and known.peer_id == PEERS[1]
    assert owners.get(A, 152.0) is None, "it is asked again meanwhile"
    assert owners.standing(A, 999.0) is not None
    owners.failed(A, "down", 1000.0)
    assert owners.standing(A, 1000.0) is None
    with pytest.raises(RegistryError, match="down"):
        owners.get(A, 1000.0)


def test_nobody_does_not_outlive_an_outage() -> None:
    owners = cache()
    owners.confirmed(A, "", 0.0)
    owners.failed(A, "down", 50.0)
    assert owners.standing(A, 50.0) is None


class Remembering(RuleBasedStateMachine):
    """Beside a plain list of what was said, the cache is never wrong and never too large."""

    def __init__(self) -> None:
        super().__init__()
        self.owners = cache()
        self.said: dict[ipaddress.IPv4Address, tuple[str, float]] = {}
        self.now_s = 0.0

    addresses = st.integers(0, 5).map(lambda last: A + last)

    @rule(by_s=st.floats(0.0, 60.0))
    def wait(self, by_s: float) -> None:
        self.now_s += by_s

    @rule(address=addresses, peer_id=st.sampled_from(["", *PEERS]))
    def confirm(self, address, peer_id: str) -> None:
        self.owners.confirmed(address, peer_id, self.now_s)
        self.said[address] = (peer_id, self.now_s)

    @rule(address=addresses)
    def fail(self, address) -> None:
        self.owners.failed(address, "down", self.now_s)
        standing = self.owners.standing(address, self.now_s)
        assert standing is None or (standing.peer_id, standing.confirmed_s) == self.said[address]

    @rule(address=addresses)
    def ask(self, address) -> None:
        try:
            known = self.owners.get(address, self.now_s)
        except RegistryError:
            return
        if known is not None:
            assert (known.peer_id, known.confirmed_s) == self.said[address]
            lifetime = 1000.0 if known.stale else 100.0 if known.peer_id else 10.0
            assert self.now_s - known.confirmed_s < lifetime

    @invariant()
    def no_more_than_so_many_are_remembered(self) -> None:
        known = [self.owners.standing(A + last, self.now_s) for last in range(6)]
        assert sum(one is not None for one in known) <= 3


TestRemembering = Remembering.TestCase


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"kind": "chain"}, "registry.kind"),
        ({"kind": "contract", "contract_address": CONTRACT}, "registry.rpc_url"),
        ({"kind": "contract", "rpc_url": "http://127.0.0.1:8545"}, "registry.contract_address"),
        ({"rpc_url": "ftp://example.org"}, "registry.rpc_url"),
        ({"rpc_url": "https://"}, "registry.rpc_url"),
        ({"rpc_url": "http://a:99999"}, "registry.rpc_url"),
        ({"rpc_url": "http://[::1"}, "registry.rpc_url"),
        ({"rpc_url": "http://a b"}, "registry.rpc_url"),
        ({"contract_address": "0x12"}, "registry.contract_address"),
        ({"contract_address": "0x" + "gg" * 20}, "registry.contract_address"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(table: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_mapping({"registry": table})


def test_settings_that_can_be_used() -> None:
    url = "https://user:key@rpc.example.org:8545/v1?k=1"
    table = {"kind": "Contract", "rpc_url": url, "contract_address": CONTRACT.upper().replace("X", "x")}
    registry = from_mapping({"registry": table}).registry
    assert (registry.kind, registry.rpc_url, registry.contract_address) == ("contract", url, CONTRACT)
