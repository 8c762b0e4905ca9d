"""What the bench compares: a way to join two namespaces, set up as its own documentation says, nothing tuned.

Each contender is made for one open lab of two nodes, started once, and gone when the lab closes.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from .network import Lab, LabError, Namespace, run_command, wait_until
from .node import ROOT, Node, pair_of_nodes, script_command

#: Debian's packages of the contenders, and of the tools that drive them.
PACKAGES = ("iperf3", "nebula", "wireguard-go", "wireguard-tools", "gcc", "libc6-dev", "ethtool")

WIREGUARD_PORT = 51820
#: What wg-quick(8) sets on a link of 1500 bytes.
WIREGUARD_MTU = 1420
WIREGUARD_SOCKETS = Path("/var/run/wireguard")
NEBULA_PORT = 4242
DEVICE_WAIT_S = 5.0


class Contender(Protocol):
    """One VPN between the two nodes of a lab."""

    #: The second node's address, as the first one reaches it through the VPN.
    target: str

    def prepare(self) -> None:
        """Write keys and configuration: what a user does once, before the start that is measured."""

    def start(self) -> None:
        """Start both ends; returns before they are ready."""

    def roots(self) -> list[list[int]]:
        """For each end, the pids its process tree starts from."""

    def explain(self) -> str:
        """The end of the logs, for the report of a failure."""


class Veth:
    """No VPN: the link itself."""

    def __init__(self, lab: Lab) -> None:
        self.target = lab.nodes[1].address

    def prepare(self) -> None:
        """Nothing to prepare."""

    def start(self) -> None:
        """The link is up already."""

    def roots(self) -> list[list[int]]:
        """The kernel does it all."""
        return [[], []]

    def explain(self) -> str:
        """A link has no log."""
        return ""


class WireguardGo:
    """wireguard-go: WireGuard in user space. Never the kernel's: the device must be a TUN."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.target = "10.99.0.2"
        # Its control socket has a fixed directory and the device's name, whatever the namespace.
        token = secrets.token_hex(3)
        self._devices = [f"wg{token}{namespace.label}" for namespace in lab.nodes]
        self._pids: list[list[int]] = []
        for device in self._devices:
            lab.remove_at_exit(WIREGUARD_SOCKETS / f"{device}.sock")

    def prepare(self) -> None:
        """Two key pairs and two configurations for `wg setconf`."""
        keys = [run_command("wg", "genkey").strip() for _ in self._lab.nodes]
        for own, other in ((0, 1), (1, 0)):
            text = (
                f"[Interface]\nPrivateKey = {keys[own]}\nListenPort = {WIREGUARD_PORT}\n"
                f"[Peer]\nPublicKey = {_wireguard_public(keys[other])}\nAllowedIPs = 10.99.0.{other + 1}/32\n"
                f"Endpoint = {self._lab.nodes[other].address}:{WIREGUARD_PORT}\n"
            )
            self._file(own, "conf").write_text(text)

    def start(self) -> None:
        """The daemon, then the steps of wg-quick: configuration, address, MTU, up."""
        for namespace, device in zip(self._lab.nodes, self._devices, strict=True):
            log = self._file(len(self._pids), "log")
            process = self._lab.spawn(namespace, "wireguard-go", "-f", device, output=log)
            self._pids.append([process.pid])
        for place, (namespace, device) in enumerate(zip(self._lab.nodes, self._devices, strict=True)):
            socket = WIREGUARD_SOCKETS / f"{device}.sock"
            wait_until(socket.exists, DEVICE_WAIT_S, f"wireguard-go makes {socket}")
            _require_tun(self._lab, namespace, device)
            self._lab.run(namespace, "wg", "setconf", device, str(self._file(place, "conf")))
            self._lab.ip(namespace, "addr", "add", f"10.99.0.{place + 1}/24", "dev", device)
            self._lab.ip(namespace, "link", "set", device, "mtu", str(WIREGUARD_MTU), "up")

    def roots(self) -> list[list[int]]:
        """The two daemons."""
        return self._pids

    def explain(self) -> str:
        """Both logs' ends."""
        return _tails(self._file(place, "log") for place in range(2))

    def _file(self, place: int, kind: str) -> Path:
        return self._lab.directory / f"wireguard-{place}.{kind}"


