"""What is on disk of a network, with real control processes: files that a power cut left empty or cut, a full disk."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_harness import eventually
from network_harness import USER, NetworkNode

from vpnd.config.paths import NETWORK_NAME as NETWORK
from vpnd.membership.store import DIRECTORY, INVITATIONS, OLD

pytestmark = pytest.mark.root


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[NetworkNode, NetworkNode]]:
    with NetworkNode(tmp_path, "a") as a, NetworkNode(tmp_path, "b", save_interval=0.0) as b:
        a.start()
        b.start(a.invite())
        eventually(lambda: a.knows(b) and b.knows(a))
        eventually(lambda: all(peer.addresses for node in (a, b) for peer in node.status().peers))
        yield a, b


@pytest.mark.parametrize("keep", [0, 100])
def test_files_that_are_empty_or_cut_after_a_power_cut_heal(nodes, keep) -> None:
    a, b = nodes
    token = a.invite()
    for node in nodes:
        node.stop()
        for name in (NETWORK, DIRECTORY, INVITATIONS):
            path = node.directory / name
            if path.exists():
                path.write_bytes(path.read_bytes()[: min(keep, path.stat().st_size - 1)])
    a.start()
    b.start()
    eventually(lambda: a.knows(b) and b.knows(a), 30.0)
    assert a.report().authority and a.report().state == b.report().state == "member"
    assert token != a.invite()


@pytest.mark.parametrize("place", [0, 1])
def test_who_has_lost_both_generations_is_what_it_was_by_the_others(nodes, place) -> None:
    """An authority by its key, which nobody else may have; every other by an authority that comes and introduces
    itself."""
    a, b = nodes
    hit = nodes[place]
    addresses = hit.own.addresses
    hit.stop()
    for name in (DIRECTORY, DIRECTORY + OLD):
        (hit.directory / name).write_bytes(b"")
    hit.start()
    eventually(lambda: a.knows(b) and b.knows(a), 60.0)
    assert hit.report().state == "member" and hit.report().addresses == addresses
    assert a.report().authority and a.members() == b.members() == {"a", "b"}


def test_who_has_lost_both_generations_and_is_alone_says_so(nodes) -> None:
    a, b = nodes
    for node in nodes:
        node.stop()
    for name in (DIRECTORY, DIRECTORY + OLD):
        (b.directory / name).write_bytes(b"")
    b.start()
    assert b.report().state == "lost"
    a.start()
    eventually(lambda: b.report().state == "member", 60.0)


@pytest.fixture
def full(nodes) -> Iterator[Path]:
    """The directory of the first node, on a file system with some room in it."""
    a, _ = nodes
    a.stop()
    kept = {path.name: path.read_bytes() for path in a.directory.iterdir()}
    size = ("-o", "size=256k,mode=0700")
    subprocess.run(("mount", "-t", "tmpfs", *size, "none", str(a.directory)), check=True)
    try:
        user = pwd.getpwnam(USER).pw_uid
        os.chown(a.directory, user, -1)
        for name, data in kept.items():
            (a.directory / name).write_bytes(data)
            (a.directory / name).chmod(0o600)
            os.chown(a.directory / name, user, -1)
        yield a.directory
    finally:
        a.control.process.kill()
        a.control.process.wait()
        subprocess.run(("umount", str(a.directory)), check=True)


def test_what_a_full_disk_cannot_keep_is_refused_and_not_done(nodes, full) -> None:
    a, b = nodes
    a.start()
    eventually(lambda: a.knows(b))
    ballast = full / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert "No space" in a.ask("remove", who="b").error
    assert "No space" in a.ask("invite", name="x").error
    assert a.members() == {"a", "b"} and b.report().state == "member"
    b.stop()
    b.moves()
    b.start()  # it says where it is now: news that cannot be kept
    eventually(lambda: a.pump() or any("No space" in line for line in a.report().warnings))
    ballast.unlink()
    eventually(lambda: a.pump() or not a.report().warnings, 30.0)
    a.invite(name="x")
    a.do("remove", who="b")
    eventually(lambda: b.report().state == "removed")
    a.stop()
    a.start()
    assert a.members() == {"a"}
