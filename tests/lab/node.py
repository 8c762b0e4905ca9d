"""vpnd nodes in a lab: configuration file, start, status, stop, kill, through vpnd's command line."""

from __future__ import annotations

import compileall
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .network import Lab, LabError, Namespace, wait_until, within

ROOT = Path(__file__).resolve().parents[2]
P2P_PORT = 4001
VIRTUAL_NETWORK = "10.86.0"
PACKAGES = ("vpnd", "supervisor", "shards")

#: How long one question to the daemon may take while `wait_ready` polls.
STATUS_TIMEOUT_S = 5.0


def script_command(root: Path = ROOT) -> list[str]:
    """vpnd as a user of a clone starts it; the first call makes the clone's .venv."""
    return [str(root / "scripts" / "vpnd")]


def module_command() -> list[str]:
    """vpnd run by this very interpreter; PYTHONPATH decides of which checkout (`Node(root=…)`), never the directory
    this runs in."""
    return [sys.executable, "-P", "-m", "vpnd"]


@functools.cache
def _compile(root: Path) -> None:
    """An installed vpnd has its byte code, and a clone after its first start, unless the environment keeps Python from
    writing it; without it half of what a node takes to start is compiling, and it takes more memory."""
    for package in PACKAGES:
        compileall.compile_dir(root / package, quiet=2)


class Node:
    """One vpnd in a namespace. Its directory, log and processes are the lab's to remove.

    `config` is the content of vpnd.toml; it may be changed until `start`.
    """

    def __init__(
        self,
        lab: Lab,
        namespace: Namespace,
        config: dict[str, Any] | None = None,
        *,
        command: Sequence[str] | None = None,
        root: Path = ROOT,
    ) -> None:
        self.lab = lab
        self.namespace = namespace
        self.config = config or {}
        self.state_dir = lab.directory / namespace.label
        self.config_file = self.state_dir / "vpnd.toml"
        self.log_file = lab.directory / f"{namespace.label}.log"
        self.command = list(command or module_command())
        self._foreign = command is not None or root != ROOT
        self.env = {"VPND_STATE_DIR": str(self.state_dir), "VPND_CONFIG": str(self.config_file)}
        if command is None:
            self.env["PYTHONPATH"] = str(root)
        if "PYTEST_XDIST_WORKER" in os.environ:
            # Other tests run beside this one, and need the CPU as much as its shards do
            self.env["VPND_PROCESS_REALTIME"] = "false"
        self.process: subprocess.Popen[str] | None = None
        self.state_dir.mkdir(mode=0o700, exist_ok=True)
        if command is None or self.command == script_command(root):
            _compile(root)

    @property
    def virtual_ip(self) -> str:
        """The node's address inside the VPN."""
        return str(self.config["network"]["virtual_ip"])

    def write_config(self) -> None:
        """Write `config` to the node's vpnd.toml."""
        self.config_file.write_text(to_toml(self.config))

    def vpnd(
        self, *words: str, check: bool = True, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a vpnd command for this node to its end. Raises LabError when it fails and `check` is on."""
        command = (*self.command, *words)
        return self.lab.run(self.namespace, *command, check=check, env=self.env, timeout_s=timeout_s)

    def peer_id(self) -> str:
        """What `vpnd id` prints; makes the identity on first use. Asked of the command only where the lab runs
        outside of vpnd's own interpreter: a process for each node of each test takes its time."""
        if self._foreign:
            return self.vpnd("id").stdout.strip()
        from vpnd.identity import load_or_create

        file = self.config.get("p2p", {}).get("identity_file", "identity.pem")
        return load_or_create(self.state_dir / file).peer_id

    def start(self, *words: str) -> None:
        """Write the configuration and start the daemon in the foreground of a process of its own."""
        if self.process and self.process.poll() is None:
            raise LabError(f"node {self.namespace.label} runs already")
        self.write_config()
        command = (*self.command, "start", *words)
        self.process = self.lab.spawn(self.namespace, *command, output=self.log_file, env=self.env)

    def wait_ready(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until the daemon says it is ready; its status. Raises LabError, with the log's end, when it is
        not within `timeout_s` (see `within`) or the daemon ended."""
        timeout_s = within(timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.ask()
            if status and status.get("ready"):
                return status
            if self.process and self.process.poll() is not None:
                code = self.process.returncode
                raise LabError(f"node {self.namespace.label} ended with {code}: {self.log_tail()}")
            if time.monotonic() > deadline:
                raise LabError(
                    f"node {self.namespace.label} not ready after {timeout_s} s: {self.log_tail()}"
                )
            time.sleep(0.02)

    def ask(self, command: str = "status", **arguments: Any) -> dict[str, Any]:
        """Ask over the status socket, which costs no process; empty when nobody answers in STATUS_TIMEOUT_S."""
        path = self.config.get("status", {}).get("socket", "vpnd.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(STATUS_TIMEOUT_S)
            try:
                connection.connect(os.path.join(self.state_dir, path))
                connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            except OSError:
                return {}
        return dict(json.loads(answer)) if answer else {}

    def status(self) -> dict[str, Any]:
        """`vpnd status --json`, whether the node is healthy or not."""
        done = self.vpnd("status", "--json", check=False)
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            raise LabError(f"vpnd status: {done.stderr.strip() or done.stdout.strip()}") from None

    def stop(self, timeout_s: float = 20.0) -> int:
        """As `vpnd stop` does it; the daemon's exit code."""
        if not self.ask("stop"):
            raise LabError(f"node {self.namespace.label} does not answer: {self.log_tail()}")
        return self.wait_ended(timeout_s)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the daemon's first process, the supervisor, alone."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def wait_ended(self, timeout_s: float = 20.0) -> int:
        """Wait for the process `start` started; its exit code."""
        if self.process is None:
            raise LabError(f"node {self.namespace.label} was not started")
        process = self.process
        wait_until(lambda: process.poll() is not None, timeout_s, f"node {self.namespace.label} ends")
        return int(process.returncode)

    def pids(self) -> list[int]:
        """Root of the daemon's process tree, for `cpu_seconds` and `pss_bytes`."""
        return [self.process.pid] if self.process and self.process.poll() is None else []

    def log_tail(self, lines: int = 5) -> str:
        """The last lines the daemon printed."""
        if not self.log_file.exists():
            return ""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])


