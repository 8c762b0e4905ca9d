"""A small network of namespaces on this machine, and the promise that nothing of it stays.

    with Lab() as lab:                       a 192.168.77.1 ── veth ── 192.168.77.2 b
        a, b = lab.nodes
        lab.run(a, "ping", "-c1", b.address)

With more than two nodes a bridge in one more namespace joins them. Names are unique per run, so several labs
may be open at once. Only the standard library and the `ip` command are used: the demonstration runs this
before anything is installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .link import Link
from .processes import command_line, pids_in_network_namespace

NETWORK = "192.168.77"
PREFIX_BITS = 24
DEVICE = "eth0"
NAMESPACES = Path("/run/netns")
LABELS = (*"abcdefghijklmnop", *(f"n{place}" for place in range(17, 255)))
NO_WAITING_FOR_DUPLICATES = "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad"

#: How long processes may take to end after SIGTERM, and after SIGKILL, before the lab goes on without them.
TERMINATE_GRACE_S = 3.0
KILL_GRACE_S = 5.0
#: How long the kernel may take to notice that both ends of a link are up.
CARRIER_S = 10.0
POLL_S = 0.02
#: Where other tests run beside this one, its nodes have a part of the CPU only.
BUSY_FACTOR = 4


class LabError(Exception):
    """A command of the lab failed, or this machine lacks something it needs. The lab can still be closed."""


@dataclass(frozen=True)
class Namespace:
    """One machine of the lab: its namespace's name, its label (a, b, …) and its address on the link."""

    name: str
    label: str
    address: str

    @property
    def path(self) -> Path:
        """The file that names the namespace."""
        return NAMESPACES / self.name


