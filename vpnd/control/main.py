"""control: the process that runs py-libp2p.

    talks to       over                             what comes, and who serves it
    -------------  -------------------------------  -----------------------------------------------------
    supervisor     channel (inherited descriptor)   main: ControlStart; Control._on_supervisor: ShardArrived,
                                                    ShardLeft, StatusRequest, NetworkChanged, Reconfigure, Stop
    each shard     channel (from ShardArrived)      Control._on_shard: SessionsHeld, SessionUp, SessionDown,
                                                    SessionWanted
    other nodes    libp2p over TCP                  Host: Noise, identify, ping; Control.take_session: inbound
                                                    data sessions; Dialer: outbound ones

It starts as root, holding one channel. Rights kept after `privileges.drop`: the channels, the counter page,
sockets of its own on unprivileged ports, the private key in memory. Nothing is imported from then on: the
files of vpnd may be readable by root alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket

import trio

from vpnd import logs, privileges
from vpnd.adapter.host import Host
from vpnd.adapter.identity import peer_id_of, read_key_pair
from vpnd.adapter.logs import Seldom, tame_libp2p
from vpnd.adapter.preload import preload
from vpnd.adapter.shape import check_libp2p
from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed, first_message
from vpnd.control.channels import TrioChannel
from vpnd.control.control import Control
from vpnd.discovery.registry import StaticRegistry
from vpnd.errors import ConfigError, ProtocolViolation, VpndError
from vpnd.metrics import CONTROL_COUNTERS, CounterPage

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """`python -m vpnd.control CHANNEL_FD`; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    parent_pid = os.getppid()
    channel = Channel(socket.socket(fileno=int(arguments[1])), "control", "supervisor")
    try:
        return _main(channel, parent_pid)
    except ChannelClosed:
        return 0
    except VpndError as error:
        with contextlib.suppress(ChannelClosed):
            channel.send(messages.Failed(kind=type(error).__name__, error=str(error)))
        return error.exit_code


def _main(channel: Channel, parent_pid: int) -> int:
    preload()
    start, descriptors = first_message(channel, messages.ControlStart)
    tame_libp2p(logs.configure(start.config.log.level, "control"))
    check_libp2p()
    if len(descriptors) != 2:
        raise ProtocolViolation(f"ControlStart with {len(descriptors)} descriptors")
    identity_fd, page_fd = descriptors
    keys = read_key_pair(identity_fd)
    page = CounterPage(CONTROL_COUNTERS, page_fd)
    page.set("connections", 0)  # a gauge: what a predecessor left there is not true any more
    os.close(identity_fd)
    os.close(page_fd)
    if peer_id_of(keys) != start.peer_id:
        raise ConfigError(f"the identity file belongs to {peer_id_of(keys)}, not to {start.peer_id}")
    privileges.drop(start.config.process.user, parent_pid)

    config = start.config
    now_s = trio.current_time
    registry = StaticRegistry(config.peers)
    seldom = Seldom(log, config.log.refusal_interval, now_s)
    control = Control(config, start.peer_id, registry, page, seldom, now_s)
    host = Host(
        keys,
        config,
        is_member=control.is_member,
        take_session=control.take_session,
        count=page.add,
        connections=lambda number: page.set("connections", number),
        seldom=seldom,
    )
    trio.run(_run, control, host, TrioChannel(channel))
    return 0


async def _run(control: Control, host: Host, supervisor: TrioChannel) -> None:
    async with host.running():
        listen = host.listen_addresses()
        log.info("listening on %s", ", ".join(listen))
        supervisor.send(messages.Ready(listen=listen))
        await control.run(host, supervisor)
