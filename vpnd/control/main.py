"""control: the process that runs py-libp2p.

    talks to       over                             what comes, and who serves it
    -------------  -------------------------------  -----------------------------------------------------
    supervisor     channel (inherited descriptor)   main: ControlStart; Control._on_supervisor: ShardArrived,
                                                    ShardLeft, StatusRequest, NetworkChanged, Reconfigure,
                                                    RelayArrived, Request, WalkTold, Withheld, Stop
    each shard     channel (from ShardArrived)      Sessions._on_shard: SessionsHeld, SessionUp, SessionDown,
                                                    SessionWanted, SegmentsStuck, OwnerWanted
    relay          channel (from RelayArrived)      Relaying: RelayHeld, RelayPairEnded, RelayMoved
    a contract     HTTP, registry.kind "contract"   Owning: who owns an address
    other nodes    libp2p over TCP                  Host: Noise, identify, ping; Sessions: inbound data sessions;
                                                    Dialer: outbound ones; Gossiping,
                                                    Introducing, EnrolmentDesk: members, and who
                                                    wants to be one; Traversal, Rendezvous: meetings;
                                                    Explaining: what becomes of their packets

It starts as root, holding one channel. Rights kept after `privileges.drop`: the channels, the counter page,
sockets of its own on unprivileged ports, the private key in memory, the directory of its network. Nothing is
imported from then on: the files of vpnd may be readable by root alone.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trio
from libp2p.crypto.keys import KeyPair

from vpnd import lean, logs, privileges, seccomp
from vpnd.adapter.host import Host
from vpnd.adapter.logs import tame_libp2p
from vpnd.adapter.noise import peer_id_of, read_key_pair, signing_key
from vpnd.adapter.shape import check_libp2p, preload
from vpnd.api import messages
from vpnd.api.channel import Channel, first_message, run_child
from vpnd.config import paths
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.control.channels import TrioChannel
from vpnd.control.common import Common
from vpnd.control.control import Base, Control
from vpnd.control.founding import Founding
from vpnd.control.membership import NetworkService
from vpnd.control.owning import Owning
from vpnd.discovery.registry import PeerRegistry
from vpnd.errors import ConfigError, VpndError
from vpnd.logs import Seldom
from vpnd.membership.store import Store
from vpnd.metrics import CONTROL_COUNTERS, CounterPage
from vpnd.nat.portmap import NONCE_BYTES
from vpnd.session import VPND

if TYPE_CHECKING:
    from vpnd.adapter.contract import ContractRegistry

log = logging.getLogger(__name__)


def main() -> None:
    """`python -m vpnd.control CHANNEL_FD`."""
    run_child("control", _main)


def _main(channel: Channel, parent_pid: int) -> None:
    preload()
    lean.settle()
    start, descriptors = first_message(channel, messages.ControlStart)
    tame_libp2p(logs.configure(start.config.log, "control"))
    check_libp2p()
    identity_fd, page_fd = descriptors[:2]
    keys = read_key_pair(identity_fd)
    page = CounterPage(CONTROL_COUNTERS, page_fd)
    page.set("connections", 0)  # a gauge: what a predecessor left there is not true any more
    os.close(identity_fd)
    os.close(page_fd)
    if peer_id_of(keys) != start.peer_id:
        raise ConfigError(
            f"the identity file belongs to {peer_id_of(keys)}, not to {start.peer_id}; start the node again"
        )
    contract = _contract(start.config, page)
    privileges.drop(start.config.process.user, parent_pid)
    if start.config.process.seccomp:
        seccomp.confine(seccomp.CONTROL)
    store = Store(paths.network_dir(start.config), descriptors[2]) if len(descriptors) > 2 else None
    failed: list[VpndError] = []
    trio.run(_run, start, keys, page, TrioChannel(channel), store, contract, failed)
    if failed:
        raise failed[0]


def _contract(config: Config, page: CounterPage) -> ContractRegistry | None:
    """What is asked who owns an address: made while there are the rights to read what that takes, and imported only
    where it is wanted."""
    if config.registry.kind != "contract":
        return None
    from vpnd.adapter.contract import ContractRegistry

    return ContractRegistry(config.registry, page.add, trio.current_time)


async def _run(
    start: messages.ControlStart,
    keys: KeyPair,
    page: CounterPage,
    supervisor: TrioChannel,
    store: Store | None,
    contract: ContractRegistry | None,
    failed: list[VpndError],
) -> None:
    """Until Stop. What keeps it from getting ready is put into `failed`: raised, it would come out of libp2p's
    nurseries in a group."""
    live = Live(start.config)
    seldom = Seldom(log, live, trio.current_time)
    common = Common(live, page.add, seldom, trio.current_time)
    owning = None
    if contract is not None:
        owning = Owning(contract, common, start.peer_id, in_network=store is not None, gauge=page.set)
    registry = owning.registry if owning is not None else PeerRegistry(start.config.peers)
    host = Host(
        keys,
        live,
        is_member=lambda peer_id: registry.find(peer_id) is not None,
        member_addresses=lambda: (address for member in registry.members() for address in member.addresses),
        speaks=lambda peer_id: member.protocol if (member := registry.find(peer_id)) is not None else VPND,
        count=page.add,
        connections=lambda number: page.set("connections", number),
        seldom=seldom,
    )
    nonce = signing_key(keys).sign(b"vpnd port map 1")[:NONCE_BYTES]
    base = Base(start, common, registry, page, host, supervisor, nonce)
    async with host.running():
        listen = host.listen_addresses()
        log.info("listening on %s", ", ".join(listen) or "no address that others could dial")
        network = own = None
        if store is not None:
            try:
                network = await _in_network(base, keys, store)
            except VpndError as error:
                failed.append(error)
                return
            if owning is not None:
                network.watch_own(owning.own_changed)
            own = network.enter()
        async with trio.open_nursery() as nursery:
            control = Control(base, nursery, network, owning)
            supervisor.send(messages.Ready(listen=listen, own=own))
            await control.run()
            nursery.cancel_scope.cancel()


async def _in_network(base: Base, keys: KeyPair, store: Store) -> NetworkService:
    """The network this node is in from now on. Raises RefusedError or ConfigError."""
    start, common = base.start, base.common
    founding = Founding(
        store, common, peer_id=start.peer_id, node_name=start.node_name, identity=signing_key(keys)
    )
    entered = await founding.enter(base.host, start.token)
    return NetworkService(entered, common, base.registry, base.host, founding, tell=base.supervisor.tell)
