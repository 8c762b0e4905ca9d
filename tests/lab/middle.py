"""A lab of two machines with a router between them, which may get a smaller MTU and says nothing of what it drops.

a 10.1.0.1, fd00:1::1 ── 10.1.0.2 m 10.2.0.2 ── 10.2.0.1, fd00:2::1 b
"""

from __future__ import annotations

from .network import DEVICE, Lab, Namespace

_SILENT = (
    "add table inet silent; add chain inet silent out { type filter hook output priority 0; policy drop; }"
)


class MiddleLab(Lab):
    """`nodes`: a and b, with their IPv4 addresses."""

    def __init__(self) -> None:
        super().__init__(0)
        self.nodes = [
            Namespace(f"lab-{self.token}-{label}", label, f"10.{place}.0.1")
            for place, label in enumerate("ab", 1)
        ]
        self.middle = Namespace(f"lab-{self.token}-m", "m", "")

    def _all(self) -> list[Namespace]:
        return [*self.nodes, self.middle]

    def _connect(self) -> None:
        for place, node in enumerate(self.nodes, 1):
            port = f"to-{node.label}"
            self._join(node, self.middle, port)
            for namespace, device, host in ((node, DEVICE, 1), (self.middle, port, 2)):
                self.ip(namespace, "addr", "add", f"10.{place}.0.{host}/24", "dev", device)
                self.ip(namespace, "addr", "add", f"fd00:{place}::{host}/64", "dev", device, "nodad")
                self.ip(namespace, "link", "set", "dev", device, "up")
            self.ip(node, "route", "add", "default", "via", f"10.{place}.0.2")
            self.ip(node, "route", "add", "default", "via", f"fd00:{place}::2")
        self.run(self.middle, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")

    def narrow(self, mtu: int) -> None:
        """From now on nothing larger passes, and nobody is told: the router sends no packets of its own but to find
        neighbours."""
        self.run(self.middle, "nft", _SILENT)
        self.run(
            self.middle,
            "nft",
            "add rule inet silent out icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        )
        self._set_mtu(mtu)

    def silence(self) -> None:
        """From now on nothing passes."""
        self.run(
            self.middle,
            "nft",
            "add table inet dead; add chain inet dead through { type filter hook forward priority 0; policy drop; }",
        )

    def widen(self) -> None:
        """Everything passes again."""
        self.run(self.middle, "nft", "flush ruleset")
        self._set_mtu(1500)

    def _set_mtu(self, mtu: int) -> None:
        for node in self.nodes:
            self.ip(self.middle, "link", "set", "dev", f"to-{node.label}", "mtu", str(mtu))
