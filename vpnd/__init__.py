"""vpnd: a peer-to-peer mesh VPN over libp2p.

`from vpnd import VPNService` is the embeddable daemon. It is loaded on first use, so that the children
(which import vpnd's shared modules) never load the supervisor.
"""

from typing import Any

from vpnd.version import __version__

__all__ = ["VPNService", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "VPNService":
        from supervisor.service import VPNService

        return VPNService
    raise AttributeError(f"module 'vpnd' has no attribute {name!r}")
