"""The tables of membership and discovery: how long it lasts, how the directory spreads, where members are found.

The rest, and what a table is, in `schema`.
"""

from __future__ import annotations

from typing import Annotated

from vpnd.config.units import Table, duration, number, share, size, switch, text


class Membership(Table, frozen=True):
    """The network this node makes or joins: its members, and how nodes tell each other of them."""

    name: Annotated[str, text("Name of a network that is made here: a-z, 0-9 and -.", "name")] = "home"
    subnet: Annotated[
        str, text("Where a network that is made here takes its IPv4 addresses from.", "cidr")
    ] = "10.86.0.0/16"
    record_lifetime: Annotated[
        float, duration("How long a membership is valid that this authority signs.", 1.0, 31536000.0)
    ] = 2592000.0
    renew_share: Annotated[
        float, share("A membership is renewed when this share of its lifetime is left.", 0.05, 0.95)
    ] = 0.5
    clock_skew: Annotated[float, duration("How far the clocks of two nodes may differ.", 0.0, 86400.0)] = (
        300.0
    )
    forget_after: Annotated[
        float,
        duration(
            "For so long an expired member may still renew, and its addresses are not given away.",
            0.0,
            31536000.0,
        ),
    ] = 2592000.0
    max_members: Annotated[
        int, number("Peer ids the directory holds at most, removed ones too.", 1, 100_000, "members")
    ] = 16_384
    invite_lifetime: Annotated[
        float, duration("How long a token is good for, unless it was made for another time.", 1.0, 31536000.0)
    ] = 3600.0
    gossip_interval: Annotated[
        float,
        duration("How often the directory is compared with that of a random neighbour.", 0.05, 86400.0),
    ] = 5.0
    gossip_push: Annotated[
        int,
        size(
            "New statements are sent whole up to so much at once; more are named and asked for.", 0, 1 << 24
        ),
    ] = 1 << 14
    gossip_request_timeout: Annotated[
        float,
        duration("A statement that was asked for is asked for elsewhere after so long.", 0.05, 3600.0),
    ] = 2.0
    presence_interval: Annotated[
        float,
        duration("New addresses of one member are pushed on to others at most this often.", 0.0, 3600.0),
    ] = 1.0
    neighbours: Annotated[
        int, number("Members this node keeps a connection to, to hear what is new.", 1, 1024, "members")
    ] = 8
    neighbour_rotation: Annotated[
        float,
        duration(
            "How often one of these is exchanged for another, so that the network stays one.", 1.0, 86400.0
        ),
    ] = 60.0
    gossip_queue: Annotated[
        int,
        size(
            "Bytes that may wait for one such member; more is left for the next comparison.", 1 << 17, 1 << 28
        ),
    ] = 1 << 23
    save_interval: Annotated[
        float, duration("The directory is written to disk at most this often; removals at once.", 0.0, 3600.0)
    ] = 1.0
    join_timeout: Annotated[float, duration("How long `start --join` may take to be let in.", 0.5, 300.0)] = (
        15.0
    )
    max_guests: Annotated[
        int,
        number(
            "Strangers that may be connected at once: to join, to renew, to show that they are members.",
            1,
            10_000,
            "peers",
        ),
    ] = 32
    guest_timeout: Annotated[
        float,
        duration("How long a stranger may stay connected; p2p.handshake_timeout ends it too.", 0.5, 300.0),
    ] = 10.0


class Discovery(Table, frozen=True):
    """Where members are found whose addresses are not known, or no longer right."""

    bootstrap: Annotated[
        tuple[str, ...], text("Multiaddrs, with /p2p/<peer id>, that are asked first.", "multiaddr")
    ] = ()
    dht: Annotated[bool, switch("Publish and look up addresses in the members' Kademlia table.")] = True
    dht_publish_interval: Annotated[
        float, duration("How often our record is published anew.", 1.0, 86400.0)
    ] = 600.0
    dht_record_lifetime: Annotated[
        float, duration("How old a record of another node may be to be believed.", 1.0, 604800.0)
    ] = 3600.0
    dht_backlog: Annotated[
        int,
        number("Members that have connected and wait to be taken into the table.", 1, 100_000, "members"),
    ] = 256
    dht_timeout: Annotated[float, duration("Deadline of one look-up.", 0.1, 300.0)] = 5.0
    dht_search_interval: Annotated[
        float, duration("How often members that cannot be reached are looked for in the table.", 0.5, 86400.0)
    ] = 10.0
    dht_searches: Annotated[
        int, number("Members looked for at once, and at most in one interval.", 1, 1024, "members")
    ] = 4
    mdns: Annotated[bool, switch("Find members on the local network.")] = True
    mdns_interval: Annotated[
        float, duration("How often this node says on the local network that it is there.", 1.0, 86400.0)
    ] = 60.0
    mdns_max_messages: Annotated[
        int,
        number(
            "Messages of the local network that are read in one second; more are dropped.",
            1,
            100_000,
            "messages",
        ),
    ] = 100
    cache_lifetime: Annotated[float, duration("How long an answer of a look-up is used.", 0.0, 86400.0)] = (
        60.0
    )
    negative_cache_lifetime: Annotated[
        float, duration("How long it is remembered that a look-up found nothing.", 0.0, 86400.0)
    ] = 5.0
    cache_entries: Annotated[
        int,
        number(
            "Answers of look-ups, and addresses seen on the local network, remembered.",
            1,
            1_000_000,
            "members",
        ),
    ] = 1024
