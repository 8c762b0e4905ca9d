"""Everything libp2p and its friends would import only when first needed, imported now.

After control has given up root it may not be able to read its own files (an environment under a directory of
root's), so an import at that moment fails. What is lazy was found by comparing sys.modules before and after
dialing, accepting, refusing, identify and ping; a test runs control where imports are impossible.
"""

from __future__ import annotations

import importlib

from multiaddr import Multiaddr

#: Module, who imports it late.
LAZY = (
    "encodings.idna",  # socket.getaddrinfo, with the first host name
    "encodings.ascii",  # reading /proc/net/tcp
    "_strptime",  # times in records of the table
    "libp2p.network.connection.swarm_connection",  # the swarm, with the first connection
    "libp2p.utils.connection_shutdown",  # that one, when a connection ends
)
#: One multiaddr of each protocol vpnd meets: codecs are loaded with the first address that needs them.
SAMPLES = (
    "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
    "/ip6/::1/tcp/1",
    "/dns/localhost/tcp/1",
    "/dns4/localhost/tcp/1",
    "/dns6/localhost/tcp/1",
)


def preload() -> None:
    """Import what is lazy; costs milliseconds beside what importing libp2p has cost already."""
    for name in LAZY:
        importlib.import_module(name)
    for text in SAMPLES:
        address = Multiaddr(text)
        str(Multiaddr(address.to_bytes()))
        list(address.items())
