"""The bridge to py-libp2p: the only code that knows how it is built and what must be guarded against.

libp2p is pinned; what is used beyond its documented interface is listed and checked in `shape`. Importing it makes DNS
resolvers, which fails on a machine whose resolv.conf is missing, empty or not UTF-8, or whose name is longer than a
label of DNS. Nothing asks them (`addresses` asks the system), so they are among the parts that libp2p is imported
without: what vpnd has no use for, and what that needs, would be half of control's memory.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from vpnd import lean

#: Of libp2p.
UNUSED = (
    "libp2p.bitswap",
    "libp2p.crypto.rsa",
    "libp2p.crypto.secp256k1",
    "libp2p.discovery",
    "libp2p.peer.persistent",
    "libp2p.pubsub",
    "libp2p.rcmgr.prometheus_exporter",
    "libp2p.relay",
    "libp2p.security.pnet",
    "libp2p.security.secio",
    "libp2p.security.tls",
    "libp2p.stream_muxer.mplex",
    "libp2p.transport.quic",
    "libp2p.transport.websocket",
)
#: Of what it needs.
UNUSED_BELOW = (
    *lean.IDLE,
    "anyio",
    "calendar",
    "cryptography.hazmat.primitives.serialization.ssh",
    "cryptography.x509",
    "dns._features",
    "google.protobuf.internal.python_message",
    "google.protobuf.text_format",
    "importlib.resources",
    "multiaddr.resolvers",
    "netaddr.contrib",
    "netaddr.eui",
    "netaddr.ip.glob",
    "netaddr.ip.nmap",
    "netaddr.ip.rfc1924",
    "netaddr.ip.sets",
    "pickle",
    "prometheus_client",
    "psutil",
    "trio._dtls",
    "trio._highlevel_ssl_helpers",
    "trio._ssl",
)


def release(package: str) -> str:
    """Which release of a package is installed. In the place of importlib.metadata's `version`, which brings the reading
    of archives and of mail."""
    for folder in sys.path:
        for file in Path(folder).glob(f"{package}-*.dist-info"):
            return file.stem.rpartition("-")[2]
    sys.modules.pop(_METADATA, None)
    return str(importlib.import_module(_METADATA).version(package))


_METADATA = "importlib.metadata"
if _METADATA not in sys.modules:
    sys.modules[_METADATA] = ModuleType(_METADATA)
    vars(sys.modules[_METADATA])["version"] = release
with lean.without(*UNUSED, *UNUSED_BELOW, missing=("_hashlib",)):
    import dns.message  # noqa: F401
    import libp2p.kad_dht.kad_dht  # noqa: F401
    from libp2p.network import swarm
    from libp2p.transport.tcp import tcp
lean.give_back(*UNUSED_BELOW)
if vars(sys.modules[_METADATA]).get("version") is release:
    del sys.modules[_METADATA]
# Whoever is given a name after all finds that this knows none.
swarm.DNSResolver = tcp.DNSResolver = object
