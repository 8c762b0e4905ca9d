"""Two associations and a made-up way between them, which loses, delays, doubles and reorders datagrams; on a clock of
its own."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random

from shards.datagram.association import Association, Plain
from shards.datagram.path import Address
from shards.datagram.sealing import Batch
from vpnd.config.live import Live
from vpnd.config.schema import Carrier, Config
from vpnd.packet.record import LENGTH
from vpnd.packet.ring import SCRATCH
from vpnd.session import AESGCM, Established

KEYS = bytes(range(32)), bytes(range(32, 64))
HERE: Address = ("192.0.2.1", 4001)
THERE: Address = ("192.0.2.2", 4001)
#: A read of the socket gives no more than so many datagrams of equal size at once.
MERGED = 40


def established(initiator: bool, cipher: str = AESGCM) -> Established:
    send, receive = KEYS if initiator else KEYS[::-1]
    return Established(
        peer_id="other", initiator=initiator, cipher=cipher, send_key=send, send_nonce=0,
        receive_key=receive, receive_nonce=0, leftover=b"",
    )  # fmt: skip


def datagrams(batch: Batch) -> list[bytes]:
    """What the socket would send, one by one; the batch is empty then."""
    batch.end_run()
    found = [
        bytes(batch.view[at : min(at + size, end)])
        for begin, end, size, _ in batch.runs
        for at in range(begin, end, size)
    ]
    batch.clear()
    return found


class End:
    """One side. `records`: what was delivered, each behind its length; `bad`: reasons of what was refused."""

    def __init__(
        self, live: Live, initiator: bool, draw: Callable[[], int], peer: tuple[Address, ...]
    ) -> None:
        self.records: list[bytes] = []
        self.bad: list[str] = []
        self.batch = Batch(1 << 22)
        self.plain = Plain(1 << 17)
        self.address = HERE if initiator else THERE
        self.association = Association(
            live, established(initiator), 7 if initiator else 8, peer, self.plain,
            self._deliver, self.bad.append, draw, 0.0,
        )  # fmt: skip
        self.path = self.association.path

    def _deliver(self, view: memoryview) -> None:
        position = 0
        while position < len(view):
            end = position + 4 + LENGTH.unpack_from(view, position)[0]
            self.records.append(bytes(view[position:end]))
            position = end
        assert position == len(view)

    def seal(self, records: list[bytes]) -> list[bytes]:
        """The datagrams of so many records."""
        span = b"".join(records)
        ring = memoryview(bytearray(SCRATCH) + bytearray(span) + bytearray(64))
        reached, count = self.association.seal(self.batch, ring, SCRATCH, SCRATCH + len(span))
        assert (reached, count) == (SCRATCH + len(span), len(records))
        return datagrams(self.batch)

    def take(
        self, several: list[bytes], address: Address, now_s: float = 0.0, *, marked: bool = False
    ) -> None:
        """Datagrams as they come from a socket, those of equal size together."""
        for _, group in itertools.groupby(several, key=len):
            whole = list(group)
            for at in range(0, len(whole), MERGED):
                merged = b"".join(whole[at : at + MERGED])
                view = memoryview(merged)
                self.association.receive_untrusted(view, 0, len(view), len(whole[0]), address, marked, now_s)
        self.plain.finish()

    def probes(self) -> list[tuple[Address, bytes]]:
        """The probes and answers that are to be sent, with where to."""
        sent, self.path.probes = self.path.probes, []
        found = []
        for probe in sent:
            self.association.seal_probe(self.batch, probe)
            found += [(probe.address, each) for each in datagrams(self.batch)]
        return found


class Net:
    """The way between two ends. `most`: datagrams larger than that do not pass. `moved`: an end's address as it is seen
    from outside now. `blocked`: nothing passes from these ends."""

    def __init__(
        self, random: Random, *, loss: float = 0.0, delay_s: float = 0.01, **carrier: object
    ) -> None:
        self.random, self.loss, self.delay_s = random, loss, delay_s
        self.jitter_s = 0.0
        self.doubled = 0.0
        self.most = 1472
        self.now_s = 0.0
        live = Live(Config(carrier=Carrier(**carrier)))  # type: ignore[arg-type]
        draw = lambda: random.getrandbits(63) + 1  # noqa: E731
        self.ends = End(live, True, draw, (THERE,)), End(live, False, draw, ())
        self.blocked: set[End] = set()
        self.sent = self.passed = 0
        self._way: list[tuple[float, int, End, bytes, Address]] = []
        self._serial = itertools.count()

    def send(self, source: End, records: list[bytes]) -> None:
        address = source.path.address
        assert address is not None
        if not source.association.used:
            source.association.use(self.now_s)
        for each in source.seal(records):
            self._put(source, address, each)

    def _put(self, source: End, address: Address, datagram: bytes) -> None:
        other = self.ends[source is self.ends[0]]
        self.sent += 1
        if source in self.blocked or len(datagram) > self.most or address != other.address:
            return
        if self.random.random() < self.loss:
            return
        self.passed += 1
        for _ in range(1 + (self.random.random() < self.doubled)):
            due_s = self.now_s + self.delay_s + self.random.random() * self.jitter_s
            heapq.heappush(self._way, (due_s, next(self._serial), other, datagram, source.address))

    def run(self, seconds: float, used: bool = False) -> None:
        """Let time pass, and what is on its way arrive."""
        until_s = self.now_s + seconds
        while True:
            for end in self.ends:
                if used and not end.association.used:
                    end.association.use(self.now_s)
                if end.path.next_s <= self.now_s:
                    end.path.step(self.now_s, end.association.used)
                    end.association.used = False
                for address, datagram in end.probes():
                    self._put(end, address, datagram)
            due_s = min([end.path.next_s for end in self.ends] + [each[0] for each in self._way[:1]])
            if due_s > until_s:
                break
            self.now_s = max(self.now_s, due_s)
            while self._way and self._way[0][0] <= self.now_s:
                _, _, end, datagram, address = heapq.heappop(self._way)
                end.take([datagram], address, self.now_s)
        self.now_s = until_s
