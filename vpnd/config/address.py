"""The virtual IP of a node whose configuration names none."""

from __future__ import annotations

import hashlib
import ipaddress

#: Where such addresses are taken from; part of the private 10.0.0.0/8 that few networks use.
DEFAULT_NETWORK = ipaddress.IPv4Network("10.86.0.0/16")


def default_virtual_ip(peer_id: str) -> str:
    """An address of `DEFAULT_NETWORK` that depends on the peer id alone.

    Its last byte is never 0 or 255, so it is a host's address in every subnet from /16 to /24. Two of 65,024
    possible addresses may coincide (among 300 nodes with probability one half): then one of the two nodes
    sets network.virtual_ip.
    """
    digest = hashlib.sha256(peer_id.encode()).digest()
    third, fourth = digest[0], 1 + int.from_bytes(digest[1:9]) % 254
    return str(DEFAULT_NETWORK.network_address + (third << 8) + fourth)
