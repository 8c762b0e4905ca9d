"""The identity file and the peer id that follows from it."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from vpnd import peerid
from vpnd.config import paths
from vpnd.config.check import default_virtual_ip
from vpnd.config.paths import NETWORK_NAME as NETWORK
from vpnd.config.schema import Config
from vpnd.errors import ConfigError
from vpnd.identity import load_or_create, read_private
from vpnd.mode import identity_of


def test_an_identity_is_made_once_and_found_again(tmp_path):
    file = tmp_path / "state" / "identity.pem"
    made = load_or_create(file)
    assert load_or_create(file) == made
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(file.parent) == ["identity.pem"]
    assert read_private(file).public_key().public_bytes_raw() == made.public_key


def test_a_member_without_its_identity_is_told_so_and_no_other_is_made(tmp_path):
    config = Config(state_dir=str(tmp_path))
    made = identity_of(config)
    assert identity_of(config) == made
    network = paths.network_dir(config)
    network.mkdir()
    (network / NETWORK).touch()
    assert identity_of(config) == made
    paths.identity_file(config).unlink()
    with pytest.raises(ConfigError, match="is missing.*put it back, or leave the network"):
        identity_of(config)
    assert not paths.identity_file(config).exists()


def test_a_generous_umask_does_not_open_the_file(tmp_path):
    before = os.umask(0)
    try:
        load_or_create(tmp_path / "identity.pem")
    finally:
        os.umask(before)
    assert (tmp_path / "identity.pem").stat().st_mode & 0o777 == 0o600


def test_the_peer_id_is_the_one_libp2p_derives(tmp_path):
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    identity = load_or_create(tmp_path / "identity.pem")
    pair = create_new_key_pair(read_private(tmp_path / "identity.pem").private_bytes_raw())
    assert ID.from_pubkey(pair.public_key).to_base58() == identity.peer_id
    assert pair.public_key.to_bytes() == identity.public_key


def test_a_private_key_is_read_from_a_descriptor_which_stays_open(tmp_path):
    identity = load_or_create(tmp_path / "identity.pem")
    fd = os.open(tmp_path / "identity.pem", os.O_RDONLY)
    try:
        for _ in range(2):
            assert read_private(fd).public_key().public_bytes_raw() == identity.public_key
        os.fstat(fd)
    finally:
        os.close(fd)


def test_processes_that_start_together_end_with_one_identity(tmp_path):
    program = (
        "import sys; from pathlib import Path; from vpnd.identity import load_or_create;"
        "print(load_or_create(Path(sys.argv[1])).peer_id)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "new" / "identity.pem")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(6)]
    answers = {process.communicate(timeout=60)[0] for process in started}
    assert len(answers) == 1
    assert answers.pop().startswith(b"12D3KooW")


def pem(key, encryption=None) -> bytes:
    encryption = encryption or serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


UNUSABLE = [
    ("an empty file", b""),
    ("text", b"not a key\n"),
    ("a cut key", pem(Ed25519PrivateKey.generate())[:60]),
    ("a key of another kind", pem(ec.generate_private_key(ec.SECP256R1()))),
    (
        "a key with a password",
        pem(Ed25519PrivateKey.generate(), serialization.BestAvailableEncryption(b"secret")),
    ),
    ("a file far too large", b"x" * 1_000_000),
]


@pytest.mark.parametrize(("what", "content"), UNUSABLE, ids=[what for what, _ in UNUSABLE])
def test_a_file_that_holds_no_key_is_refused_and_left_alone(tmp_path, what, content):
    file = tmp_path / "identity.pem"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="is not an ed25519 private key.*move it away") as caught:
        load_or_create(file)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_open_to_others_is_refused(tmp_path, mode):
    file = tmp_path / "identity.pem"
    load_or_create(file)
    file.chmod(mode)
    with pytest.raises(ConfigError, match="open to other users.*chmod 600"):
        load_or_create(file)


def test_a_directory_in_its_place_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a file"):
        load_or_create(tmp_path)


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_leads_back_to_its_key(key):
    assert peerid.public_key_untrusted(peerid.from_public_key(key)) == key


@given(st.text() | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", max_size=60))
def test_any_text_is_a_peer_id_or_a_value_error(text):
    try:
        key = peerid.public_key_untrusted(text)
    except ValueError:
        return
    assert peerid.from_public_key(key) == text


@given(st.text())
def test_a_default_address_is_a_host_of_every_subnet_down_to_24(peer_id):
    address = ipaddress.ip_address(default_virtual_ip(peer_id))
    for prefix in (16, 20, 24):
        network = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
        assert address not in (network.network_address, network.broadcast_address)
    assert address in ipaddress.ip_network("10.86.0.0/16")
    assert default_virtual_ip(peer_id) == str(address)
