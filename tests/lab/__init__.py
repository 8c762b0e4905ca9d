"""The lab: namespaces on one machine, vpnd nodes in them, ordinary traffic through them, and its cost.

Used by the tests, scripts/bench and scripts/demo. Standard library only.
"""

from __future__ import annotations

from .bulk import Bulk
from .faults import (
    blackhole,
    closed,
    cut_connections,
    flap,
    lossy,
    moved,
    narrow,
    reset_storm,
    without_tcp,
    without_udp,
)
from .ledger import Ledger, children, unharmed
from .network import Lab, LabError, Namespace, clean_exit_on_signals, wait_until, within
from .node import Node, mesh_of_nodes, module_command, pair_of_nodes, script_command, to_toml
from .processes import cpu_seconds, own_pss_bytes, process_tree, pss_bytes
from .running import check_logs, connected, drops, running_nodes, settled, wait_connected
from .sockets import Datagrams, inside, socket_in, tcp_pair, tcp_transfer, transfer, udp_flow
from .steady import SteadyFlow, meanwhile
from .traffic import (
    Ping,
    goodput_bps,
    iperf3,
    loss_share,
    out_of_order,
    parse_ping,
    ping,
    received_bytes,
    sent_bps,
    wait_for_answer,
)

__all__ = [
    "Bulk",
    "Datagrams",
    "Lab",
    "LabError",
    "Ledger",
    "Namespace",
    "Node",
    "Ping",
    "SteadyFlow",
    "blackhole",
    "check_logs",
    "children",
    "clean_exit_on_signals",
    "closed",
    "connected",
    "cpu_seconds",
    "cut_connections",
    "drops",
    "flap",
    "goodput_bps",
    "inside",
    "iperf3",
    "loss_share",
    "lossy",
    "meanwhile",
    "mesh_of_nodes",
    "module_command",
    "moved",
    "narrow",
    "out_of_order",
    "own_pss_bytes",
    "pair_of_nodes",
    "parse_ping",
    "ping",
    "process_tree",
    "pss_bytes",
    "received_bytes",
    "reset_storm",
    "without_tcp",
    "without_udp",
    "running_nodes",
    "script_command",
    "sent_bps",
    "settled",
    "socket_in",
    "tcp_pair",
    "tcp_transfer",
    "to_toml",
    "transfer",
    "udp_flow",
    "unharmed",
    "wait_connected",
    "wait_for_answer",
    "wait_until",
    "within",
    "without_udp",
]
