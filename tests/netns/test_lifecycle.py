"""A node's life on a machine: how it ends, what it refuses to start over, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Node, module_command, process_tree, socket_in, wait_until

from vpnd import errors

pytestmark = pytest.mark.root

#: After kill -9 of the supervisor nothing is left within this time.
GONE_S = 2.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(2) as opened:
        yield opened


def alone(lab: Lab, **network: object) -> Node:
    """A node that nobody knows, in the lab's first namespace."""
    namespace = lab.nodes[0]
    node = Node(lab, namespace)
    node.config = {
        "network": {"virtual_ip": "10.86.0.1", "routes": ["10.87.0.0/16"], **network},
        "p2p": {"listen": [f"/ip4/{namespace.address}/tcp/4001"]},
        "worker": {"shards": 2},
    }
    return node


def started(lab: Lab, **network: object) -> Node:
    node = alone(lab, **network)
    node.start()
    node.wait_ready()
    return node


def nothing_left(lab: Lab, node: Node, timeout_s: float = GONE_S) -> None:
    path = node.state_dir / "vpnd.sock"
    wait_until(
        lambda: not lab.leaks() and not path.exists(), timeout_s, f"nothing is left of it; {lab.leaks()}"
    )


ENDINGS: list[tuple[str, Callable[[Node], object]]] = [
    ("vpnd stop", lambda node: node.vpnd("stop")),
    ("SIGINT", lambda node: node.kill(signal.SIGINT)),
    ("SIGTERM", lambda node: node.kill(signal.SIGTERM)),
]


@pytest.mark.parametrize(("how", "end"), ENDINGS, ids=[row[0] for row in ENDINGS])
def test_a_node_that_is_asked_to_end_takes_everything_back(
    how: str, end: Callable[[Node], object], lab: Lab
) -> None:
    node = started(lab)
    assert "10.87.0.0/16" in lab.ip(node.namespace, "route", "show")
    end(node)
    assert node.wait_ended() == 0
    nothing_left(lab, node)
    assert "Traceback" not in node.log_file.read_text()


def test_ctrl_c_of_a_terminal_reaches_all_processes_and_the_node_ends_as_well(lab: Lab) -> None:
    node = started(lab)
    for pid in process_tree(node.pids()):
        with contextlib.suppress(ProcessLookupError):  # a program that it ran for a moment
            os.kill(pid, signal.SIGINT)
    assert node.wait_ended() == 0
    nothing_left(lab, node)


@pytest.mark.parametrize("after_s", [0.1, 0.6, 1.1])
def test_a_node_that_is_ended_while_it_starts_leaves_nothing(after_s: float, lab: Lab) -> None:
    node = alone(lab)
    node.start()
    time.sleep(after_s)
    node.kill(signal.SIGTERM)
    assert node.wait_ended() in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    nothing_left(lab, node)
    assert "Traceback" not in node.log_file.read_text()


def test_a_killed_supervisor_takes_the_whole_node_with_it(lab: Lab) -> None:
    node = started(lab)
    pids = process_tree(node.pids())
    assert len(pids) >= 4
    begun_s = time.monotonic()
    node.kill(signal.SIGKILL)
    node.wait_ended()
    nothing_left(lab, node)
    print(f"gone after {time.monotonic() - begun_s:.2f} s")
    node.start()
    node.wait_ready()
    assert node.stop() == 0


def test_a_restart_keeps_the_identity_and_the_address(lab: Lab) -> None:
    node = alone(lab)
    del node.config["network"]["virtual_ip"]
    seen = []
    for _ in range(2):
        node.start()
        status = node.wait_ready()
        seen.append((status["node"]["peer_id"], status["node"]["virtual_ip"]))
        assert node.stop() == 0
    assert seen[0] == seen[1]
    assert seen[0][0] == node.peer_id()


def refused(node: Node, error: type[errors.VpndError], *said: str) -> None:
    """`vpnd start` ends at once with the error's code and one line that has these words."""
    node.write_config()
    done = node.vpnd("start", check=False, timeout_s=30)
    assert done.returncode == error.exit_code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("vpnd: error: ")]
    assert len(lines) == 1, done.stderr
    for word in said:
        assert word in lines[0]
    assert "Traceback" not in done.stderr


def test_a_second_node_on_one_state_directory_is_refused(lab: Lab) -> None:
    node = started(lab)
    before = lab.inventory(node.namespace)
    refused(node, errors.AlreadyRunningError, str(node.state_dir), "stop")
    assert lab.inventory(node.namespace) == before
    assert node.ask()["ready"]


def second(lab: Lab, **network: object) -> Node:
    """Another node in the first one's namespace, with a directory of its own."""
    node = alone(lab, **network)
    node.state_dir = lab.directory / "second"
    node.state_dir.mkdir(mode=0o700)
    node.config_file = node.state_dir / "vpnd.toml"
    node.log_file = lab.directory / "second.log"
    node.env |= {"VPND_STATE_DIR": str(node.state_dir), "VPND_CONFIG": str(node.config_file)}
    return node


