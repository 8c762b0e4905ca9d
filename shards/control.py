"""A shard's side of the channel to control: what is told, and what comes: who the peers are, and sessions as they are
made. Control may die and come back; sessions go on."""

from __future__ import annotations

import logging
import socket

from shards.plane import Plane
from shards.session.link import Link
from shards.session.transport import SocketTransport
from vpnd.api import messages
from vpnd.api.aio import Descriptors, LoopChannel
from vpnd.api.channel import Channel
from vpnd.api.reports import HeldSession
from vpnd.session import Established

log = logging.getLogger("shard")


class ControlPort:
    """What the data plane tells: its `PlaneEvents`. Nobody hears it while there is no `channel`."""

    def __init__(self) -> None:
        self.channel: LoopChannel | None = None

    def session_up(self, link: Link) -> None:
        self.tell(messages.SessionUp(session_id=link.session_id, peer_id=link.peer.peer_id))

    def session_down(self, link: Link, reason: str, failed: bool) -> None:
        self.tell(
            messages.SessionDown(
                session_id=link.session_id, peer_id=link.peer.peer_id, reason=reason, failed=failed
            )
        )

    def session_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        self.tell(messages.SessionWanted(peer_id=peer_id, sessions=sessions, urgent=urgent))

    def sessions_doubted(self, peer_id: str) -> None:
        self.tell(messages.SessionsDoubted(peer_id=peer_id))

    def segments_stuck(self, peer_id: str) -> None:
        self.tell(messages.SegmentsStuck(peer_id=peer_id))

    def owner_wanted(self, address: int) -> None:
        self.tell(messages.OwnerWanted(address=address))

    def tell(self, message: messages.Message) -> None:
        """Say it, if there is a control."""
        if self.channel is not None:
            self.channel.send(message)


class ControlClient:
    """What control tells. Owner: the shard."""

    def __init__(self, port: ControlPort, plane: Plane, descriptors: Descriptors) -> None:
        self._port, self._plane, self._descriptors = port, plane, descriptors
        #: peer ids told on this channel so far; None once all are told
        self._told: set[str] | None = None

    def meet(self, sock: socket.socket) -> None:
        """A control is there, perhaps a new one: tell it what is held here."""
        if self._port.channel is not None:
            self._port.channel.close()
        self._told = set()
        self._port.channel = LoopChannel(Channel(sock, "shard", "control"), self._receive, self._closed)
        held = tuple(
            HeldSession(link.session_id, link.peer.peer_id, link.initiator, link.path)
            for link in self._plane.links.values()
        )
        self._port.tell(messages.SessionsHeld(sessions=held))
        for peer in self._plane.peers:
            peer.set_circuit("closed")  # a new control has not found out yet
            peer.pool.repeat_wanted()

    def _closed(self, error: Exception) -> None:
        log.info("control: %s; sessions go on", error)

    def _receive(self, message: messages.Message, descriptors: list[int]) -> None:
        peers = self._plane.peers
        match message:
            case messages.PeerKnown(peer_id=peer_id, name=name, prefixes=prefixes):
                new = peers.get(peer_id) is None
                peer = peers.know(peer_id, name, prefixes)
                if new:
                    peer.pool.tell_wanted(urgent=False)
                if self._told is not None:
                    self._told.add(peer_id)
            case messages.PeersComplete():
                told, self._told = self._told or set(), None
                for peer in peers:
                    if peer.peer_id not in told:
                        peers.forget(peer.peer_id)
            case messages.PeerForgotten(peer_id=peer_id):
                peers.forget(peer_id)
            case messages.OwnersAsked(networks=networks):
                peers.ask_owners(networks)
            case messages.PeerCircuit(peer_id=peer_id, state=state):
                known = peers.get(peer_id)
                if known is not None:
                    known.set_circuit(state)
            case messages.SessionsDoubted(peer_id=peer_id):
                if (known := peers.get(peer_id)) is not None:
                    known.pool.look_after()
            case messages.SessionHandover(session_id=session_id, session=session):
                self._take(session_id, session, socket.socket(fileno=descriptors[0]))

    def _take(self, session_id: int, session: Established, sock: socket.socket) -> None:
        sock.setblocking(False)
        transport = SocketTransport(sock, self._plane.live.config.session, self._descriptors)
        if self._plane.take(session_id, session, transport):
            return
        transport.close(discard=False)
        self._port.tell(
            messages.SessionDown(
                session_id=session_id, peer_id=session.peer_id, reason="unknown", failed=False
            )
        )
