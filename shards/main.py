"""A shard: one data-plane process.

    talks to      over                               what comes, and who serves it
    ------------  ---------------------------------  --------------------------------------------------
    supervisor    channel (inherited descriptor)     _on_supervisor: ShardStart, ControlArrived, Reconfigure,
                                                     NetworkChanged, OwnPrefixes, DatagramSocket, Stop,
                                                     StatusRequest, ProbeRequest
    supervisor    ring from it                       Outbound.run
    kernel        TUN descriptor, written to only    Inbound
    control       channel (from ControlArrived)      ControlClient: peers, circuits, owners, sessions
    peers         sessions' sockets                  Link
    peers         a UDP socket                       DatagramSocket, DatagramLane

Rights kept after the start: the descriptors it was given (the TUN's, to write packets of peers into), and
nothing else: no files and no new sockets (everything is imported before, and `seccomp.SHARD` refuses them), no
capability, no way to gain one.
It never sees the identity key.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import socket
from random import SystemRandom
from time import monotonic

import uvloop

from shards.answers import alone_report, probe, session_report
from shards.control import ControlClient, ControlPort
from shards.counters import Counters, Counts
from shards.plane import Plane
from shards.session.udp import DatagramSocket
from vpnd import logs, privileges, seccomp
from vpnd.api import messages, parts
from vpnd.api.aio import Descriptors, LoopChannel, Recurring, end_at_bug
from vpnd.api.channel import Channel, first_message, run_child
from vpnd.config.live import Live
from vpnd.discovery.registry import PeerRegistry
from vpnd.metrics import SHARD_COUNTERS, CounterPage, heartbeat_s
from vpnd.packet import ring
from vpnd.packet.record import MAX_RECORD_BYTES, Capabilities

log = logging.getLogger("shard")


class Shard:
    """A data plane and what it is connected to. Owner: its loop. Until a `Stop`, or until the supervisor is
    gone."""

    def __init__(self, supervisor: Channel, start: messages.ShardStart, descriptors: list[int]) -> None:
        config = start.config
        self._live = live = Live(config)
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        memory, wake, page, tun_fd = descriptors
        self._consumer = ring.Consumer(ring.Descriptors(memory, wake))
        counts = Counts()
        counter_page = CounterPage(SHARD_COUNTERS, page)
        self._counters = Counters(counter_page, counts)
        for fd in (memory, page):
            os.close(fd)
        hello = Capabilities(offloads=start.tun_offloads, max_record=MAX_RECORD_BYTES, mtu=config.network.mtu)
        write = functools.partial(os.write, tun_fd)
        port = ControlPort()
        self._plane = Plane(
            live, start.own, hello, write, port, counts, self._counters.store_batch, monotonic, SystemRandom()
        )
        self._descriptors = Descriptors()
        self._control = ControlClient(port, self._plane, self._descriptors)
        # Until control has told who the peers are, their packets wait instead of having no route.
        for member in PeerRegistry(config.peers).members():
            self._plane.peers.know(member.peer_id, member.name, member.prefixes)
        self._draining_until_s = 0.0
        end_at_bug(self._end)
        self._supervisor = LoopChannel(
            supervisor, self._on_supervisor, lambda error: self._end(f"supervisor: {error}")
        )
        self._loop.add_reader(wake, self._on_wake)
        self._loop.call_soon(self._take_records)
        self._plane.start()
        live.watch(lambda config: config.log.level, lambda: logs.set_level(live.config.log.level))
        Recurring(live, lambda config: config.metrics.interval, self._store_all).start()
        Recurring(live, lambda config: heartbeat_s(config.process.watchdog), counter_page.beat).start()
        if config.process.seccomp:
            # Waiting or not is a mode of the TUN device and of the wake-up which the supervisor shares.
            seccomp.keep_modes((tun_fd, wake))
        self._supervisor.send(messages.Ready())

    async def run(self) -> str:
        """Until Stop, or until the supervisor is gone: the reason."""
        reason: str = await self._stopped
        self._plane.end("the node stops")
        self._store_all()
        return reason

    # --- ring

    def _on_wake(self) -> None:
        """The ring to this shard has records, and is not empty before the signal is cleared: none comes before the
        next `sleep`, so the packets go first."""
        more = self._plane.outbound.run(self._consumer)
        ring.drain(self._consumer.wake_fd)
        self._go_on(more)

    def _take_records(self) -> None:
        self._go_on(self._plane.outbound.run(self._consumer))

    def _go_on(self, more: bool) -> None:
        self._counters.store_batch()
        if more or not self._consumer.sleep():
            self._loop.call_soon(self._take_records)

    # --- supervisor

    def _on_supervisor(self, message: messages.Message, descriptors: list[int]) -> None:
        match message:
            case messages.ControlArrived():
                self._control.meet(socket.socket(fileno=descriptors[0]))
            case messages.StatusRequest(serial=serial):
                self._plane.flows.count_states(monotonic())
                self._store_all()
                status = messages.ShardStatus(
                    serial=serial,
                    sessions=(
                        *(session_report(link) for link in self._plane.links.values()),
                        *(alone_report(alone) for alone in self._plane.alone() if not alone.beside.leaving),
                    ),
                    traffic=tuple(peer.traffic() for peer in self._plane.peers),
                )
                for part in parts.split(status):
                    self._supervisor.send(part)
            case messages.ProbeRequest():
                probe(self._plane, message, self._supervisor.send)
            case messages.Reconfigure(config=config):
                self._live.take(config)
            case messages.DatagramSocket(number=number, port=port):
                self._open_datagrams(socket.socket(fileno=descriptors[0]), number, port)
            case messages.OwnPrefixes(own=own):
                self._plane.local_changed(own)
            case messages.NetworkChanged(addresses=addresses):
                self._plane.network_changed(addresses)
            case messages.Stop(drain=True):
                self._draining_until_s = monotonic() + self._live.config.process.drain_timeout
                self._drain()
            case messages.Stop():
                self._end("stopped")

    def _open_datagrams(self, sock: socket.socket, number: int, port: int) -> None:
        plane = self._plane
        plane.datagrams = DatagramSocket(
            sock,
            self._descriptors,
            number,
            port,
            plane.live,
            plane.counts,
            plane.now,
            self._counters.store_batch,
            plane.draw,
            plane.rest.between_turns,
        )

    def _drain(self) -> None:
        """The ring gets no more: end when everything is on its way, or when it has taken too long."""
        start, end = self._consumer.readable()
        if (start == end and self._plane.all_sent()) or monotonic() >= self._draining_until_s:
            self._end("scaled away")
        else:
            self._loop.call_later(self._live.config.status.poll_interval, self._drain)

    def _end(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)

    # --- counters

    def _store_all(self) -> None:
        plane, counts, flows = self._plane, self._plane.counts, self._plane.flows
        self._counters.store_all(
            packets_queued=plane.queued(),
            flows=len(flows.flows),
            **{f"flows_{state}": number for state, number in flows.states.items()},
            streams=plane.streams(),
            streams_returned=counts.streams_acquired - plane.pinned(),
            sessions=len(plane.links),
        )


def main() -> None:
    """`python -m shards CHANNEL_FD`."""
    run_child("shard", _main)


def _main(channel: Channel, parent_pid: int) -> None:
    """Everything is imported: take the start message, give up root, run."""
    start, descriptors = first_message(channel, messages.ShardStart)
    logs.configure(start.config.log, f"shard {start.index}")
    privileges.drop(start.config.process.user, parent_pid)
    if start.config.process.seccomp:
        seccomp.confine(seccomp.SHARD)
    gc.freeze()
    # Never closed: for that uvloop would run it once more, and make a pair of sockets.
    uvloop.new_event_loop().run_until_complete(_run(channel, start, descriptors))


async def _run(channel: Channel, start: messages.ShardStart, descriptors: list[int]) -> None:
    reason = await Shard(channel, start, descriptors).run()
    log.debug("ends: %s", reason)
