"""What needs two settings to judge, and what a setting means with the identity known.

Every check reports through `Report`, which knows where a value came from. A setting that was refused by
itself is judged here by its default, so an empty text stands for "not known" everywhere.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Callable, Iterator

from vpnd.config import multiaddrs, paths
from vpnd.config.schema import Config, Peer
from vpnd.endpoint import IP, IPNetwork
from vpnd.session import SUBNET_NODE

#: Where the virtual IP of a node is taken from whose configuration names none; a part of 10.0.0.0/8 few networks use.
DEFAULT_NETWORK = ipaddress.IPv4Network("10.86.0.0/16")
#: Linux sockaddr_un.sun_path is 108 bytes with the closing zero byte.
MAX_SOCKET_PATH = 107
#: RFC 8200 section 5: no IPv6 link may have a smaller MTU.
MIN_IPV6_MTU = 1280


#: Takes one problem: the setting to change, its value, and reason; remedy.
Report = Callable[[str, object, str], None]


def check(config: Config, report: Report, *, network_known: bool = True) -> None:
    """All checks across settings; `network_known` is false when part of [network] was refused already."""
    if network_known:
        _network(config, report)
        _peers_inside(config, report)
    _endpoints(config, report)
    _peers_differ(config, report)
    _registry(config, report)
    _orders(config, report)
    _socket(config, report)


def check_identity(config: Config, peer_id: str, report: Report) -> None:
    """The checks that need the identity: `config.network.virtual_ip` is filled in, `peer_id` is our own."""
    check(config, report)
    for place, peer in enumerate(config.peers):
        if peer.peer_id == peer_id:
            report(f"peers[{place}].peer_id", peer_id, "is this node itself; remove this [[peers]] entry")


def default_virtual_ip(peer_id: str) -> str:
    """An address of `DEFAULT_NETWORK` that depends on the peer id alone.

    Its last byte is never 0 or 255, so it is a host's address in every subnet from /16 to /24. Two of 65,024
    possible addresses may coincide (among 300 nodes with probability one half): then one of the two nodes
    sets network.virtual_ip.
    """
    digest = hashlib.sha256(peer_id.encode()).digest()
    third, fourth = digest[0], 1 + int.from_bytes(digest[1:9]) % 254
    return str(DEFAULT_NETWORK.network_address + (third << 8) + fourth)


def subnet(config: Config) -> IPNetwork:
    """The VPN's subnet. Without a virtual_ip: around the network default addresses are chosen from."""
    address = config.network.virtual_ip or str(DEFAULT_NETWORK.network_address)
    longest = ipaddress.ip_address(address).max_prefixlen
    return ipaddress.ip_network(f"{address}/{min(config.network.subnet, longest)}", strict=False)


def _network(config: Config, report: Report) -> None:
    network = config.network
    own = subnet(config)
    if network.subnet > own.max_prefixlen:
        text = f"must be at most {own.max_prefixlen} for IPv{own.version}"
        report("network.subnet", network.subnet, f"{text}; give a value from 1 to {own.max_prefixlen}")
    elif network.virtual_ip and _names_network(ipaddress.ip_address(network.virtual_ip), own):
        text = f"is the network or broadcast address of {own}; take another address inside it"
        report("network.virtual_ip", network.virtual_ip, text)
    if own.version == 6 and network.mtu < MIN_IPV6_MTU:
        report(
            "network.mtu",
            network.mtu,
            f"must be at least {MIN_IPV6_MTU} with an IPv6 virtual_ip; write {MIN_IPV6_MTU}, or give an IPv4 one",
        )
    for route in network.routes:
        version = ipaddress.ip_network(route).version
        if version != own.version:
            text = f"{route} is IPv{version} but the VPN's subnet {own} is IPv{own.version}; remove it"
            report("network.routes", list(network.routes), text)


def _names_network(address: IP, network: IPNetwork) -> bool:
    """True for the first address of a network, and the last of an IPv4 one; /31 and longer have neither."""
    if network.prefixlen >= network.max_prefixlen - 1:
        return False
    return address == network.network_address or (
        network.version == 4 and address == network.broadcast_address
    )


