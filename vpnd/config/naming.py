"""The tables of who is who: names of members in DNS, and where the owner of a virtual address is looked up.

The rest, and what a table is, in `schema`.
"""

from __future__ import annotations

from typing import Annotated

from vpnd.config.units import Table, duration, number, share, size, switch, text


class Dns(Table, frozen=True):
    """Names of members, answered by each node on its virtual IP."""

    enabled: Annotated[bool, switch("Answer DNS for <name>.<network>.vpn on the virtual IP.")] = True
    port: Annotated[int, number("UDP and TCP port of the answers.", 1, 65535, "port")] = 53
    register: Annotated[
        bool,
        switch("Tell systemd-resolved, where it runs, to send queries for these names here, and only those."),
    ] = True
    register_timeout: Annotated[float, duration("How long one resolvectl command may take.", 0.1, 300.0)] = (
        5.0
    )
    ttl: Annotated[
        float, duration("How long resolvers may keep an answer, in whole seconds.", 0.0, 604800.0)
    ] = 30.0
    negative_ttl: Annotated[
        float, duration("As ttl, for answers that there is no such name.", 0.0, 604800.0)
    ] = 5.0
    max_udp_bytes: Annotated[
        int,
        size(
            "Largest answer over UDP to a resolver that takes it; longer ones are asked for over TCP.",
            512,
            65535,
        ),
    ] = 1232
    max_query_bytes: Annotated[int, size("Largest query; a longer one is ignored.", 512, 65535)] = 4096
    max_connections: Annotated[
        int,
        number("TCP connections at once; one more, and the oldest is closed.", 1, 65536, "connections"),
    ] = 64
    max_connections_per_client: Annotated[
        int, number("TCP connections of one address at once; one more is closed.", 1, 65536, "connections")
    ] = 8
    idle_timeout: Annotated[
        float, duration("A TCP connection without a query for so long is closed.", 0.05, 3600.0)
    ] = 10.0
    query_timeout: Annotated[
        float,
        duration("How long a query over TCP may take to come in, and its answer to go out.", 0.05, 3600.0),
    ] = 3.0


class Registry(Table, frozen=True):
    """Where the owner of a virtual address is looked up beside the configured peers."""

    kind: Annotated[
        str,
        text(
            "static (peers have the addresses they claim) or contract (an Ethereum contract with getPeer(uint256) says "
            "who has an IPv4 address).",
            "registry",
        ),
    ] = "static"
    rpc_url: Annotated[
        str,
        text(
            "JSON-RPC endpoint of the chain; what it answers is believed, so https unless it is local.", "url"
        ),
    ] = ""
    contract_address: Annotated[
        str, text("Address of the contract: 0x and 40 hex digits.", "contract_address")
    ] = ""
    timeout: Annotated[float, duration("Deadline of one look-up.", 0.1, 300.0)] = 5.0
    max_requests: Annotated[int, number("Look-ups under way at once.", 1, 1024, "requests")] = 8
    max_waiting: Annotated[
        int,
        number(
            "Look-ups that may wait for their turn; one more fails at once. So many addresses that no peer has are "
            "asked for, because of packets to them, in one negative_lifetime.",
            0,
            100_000,
            "requests",
        ),
    ] = 256
    max_response_bytes: Annotated[int, size("Largest answer read from the endpoint.", 1 << 10, 1 << 24)] = (
        1 << 14
    )
    positive_lifetime: Annotated[
        float, duration("How long an owner is remembered before the contract is asked again.", 0.1, 604800.0)
    ] = 300.0
    refresh_share: Annotated[
        float,
        share(
            "Owners of addresses in use are confirmed again after this share of positive_lifetime.",
            0.05,
            0.95,
        ),
    ] = 0.75
    negative_lifetime: Annotated[
        float,
        duration(
            "How long it is remembered that an address has no owner, or not the expected one.", 0.1, 604800.0
        ),
    ] = 30.0
    failure_lifetime: Annotated[
        float,
        duration(
            "How long a failed look-up is not tried again; for addresses in use it grows from one failure to the next, "
            "up to negative_lifetime.",
            0.1,
            86400.0,
        ),
    ] = 2.0
    stale_lifetime: Annotated[
        float,
        duration(
            "While look-ups fail, an owner is still believed for so long after it was confirmed.",
            0.0,
            2592000.0,
        ),
    ] = 3600.0
    max_entries: Annotated[int, number("Addresses remembered.", 1, 10_000_000, "addresses")] = 65536