class Lab:
    """Namespaces, the link between them, the processes in them. A context manager; needs root.

    `directory` is a temporary directory for state and logs, removed with the rest. Owner: one thread.
    """

    def __init__(
        self, nodes: int = 2, *, netem: str = "", link_mtu: int = 1500, link: Link | None = None
    ) -> None:
        """`netem` is what tc(8) takes after the word netem ("delay 4ms"), for each node's sending. `link`: what
        is between two nodes, for kernels without netem; packets of at most the MTU then."""
        self.token = f"{os.getpid():x}{secrets.token_hex(2)}"
        self.nodes = [
            Namespace(f"lab-{self.token}-{label}", label, f"{NETWORK}.{place}")
            for place, label in enumerate(LABELS[:nodes], start=1)
        ]
        self._switch = Namespace(f"lab-{self.token}-switch", "switch", "") if nodes > 2 or link else None
        self._netem, self._link = netem, link
        self._link_mtu = link_mtu
        self._processes: list[subprocess.Popen[Any]] = []
        self._paths: list[Path] = []
        self._fresh: dict[str, set[str]] = {}
        self.directory = Path()

    # -- making and unmaking ---------------------------------------------------------------------------

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("network namespaces need root: run it with sudo")
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        self.directory = self.remove_at_exit(Path(tempfile.mkdtemp(prefix="lab-")))
        for namespace in self._all():
            run_command("ip", "netns", "add", namespace.name)
            # A link-local address that is ready a second late would be a change of the network to every node
            run_command("ip", "netns", "exec", namespace.name, "sh", "-c", NO_WAITING_FOR_DUPLICATES)
            self.ip(namespace, "link", "set", "lo", "up")
        self._connect()
        wait_until(self._take_stock, CARRIER_S, "every link has a carrier")

    def _connect(self) -> None:
        """Links and addresses between the namespaces."""
        if self._switch and self._link:
            self._impair_between(self._switch, self._link)
        elif self._switch:
            self.ip(self._switch, "link", "add", "br0", "type", "bridge")
            self.ip(self._switch, "link", "set", "br0", "up")
            for namespace in self.nodes:
                port = f"to-{namespace.label}"
                self._join(namespace, self._switch, port)
                self.ip(self._switch, "link", "set", port, "master", "br0", "up")
        elif len(self.nodes) == 2:
            self._join(self.nodes[0], self.nodes[1], DEVICE)
        for namespace in self.nodes:
            if len(self.nodes) > 1:
                self.ip(namespace, "addr", "add", f"{namespace.address}/{PREFIX_BITS}", "dev", DEVICE)
                self.ip(namespace, "link", "set", DEVICE, "mtu", str(self._link_mtu), "up")
                if self._netem:
                    self.impair(namespace, self._netem)

    def _take_stock(self) -> bool:
        """What is there at first. False while the kernel has not noticed yet that a link's other end is up: a route
        that is marked linkdown now would look like another one later."""
        self._fresh = {namespace.name: self.inventory(namespace) for namespace in self.nodes}
        return not any("linkdown" in item.split() for found in self._fresh.values() for item in found)

    def _impair_between(self, middle: Namespace, link: Link) -> None:
        ports = [f"to-{namespace.label}" for namespace in self.nodes]
        for namespace, port in zip(self.nodes, ports, strict=True):
            self._join(namespace, middle, port)
            self.ip(namespace, "link", "set", "dev", DEVICE, "gso_max_segs", "1")
            # What is left to a card to do would be left undone
            self.run(namespace, "ethtool", "-K", DEVICE, "tx", "off", "gro", "off")
            self.ip(middle, "link", "set", port, "mtu", str(self._link_mtu), "up")
        process = self.spawn(
            middle, *link.command(self.directory), *ports, *link.words(), output=subprocess.PIPE
        )
        assert process.stdout
        if process.stdout.readline().strip() != "up":
            raise LabError("the link's program does not run")

    def _join(self, one: Namespace, other: Namespace, other_device: str) -> None:
        peer = ("peer", "name", other_device, "netns", other.name)
        self.ip(one, "link", "add", DEVICE, "type", "veth", *peer)

    def close(self) -> None:
        """End every process, remove namespaces, files and directories. Signals wait until it is done."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            self._end_processes()
            for namespace in self._all():
                if namespace.path.exists():
                    subprocess.run(["ip", "netns", "del", namespace.name], check=False)
            for path in self._paths:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def _end_processes(self) -> None:
        # Whatever left its process group is found by the namespace it is in, which is the lab's own.
        _signal_all(self._living(), signal.SIGTERM)
        deadline = time.monotonic() + TERMINATE_GRACE_S
        while self._living() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        deadline = time.monotonic() + KILL_GRACE_S
        while (pids := self._living()) and time.monotonic() < deadline:
            _signal_all(pids, signal.SIGKILL)
            time.sleep(POLL_S)
        for process in self._processes:
            process.poll()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()

    def _living(self) -> list[int]:
        """Processes in the lab's namespaces, zombies not counted, and started ones not yet in them."""
        inside = {pid for namespace in self._all() for pid in pids_in_network_namespace(namespace.path)}
        return sorted(inside | {process.pid for process in self._processes if process.poll() is None})

    def _all(self) -> list[Namespace]:
        return [*self.nodes, *([self._switch] if self._switch else [])]

    # -- using it --------------------------------------------------------------------------------------

    def run(
        self,
        namespace: Namespace,
        *command: str,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a namespace to its end; output captured as text.

        Raises LabError with its output when it fails (unless `check` is off) or outlives `timeout_s`.
        """
        process = self.spawn(namespace, *command, output=subprocess.PIPE, env=env)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(command)}: not done after {timeout_s} s") from None
        finally:
            _signal_group(process, signal.SIGKILL)
            process.wait()
            self._processes.remove(process)
        if check and process.returncode != 0:
            raise LabError(f"{' '.join(command)}: exit code {process.returncode}: {(err or out).strip()}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def spawn(
        self,
        namespace: Namespace,
        *command: str,
        output: int | Path = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command in a namespace and return at once; its pid is the command's own.

        `output` is a file that standard output and error are appended to, or PIPE for text pipes of both.
        It leads a process group of its own, which the lab ends. `env` is added to this process's.
        """
        with contextlib.ExitStack() as stack:
            where: Any = stack.enter_context(output.open("ab")) if isinstance(output, Path) else output
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace.name, *command],
                stdin=subprocess.DEVNULL,
                stdout=where,
                stderr=subprocess.STDOUT if isinstance(output, Path) else where,
                text=True,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        self._processes.append(process)
        return process

    def ip(self, namespace: Namespace, *words: str) -> str:
        """An `ip` command about a namespace; its output."""
        return run_command("ip", "-n", namespace.name, *words)

    def impair(self, namespace: Namespace, netem: str) -> None:
        """Delay, lose, reorder … what a namespace sends, as tc(8) netem says; empty: no longer.

        Raises LabError when this kernel has no netem.
        """
        base = ["tc", "-n", namespace.name, "qdisc"]
        if netem:
            try:
                run_command(*base, "replace", "dev", DEVICE, "root", "netem", *netem.split())
            except LabError as error:
                if "kind is unknown" in str(error):
                    raise LabError("this kernel has no netem") from error
                raise
        else:
            run_command(*base, "del", "dev", DEVICE, "root")

    def remove_at_exit(self, path: Path) -> Path:
        """Remove this file or directory too when the lab closes; `leaks` then looks at it."""
        self._paths.append(path)
        return path

    # -- looking for what is left ----------------------------------------------------------------------

    def inventory(self, namespace: Namespace) -> set[str]:
        """Processes, devices, addresses, routes and listening sockets of a namespace, a line each.

        Multicast and link-local entries, which the kernel adds when it likes, are left out.
        """
        processes = {pid: command_line(pid) for pid in pids_in_network_namespace(namespace.path)}
        found = {f"process {pid}: {line}" for pid, line in processes.items() if not _passing(line)}
        for link in json.loads(self.ip(namespace, "-json", "addr", "show") or "[]"):
            found.add(f"device {link['ifname']}")
            found |= {
                f"address {address['local']} on {link['ifname']}"
                for address in link.get("addr_info", ())
                if address.get("scope") != "link"
            }
        for family in ("-4", "-6"):
            for line in self.ip(namespace, family, "route", "show", "table", "all").splitlines():
                if not any(word in line for word in ("fe80::", "ff00::", "multicast", "anycast")):
                    found.add(f"route {' '.join(line.split())}")
        sockets = run_command("ip", "netns", "exec", namespace.name, "ss", "-Hltun").splitlines()
        found |= {f"socket {line.split()[0]} {line.split()[4]}" for line in sockets if line.strip()}
        return found

    def leaks(self) -> list[str]:
        """What is left. While the lab is open: all in its nodes that was not there when it opened, its own
        running processes included. After it closed: namespaces, processes and files that should be gone."""
        if all(namespace.path.exists() for namespace in self.nodes) and self._fresh:
            return sorted(
                f"{namespace.label}: {item}"
                for namespace in self.nodes
                for item in self.inventory(namespace) - self._fresh[namespace.name]
            )
        left = [f"namespace {namespace.name}" for namespace in self._all() if namespace.path.exists()]
        left += [f"process {pid}: {command_line(pid)}" for pid in self._living()]
        return left + [f"file {path}" for path in self._paths if path.exists()]


def _passing(command: str) -> bool:
    """Whether it is a program that a node runs for a moment, now and then."""
    return Path(command.partition(" ")[0]).name == "nft"


def within(limit_s: float) -> float:
    """The limit of what takes so long at most on an idle machine, on this one."""
    return limit_s * (BUSY_FACTOR if "PYTEST_XDIST_WORKER" in os.environ else 1)


def wait_until(condition: Any, timeout_s: float, what: str) -> Any:
    """Poll `condition` until it returns something true; returns that. Raises LabError after `within(timeout_s)`."""
    timeout_s = within(timeout_s)
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise LabError(f"not within {timeout_s} s: {what}")
        time.sleep(POLL_S)
    return answer


def run_command(*command: str) -> str:
    """Run a short command of the host; its output. Raises LabError with what it said when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@contextlib.contextmanager
def clean_exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit inside the block, so that labs are closed. Main thread only."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal processes, of which some may have ended meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _signal_group(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Signal a running child's group; the number of a child waited for may belong to a stranger."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
