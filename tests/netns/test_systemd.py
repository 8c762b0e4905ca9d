"""A node under a service manager: what it tells it, and that it gets along with what the unit leaves it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, Node, module_command, wait_until
from lab.joining import machine

from vpnd.cli import main, service
from vpnd.cli.command import Where
from vpnd.errors import MachineError

pytestmark = pytest.mark.root

#: Seconds; generous, for other tests run beside these.
SOON_S = 20.0


class Manager:
    """The socket a service manager is told on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._lines: list[str] = []

    def heard(self, line: Callable[[str], bool]) -> bool:
        """Whether it was told such a line since this was last asked with success; what came before it is forgotten."""
        self._socket.setblocking(False)
        while True:
            try:
                self._lines += self._socket.recv(65536).decode().split("\n")
            except BlockingIOError:
                break
        for place, each in enumerate(self._lines):
            if line(each):
                del self._lines[: place + 1]
                return True
        return False

    def wait(self, line: str) -> None:
        wait_until(
            lambda: self.heard(lambda said: said.startswith(line)), SOON_S, f"{line}, but: {self._lines}"
        )


def confined(capabilities: Iterator[str]) -> list[str]:
    """Runs a command with these capabilities only, and with ProtectProc=invisible."""
    names = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)
    privileges = f"setpriv --bounding-set=-all,{names} --inh-caps=-all --no-new-privs"
    script = f'mount -t proc -o hidepid=invisible proc /proc && exec {privileges} "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


@pytest.fixture
def node() -> Iterator[tuple[Node, Manager]]:
    with Lab(1) as lab:
        node = machine(
            lab, 0, {"p2p": {"listen": ["/ip4/127.0.0.1/tcp/4001"]}, "process": {"watchdog": "2s"}}
        )
        node.command = [*confined(iter(service.CAPABILITIES)), *module_command()]
        manager = Manager(lab.directory / "notify")
        node.env |= {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
        yield node, manager


def test_a_node_lives_with_what_the_unit_leaves_it_and_says_how_it_is(node: tuple[Node, Manager]) -> None:
    vpnd, manager = node
    vpnd.start()
    manager.wait("READY=1")
    status = vpnd.ask()
    assert status["ready"], "it says so when it is"
    assert status["health"] == "healthy"
    manager.wait("WATCHDOG=1")
    manager.wait("STATUS=healthy: no peers")

    vpnd.kill(signal.SIGHUP)
    manager.wait("RELOADING=1")
    manager.wait("READY=1")

    os.kill(status["control"]["pid"], signal.SIGKILL)
    manager.wait("STATUS=degraded: control")
    manager.wait("STATUS=healthy")
    os.kill(status["shards"][0]["pid"], signal.SIGSTOP)
    wait_until(lambda: vpnd.ask()["shards"][0]["restarts"] >= 1, SOON_S, "a hung shard is killed: CAP_KILL")
    wait_until(
        lambda: vpnd.ask()["control"]["rss_bytes"] > 1 << 20, SOON_S, "processes of vpnd's user are seen"
    )
    log = vpnd.log_file.read_text()
    assert "not permitted" not in log and "denied" not in log.lower()

    vpnd.kill(signal.SIGSTOP)  # a supervisor that hangs falls silent
    try:
        wait_until(lambda: not manager.heard(lambda line: True), SOON_S, "what it had said is read")
        time.sleep(1.0)
        assert not manager.heard(lambda line: True)
    finally:
        vpnd.kill(signal.SIGCONT)
    manager.wait("WATCHDOG=1")

    assert vpnd.stop() == 0
    manager.wait("STOPPING=1")


# --- the unit


def written(tmp_path: Path, config_file: Path | None = None, state_dir: Path | None = None) -> Path:
    """The unit file, without its manual pages, which are a package's."""
    unit = tmp_path / service.NAME
    lines = service.text(Where(config_file, state_dir), ["/bin/true"]).splitlines()
    unit.write_text("\n".join(line for line in lines if not line.startswith("Documentation=")))
    return unit


def systemd_analyze(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


def test_systemd_finds_nothing_to_complain_of_in_the_unit(tmp_path: Path) -> None:
    done = systemd_analyze("verify", str(written(tmp_path)))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_exposed_by_less_than_3(tmp_path: Path) -> None:
    done = systemd_analyze(
        "security", "--offline=true", "--threshold=29", "--no-pager", str(written(tmp_path))
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1]


def test_the_unit_is_of_the_state_directory_and_configuration_it_is_made_for(tmp_path: Path) -> None:
    state, file = tmp_path / "a b", tmp_path / "x.toml"
    text = written(tmp_path, file, state).read_text()
    assert f'Environment="VPND_STATE_DIR={state}"' in text
    assert f'Environment="VPND_CONFIG={file}"' in text
    assert f'ReadWritePaths="{state}"' in text and "StateDirectory" not in text
    assert systemd_analyze("verify", str(tmp_path / service.NAME)).returncode == 0


def test_the_unit_lets_children_give_up_system_calls(tmp_path: Path) -> None:
    """Older systemds have seccomp(2) in none of the sets that the unit permits; without it no child gets ready."""
    assert "\nSystemCallFilter=@system-service seccomp\n" in written(tmp_path).read_text()


def test_where_systemd_does_not_run_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(service, "BOOTED", tmp_path / "not-there")
    monkeypatch.setattr(service, "UNIT_FILE", tmp_path / "vpnd.service")
    assert main(["service", "install", "--state-dir", str(tmp_path)]) == MachineError.exit_code
    assert not service.UNIT_FILE.exists()
