"""A shard's side of the channel to control: who the peers are, sessions as they are made, and what is told
back."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

from vpnd.api import messages
from vpnd.api.aio import LoopChannel
from vpnd.api.channel import Channel

if TYPE_CHECKING:
    from shards.plane import Plane
    from shards.session.link import Link

log = logging.getLogger("shard")


class Controlled:
    """Owner: the shard. `plane` is set before the first message. Control may die and come back; sessions go
    on."""

    plane: Plane

    def __init__(self) -> None:
        #: peer ids told on this channel so far; None once all are told
        self._told: set[str] | None = None
        self._channel: LoopChannel | None = None

    def meet(self, sock: socket.socket) -> None:
        """A control is there, perhaps a new one: tell it what is held here."""
        if self._channel is not None:
            self._channel.close()
        self._told = set()
        self._channel = LoopChannel(Channel(sock, "shard", "control"), self._receive, self._closed)
        held = tuple(
            (link.session_id, link.peer.peer_id, link.initiator) for link in self.plane.links.values()
        )
        self._channel.send(messages.SessionsHeld(sessions=held))
        for peer in self.plane.peers:
            peer.set_circuit("closed")  # a new control has not found out yet
            peer.pool.repeat_wanted()

    def _closed(self, error: Exception) -> None:
        log.info("control: %s; sessions go on", error)

    def _receive(self, message: messages.Message, descriptors: list[int]) -> None:
        peers = self.plane.peers
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
                self.plane.owners_asked(networks)
            case messages.PeerCircuit(peer_id=peer_id, state=state):
                known = peers.get(peer_id)
                if known is not None:
                    known.set_circuit(state)
            case messages.PeerDialed(peer_id=peer_id):
                if (known := peers.get(peer_id)) is not None:
                    known.pool.look_after()
            case messages.SessionHandover():
                self._take(message, socket.socket(fileno=descriptors[0]))

    def _take(self, message: messages.SessionHandover, sock: socket.socket) -> None:
        sock.setblocking(False)
        if self.plane.take(message, sock):
            return
        sock.close()
        self._tell(
            messages.SessionDown(
                session_id=message.session_id, peer_id=message.peer_id, reason="unknown", failed=False
            )
        )

    def session_up(self, link: Link) -> None:
        """See PlaneEvents."""
        self._tell(messages.SessionUp(session_id=link.session_id, peer_id=link.peer.peer_id))

    def session_down(self, link: Link, reason: str, failed: bool) -> None:
        """See PlaneEvents."""
        self._tell(
            messages.SessionDown(
                session_id=link.session_id, peer_id=link.peer.peer_id, reason=reason, failed=failed
            )
        )

    def session_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """See PlaneEvents."""
        self._tell(messages.SessionWanted(peer_id=peer_id, sessions=sessions, urgent=urgent))

    def owner_wanted(self, address: int) -> None:
        """See PlaneEvents."""
        self._tell(messages.OwnerWanted(address=address))

    def _tell(self, message: messages.Message) -> None:
        if self._channel is not None:
            self._channel.send(message)
