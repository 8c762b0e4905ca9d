"""The bridge to py-libp2p: the only code that knows how it is built and what must be guarded against.

libp2p is pinned; what is used beyond its documented interface is listed and checked in `shape`. Importing it makes DNS
resolvers, which fails on a machine whose resolv.conf is missing, empty or not UTF-8, or whose name is longer than a
label of DNS. Nothing asks them (`addresses` asks the system), so none reads a configuration or the name of
the machine; so this comes before any import of libp2p. That is imported without the parts vpnd has no use for: they and
what they need would be a third of control's memory.
"""

import socket
import sys
from typing import Any

from vpnd import lean

#: Of libp2p and dnspython.
UNUSED = (
    "dns.quic",
    "libp2p.bitswap",
    "libp2p.discovery",
    "libp2p.peer.persistent",
    "libp2p.pubsub",
    "libp2p.rcmgr.prometheus_exporter",
    "libp2p.relay",
    "libp2p.security.secio",
    "libp2p.security.tls",
    "libp2p.stream_muxer.mplex",
    "libp2p.transport.quic",
    "libp2p.transport.websocket",
    "prometheus_client",
)

with lean.without(*UNUSED):
    import dns.resolver
    from multiaddr.resolvers import DNSResolver


class _Nameless:
    """The socket module on a machine without a name."""

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def gethostname(self) -> str:
        """In the place of the machine's name."""
        return "localhost"


def _make_none(resolver: DNSResolver) -> None:
    """In the place of DNSResolver's __init__."""


dns.resolver.socket = _Nameless()  # type: ignore[assignment]
DNSResolver.__init__ = _make_none

# Of pycryptodome, which uses ctypes without it, as it does from Python 3.12 on: parsing C takes a tenth of the start.
sys.modules.setdefault("cffi", None)  # type: ignore[arg-type]
with lean.without(*UNUSED):
    import libp2p.kad_dht.kad_dht  # noqa: F401
if sys.modules["cffi"] is None:
    del sys.modules["cffi"]
