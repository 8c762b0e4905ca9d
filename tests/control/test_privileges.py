"""Giving up root, each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from control_harness import (
    REPOSITORY,
    ControlProcess,
    FakeShard,
    Identity,
    config,
    eventually,
    free_port,
    peer,
)

from vpnd import privileges

pytestmark = pytest.mark.root

PRELUDE = "import os\nfrom vpnd import privileges\nfrom vpnd.errors import ChildError, PrivilegeError\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_left_and_nothing_comes_back() -> None:
    run(
        """
privileges.drop("nobody", os.getppid())
assert privileges.rights_left(True) == []
for regain in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot("/")):
    try:
        regain()
    except PermissionError:
        continue
    raise AssertionError("got it back")
"""
    )


def test_a_root_process_sees_all_that_is_to_be_given_up() -> None:
    left = run("print(privileges.rights_left(True))")
    for right in (
        "root as user",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "new privileges",
        "dumpable",
        "parent's death",
    ):
        assert right in left


@pytest.mark.parametrize(
    ("user", "error", "said"),
    [
        ("root", "PrivilegeError", "is root"),
        ("no-such-user", "PrivilegeError", "there is no user"),
    ],
)
def test_users_that_will_not_do(user: str, error: str, said: str) -> None:
    run(f"""
try:
    privileges.drop({user!r}, os.getppid())
except {error} as refusal:
    assert {said!r} in str(refusal), refusal
else:
    raise AssertionError("accepted")
""")


def test_a_parent_that_has_died_already_is_noticed() -> None:
    run("""
try:
    privileges.drop("nobody", os.getppid() + 1)
except ChildError:
    pass
else:
    raise AssertionError("accepted")
""")


def test_it_works_without_root_too() -> None:
    run("""
os.setgroups([]); os.setgid(65534); os.setuid(65534)
privileges.drop("nobody", os.getppid())
assert privileges.rights_left(False) == []
""")


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        PRELUDE
        + "import time\nprivileges.drop('nobody', os.getppid())\nprint('up', flush=True)\ntime.sleep(60)"
    )
    parent = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 5
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_control_works_where_it_cannot_read_its_own_files(tmp_path: Path) -> None:
    """Environment and program lie in a directory of root's: after giving up root nothing can be imported."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (private / "environment").symlink_to(sys.prefix)
    (private / "vpnd").symlink_to(REPOSITORY / "vpnd")
    python = str(private / "environment" / "bin" / "python")
    a, b = Identity.pair()
    stranger = Identity()
    a_port, b_port = free_port(), free_port()
    names = (f"/dns4/nowhere.invalid/tcp/{b_port}", f"/dns4/localhost/tcp/{b_port}")
    by_name = msgspec.structs.replace(peer("b", b, 2), addresses=names)
    out_config = config(free_port(), peer("b", b, 2, b_port))
    with (
        ControlProcess(a, config(a_port, by_name), python=python, root=private) as dialing,
        ControlProcess(b, config(b_port, peer("a", a, 1, a_port)), python=python, root=private) as accepting,
        ControlProcess(stranger, out_config, python=python, root=private) as out,
    ):
        for process in (dialing, accepting, out):
            process.ready()
        assert _module_path_is_closed(private)
        ours, theirs, outside = FakeShard(0), FakeShard(0), FakeShard(0)
        accepting.add_shard(theirs)
        dialing.add_shard(ours)
        out.add_shard(outside)
        x, y = ours.session(), theirs.session()
        x.send(b"hello")
        assert y.receive() == b"hello"
        eventually(lambda: out.counter("dial_failures") > 1)
        assert "does the other node list this one" in out.status().peers[0].last_error
        # The other paths: an ordinary connection with identify and ping, and its end.
        _connect_and_ping(a, b, b_port)
        eventually(lambda: accepting.counter("connections") == 0)
        for process in (dialing, accepting, out):
            assert process.stop() == 0
            assert "Traceback" not in (said := process.stderr()) and "import" not in said, said


def _module_path_is_closed(private: Path) -> bool:
    return (
        subprocess.run(["ls", private], user="nobody", capture_output=True).returncode != 0
        and os.stat(private).st_mode & 0o777 == 0o700
    )


def _connect_and_ping(as_whom: Identity, whom: Identity, port: int) -> None:
    """In a process of its own, for it takes the place of node a."""
    code = f"""
import os, trio
from libp2p import new_host
from libp2p.host.ping import PingService
from libp2p.peer.id import ID
from multiaddr import Multiaddr
from vpnd.adapter.noise import read_key_pair

async def main():
    fd = os.memfd_create("identity")
    os.fchmod(fd, 0o600)
    os.write(fd, {as_whom.pem!r})
    host, whom = new_host(key_pair=read_key_pair(fd)), ID.from_string({whom.peer_id!r})
    async with host.run([]):
        connection = await host.get_network().dial_addr(Multiaddr("/ip4/127.0.0.1/tcp/{port}"), whom)
        assert await PingService(host).ping(whom, 2)
        with trio.fail_after(10):
            while "/ipfs/id/1.0.0" not in host.get_peerstore().get_protocols(whom):
                await trio.sleep(0.02)
        await connection.close()
        await host.close()

trio.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_a_user_of_vpnds_own_is_made_where_it_can_be(tmp_path: Path) -> None:
    """With user files of its own, in a mount namespace; and without a program that makes users."""
    for prepare, user in (
        ("sed -i /^vpnd:/d $D/passwd $D/group $D/shadow $D/gshadow || true; mount --bind $D /etc", "vpnd"),
        (
            "sed -i /^vpnd:/d $D/passwd; mount --bind $D /etc; mount --bind /bin/false /usr/sbin/useradd",
            "nobody",
        ),
    ):
        program = (
            "from vpnd import privileges; import pwd; user = privileges.existing('vpnd'); "
            "assert privileges.existing('vpnd') == user and pwd.getpwnam(user).pw_uid not in (0, 1000); print(user)"
        )
        etc = tmp_path / user
        script = f'D={etc}; cp -a /etc $D; {prepare}; exec {sys.executable} -P -c "$1"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", program], capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == user, done.stderr
    assert privileges.existing("daemon") == "daemon"
