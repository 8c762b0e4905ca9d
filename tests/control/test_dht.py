"""The members' table on real hosts: who is found, what is refused, and that nobody hears an old copy."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import trio
from control_nodes import Node, eventually, running
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.kad_dht.common import PROTOCOL_ID
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from vpnd.adapter.dht import DhtError, MembersDht
from vpnd.adapter.noise import SEED_BYTES
from vpnd.config.schema import Discovery
from vpnd.discovery.records import RecordRules, dht_key
from vpnd.membership.statements import Presence, sign

NETWORK_ID = bytes(16)
HOUR_MS = 3_600_000


PATIENCE_S = 60.0


class Table:
    """A node with its part of the table."""

    def __init__(self, directory: dict[str, tuple[str, ...]], **settings) -> None:
        self.counts: Counter[str] = Counter()
        self.directory = directory
        self.node = Node(members=None)
        self.node.members = directory.keys()  # type: ignore[assignment]
        seed = self.node.host.libp2p.get_private_key().to_bytes()[:SEED_BYTES]
        self.key = Ed25519PrivateKey.from_private_bytes(seed)
        self.addresses = ("/ip4/192.0.2.1/tcp/4001",)
        self.known_ms: dict[str, int] = {}
        rules = RecordRules(
            lambda peer_id: self.known_ms.get(peer_id, -1) if peer_id in directory else None, HOUR_MS, 1000
        )
        self.dht = MembersDht(
            self.node.host,
            rules,
            Discovery(**{"dht_timeout": 3.0} | settings),
            stream_timeout_s=10.0,
            addresses_of=self.directory.get,
            presence=self.presence,
            now_ms=now_ms,
            count=lambda name: self.counts.update((name,)),
        )

    @property
    def peer_id(self) -> str:
        return self.node.peer_id

    def presence(self, sequence_ms: int | None = None) -> bytes:
        body = Presence(
            NETWORK_ID,
            peer_id=self.peer_id,
            addresses=self.addresses,
            sequence_ms=now_ms() if sequence_ms is None else sequence_ms,
        )
        return sign(self.key, body).wire

    def put_into(self, other: Table, value: bytes, key: str | None = None):
        """PUT_VALUE to another node, past what the library checks here."""
        raw = (key or dht_key(self.peer_id)).encode()
        record = Record(key=raw, value=value, author=b"somebody", signature=b"")
        return self.dht._dht.value_store._store_at_peer(other.node.id, raw, value, record=record)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextlib.asynccontextmanager
async def tables(count: int, **settings) -> AsyncIterator[list[Table]]:
    """A chain of nodes, each connected to the next, all of them members."""
    directory: dict[str, tuple[str, ...]] = {}
    made = [Table(directory, **settings) for _ in range(count)]
    for table in made:
        directory[table.peer_id] = ()
    async with running(*(table.node for table in made)), trio.open_nursery() as nursery:
        for table in made:
            directory[table.peer_id] = (table.node.address,)
            nursery.start_soon(table.dht.run)
        for one, other in zip(made, made[1:], strict=False):
            await one.node.connect(other.node)
        await eventually(lambda: all(table.counts["dht_published"] for table in made))
        yield made
        nursery.cancel_scope.cancel()


def test_a_member_is_found_over_others() -> None:
    async def main() -> None:
        async with tables(5) as made:
            found = None
            with trio.fail_after(PATIENCE_S):  # one look-up has a deadline, and this machine may be busy
                while found is None:
                    found = await made[0].dht.find(made[-1].peer_id)
            assert found.addresses == made[-1].addresses
            assert 0 <= found.age_s < PATIENCE_S
            assert found.statement

    trio.run(main)


def test_new_addresses_are_found_at_once_though_an_old_copy_is_held() -> None:
    async def main() -> None:
        async with tables(3) as made:
            a, _, c = made
            old = await a.dht.find(c.peer_id)
            assert old is not None
            assert dht_key(c.peer_id).encode() in a.dht._dht.value_store.store, "a has a copy now"
            c.addresses = ("/ip4/192.0.2.99/tcp/4001",)
            published = c.counts["dht_published"]
            # a is not told: it neither takes nor is offered the new record
            await trio.sleep(0.002)
            held = dict(a.dht._dht.value_store.store)
            c.dht.publish()
            await eventually(lambda: c.counts["dht_published"] > published)
            a.dht._dht.value_store.store.clear()
            a.dht._dht.value_store.store.update(held)
            new = await a.dht.find(c.peer_id)
            assert new is not None
            assert new.addresses == c.addresses

    trio.run(main)


def test_a_copy_that_is_newer_than_what_others_say_is_kept_and_counts() -> None:
    async def main() -> None:
        async with tables(2) as (a, b):
            b.addresses = ("/ip4/192.0.2.50/tcp/4001",)
            key, newer = dht_key(b.peer_id), b.presence(now_ms() + 500)
            assert await b.put_into(a, newer)
            found = await a.dht.find(b.peer_id)
            assert found is not None
            assert found.addresses == b.addresses
            assert a.dht._dht.value_store.store[key.encode()][0].value == newer

    trio.run(main)


def test_what_nobody_published_is_not_found() -> None:
    async def main() -> None:
        async with tables(3) as made:
            stranger = Node()
            assert await made[0].dht.find(stranger.peer_id) is None
            assert made[0].counts["dht_not_found"] == 1

    trio.run(main)


def test_bad_records_are_refused_by_whoever_is_to_hold_them() -> None:
    async def main() -> None:
        async with tables(2) as (a, b):
            stranger = Table({})
            good = b.presence()
            b.known_ms[b.peer_id] = a.known_ms[b.peer_id] = now_ms()
            rows = {
                "forged": (good[:-1] + bytes([good[-1] ^ 1]), None),
                "under another's key": (good, dht_key(a.peer_id)),
                "of nobody": (stranger.presence(), dht_key(stranger.peer_id)),
                "too old": (b.presence(now_ms() - 2 * HOUR_MS), None),
                "of the future": (b.presence(now_ms() + HOUR_MS), None),
                "rolled back": (b.presence(a.known_ms[b.peer_id] - 1), None),
                "no statement at all": (b"hello", None),
                "of another namespace": (good, "/pk/something"),
            }
            before = {key: held[0].value for key, held in a.dht._dht.value_store.store.items()}
            for name, (value, key) in rows.items():
                assert not await b.put_into(a, value, key), name
            assert a.counts["dht_refused_records"] == len(rows) - 1
            after = {key: held[0].value for key, held in a.dht._dht.value_store.store.items()}
            assert after == before

    trio.run(main)


def test_nothing_beside_the_statement_is_stored() -> None:
    async def main() -> None:
        async with tables(2) as (a, b):
            assert await b.put_into(a, b.presence())
            record = a.dht._dht.value_store.store[dht_key(b.peer_id).encode()][0]
            assert not record.author
            assert not record.signature
            assert len(record.SerializeToString()) < 512

    trio.run(main)


def test_a_node_that_is_silent_does_not_hold_up_a_look_up() -> None:
    async def main() -> None:
        async with tables(4) as made:
            a, silent, c, d = made
            # it still takes connections and streams
            handlers = silent.node.host.libp2p.get_mux().handlers

            async def never(stream) -> None:
                await trio.sleep_forever()

            for protocol in list(handlers):
                if "kad" in str(protocol):
                    handlers[protocol] = never
            await c.node.connect(a.node)
            await d.node.connect(a.node)
            before = trio.current_time()
            found = await a.dht.find(d.peer_id)
            assert found is not None
            assert trio.current_time() - before < 4.0

    trio.run(main)


def test_streams_go_to_members_only() -> None:
    async def main() -> None:
        async with tables(2) as (a, b):
            with pytest.raises(DhtError, match="not a member"):
                await a.dht._dht.host.new_stream(Node().id, ["/ipfs/kad/1.0.0"])
            del a.directory[b.peer_id]
            assert await a.dht.find(b.peer_id) is None, "a member that was removed is not found either"

    trio.run(main)


def test_nothing_is_kept_of_who_says_to_provide_something() -> None:
    async def main() -> None:
        async with tables(2) as (a, b):
            message = Message(type=Message.MessageType.ADD_PROVIDER, key=b"/vpnd/anything")
            said = message.providerPeers.add()
            said.id = a.node.id.to_bytes()
            said.addrs.append(Multiaddr("/ip4/192.0.2.1/tcp/4001").to_bytes())
            stream = await a.node.host.open_stream((b.node.address,), b.peer_id, PROTOCOL_ID)
            with trio.fail_after(5):
                await stream.write(encode_varint_prefixed(message.SerializeToString()))
                assert await stream.read(1), "it is answered"
            assert not b.dht._dht.provider_store.providers

    trio.run(main)