def _endpoints(config: Config, report: Report) -> None:
    for text in config.p2p.listen:
        endpoint = multiaddrs.parse(text)
        if endpoint.kind not in ("ip4", "ip6") or endpoint.peer_id:
            report(
                "p2p.listen", text, "must be an address of this machine; write it like /ip4/0.0.0.0/tcp/4001"
            )
    for text in config.p2p.announce:
        endpoint = multiaddrs.parse(text)
        if endpoint.peer_id:
            report("p2p.announce", text, "is this node's; remove the /p2p part")
        else:
            _to_dial("p2p.announce", text, endpoint, report)
    for place, peer in enumerate(config.peers):
        if peer.protocol == SUBNET_NODE:
            _subnet_node(config, place, peer, report)
        for text in peer.addresses:
            endpoint = multiaddrs.parse(text)
            path = f"peers[{place}].addresses"
            if endpoint.peer_id not in ("", peer.peer_id):
                report(
                    path, text, f"names another peer than its peer_id {peer.peer_id}; remove the /p2p part"
                )
            else:
                _to_dial(path, text, endpoint, report)


def _to_dial(path: str, text: str, endpoint: multiaddrs.Endpoint, report: Report) -> None:
    if endpoint.port == 0:
        report(path, text, f"has no port behind /tcp/; write one from 1 to {multiaddrs.MAX_PORT}")
    elif endpoint.kind in ("ip4", "ip6") and ipaddress.ip_address(endpoint.host).is_unspecified:
        report(path, text, "cannot be dialed; write an address that others can reach")


def _subnet_node(config: Config, place: int, peer: Peer, report: Report) -> None:
    if ":" in peer.virtual_ip:
        text = "knows IPv4 alone; give the peer an IPv4 virtual_ip"
        report(f"peers[{place}].protocol", peer.protocol, text)
    if not peer.addresses and config.worker.shards != 1:
        # The one connection it makes is one shard's
        text = "a subnet node dials once; name where each shard can dial it, or set worker.shards = 1"
        report(f"peers[{place}].addresses", "[]", text)


def _peers_differ(config: Config, report: Report) -> None:
    taken: dict[tuple[str, str], str] = {}
    if config.network.virtual_ip:
        taken["virtual_ip", config.network.virtual_ip] = "this node (network.virtual_ip)"
    for place, peer in enumerate(config.peers):
        for key, value in (("name", peer.name), ("peer_id", peer.peer_id), ("virtual_ip", peer.virtual_ip)):
            owner = taken.setdefault((key, value), f"peers[{place}]")
            if value and owner != f"peers[{place}]":
                report(f"peers[{place}].{key}", value, f"is already that of {owner}; change one of them")


def _peers_inside(config: Config, report: Report) -> None:
    inside = [subnet(config), *map(ipaddress.ip_network, config.network.routes)]
    for place, peer in _with_address(config):
        address = ipaddress.ip_address(peer.virtual_ip)
        path = f"peers[{place}].virtual_ip"
        if not any(address in network for network in inside):
            text = f"is neither in the VPN's subnet {inside[0]} nor in network.routes"
            report(
                path,
                peer.virtual_ip,
                f'{text}; change it or add "{ipaddress.ip_network(address)}" to the routes',
            )
        elif _names_network(address, inside[0]):
            report(
                path, peer.virtual_ip, f"is the network or broadcast address of {inside[0]}; take another one"
            )


def _with_address(config: Config) -> Iterator[tuple[int, Peer]]:
    """Peers whose virtual_ip can be judged: all, unless our own subnet is only known with the identity."""
    known = config.network.virtual_ip or config.network.subnet <= DEFAULT_NETWORK.prefixlen
    return ((place, peer) for place, peer in enumerate(config.peers) if known and peer.virtual_ip)


def _registry(config: Config, report: Report) -> None:
    if config.registry.kind != "contract":
        return
    for key in ("rpc_url", "contract_address"):
        if not getattr(config.registry, key):
            report(
                f"registry.{key}", "", 'is missing; set it, or registry.kind = "none": "contract" needs it'
            )


def _orders(config: Config, report: Report) -> None:
    for table, least, most in (
        ("network", "change_settle", "change_settle_max"),
        ("retry", "initial_interval", "max_interval"),
        ("process", "restart_initial", "restart_max"),
        ("p2p", "max_connects_per_source", "max_connects"),
        ("p2p", "max_sessions_per_peer", "max_handshakes_per_peer"),
    ):
        value = getattr(getattr(config, table), least)
        if value > getattr(getattr(config, table), most):
            report(f"{table}.{least}", value, f"must not be above {table}.{most}; lower it, or raise that")


def _socket(config: Config, report: Report) -> None:
    path = paths.status_socket(config)
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        text = f"is {length} bytes long as {path}, and a socket's path has at most {MAX_SOCKET_PATH}"
        report("status.socket", config.status.socket, f"{text}; name a shorter one or a shorter --state-dir")
    if path == paths.identity_file(config):
        report("status.socket", config.status.socket, "is the identity file too; name another file")
