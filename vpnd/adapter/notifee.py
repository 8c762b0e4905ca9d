"""Base for listeners to events of libp2p's swarm: every event is ignored unless a subclass overrides it."""

from __future__ import annotations

from typing import Any

from libp2p.abc import INotifee


class Notifee(INotifee):
    """Override what is of interest. Called inline by the swarm, so nothing here may wait."""

    async def connected(self, network: Any, conn: Any) -> None:
        return

    async def disconnected(self, network: Any, conn: Any) -> None:
        return

    async def opened_stream(self, network: Any, stream: Any) -> None:
        return

    async def closed_stream(self, network: Any, stream: Any) -> None:
        return

    async def listen(self, network: Any, multiaddr: Any) -> None:
        return

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        return
