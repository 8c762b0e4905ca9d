"""Layers, precedence, and every way a configuration can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd import peerid
from vpnd.config import fields, load, paths, values
from vpnd.errors import ConfigError

A, B, C = (peerid.from_public_key(bytes([n]) * 32) for n in (1, 2, 3))


def peer(**changes: object) -> dict[str, object]:
    return {"name": "b", "peer_id": B, "virtual_ip": "10.86.0.2"} | changes


def refusal(mapping: dict[str, object], **layers) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load.from_mapping(mapping, **layers)
    return str(caught.value).splitlines()


def test_without_file_and_flags_everything_has_its_default(tmp_path):
    config = load.load(None, tmp_path, {}, {})
    assert (config.network.mtu, config.worker.idle_timeout) == (1400, 60.0)
    assert paths.identity_file(config) == tmp_path / "identity.pem"
    assert paths.status_socket(config) == tmp_path / "vpnd.sock"


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    file = tmp_path / "vpnd.toml"
    layers: tuple[dict[str, object], dict[str, str]] = ({}, {})
    assert load.load(None, tmp_path, *layers).worker.shards == 0
    file.write_text("[worker]\nshards = 1\n")
    assert load.load(None, tmp_path, *layers).worker.shards == 1
    layers = ({"worker.shards": None}, {"VPND_WORKER_SHARDS": "2"})
    assert load.load(None, tmp_path, *layers).worker.shards == 2
    layers = ({"worker.shards": 3}, {"VPND_WORKER_SHARDS": "2"})
    loaded = load.load_with_origins(None, tmp_path, *layers)
    assert loaded.config.worker.shards == 3
    assert loaded.origins["worker.shards"] == "--shards"
    assert loaded.origins["network.mtu"] == "default"


def test_the_environment_says_everything_as_text():
    config = load.from_mapping(
        {},
        environ={
            "VPND_NETWORK_MTU": "1280",
            "VPND_NETWORK_ROUTES": "10.1.0.0/16, 10.2.0.0/16",
            "VPND_NETWORK_OFFLOADS": "no",
            "VPND_WORKER_RING_BYTES": "1MiB",
            "VPND_SESSION_WINDOW_BYTES": "1048576",
            "VPND_RETRY_MULTIPLIER": "1.5",
            "VPND_P2P_DIAL_TIMEOUT": "750ms",
            "VPND_P2P_LISTEN": "",
        },
    )
    assert config.network.routes == ("10.1.0.0/16", "10.2.0.0/16")
    assert (config.network.mtu, config.network.offloads, config.worker.ring_bytes) == (1280, False, 1 << 20)
    assert (config.session.window_bytes, config.retry.multiplier) == (1 << 20, 1.5)
    assert (config.p2p.dial_timeout, config.p2p.listen) == (0.75, ())


def test_a_file_that_was_named_must_be_there(tmp_path):
    missing = tmp_path / "other.toml"
    with pytest.raises(ConfigError, match="no such file.*--config"):
        load.load(missing, tmp_path, {}, {})
    with pytest.raises(ConfigError, match="no such file.*VPND_CONFIG"):
        load.load(None, tmp_path, {}, {"VPND_CONFIG": str(missing)})


def test_a_peer_id_can_be_asked_for_before_the_file_is_written(tmp_path):
    environ = {"VPND_CONFIG": str(tmp_path / "other.toml")}
    assert load.load_with_origins(None, tmp_path, {}, environ, only=["p2p"]).config.p2p.identity_file
    environ = {"VPND_CONFIG": str(tmp_path / "vpnd.toml"), "VPND_STATE_DIR": str(tmp_path)}
    assert load.load(None, None, {}, environ).state_dir == str(tmp_path)


def test_a_command_that_needs_one_table_works_while_others_are_wrong(tmp_path):
    (tmp_path / "vpnd.toml").write_text('[network]\nmtu = 1\n[[peers]]\npeer_id = "12D3KooW…"\n')
    assert load.load_with_origins(None, tmp_path, {}, {}, only=["status"]).config.status.timeout
    (tmp_path / "vpnd.toml").write_text("[status]\ntimeout = 1\n")
    with pytest.raises(ConfigError, match=r"status\.timeout"):
        load.load_with_origins(None, tmp_path, {}, {}, only=["status"])


def test_a_state_directory_is_absolute_whatever_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load.load(None, Path("a"), {}, {}).state_dir == str(tmp_path / "a")


def test_broken_toml_is_named_with_its_line(tmp_path):
    (tmp_path / "vpnd.toml").write_text("[network]\nmtu = \n")
    with pytest.raises(ConfigError, match=r"vpnd\.toml: is not TOML: .*line 2"):
        load.load(None, tmp_path, {}, {})
    (tmp_path / "vpnd.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load.load(None, tmp_path, {}, {})
    with pytest.raises(ConfigError, match="cannot be read"):
        load.load(tmp_path, tmp_path, {}, {})


def test_all_problems_are_told_at_once_with_file_key_value_and_remedy(tmp_path):
    (tmp_path / "vpnd.toml").write_text(
        "[network]\nmtu = 99999\nrouts = []\n"
        '[worker]\nidle_timeout = 60\n[p2p]\nlisten = "/ip4/0.0.0.0/tcp/1"\n'
    )
    with pytest.raises(ConfigError) as caught:
        load.load(None, tmp_path, {"worker.shards": 99}, {"VPND_LOG_LEVEL": "loud"})
    file = tmp_path / "vpnd.toml"
    assert str(caught.value).splitlines() == [
        f"{file}: network.mtu = 99999: must be at most 9000; give a value from 576 to 9000",
        f"{file}: network.routs = []: there is no such key; did you mean routes?",
        f'{file}: worker.idle_timeout = 60: has no unit; write "60s" for seconds or "60ms" for milliseconds',
        f'{file}: p2p.listen = "/ip4/0.0.0.0/tcp/1": must be a list; write ["/ip4/0.0.0.0/tcp/1"]',
        'VPND_LOG_LEVEL: log.level = "loud": must be one of debug, info, warning, error; write for example "debug"',
        "--shards: worker.shards = 99: must be at most 64; give a value from 0 to 64",
    ]


WRONG = [
    ("an unknown table", {"netwrk": {}}, "netwrk = {}: there is no such table; did you mean network?"),
    (
        "a key outside its table",
        {"mtu": 1400},
        "mtu = 1400: stands outside a table; write it below [network]",
    ),
    ("a key of another table", {"network": {"listen": []}}, "did you mean p2p.listen?"),
    ("a value for a table", {"network": 3}, "must be a table; write [network]"),
    ("the state directory", {"state_dir": "/x"}, "give --state-dir or VPND_STATE_DIR"),
    ("peers as one table", {"peers": {"name": "b"}}, "write [[peers]]"),
    ("a peer without id", {"peers": [{"name": "b", "virtual_ip": "10.86.0.2"}]}, "peers[0].peer_id"),
    ("an unknown key of a peer", {"peers": [peer(adresses=[])]}, "did you mean addresses?"),
    ("a number in quotes", {"network": {"mtu": "1400"}}, "write 1400, without quotes"),
    ("true for a number", {"network": {"mtu": True}}, "must be an integer"),
    ("a fraction for a count", {"network": {"mtu": 1400.5}}, "must be an integer"),
    ("text for a switch", {"network": {"offloads": "yes"}}, "must be true or false"),
    ("a list for text", {"network": {"virtual_ip": []}}, "must be text"),
    ("not a number", {"retry": {"multiplier": float("nan")}}, "must be a number"),
    (
        "too short a duration",
        {"p2p": {"dial_timeout": "1ms"}},
        "at least 100ms; give a value from 100ms to 5m",
    ),
    ("a duration in words", {"p2p": {"dial_timeout": "5 sec"}}, "write it like"),
    ("too large a size", {"worker": {"ring_bytes": "2GiB"}}, "must be at most 1GiB"),
    ("no power of two", {"worker": {"ring_bytes": 1_000_000}}, 'write "1MiB"'),
    ("an address with prefix", {"network": {"virtual_ip": "10.86.0.1/16"}}, 'write "10.86.0.1"'),
    ("a name for an address", {"network": {"virtual_ip": "localhost"}}, "is not an IP address"),
    ("IPv4 inside IPv6", {"network": {"virtual_ip": "::ffff:10.86.0.1"}}, 'write "10.86.0.1"'),
    ("loopback as address", {"network": {"virtual_ip": "127.0.0.1"}}, "take a private one"),
    ("host bits in a route", {"network": {"routes": ["10.86.0.1/16"]}}, 'write "10.86.0.0/16"'),
    ("a route without prefix", {"network": {"routes": ["10.86.0.1"]}}, 'write "10.86.0.1/32"'),
    ("nonsense for a route", {"network": {"routes": ["10.86"]}}, "is not a network"),
    ("a route twice", {"network": {"routes": ["10.1.0.0/16", "10.1.0.0/16"]}}, "twice"),
    ("an IPv6 route in an IPv4 VPN", {"network": {"routes": ["fd00::/8"]}}, "is IPv6 but"),
    (
        "a prefix too long for IPv4",
        {"network": {"virtual_ip": "10.1.0.1", "subnet": 64}},
        "at most 32 for IPv4",
    ),
    ("the network's own address", {"network": {"virtual_ip": "10.86.0.0"}}, "network or broadcast address"),
    ("the broadcast address", {"network": {"virtual_ip": "10.86.255.255"}}, "network or broadcast address"),
    ("too small an MTU for IPv6", {"network": {"virtual_ip": "fd00::1", "subnet": 64, "mtu": 1000}}, "1280"),
    ("too long a device name", {"network": {"interface": "a" * 16}}, "1 to 15 bytes"),
    ("a device name with a slash", {"network": {"interface": "a/b"}}, "may not hold"),
    ("a device name of the system", {"network": {"interface": "all"}}, "taken by the system"),
    ("listening on a name", {"p2p": {"listen": ["/dns/a/tcp/1"]}}, "must be an address of this machine"),
    ("a peer id cut short", {"peers": [peer(peer_id=B[:-1])]}, "copy what `vpnd id` prints"),
    (
        "two peers of one name",
        {"peers": [peer(), peer(peer_id=C, virtual_ip="10.86.0.3")]},
        "already that of peers[0]",
    ),
    (
        "two peers of one id",
        {"peers": [peer(), peer(name="c", virtual_ip="10.86.0.3")]},
        "already that of peers[0]",
    ),
    ("two peers of one address", {"peers": [peer(), peer(name="c", peer_id=C)]}, "already that of peers[0]"),
    (
        "a peer with our address",
        {"network": {"virtual_ip": "10.86.0.2"}, "peers": [peer()]},
        "that of this node",
    ),
    ("a peer outside the VPN", {"peers": [peer(virtual_ip="10.87.0.2")]}, 'add "10.87.0.2/32" to the routes'),
    ("a peer at the broadcast address", {"peers": [peer(virtual_ip="10.86.255.255")]}, "take another one"),
    ("another peer's address", {"peers": [peer(addresses=[f"/dns/a/tcp/1/p2p/{C}"])]}, "names another peer"),
    ("dialing everywhere", {"peers": [peer(addresses=["/ip4/0.0.0.0/tcp/1"])]}, "cannot be dialed"),
    ("dialing no port", {"peers": [peer(addresses=["/ip4/1.2.3.4/tcp/0"])]}, "has no port"),
    ("announcing everywhere", {"p2p": {"announce": ["/ip6/::/tcp/1"]}}, "cannot be dialed"),
    ("announcing no port", {"p2p": {"announce": ["/dns/a/tcp/0"]}}, "has no port"),
    ("announcing a peer", {"p2p": {"announce": [f"/dns/a/tcp/1/p2p/{C}"]}}, "remove the /p2p part"),
    ("a subnet node at nowhere", {"peers": [peer(protocol="subnet-node")]}, "set worker.shards = 1"),
    (
        "IPv6 of a subnet node",
        {
            "network": {"virtual_ip": "fd00::1", "subnet": 64},
            "worker": {"shards": 1},
            "peers": [peer(protocol="subnet-node", virtual_ip="fd00::2")],
        },
        "IPv4 alone",
    ),
    ("retries that shrink", {"retry": {"initial_interval": "1m"}}, "must not be above retry.max_interval"),
    ("a user nobody has", {"process": {"user": "no-such-user"}}, "useradd --system no-such-user"),
    ("children as root", {"process": {"user": "root"}}, "is root"),
    ("a port alone", {"metrics": {"listen": "9586"}}, "must be host:port"),
    ("a socket path too long", {"status": {"socket": "/" + "s" * 107}}, "at most 107"),
    ("one file for two things", {"status": {"socket": "identity.pem"}}, "is the identity file too"),
]


@pytest.mark.parametrize(("what", "mapping", "message"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_configuration_is_refused_in_one_line(what, mapping, message):
    lines = refusal(mapping)
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].startswith("configuration: ")
    assert "; " in lines[0], "behind it stands what to do"


#: What no setting of that type takes.
WRONG_TYPES: dict[type, list[object]] = {
    int: ["many", -1, 1.5, [], True, 1 << 80],
    float: ["long", -1.0, [], True, float("inf")],
    bool: ["perhaps", 1, []],
    str: [1, [], "\0", " ", "/", "%"],
}


@pytest.mark.parametrize(
    "field", [*fields.all_settings(), *fields.tables()[fields.PEERS].values()], ids=lambda f: f.path
)
def test_whatever_is_wrong_with_a_setting_its_key_its_value_and_the_remedy_are_told(field):
    for value in WRONG_TYPES[field.base]:
        for raw in ([value], value) if field.many else (value,):
            try:
                values.convert(field, raw, text_form=False)
            except values.Refused as refused:
                mapping = {field.table: {field.key: raw}}
                if field.table == fields.PEERS:
                    mapping = {fields.PEERS: [peer(**{field.key: raw})]}
                (line, *_) = refusal(mapping)
                assert f"{field.key} = " in line and "; " in str(refused)


RIGHT = [
    ("a route that is the subnet", {"network": {"virtual_ip": "10.86.0.1", "routes": ["10.86.0.0/16"]}}),
    ("a peer in a route", {"network": {"routes": ["10.87.0.0/16"]}, "peers": [peer(virtual_ip="10.87.0.0")]}),
    (
        "IPv6 throughout",
        {"network": {"virtual_ip": "fd00::1", "subnet": 64}, "peers": [peer(virtual_ip="fd00::2")]},
    ),
    ("a point-to-point subnet", {"network": {"virtual_ip": "10.0.0.0", "subnet": 31}}),
    ("no metrics", {"metrics": {"listen": ""}}),
    ("metrics over IPv6", {"metrics": {"listen": "[::1]:9586"}}),
    ("an address with the peer's own id", {"peers": [peer(addresses=[f"/dns/a/tcp/1/p2p/{B}"])]}),
    ("a peer that dials us", {"peers": [peer()]}),
    ("nowhere to listen", {"p2p": {"listen": []}}),
]


@pytest.mark.parametrize(("what", "mapping"), RIGHT, ids=[row[0] for row in RIGHT])
def test_a_right_configuration_is_taken(what, mapping):
    load.from_mapping(mapping)


VARIABLES = [
    ("a key that is not there", {"VPND_NETWORK_MTV": "1"}, "did you mean VPND_NETWORK_MTU?"),
    ("a table nearly right", {"VPND_NETWRK_MTU": "1"}, "did you mean VPND_NETWORK_MTU?"),
    ("peers", {"VPND_PEERS_NAME": "b"}, "there is no such variable"),
]


@pytest.mark.parametrize(("what", "environ", "message"), VARIABLES, ids=[row[0] for row in VARIABLES])
def test_a_misspelt_variable_is_refused(what, environ, message):
    lines = refusal({}, environ=environ)
    assert len(lines) == 1
    assert message in lines[0]
    ((variable, value),) = environ.items()
    assert lines[0].startswith(f'environment: {variable} = "{value}": ')


def test_variables_of_others_pass():
    load.from_mapping({}, environ={"VPND_CONFIG": "/x", "VPND_CI_RUN": "7", "PATH": "/bin"})


def test_what_only_the_identity_shows_is_refused_too():
    mapping = {"peers": [peer()]}
    done = load.complete(load.from_mapping(mapping), A, "host")
    assert done.node.name == "host"
    assert done.network.virtual_ip.startswith("10.86.")
    with pytest.raises(ConfigError, match=r"peers\[0\]\.peer_id.*is this node itself"):
        load.complete(load.from_mapping(mapping), B, "host")
    mapping = {"peers": [peer(virtual_ip=done.network.virtual_ip)]}
    with pytest.raises(ConfigError, match="already that of this node"):
        load.complete(load.from_mapping(mapping), A, "host")
    mapping = {"network": {"subnet": 24}, "peers": [peer(virtual_ip="192.168.0.1")]}
    with pytest.raises(ConfigError, match="neither in the VPN's subnet"):
        load.complete(load.from_mapping(mapping), A, "host")


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
tables = st.sampled_from(["network", "p2p", "peers", "worker", "log", "status", "x"])
keys = st.sampled_from(
    ["mtu", "routes", "listen", "name", "peer_id", "virtual_ip", "shards", "socket", "level", "y"]
)


rows = st.dictionaries(keys, toml_values, max_size=3)


@given(st.dictionaries(tables, rows | st.lists(rows, max_size=2), max_size=3))
def test_any_mapping_is_a_configuration_or_a_config_error(mapping):
    try:
        load.from_mapping(mapping)
    except ConfigError as error:
        assert all(line.startswith("configuration: ") for line in str(error).splitlines())
