"""What `vpnd start` becomes: the supervisor in a fresh interpreter, without the libraries of the command line, which
would be a third of its memory for as long as it lives.

Its program, vpnd/cli/supervise.py, has one argument, `Given` as JSON. What the command has found right it finds right
again.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from supervisor import interpreter
from vpnd import lean
from vpnd.config import load
from vpnd.config.schema import Config
from vpnd.logs import Output
from vpnd.mode import decide
from vpnd.peerid import Identity

if TYPE_CHECKING:
    from vpnd.cli.command import Where

#: Of pyroute2, of which the supervisor needs addresses, routes and rules.
UNUSED = (
    *lean.IDLE,
    "asyncio.sslproto",
    "ctypes.util",
    "multiprocessing",
    "pyroute2.conntrack",
    "pyroute2.devlink",
    "pyroute2.ethtool",
    "pyroute2.iproute.ipmock",
    "pyroute2.ipdb",
    "pyroute2.ipset",
    "pyroute2.ipvs",
    "pyroute2.iwutil",
    "pyroute2.ndb",
    "pyroute2.nslink",
    "pyroute2.plan9",
    "pyroute2.statsd",
    "pyroute2.wiset",
    "pyroute2.netlink.connector",
    "pyroute2.netlink.devlink",
    "pyroute2.netlink.diag",
    "pyroute2.netlink.event",
    "pyroute2.netlink.generic",
    "pyroute2.netlink.ipq",
    "pyroute2.netlink.nfnetlink",
    "pyroute2.netlink.nl80211",
    "pyroute2.netlink.rtnl.br_vlan",
    "pyroute2.netlink.rtnl.ifstatsmsg",
    "pyroute2.netlink.rtnl.ndmsg",
    "pyroute2.netlink.rtnl.ndtmsg",
    "pyroute2.netlink.rtnl.nsidmsg",
    "pyroute2.netlink.rtnl.nsinfmsg",
    "pyroute2.netlink.rtnl.probe_msg",
    "pyroute2.netlink.rtnl.tcmsg",
    "pyroute2.netlink.taskstats",
    "pyroute2.netlink.uevent",
    "unittest",
)


class Given(msgspec.Struct, frozen=True):
    """What the command was given, and whose identity it found: control refuses to be another. `token`: a descriptor
    that a token to join with can be read from, or -1. `early`: see supervisor/interpreter.py."""

    config_file: str | None
    state_dir: str | None
    overrides: dict[str, str | int | None]
    token: int
    identity: Identity
    early: dict[str, tuple[int, int]]

    def read(self) -> load.Loaded:
        """The configuration as it is now. Raises ConfigError."""
        return load.load_with_origins(
            Path(self.config_file) if self.config_file is not None else None,
            Path(self.state_dir) if self.state_dir is not None else None,
            self.overrides,
            os.environ,
        )


def become(place: Where, overrides: dict[str, str | int | None], token: str, identity: Identity) -> NoReturn:
    """Be the daemon from now on, in this process."""
    token_fd = -1
    if token:  # not an argument, which everybody on the machine can read
        token_fd = os.memfd_create("vpnd-token", 0)
        os.write(token_fd, token.encode())
    config_file, state_dir = (str(path) if path is not None else None for path in place)
    given = Given(config_file, state_dir, overrides, token_fd, identity, interpreter.hand_over())
    sys.stdout.flush()
    words = [sys.executable, "-P", "-m", "vpnd.cli.supervise", msgspec.json.encode(given).decode()]
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, words, {**interpreter.FRUGAL, **os.environ, "PYTHONPATH": path})


def run(words: list[str]) -> int:
    """The daemon, until it is stopped: its exit code. Raises a VpndError."""
    given = msgspec.json.decode(words[0], type=Given)
    interpreter.take_over(given.early)
    token = ""
    if given.token >= 0:
        with open(given.token, "rb") as file:
            file.seek(0)
            token = file.read().decode()
    found = given.read()
    host_name = socket.gethostname().partition(".")[0]
    in_network = decide(found.config, joining=bool(token)).in_network

    def complete(found: load.Loaded) -> Config:
        return load.complete(
            found.config, given.identity.peer_id, host_name, found.origins, in_network=in_network
        )

    config = complete(found)
    if os.geteuid() == 0:
        interpreter.begin_early("vpnd.control")
        if config.process.fork_timeout:
            interpreter.begin_early("vpnd.nursery")
    gc.disable()  # nothing of what is imported goes again
    with lean.without(*UNUSED, missing=lean.SPARE):
        from supervisor.service import run_foreground
    lean.settle()
    announce = Output(sys.stdout.fileno()).tell
    return run_foreground(config, given.identity, token, announce, lambda: complete(given.read()))
