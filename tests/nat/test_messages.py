"""The words of meetings: what is read is what was said, and nothing a peer can say is more than refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd import endpoint, peerid
from vpnd.errors import RemoteProtocolError
from vpnd.nat import messages
from vpnd.nat.messages import Call, Gone, Hello, Meet, Met, Refused, Welcome

PEER = peerid.from_public_key(bytes(32))
TOKEN = bytes(16)
SEEN = "203.0.113.2:33949"
SAMPLES = [
    Hello("kept"),
    Welcome(SEEN),
    Welcome("[2001:db8::2]:4001", messages.FULL),
    Call(TOKEN, PEER),
    Gone(TOKEN, messages.ABSENT),
    Meet(TOKEN, PEER, messages.PUNCH, ("10.1.0.2:4001", "[2001:db8::1]:40001"), "moved"),
    Met(SEEN, "203.0.113.1:1", ("10.2.0.2:4001",), "random", True, 1 << 20),
    Refused(messages.NOT_HERE),
]
KINDS = tuple(type(sample) for sample in SAMPLES)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_what_is_read_is_what_was_said(message) -> None:
    data = messages.encode(message)
    assert messages.parse_untrusted(data, type(message)) == message
    for cut in range(len(data)):
        with pytest.raises(RemoteProtocolError):
            messages.parse_untrusted(data[:cut], *KINDS)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_later_version_may_say_more(message) -> None:
    data = msgspec.msgpack.encode([*msgspec.msgpack.decode(messages.encode(message)), "more"])
    short_of_defaults = msgspec.msgpack.decode(messages.encode(message))
    if len(short_of_defaults) == 1 + len(type(message).__struct_fields__):
        assert messages.parse_untrusted(data, type(message)) == message


BAD = [
    ("a token is cut", [3, TOKEN[1:], PEER]),
    ("nobody's peer id", [3, TOKEN, "nobody"]),
    ("an endpoint without a port", [6, SEEN, "203.0.113.1"]),
    ("an endpoint in another spelling", [6, SEEN, "203.0.113.1:01"]),
    ("a port that is none", [6, SEEN, "203.0.113.1:70000"]),
    ("a name where an address belongs", [6, SEEN, "example.org:443"]),
    ("an interface in an address", [6, SEEN, "[fe80::1%eth0]:443"]),
    ("too many candidates", [5, TOKEN, PEER, "both", ["10.0.0.1:1"] * 9]),
    ("a candidate that is none", [5, TOKEN, PEER, "both", ["10.0.0.1"]]),
    ("a mode nobody knows", [5, TOKEN, PEER, "all"]),
    ("a limit below nothing", [6, SEEN, SEEN, [], "kept", True, -1]),
    ("a message of no kind", [99, TOKEN]),
]


@pytest.mark.parametrize(("why", "fields"), BAD, ids=[why for why, _ in BAD])
def test_what_is_wrong_is_refused(why: str, fields: list) -> None:
    with pytest.raises(RemoteProtocolError):
        messages.parse_untrusted(msgspec.msgpack.encode(fields), *KINDS)


def test_a_message_in_the_wrong_place_or_too_long_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="Hello"):
        messages.parse_untrusted(messages.encode(Hello()), Meet)
    with pytest.raises(RemoteProtocolError, match="at most"):
        messages.parse_untrusted(bytes(messages.MAX_MESSAGE + 1), *KINDS)


_leaves = st.none() | st.booleans() | st.integers() | st.binary(max_size=20) | st.text(max_size=20)
_values = st.recursive(_leaves, lambda inner: st.lists(inner, max_size=8), max_leaves=12)


@given(
    st.binary(max_size=200) | st.builds(lambda tag, rest: [tag, *rest], st.integers(1, 8), st.lists(_values))
)
def test_whatever_comes_is_read_or_refused(sent) -> None:
    data = sent
    if isinstance(sent, list):
        try:
            data = msgspec.msgpack.encode(sent)
        except OverflowError:
            return
    try:
        message = messages.parse_untrusted(data, *KINDS)
    except RemoteProtocolError:
        return
    assert messages.parse_untrusted(messages.encode(message), *KINDS) == message


@given(st.ip_addresses(), st.integers(0, 65535))
def test_endpoints_are_read_as_they_are_written(ip, port: int) -> None:
    if "%" not in str(ip):
        assert endpoint.parse(str(endpoint.Endpoint(ip, port))) == endpoint.Endpoint(ip, port)
