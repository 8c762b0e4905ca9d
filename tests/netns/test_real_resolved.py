"""The real systemd-resolved, where its package is installed: it answers for members, and only for them.

It runs as on a machine of its own: with a bus, a /run, users and a resolv.conf, in namespaces whose first process the
bus is. They go with the test; nothing of the real machine is touched.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, Namespace, Node, check_logs, wait_until
from lab.joining import address, machine

RESOLVED = Path("/lib/systemd/systemd-resolved")
MISSING = [name for name in ("resolvectl", "dbus-daemon", "nsenter") if shutil.which(name) is None]

# not marked root: where the package is missing there is nothing to insist on
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING) or not RESOLVED.exists(), reason="the package systemd-resolved is not installed"
    ),
    pytest.mark.skipif("os.geteuid() != 0", reason="needs root"),
]

ANSWERED_S = 10.0
BUS = """<busconfig>
  <type>system</type> <listen>unix:path=/run/dbus/system_bus_socket</listen> <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/> <allow own="*"/> <allow send_destination="*"/> <allow send_type="*"/> <allow receive_type="*"/>
  </policy>
</busconfig>
"""
#: $1: a directory to work in. Ends as the bus.
ROOM = """set -e
mkdir "$1/run" && mount -t tmpfs none "$1/run"
mkdir -p "$1/run/netns" "$1/run/dbus" "$1/run/systemd/resolve"
mount --rbind /run/netns "$1/run/netns"
mount --rbind "$1/run" /run
for file in passwd group; do grep -v '^systemd-resolve:' "/etc/$file" > "$1/$file"; done
echo 'systemd-resolve:x:64990:64990::/:/bin/false' >> "$1/passwd"
echo 'systemd-resolve:x:64990:' >> "$1/group"
echo 'nameserver 127.0.0.53' > "$1/resolv.conf"
for file in passwd group resolv.conf; do mount --bind "$1/$file" "/etc/$file"; done
chown 64990:64990 /run/systemd/resolve
exec dbus-daemon --nofork --nopidfile --config-file="$1/bus.conf"
"""


class Room:
    """The namespaces, and resolved in them; their network is that of the lab's namespace `inside`."""

    def __init__(self, lab: Lab, inside: Namespace) -> None:
        self._lab, self._inside = lab, inside
        directory = lab.directory / "room"
        directory.mkdir()
        (directory / "bus.conf").write_text(BUS)
        self._log = (directory / "log").open("w")
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._bus = self._spawn(*apart, "sh", "-c", ROOM, "sh", str(directory))
        children = Path(f"/proc/{self._bus.pid}/task/{self._bus.pid}/children")
        first = wait_until(lambda: children.read_text().split(), ANSWERED_S, "there is a first process")[0]
        self.enter = ["nsenter", f"--target={first}", "--mount", "--pid", "--"]
        socket = Path("/proc", first, "root", "run", "dbus", "system_bus_socket")
        wait_until(socket.exists, ANSWERED_S, "the bus is there")
        self._resolved = self._spawn(*self.enter, str(RESOLVED))
        wait_until(lambda: self.ctl("status").returncode == 0, ANSWERED_S, "resolved answers")

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self._inside.name, *command]
        return subprocess.Popen(inside, stdout=self._log, stderr=self._log)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self._lab.run(self._inside, *self.enter, *command, check=False)

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("resolvectl", *arguments)

    def close(self) -> None:
        self._bus.kill()  # and with it the first process, and all others there
        for process in (self._bus, self._resolved):
            process.wait()
        self._log.close()


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(2) as opened:
        yield opened


def test_resolved_answers_for_members_and_for_nobody_else(lab: Lab) -> None:
    node, room = machine(lab, 0), Room(lab, lab.nodes[0])
    try:
        node.command = [*room.enter, *node.command]
        node.start()
        node.wait_ready()
        ours = address(node)
        wait_until(lambda: ours in room.ctl("query", "a.home.vpn").stdout, ANSWERED_S, "it has a name")
        assert "a.home.vpn" in room.ctl("query", ours).stdout, "and its address the name"
        assert ours in room.run("getent", "ahostsv4", "a.home.vpn").stdout, "any program is told"
        assert room.ctl("query", "nobody.home.vpn").returncode != 0
        link = room.ctl("status", "vpnd0").stdout
        assert "-DefaultRoute" in link and "~home.vpn" in link
        asked = queries(node)
        assert room.ctl("query", "example.org").returncode != 0
        assert queries(node) == asked, "others' names are no business of ours"
        assert not any("names like" in line for line in node.ask()["node"]["warnings"])
        assert node.stop() == 0
        assert room.ctl("query", "a.home.vpn").returncode != 0
        check_logs([node])
    finally:
        room.close()


def queries(node: Node) -> int:
    """So many were answered."""
    return int(node.ask()["control"]["counters"]["dns_queries"])
