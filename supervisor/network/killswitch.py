"""What of an exit node outlives the daemon, and what does not: rules, unreachable routes and nftables rules.

With `network.exit_node` and `network.exit_kill_switch` nothing but process.user's sockets leaves the machine past the
tunnel, except for the networks it has routes of its own for: not while the exit node is unknown, gone, not announced or
removed, nor when the daemon was killed. Only a stop that was asked for, `vpnd stop` without a daemon, or a start
without an exit node ends that. Without the switch all of it goes with the daemon; after a kill -9 the janitor's shell
does it.
"""

from __future__ import annotations

import os
import re
import socket
import struct

from supervisor import statedir
from supervisor.network.filter import Filter, KillSwitch, table_name
from supervisor.network.policy import Place, PolicyTable
from vpnd import privileges
from vpnd.config.schema import Config
from vpnd.errors import AlreadyRunningError, MachineError

#: The number at the end of a device's name, and how many nodes of a machine are kept apart by it.
_NUMBER = re.compile(r"[0-9]{1,3}\Z", re.ASCII)
#: SO_PEERCRED's struct ucred: pid, uid, gid.
_UCRED = struct.Struct("=iII")


def is_on(config: Config, *, in_network: bool) -> bool:
    """Whether this node is to have one: peers of a configuration announce nothing, so there is no exit node."""
    return in_network and bool(config.network.exit_node) and config.network.exit_kill_switch


def place(config: Config) -> Place:
    """Where the node's own routes and rules are. Raises PrivilegeError for a process.user that is not there."""
    return _place(config, privileges.entry_of(config.process.user).pw_uid)


def _place(config: Config, user: int) -> Place:
    """Nodes of one machine have other devices, so those with a number, vpnd1, have a table and rules of their own; the
    same ones at each start, for a killed node has left some there."""
    network = config.network
    found = _NUMBER.search(network.interface)
    number = int(found[0]) if found is not None else 0
    table, priority = network.route_table + number, network.rule_priority + 2 * number
    return Place(network.interface, table, priority, user)


def claim(config: Config) -> socket.socket:
    """Keep other nodes of this network namespace from our table, until it is closed, or the process ends.

    Raises AlreadyRunningError for one that another node has.
    """
    table = place(config).table
    name = f"\0vpnd table {table}"
    claimed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claimed.bind(name)
        claimed.listen()
    except OSError:
        with claimed, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            if _holder(asking, name) == os.geteuid():  # nobody else keeps a node from starting
                raise AlreadyRunningError(
                    f"network.route_table = {config.network.route_table}: another node on this machine uses table "
                    f"{table}; give one of the two another network.interface, with a number of its own (vpnd1), or "
                    "another network.route_table and network.rule_priority"
                ) from None
    return claimed


def _holder(asking: socket.socket, name: str) -> int | None:
    """The user that listens there."""
    try:
        asking.connect(name)
        _, uid, _ = _UCRED.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    return int(uid)


def filter_of(config: Config, *, in_network: bool) -> Filter:
    """The node's nftables table, not made yet."""
    where = place(config)
    switch = KillSwitch(where.user, where.table) if is_on(config, in_network=in_network) else None
    return Filter(where.interface, switch)


def release(config: Config) -> bool:
    """Undo what a daemon that was killed has left. False when there was nothing.

    Raises AlreadyRunningError while a daemon has the state directory, MachineError when the kernel refuses.
    """
    lock = statedir.lock(config)
    try:
        network = config.network
        table = PolicyTable(_place(config, 0))
        held = table.holds()
        if problems := table.set([]):
            raise MachineError(f"not all of the kill switch is undone: {problems[0]}")
        return Filter(network.interface, None).remove() or held
    except OSError as error:
        raise MachineError(f"routing rules cannot be looked at: {error.strerror}") from error
    finally:
        os.close(lock)


def cleanup_commands(config: Config, *, in_network: bool) -> list[str]:
    """What a shell does to take away what a node that was killed has left; fails silently where nothing is."""
    if is_on(config, in_network=in_network):
        return []
    _, table, priority, _ = _place(config, 0)
    own = f"priority {priority} table main suppress_prefixlength 0"
    return [
        f"nft delete table inet {table_name(config.network.interface)}",
        *(
            command
            for family in ("-4", "-6")
            for command in (
                f"ip {family} rule del {own}",
                f"ip {family} rule del priority {priority + 1} table {table}",
                f"ip {family} route flush table {table}",
            )
        ),
    ]
