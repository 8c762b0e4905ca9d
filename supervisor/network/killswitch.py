"""What of an exit node outlives the daemon, and what does not: rules, unreachable routes and nftables rules.

With `network.exit_node` and `network.exit_kill_switch` nothing but process.user's sockets leaves the machine past the
tunnel, except for the networks it has routes of its own for: not while the exit node is unknown, gone, not announced or
removed, nor when the daemon was killed. Only a stop that was asked for, `vpnd stop` without a daemon, or a start
without an exit node ends that. Without the switch all of it goes with the daemon; after a kill -9 the janitor's shell
does it.
"""

from __future__ import annotations

import os

from supervisor import statedir
from supervisor.network.filter import Filter, KillSwitch, table_name
from supervisor.network.policy import Place, PolicyTable
from vpnd import privileges
from vpnd.config.schema import Config
from vpnd.errors import MachineError


def is_on(config: Config, *, in_network: bool) -> bool:
    """Whether this node is to have one: peers of a configuration announce nothing, so there is no exit node."""
    return in_network and bool(config.network.exit_node) and config.network.exit_kill_switch


def place(config: Config) -> Place:
    """Where the node's own routes and rules are. Raises PrivilegeError for a process.user that is not there."""
    network = config.network
    user = privileges.entry_of(config.process.user).pw_uid
    return Place(network.interface, network.route_table, network.rule_priority, user)


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
        table = PolicyTable(Place(network.interface, network.route_table, network.rule_priority, user=0))
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
    table, priority = config.network.route_table, config.network.rule_priority
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
