"""Whole nodes after a power cut, and on a full disk. How control takes it: tests/control/test_state_on_disk.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Node, check_logs, wait_until
from lab.joining import all_reach_all, invite, network_of, wait_standing

pytestmark = [pytest.mark.root, pytest.mark.long("takes half a minute")]

SETTLE_S = 20.0
HEALED_S = 30.0


def healthy(node: Node) -> bool:
    return node.ask().get("health") == "healthy"


@pytest.mark.parametrize("keep", [0, 100])
def test_nodes_whose_files_a_power_cut_left_empty_or_cut_are_well_soon(keep: int) -> None:
    with Lab(2) as lab:
        nodes = network_of(lab)
        all_reach_all(nodes, SETTLE_S)
        for node in nodes:  # so that the generation before knows both members, too
            assert node.stop() == 0
            node.start()
            node.wait_ready()
        all_reach_all(nodes, SETTLE_S)
        invite(nodes[0])
        addresses = [node.ask()["node"]["addresses"] for node in nodes]
        for node in nodes:
            node.kill(signal.SIGKILL)
            node.wait_ended()
            files = [path for path in Path(node.state_dir, "network").glob("*.bin") if path.is_file()]
            assert files
            for path in files:
                os.truncate(path, min(keep, path.stat().st_size - 1))
        for node in nodes:
            node.start()
        for node in nodes:
            node.wait_ready()
        wait_until(lambda: all(map(healthy, nodes)), HEALED_S, "healthy")
        assert [node.ask()["node"]["addresses"] for node in nodes] == addresses
        all_reach_all(nodes, SETTLE_S)
        check_logs(nodes)
        for node in nodes:
            assert node.stop() == 0


def test_a_member_without_its_identity_says_so() -> None:
    with Lab(2) as lab:
        a, b = network_of(lab)
        assert b.stop() == 0
        Path(b.state_dir, "identity.pem").unlink()
        b.start()
        assert b.wait_ended()
        assert "identity" in b.log_tail(3) and "Traceback" not in b.log_file.read_text()
        assert a.stop() == 0


@contextlib.contextmanager
def small_disk(node: Node) -> Iterator[Path]:
    """The state directory of a node that does not run, on a file system with little room; its ballast."""
    kept = [(path, path.read_bytes()) for path in node.state_dir.rglob("*") if path.is_file()]
    assert kept
    where = str(node.state_dir)
    subprocess.run(("cp", "-a", f"{where}/.", f"{where}.kept"), check=True)
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "none", where), check=True)
    try:
        subprocess.run(("cp", "-a", f"{where}.kept/.", where), check=True)
        yield Path(where, "ballast")
    finally:
        node.kill(signal.SIGKILL)
        node.wait_ended()
        subprocess.run(("umount", "-l", where), check=True)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def test_on_a_full_disk_nothing_is_done_by_halves_and_packets_flow() -> None:
    with Lab(2) as lab:
        a, b = nodes = network_of(lab)
        assert a.stop() == 0
        with small_disk(a) as ballast:
            a.start()
            a.wait_ready()
            all_reach_all(nodes, SETTLE_S)
            fill(ballast)
            for words in (("remove", "b"), ("invite",)):
                done = a.vpnd(*words, check=False)
                assert done.returncode and "No space" in done.stderr + done.stdout
            all_reach_all(nodes, SETTLE_S)
            assert b.stop() == 0
            b.config["p2p"]["listen"] = [f"/ip4/{b.namespace.address}/tcp/4005"]
            b.start()  # it says where it is now: news that cannot be kept
            b.wait_ready()
            wait_until(lambda: "No space" in str(a.ask()), SETTLE_S, "status says that it cannot be kept")
            all_reach_all(nodes, SETTLE_S)
            assert a.stop() == 0
            a.start()  # still full
            a.wait_ready()
            all_reach_all(nodes, SETTLE_S)
            ballast.unlink()
            wait_until(lambda: healthy(a) and "No space" not in str(a.ask()), HEALED_S, "kept after all")
            a.vpnd("remove", "b")
            wait_standing(b, "removed", SETTLE_S)
            check_logs(nodes)