def mesh_of_nodes(
    lab: Lab,
    *,
    shards: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    command: Sequence[str] | None = None,
    root: Path = ROOT,
) -> list[Node]:
    """A node in each namespace of the lab, each listing all others; configured, not started.

    `settings` are further tables, {"session": {"congestion_control": "cubic"}}, for all nodes.
    """
    nodes = [Node(lab, namespace, command=command, root=root) for namespace in lab.nodes]
    peers = []
    for place, node in enumerate(nodes, start=1):
        ip = node.namespace.address
        node.config = {
            "network": {
                "interface": "vpnd0",
                "virtual_ip": f"{VIRTUAL_NETWORK}.{place}",
                "subnet": 16,
                "routes": [f"{VIRTUAL_NETWORK}.0/16"],
            },
            "p2p": {"listen": [f"/ip4/{ip}/tcp/{P2P_PORT}"]},
        }
        if shards is not None:
            node.config["worker"] = {"shards": shards}
        for table, keys in (settings or {}).items():
            node.config.setdefault(table, {}).update(keys)
        node.write_config()
        peers.append(
            {
                "name": node.namespace.label,
                "peer_id": node.peer_id(),
                "virtual_ip": node.virtual_ip,
                "addresses": [f"/ip4/{ip}/tcp/{P2P_PORT}"],
            }
        )
    for node in nodes:
        node.config["peers"] = [peer for peer in peers if peer["name"] != node.namespace.label]
        node.write_config()
    return nodes


def pair_of_nodes(
    lab: Lab,
    *,
    shards: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    command: Sequence[str] | None = None,
    root: Path = ROOT,
) -> tuple[Node, Node]:
    """The two nodes of a lab of two, each listing the other; configured, not started."""
    first, second = mesh_of_nodes(lab, shards=shards, settings=settings, command=command, root=root)
    return first, second


def to_toml(config: Mapping[str, Any]) -> str:
    """TOML of tables, and lists of tables, of strings, numbers, booleans and lists of those."""
    parts = []
    for table, content in config.items():
        several = isinstance(content, list)
        for keys in content if several else [content]:
            parts.append(f"[[{table}]]" if several else f"[{table}]")
            # A JSON string, number, boolean or list of them is TOML as well.
            parts += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
            parts.append("")
    return "\n".join(parts)