class Nebula:
    """nebula with certificates of its own, MTU and everything else as it comes."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.target = "10.98.0.2"
        self._pids: list[list[int]] = []

    def prepare(self) -> None:
        """An authority, two certificates, two configurations."""
        base = self._lab.directory
        authority = ("-ca-crt", str(base / "ca.crt"), "-ca-key", str(base / "ca.key"))
        run_command("nebula-cert", "ca", "-name", "lab", "-out-crt", authority[1], "-out-key", authority[3])
        for place in (1, 2):
            own, other = base / f"nebula{place}", 3 - place
            run_command(
                "nebula-cert", "sign", *authority, "-name", f"host{place}", "-ip", f"10.98.0.{place}/24",
                "-out-crt", f"{own}.crt", "-out-key", f"{own}.key",
            )  # fmt: skip
            anything = [{"port": "any", "proto": "any", "host": "any"}]
            endpoint = f"{self._lab.nodes[other - 1].address}:{NEBULA_PORT}"
            config = {
                "pki": {"ca": str(base / "ca.crt"), "cert": f"{own}.crt", "key": f"{own}.key"},
                "static_host_map": {f"10.98.0.{other}": [endpoint]},
                "lighthouse": {"am_lighthouse": False, "hosts": []},
                "listen": {"host": "0.0.0.0", "port": NEBULA_PORT},
                "tun": {"dev": f"neb{place}"},
                "firewall": {"outbound": anything, "inbound": anything},
            }
            # YAML is a superset of JSON.
            Path(f"{own}.yml").write_text(json.dumps(config))

    def start(self) -> None:
        """One process a node."""
        for place, namespace in enumerate(self._lab.nodes, start=1):
            own = self._lab.directory / f"nebula{place}"
            process = self._lab.spawn(namespace, "nebula", "-config", f"{own}.yml", output=Path(f"{own}.log"))
            self._pids.append([process.pid])

    def roots(self) -> list[list[int]]:
        """The two daemons."""
        return self._pids

    def explain(self) -> str:
        """Both logs' ends."""
        return _tails(self._lab.directory / f"nebula{place}.log" for place in (1, 2))


class Vpnd:
    """vpnd with its defaults and a number of shards; `env`, VPND_SESSION_WINDOW_BYTES and the like, sets others."""

    def __init__(
        self, lab: Lab, shards: int, root: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> None:
        self._lab, self._shards, self._root, self._env = lab, shards, root, env or {}
        self.nodes: tuple[Node, ...] = ()
        self.target = ""

    def prepare(self) -> None:
        """Identities and configurations. This checkout through its scripts/vpnd, the command users have;
        another one through this interpreter, so that comparing two does not need a second installation."""
        own = self._root == ROOT and Path(script_command()[0]).exists()
        command = script_command() if own else None
        self.nodes = pair_of_nodes(self._lab, shards=self._shards, command=command, root=self._root)
        for node in self.nodes:
            node.env.update(self._env)
        self.target = self.nodes[1].virtual_ip

    def start(self) -> None:
        """Both daemons, as a user starts them."""
        for node in self.nodes:
            node.start()

    def roots(self) -> list[list[int]]:
        """The two supervisors."""
        return [node.pids() for node in self.nodes]

    def explain(self) -> str:
        """Both logs' ends."""
        return _tails(node.log_file for node in self.nodes)


def available(
    names: list[str], shards: list[int], roots: list[Path]
) -> tuple[dict[str, Callable[[Lab], Contender]], list[str]]:
    """Contenders by name, in the order they are shown, and the names of those not installed."""
    found: dict[str, Callable[[Lab], Contender]] = {}
    missing = []
    if "veth" in names:
        found["veth"] = Veth
    for name, kind, tools in (
        ("nebula", Nebula, ("nebula", "nebula-cert")),
        ("wireguard-go", WireguardGo, ("wireguard-go", "wg")),
    ):
        if name in names:
            if all(shutil.which(tool) for tool in tools):
                found[name] = kind
            else:
                missing.append(name)
    if "vpnd" in names:
        for root in roots:
            suffix = "" if root == ROOT else f"@{root.name}"
            if f"vpnd-{shards[0]}{suffix}" in found:
                suffix = f"@{root}"
            for count in shards:
                found[f"vpnd-{count}{suffix}"] = _vpnd(count, root)
    return found, missing


def _vpnd(shards: int, root: Path) -> Callable[[Lab], Contender]:
    return lambda lab: Vpnd(lab, shards, root)


def _require_tun(lab: Lab, namespace: Namespace, device: str) -> None:
    """Refuse a WireGuard device that is the kernel's own."""
    kind = json.loads(lab.ip(namespace, "-json", "-details", "link", "show", device))[0]
    if kind.get("linkinfo", {}).get("info_kind") != "tun":
        raise LabError(f"{device} is not a TUN device: this would measure the kernel's WireGuard")


def _wireguard_public(private: str) -> str:
    done = subprocess.run(["wg", "pubkey"], input=private, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _tails(files: Iterable[Path], lines: int = 5) -> str:
    return "\n".join(
        f"{file.name}: {line}"
        for file in files
        if file.exists()
        for line in file.read_text(errors="replace").splitlines()[-lines:]
    )
