"""A shard: one data-plane process.

    talks to      over                               what comes, and who serves it
    ------------  ---------------------------------  --------------------------------------------------
    supervisor    channel (inherited descriptor)     _on_supervisor: ShardStart, ControlArrived, Stop, StatusRequest
    supervisor    ring from it                       Outbound.run
    kernel        TUN descriptor, written to only    Inbound
    control       channel (from ControlArrived)      _on_control: peers, SessionHandover
    peers         sessions' sockets                  Link

Rights kept after the start: the descriptors it was given (the TUN's, to write packets of peers into), and
nothing else: no file system of its own (everything is imported before), no capability, no way to gain one.
It never sees the identity key.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from typing import Any

import uvloop

from shards.counters import Counters
from shards.flows import FlowTable, Queue, Waiting, new_drops
from shards.inbound import Inbound
from shards.link import Link
from shards.outbound import Outbound
from shards.peers import PeerTable
from shards.prefixes import Prefixes
from shards.stream.session import Session
from vpnd import logs, privileges
from vpnd.api import messages
from vpnd.api.aio import LoopChannel
from vpnd.api.channel import Channel, first_message
from vpnd.discovery.registry import StaticRegistry
from vpnd.metrics import SHARD_COUNTERS, CounterPage
from vpnd.packet import ring
from vpnd.packet.capability import Capabilities
from vpnd.packet.record import MAX_RECORD_BYTES

log = logging.getLogger("shard")


class Shard:
    """Everything of one shard. Owner: its loop. It is the `LinkEvents` of its links."""

    def __init__(self, supervisor: Channel, start: messages.ShardStart, descriptors: list[int]) -> None:
        config = self._config = start.config
        self.index = start.index
        self.packets_sent = self.bytes_sent = 0
        self.streams_opened = self.streams_closed = self.session_errors = 0
        self._sessions_opened = self._sessions_closed = 0
        self._loop = asyncio.get_running_loop()
        self._stopped = self._loop.create_future()
        memory, wake, page, tun_fd = descriptors
        self._consumer = ring.Consumer(ring.Descriptors(memory, wake))
        self._counters = Counters(CounterPage(SHARD_COUNTERS, page))
        for fd in (memory, page):
            os.close(fd)
        self._drops = new_drops()
        own: Prefixes[bool] = Prefixes()
        for prefix in start.own:
            own.add(prefix, True)
        self._hello = Capabilities(
            offloads=start.tun_offloads, max_record=MAX_RECORD_BYTES, mtu=config.network.mtu
        )
        self._peers = PeerTable(self._make_waiting, self._drops)
        # Until control has told who the peers are, their packets wait instead of having no route.
        for member in StaticRegistry(config.peers).members():
            self._peers.know(member.peer_id, member.name, member.prefixes)
        self._flows = FlowTable(
            config.worker.max_flows, config.worker.idle_timeout, self._peers.place, self._drops
        )
        self._inbound = Inbound(tun_fd, own, self._drops)
        batch_bytes = config.worker.ring_bytes // 4
        self._outbound = Outbound(self._consumer, self._flows, self._loop.time, batch_bytes)
        self._links: dict[int, Link] = {}
        self._told: set[str] | None = None
        self._control: LoopChannel | None = None
        self._loop.set_exception_handler(self._on_bug)
        self._supervisor = LoopChannel(supervisor, self._on_supervisor, self._on_supervisor_closed)
        self._loop.add_reader(wake, self._on_wake)
        self._loop.call_later(config.worker.cleanup_interval, self._clean)
        self._loop.call_soon(self._on_wake)
        self._store_often()
        self._supervisor.send(messages.Ready())

    async def run(self) -> str:
        """Until Stop, or until the supervisor is gone: the reason."""
        reason: str = await self._stopped
        for link in list(self._links.values()):
            link.close("the node stops", polite=True)
        self._store_all()
        return reason

    # --- ring

    def _on_wake(self) -> None:
        """The ring to this shard has records."""
        ring.drain(self._consumer.wake_fd)
        more = self._outbound.run()
        self.batch_done()
        if more or not self._consumer.sleep():
            self._loop.call_soon(self._on_wake)

    # --- supervisor

    def _on_supervisor(self, message: messages.Any, descriptors: list[int]) -> None:
        match message:
            case messages.ControlArrived():
                self._meet_control(socket.socket(fileno=descriptors[0]))
            case messages.StatusRequest(serial=serial):
                reports = tuple(link.report() for link in self._links.values())
                self._store_all()
                traffic = tuple(peer.traffic() for peer in self._peers)
                self._supervisor.send(messages.ShardStatus(serial=serial, sessions=reports, traffic=traffic))
            case messages.Stop():
                self._end("stopped")
            case _:
                self._end(f"{type(message).__name__} came twice")

    def _on_supervisor_closed(self, error: Exception) -> None:
        self._end(f"supervisor: {error}")

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception left a callback: whatever it left half done is gone with this process, and a new one begins."""
        log.error("%s", context.get("message", "error"), exc_info=context.get("exception"))
        self._end("an error of its own")

    def _end(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)

    # --- control

    def _meet_control(self, sock: socket.socket) -> None:
        if self._control is not None:
            self._control.close()
        self._told = set()
        self._control = LoopChannel(
            Channel(sock, "shard", "control"), self._on_control, self._on_control_closed
        )
        held = tuple((link.session_id, link.peer.peer_id, link.initiator) for link in self._links.values())
        self._control.send(messages.SessionsHeld(sessions=held))

    def _on_control_closed(self, error: Exception) -> None:
        log.info("control: %s; sessions go on", error)

    def _on_control(self, message: messages.Any, descriptors: list[int]) -> None:
        match message:
            case messages.PeerKnown(peer_id=peer_id, name=name, prefixes=prefixes):
                self._peers.know(peer_id, name, prefixes)
                if self._told is not None:
                    self._told.add(peer_id)
            case messages.PeersComplete():
                told, self._told = self._told or set(), None
                for peer in self._peers:
                    if peer.peer_id not in told:
                        self._forget(peer.peer_id)
            case messages.PeerForgotten(peer_id=peer_id):
                self._forget(peer_id)
            case messages.SessionHandover():
                self._take_session(message, descriptors)

    def _forget(self, peer_id: str) -> None:
        peer = self._peers.forget(peer_id)
        if peer is not None:
            for link in list(peer.links):
                link.close("no longer a peer", polite=True)

    def _take_session(self, message: messages.SessionHandover, descriptors: list[int]) -> None:
        sock = socket.socket(fileno=descriptors[0])
        sock.setblocking(False)
        peer = self._peers.get(message.peer_id)
        if peer is None:
            sock.close()
            self._tell(
                messages.SessionDown(session_id=message.session_id, peer_id=message.peer_id, reason="unknown")
            )
            return
        session = Session(
            initiator=message.initiator,
            cipher=message.cipher,
            send_key=message.send_key,
            send_nonce=message.send_nonce,
            receive_key=message.receive_key,
            receive_nonce=message.receive_nonce,
            leftover=message.leftover,
            hello=self._hello,
            settings=self._config.session,
            now_s=self._loop.time(),
        )
        link = Link(
            sock, session, message.session_id, message.initiator, peer, self._hello,
            self._config.session, self._config.worker.buffer_size, self._inbound, self._drops, self,
        )  # fmt: skip
        self._links[link.session_id] = link
        peer.links.add(link)
        self._sessions_opened += 1
        link.start()

    def _tell(self, message: messages.Message) -> None:
        if self._control is not None:
            self._control.send(message)

    # --- links

    def link_ready(self, link: Link) -> None:
        log.info("session %x with %s is up", link.session_id, link.peer.name)
        self._peers.link_ready(link)
        self._tell(messages.SessionUp(session_id=link.session_id, peer_id=link.peer.peer_id))

    def link_closed(self, link: Link, reason: str) -> None:
        log.info("session %x with %s: %s", link.session_id, link.peer.name, reason)
        self._links.pop(link.session_id, None)
        self._sessions_closed += 1
        self._peers.link_closed(link)
        self._tell(messages.SessionDown(session_id=link.session_id, peer_id=link.peer.peer_id, reason=reason))

    def _make_waiting(self, peer_id: str) -> Waiting:
        worker = self._config.worker

        def want() -> None:
            self._tell(messages.SessionWanted(peer_id=peer_id))
            self._loop.call_later(worker.pending_timeout, expire)

        def expire() -> None:
            waiting.expire(self._loop.time() - worker.pending_timeout)
            if waiting.queue:
                due_s = waiting.queue.first().since_s + worker.pending_timeout
                self._loop.call_at(due_s, expire)

        waiting = Waiting(Queue(worker.pending_bytes, worker.buffer_size), self._drops, self._loop.time, want)
        return waiting

    # --- time and counters

    def _clean(self) -> None:
        self._flows.reap(self._loop.time())
        self._loop.call_later(self._config.worker.cleanup_interval, self._clean)

    def batch_done(self) -> None:
        """Store what changes with every batch of packets."""
        outbound, inbound = self._outbound, self._inbound
        self._counters.store_batch(
            outbound.packets,
            outbound.bytes,
            inbound.packets_to_tun,
            inbound.bytes_to_tun,
            self.packets_sent,
            self.bytes_sent,
            inbound.packets_received,
            inbound.bytes_received,
        )

    def _store_all(self) -> None:
        self.batch_done()
        queued = sum(link.queue.packets for link in self._links.values())
        queued += sum(peer.waiting.queue.packets for peer in self._peers)
        self._counters.store(
            packets_queued=queued,
            flows=len(self._flows.flows),
            flows_created=self._flows.created,
            flows_reaped=self._flows.reaped,
            streams=sum(link.streams for link in self._links.values()),
            streams_opened=self.streams_opened,
            streams_closed=self.streams_closed,
            sessions=len(self._links),
            sessions_opened=self._sessions_opened,
            sessions_closed=self._sessions_closed,
            session_errors=self.session_errors,
        )
        self._counters.store_drops(self._drops)

    def _store_often(self) -> None:
        self._store_all()
        self._loop.call_later(self._config.metrics.interval, self._store_often)


def main() -> None:
    """Entry point: everything is imported; take the start message, give up root, run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    parent = os.getppid()
    sock = socket.socket(fileno=int(sys.argv[1]))
    channel = Channel(sock, "shard", "supervisor")
    start, descriptors = first_message(channel, messages.ShardStart)
    logs.configure(start.config.log.level, f"shard {start.index}")
    privileges.drop(start.config.process.user, parent)
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(channel, start, descriptors))


async def _run(channel: Channel, start: messages.ShardStart, descriptors: list[int]) -> None:
    reason = await Shard(channel, start, descriptors).run()
    log.debug("ends: %s", reason)
