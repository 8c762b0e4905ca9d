"""The state directory: complete after every save, useful after damage, and closed to others."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from membership_world import NETWORK, NOW, World, directory, key, peer

from vpnd.membership import store
from vpnd.membership.invitations import Invitations
from vpnd.membership.statements import Statement, parse_untrusted, parse_verified
from vpnd.membership.store import Store, StoreError

#: A zero length and a SHA-256, at the end of directory.bin.
SEAL_BYTES = 2 + 32


@pytest.fixture
def held(tmp_path):
    opened = Store(tmp_path / "network")
    yield opened
    opened.close()


@pytest.fixture
def world() -> World:
    made = World()
    made.enrol("b")
    made.enrol("c")
    return made


def test_a_new_one_is_empty(held):
    assert held.load_network() is None and held.load_key() is None
    assert held.load_statements() == ([], True) and held.load_invitations() == ()


def test_everything_comes_back(held, world, tmp_path):
    invitations = Invitations()
    invitations.add(bytes(16), world.directory, NOW, lifetime_ms=1000, name="x")
    held.save_network(NETWORK)
    held.save_key(key("root"))
    held.save_statements(world.directory.statements())
    held.save_invitations(invitations.all())
    again = Store(tmp_path / "network")
    assert again.load_network() == NETWORK
    assert again.load_key().private_bytes_raw() == key("root").private_bytes_raw()
    assert again.load_statements() == (world.directory.statements(), True)
    assert again.load_invitations() == invitations.all()
    again.close()


def test_nobody_else_may_read_any_of_it(held, tmp_path):
    held.save_network(NETWORK)
    held.save_key(key("root"))
    held.save_statements([b"x"])
    held.save_invitations(())
    held.save_statements([b"y"])
    files = list((tmp_path / "network").iterdir())
    assert len(files) == 7
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "network").stat().st_mode) == 0o700


def test_a_key_is_never_overwritten(held):
    held.save_key(key("root"))
    with pytest.raises(StoreError, match="already"):
        held.save_key(key("other"))


def test_of_a_directory_cut_anywhere_the_whole_statements_are_used(held, world, tmp_path):
    wires = world.directory.statements()
    held.save_statements(wires)
    path = tmp_path / "network" / store.DIRECTORY
    data = path.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        found, verified = held.load_statements()
        assert found == wires[: len(found)] and not verified
        restored = directory()
        assert not restored.restore(found, NOW).refused
    path.write_bytes(data)
    restored = directory()
    restored.restore(held.load_statements()[0], NOW)
    assert restored.find(peer("b"), NOW)


def test_changed_bytes_cost_the_statements_they_are_in(held, world, tmp_path):
    held.save_statements(world.directory.statements())
    path = tmp_path / "network" / store.DIRECTORY
    data = bytearray(path.read_bytes())
    data[-1 - SEAL_BYTES] ^= 1
    path.write_bytes(data)
    restored = directory()
    wires, verified = held.load_statements()
    assert not verified, "or the change would go unnoticed"
    merged = restored.restore(wires, NOW)
    assert [one.reason for one in merged.refused] == ["forged"] and len(restored.members(NOW)) == 1


def test_any_changed_byte_breaks_the_seal(held, world, tmp_path):
    held.save_statements(world.directory.statements())
    path = tmp_path / "network" / store.DIRECTORY
    data = path.read_bytes()
    assert held.load_statements() == (world.directory.statements(), True)
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert not held.load_statements()[1], place
    path.write_bytes(data + b"x")
    assert not held.load_statements()[1]


def test_what_was_verified_is_restored_without_verifying_and_to_the_same(held, world):
    held.save_statements(world.directory.statements())
    wires, verified = held.load_statements()
    assert verified
    one, other = directory(), directory(parse=_fails)
    one.restore(wires, NOW)
    other.restore(wires, NOW, parse_verified)
    assert one.members(NOW) == other.members(NOW) == world.directory.members(NOW)
    assert one.index.root() == other.index.root() == world.directory.index.root()
    assert list(map(parse_verified, wires)) == list(map(parse_untrusted, wires))


def _fails(wire: bytes) -> Statement:
    raise AssertionError("it is verified again")


@pytest.mark.parametrize("name", [store.NETWORK_NAME, store.KEY])
@pytest.mark.parametrize("data", [b"", b"junk"])
def test_other_damage_is_an_error_that_names_the_file(held, tmp_path, name, data):
    (tmp_path / "network" / name).write_bytes(data)
    load = {
        store.NETWORK_NAME: held.load_network,
        store.KEY: held.load_key,
    }
    with pytest.raises(StoreError, match=name):
        load[name]()


@pytest.mark.parametrize("data", [b"", b"junk", b"vpnd invitations 1\n\x91\x01"])
def test_of_a_damaged_file_the_generation_before_is_used_and_not_lost(held, tmp_path, world, data):
    invitations = Invitations()
    invitations.add(bytes(16), world.directory, NOW, lifetime_ms=1000, name="x")
    held.save_network(NETWORK)
    held.save_invitations(invitations.all())
    held.save_invitations(())
    held.save_statements(world.directory.statements())
    held.save_statements(world.directory.statements()[:1])
    for name in (store.NETWORK_NAME, store.INVITATIONS, store.DIRECTORY):
        (tmp_path / "network" / name).write_bytes(data)
    for _ in range(2):
        again = Store(tmp_path / "network")
        assert again.load_network() == NETWORK
        assert again.load_invitations() == invitations.all()
        assert again.load_statements() == (world.directory.statements(), False)
        again.close()
    again = Store(tmp_path / "network")
    again.load_statements()
    again.save_statements([b"new"])
    (tmp_path / "network" / store.DIRECTORY).unlink()
    assert again.load_statements()[0] == world.directory.statements(), "what was damaged is no generation"


@pytest.mark.parametrize("name", [store.NETWORK_NAME, store.INVITATIONS, store.DIRECTORY])
def test_what_was_healed_is_whole_when_the_generation_before_goes_next(held, tmp_path, world, name):
    invitations = Invitations()
    invitations.add(bytes(16), world.directory, NOW, lifetime_ms=1000, name="x")
    statements, files = world.directory.statements(), tmp_path / "network"
    held.save_network(NETWORK)
    for _ in range(2):
        held.save_invitations(invitations.all())
        held.save_statements(statements)
    for damaged in (name, name + store.OLD, name, name):
        (files / damaged).write_bytes(b"")
        again = Store(files)
        found, _ = again.load_statements()
        again.heal(again.load_network(), again.load_invitations(), lambda found=found: found)
        again.close()
        (files / (name + store.OLD)).unlink()
        again = Store(files)
        again.heal(NETWORK, invitations.all(), lambda: statements)
        again.close()
    assert held.load_network() == NETWORK and held.load_invitations() == invitations.all()
    assert held.load_statements() == (statements, True)


def test_what_cannot_be_healed_keeps_nobody_from_starting(held, tmp_path, monkeypatch):
    held.save_network(NETWORK)
    (tmp_path / "network" / store.NETWORK_NAME).write_bytes(b"")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    held.heal(held.load_network(), (), tuple)
    assert held.load_network() == NETWORK


def test_invitations_that_are_lost_keep_nobody_from_starting(held, tmp_path):
    for name in (store.INVITATIONS, store.INVITATIONS + store.OLD):
        (tmp_path / "network" / name).write_bytes(b"")
    assert held.load_invitations() == ()


def test_the_files_of_the_first_version_are_read_and_brought_up_to_date(tmp_path):
    shutil.copytree(Path(__file__).with_name("state-0.1.0"), tmp_path / "network")
    held = Store(tmp_path / "network")
    held.upgrade()
    assert (
        held.load_network() == NETWORK
        and held.load_key().private_bytes_raw() == key("root").private_bytes_raw()
    )
    assert [one.name for one in held.load_invitations()] == ["x"]
    wires, verified = held.load_statements()
    restored = directory()
    assert verified and not restored.restore(wires, NOW + 1).refused
    assert [one.name for one in restored.members(NOW + 1)] == ["b"] and restored.removal(peer("c"))
    assert [one.peer_id for one in restored.authorities()] == [peer("root"), peer("second")]
    (tmp_path / "network" / store.NETWORK_NAME).write_bytes(b"")
    assert held.load_network() == NETWORK, "there is a second copy from now on"
    held.upgrade()
    held.close()


def test_the_files_of_a_newer_version_are_left_alone(held, tmp_path):
    held.save_network(NETWORK)
    (tmp_path / "network" / store.FORMAT).write_text("99")
    with pytest.raises(StoreError, match="newer"):
        held.upgrade()


def test_a_failed_save_leaves_the_old_file_and_nothing_beside_it(held, tmp_path, monkeypatch):
    held.save_network(NETWORK)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space"):
        held.save_network(NETWORK)
    monkeypatch.undo()
    files = {store.NETWORK_NAME, store.NETWORK_NAME + store.OLD, store.FORMAT}
    assert set(os.listdir(tmp_path / "network")) == files and held.load_network() == NETWORK


def test_leaving_forgets_everything(held, tmp_path):
    held.save_network(NETWORK)
    held.save_key(key("root"))
    held.save_statements([b"x"])
    held.save_statements([b"y"])
    held.forget()
    held.forget()
    assert os.listdir(tmp_path / "network") == []


def test_a_place_that_cannot_be_one_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--state-dir"):
        Store(tmp_path / "file" / "network")
