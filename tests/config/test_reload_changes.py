"""What a reload takes over: every setting is decided, and the difference of two configurations is told."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.config import changes, fields, load
from vpnd.config.fields import PEERS, Field
from vpnd.config.schema import Config, Peer

BASE = Config()
SETTINGS = {field.path: field for field in fields.all_settings()}
LIVE = {path for path, field in SETTINGS.items() if not field.restart}
B = Peer(name="b", peer_id="B", virtual_ip="10.86.0.2", addresses=("/ip4/192.0.2.2/tcp/4001",))
C = Peer(name="c", peer_id="C", virtual_ip="10.86.0.3")


def other_value(field: Field) -> object:
    """A value that is not the default; whether it is a good one does not matter here."""
    if field.many:
        return ("something else",)
    if field.base is bool:
        return not field.default
    if field.base is str:
        return "something else"
    return field.most_value if field.default != field.most_value else field.least_value


def changed(*paths: str) -> Config:
    config = BASE
    for path in paths:
        field = SETTINGS[path]
        table = msgspec.structs.replace(getattr(config, field.table), **{field.key: other_value(field)})
        config = msgspec.structs.replace(config, **{field.table: table})
    return config


def value(config: Config, path: str) -> object:
    return getattr(getattr(config, SETTINGS[path].table), SETTINGS[path].key)


@pytest.mark.parametrize("path", sorted(SETTINGS))
def test_one_changed_setting_is_told_and_in_force_when_it_is_live(path: str):
    wanted = changed(path)
    change = changes.compare(BASE, wanted)
    told = change.applied if path in LIVE else change.needs_restart
    other = change.needs_restart if path in LIVE else change.applied
    assert [(each.key, each.old, each.new) for each in told] == [
        (path, value(BASE, path), value(wanted, path))
    ]
    assert [each.remedy for each in told] == [SETTINGS[path].restart]
    assert not other and not change.peers_added and not change.peers_removed
    assert change.config == (wanted if path in LIVE else BASE)


@given(st.sets(st.sampled_from(sorted(SETTINGS))))
def test_any_mixture_keeps_what_needs_a_restart_and_takes_the_rest(paths: set[str]):
    wanted = changed(*sorted(paths))
    change = changes.compare(BASE, wanted)
    for path in SETTINGS:
        assert value(change.config, path) == value(wanted if path in LIVE else BASE, path)
    again = changes.compare(change.config, wanted)
    assert not again.applied
    assert {each.key for each in again.needs_restart} == paths - LIVE


PEERS_TABLE = [
    ("one is added", (), (B,), ["b"], [], []),
    ("one is removed", (B, C), (C,), [], ["b"], []),
    ("the order is nothing", (B, C), (C, B), [], [], []),
    ("an address changes", (B,), (msgspec.structs.replace(B, addresses=()),), [], [], ["peers[b].addresses"]),
    ("a name changes", (B,), (msgspec.structs.replace(B, name="x"),), [], [], ["peers[b].name"]),
    ("another key under a name", (B,), (msgspec.structs.replace(B, peer_id="X"),), ["b"], ["b"], []),
]


@pytest.mark.parametrize(
    ("what", "before", "after", "added", "removed", "applied"),
    PEERS_TABLE,
    ids=[row[0] for row in PEERS_TABLE],
)
def test_peers_are_compared_by_peer_id(what, before, after, added, removed, applied):
    change = changes.compare(Config(peers=before), Config(peers=after))
    assert [peer.name for peer in change.peers_added] == added
    assert [peer.name for peer in change.peers_removed] == removed
    assert [each.key for each in change.applied] == applied
    assert change.config.peers == after


SHOWN = [
    ("health.interval", 2.0, '"2s"'),
    ("session.queue_bytes", 1 << 20, '"1MiB"'),
    ("p2p.listen", ["/ip4/0.0.0.0/tcp/1"], '["/ip4/0.0.0.0/tcp/1"]'),
    ("log.level", "debug", '"debug"'),
    ("peers[a.b].addresses", [], "[]"),
    ("state_dir", "/x", "/x"),
    ("of another version", 5, "5"),
]


@pytest.mark.parametrize(("key", "held", "shown"), SHOWN, ids=[row[0] for row in SHOWN])
def test_values_are_shown_as_the_file_has_them(key, held, shown):
    assert changes.show(key, held) == shown


def test_peers_have_no_setting_that_is_not_compared():
    assert set(fields.tables()[PEERS]) == set(Peer.__struct_fields__)


def test_a_wait_for_changes_above_its_limit_is_refused():
    with pytest.raises(load.ConfigError, match="change_settle_max"):
        load.from_mapping({"network": {"change_settle": "10s"}})