def test_a_second_node_on_one_interface_or_port_or_network_is_refused(lab: Lab) -> None:
    first = started(lab)
    other = second(lab, virtual_ip="10.99.0.1", routes=[])
    other.config["p2p"]["listen"] = [f"/ip4/{first.namespace.address}/tcp/4002"]
    before = lab.inventory(first.namespace)
    refused(other, errors.AlreadyRunningError, "vpnd0")
    other.config["network"]["interface"] = "vpnd1"
    other.config["p2p"]["listen"] = first.config["p2p"]["listen"]
    refused(other, errors.AlreadyRunningError, "4001")
    other.config["p2p"]["listen"] = [f"/ip4/{first.namespace.address}/tcp/4002"]
    other.config["network"]["virtual_ip"] = "10.86.9.9"
    refused(other, errors.ConfigError, "10.86.0.0/16", "vpnd0")
    assert lab.inventory(first.namespace) == before
    assert first.ask()["ready"]

    other.config["network"]["virtual_ip"] = "10.99.0.1"
    other.start()
    other.wait_ready()
    assert first.ask()["ready"], "two nodes on one machine"
    assert other.stop() == 0
    assert lab.inventory(first.namespace) == before


OVERLAPS = [
    ("the link's own network", {"virtual_ip": "192.168.77.200", "subnet": 24}),
    ("a network around the link's", {"virtual_ip": "192.168.0.1", "subnet": 16}),
    ("a route of the configuration", {"routes": ["192.168.77.128/25"]}),
]


@pytest.mark.parametrize(("what", "network"), OVERLAPS, ids=[row[0] for row in OVERLAPS])
def test_an_address_range_the_machine_already_routes_is_refused(
    what: str, network: dict[str, object], lab: Lab
) -> None:
    node = alone(lab, **network)
    refused(node, errors.ConfigError, "192.168.77.", "eth0")
    assert not lab.leaks()


def test_a_port_somebody_else_has_is_refused(lab: Lab) -> None:
    node = alone(lab)
    with socket_in(node.namespace, "0.0.0.0", socket.SOCK_STREAM) as holder:
        holder.bind((node.namespace.address, 4001))
        holder.listen()
        refused(node, errors.AlreadyRunningError, "4001")
    assert not lab.leaks()


WRONG = [
    ("an unknown key", "[network]\nmtuu = 1400\n", "network.mtuu"),
    ("a value out of range", "[network]\nmtu = 100\n", "network.mtu"),
    ("no TOML", "[network\n", "vpnd.toml"),
    ("a route with host bits", '[network]\nroutes = ["10.1.2.3/8"]\n', "network.routes"),
    ("a multiaddr that is none", '[p2p]\nlisten = ["10.0.0.1:4001"]\n', "p2p.listen"),
]


@pytest.mark.parametrize(("what", "text", "said"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_configuration_is_refused_and_nothing_is_changed(
    what: str, text: str, said: str, lab: Lab
) -> None:
    node = alone(lab)
    node.config_file.write_text(text)
    done = node.vpnd("start", check=False)
    assert done.returncode == 2
    assert said in done.stderr and str(node.config_file) in done.stderr
    assert not lab.leaks()
    assert sorted(path.name for path in node.state_dir.iterdir()) == ["vpnd.toml"]


def test_without_root_one_line_says_so(lab: Lab) -> None:
    """As nobody, in a directory of its own: what matters is that it asks for root before anything else."""
    if not shutil.which("setpriv"):
        pytest.fail("setpriv (util-linux) is needed")
    state = lab.directory / "nobody"
    state.mkdir()
    os.chown(state, 65534, 65534)
    lab.directory.chmod(0o755)
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *module_command(), "start")
    root = Path(__file__).resolve().parents[2]
    environment = {"VPND_STATE_DIR": str(state), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = lab.run(lab.nodes[0], *command, check=False, env=environment)
    assert done.returncode == errors.PrivilegeError.exit_code, done.stderr
    assert done.stderr.count("\n") == 1 and "sudo" in done.stderr
    assert not any(state.iterdir()) and not lab.leaks()


def test_a_detached_node_goes_on_and_can_be_stopped(lab: Lab) -> None:
    node = alone(lab)
    node.write_config()
    command = ["ip", "netns", "exec", node.namespace.name, *node.command, "start", "--detach"]
    environment = {**os.environ, **node.env}
    with (lab.directory / "detach.log").open("w") as out:  # no pipe: the daemon might hold it
        subprocess.run(command, env=environment, stdout=out, stderr=out, check=True, timeout=60)
    status = node.status()
    assert status["ready"]
    assert f"process {status['supervisor']['pid']}" in (lab.directory / "detach.log").read_text()
    node.vpnd("stop")
    nothing_left(lab, node)
    assert node.vpnd("status", check=False).returncode == errors.NotRunningError.exit_code


def test_a_node_without_its_device_ends_by_itself_and_says_why(lab: Lab) -> None:
    node = started(lab)
    lab.ip(node.namespace, "link", "del", "vpnd0")
    assert node.wait_ended() != 0
    assert "vpnd0 is gone (" in node.log_file.read_text()
    assert "start the node again" in node.log_file.read_text()
    nothing_left(lab, node)
    assert "Traceback" not in node.log_file.read_text()
