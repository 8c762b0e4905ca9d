"""What a status costs the packets, and whose peers it tells of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import msgspec
import psutil
import pytest

from supervisor import report
from supervisor.pump import FlowTable
from supervisor.slots import Traffic
from vpnd.api.messages import ControlStatus, ShardStatus
from vpnd.api.reports import PeerReport, PeerTraffic, SessionReport
from vpnd.config.schema import Config, Peer
from vpnd.status import Peer as Row
from vpnd.status import Spread, Status

FLOWS = 131_072
#: What the pump may be held up for at once.
PAUSE_S = 0.001


def test_to_count_the_flows_is_no_work_and_right():
    table = FlowTable(FLOWS)
    for key in range(FLOWS):
        table.find(key, [0, 1])
    table.age()
    for key in range(FLOWS // 2, FLOWS + FLOWS // 2):  # half of them again, and as many new ones
        table.find(key, [0, 1])
    begun_s = time.thread_time()
    for _ in range(100):
        count = len(table)
    assert time.thread_time() - begun_s < PAUSE_S
    assert count == FLOWS + FLOWS // 2 == len({*table.young, *range(FLOWS // 2)})
    assert table.forget(0) + table.forget(1) == count and len(table) == 0


class Slot:
    """What peer_rows reads of a slot."""

    def __init__(self, rows: Iterable[PeerTraffic] = ()) -> None:
        self.traffic = Traffic()
        self.traffic.told(tuple(rows))


def session(peer_id: str) -> SessionReport:
    return SessionReport(
        peer_id=peer_id, session_id=1, initiator=True, state="up", rtt_ms=1.0, streams=2, bytes_sent=1,
        bytes_received=1, packets_sent=1, packets_received=1, segments_sent=1, segments_received=1, queued_bytes=0,
            age_s=1.0,
    )  # fmt: skip


def told(*peers: PeerReport) -> ControlStatus:
    return ControlStatus(serial=1, listen=(), peers=peers, connections=0)


def rows(
    config: Config, control: ControlStatus | None, last: ControlStatus | None, *, slots: tuple[Slot, ...] = ()
) -> dict[str, Row]:
    made = asyncio.run(report.peer_rows(config, control, control or last, (), list(slots)))  # type: ignore[arg-type]
    return {row.name: row for row in made}


MEMBER = PeerReport(name="m", peer_id="M", state="connected", source="membership", virtual_ips=("10.86.0.3",))
BACKOFF = PeerReport(name="old name", peer_id="B", state="backoff", last_error="refused", dials=3)
CONFIG = Config(peers=(Peer(name="b", peer_id="B", virtual_ip="10.86.0.2"),))


def test_configured_peers_come_first_by_the_names_they_have_there():
    made = rows(CONFIG, told(MEMBER, BACKOFF), None)
    assert list(made) == ["b", "m"]
    assert (made["b"].state, made["b"].last_error, made["b"].virtual_ip) == (
        "backoff",
        "refused",
        "10.86.0.2",
    )
    assert (made["m"].state, made["m"].source) == ("connected", "membership")


def test_without_control_peers_are_known_and_their_state_is_not():
    made = rows(CONFIG, None, told(MEMBER, BACKOFF))
    for row in made.values():
        assert (row.state, row.circuit, row.last_error, row.dials) == ("unknown", "unknown", "", 0)
    assert list(made) == ["b", "m"]
    assert list(rows(CONFIG, None, None)) == ["b"]


def test_a_peer_that_was_taken_out_of_the_configuration_is_gone():
    assert list(rows(Config(), told(MEMBER, BACKOFF), None)) == ["m"]


def test_traffic_is_that_of_all_slots_and_of_processes_that_have_ended():
    rtt = (1, *(0,) * 11, 90)
    slots = tuple(Slot([PeerTraffic(peer_id="B", bytes_sent=5, packets_sent=1, rtt=rtt)]) for _ in range(2))
    slots[0].traffic.ended()
    slots[0].traffic.told((PeerTraffic(peer_id="B", bytes_sent=2, packets_sent=1, rtt=(0, 2)),))
    made = rows(CONFIG, told(BACKOFF), None, slots=slots)["b"]
    assert (made.bytes_sent, made.packets_sent, made.bytes_received) == (12, 3, 0)
    assert made.rtt == Spread(buckets=(2, 2, *(0,) * 10), sum_s=180 / 1e6), "what a bad shard leaves out is 0"


@pytest.mark.alone
def test_a_thousand_peers_never_hold_up_the_pump():
    """CPU of this thread between two turns of the loop, of which packets have every second one. Each turn does the same
    in every try: its least is what it takes itself, the rest is what other processes do to its caches."""
    ids = [f"12D3KooW{number:044}" for number in range(1000)]
    control = told(
        *(PeerReport(name=each, peer_id=each, source="membership", state="connected") for each in ids)
    )
    shards = [ShardStatus(serial=1, traffic=(), sessions=tuple(map(session, ids[at::4]))) for at in range(4)]
    slots = [Slot(PeerTraffic(peer_id=each, bytes_sent=1) for each in ids) for _ in range(4)]

    async def answer() -> bytes:
        return await report.encoded(
            Status(peers=await report.peer_rows(Config(), control, control, shards, slots))  # type: ignore[arg-type]
        )

    async def body() -> list[float]:
        making = asyncio.ensure_future(answer())
        pauses = []
        while not making.done():
            before_s = time.thread_time()
            await asyncio.sleep(0)
            pauses.append(time.thread_time() - before_s)
        assert len(msgspec.json.decode(making.result(), type=Status).peers) == 1000
        return pauses

    tries = [asyncio.run(body()) for _ in range(10)]
    # all at once would take more than ten times as long
    assert max(map(min, zip(*tries, strict=True))) < PAUSE_S


@pytest.mark.parametrize("peers", [0, 1, 16, 17, 100])
def test_a_status_written_in_turns_is_that_written_at_once(peers: int):
    whole = Status(version="\0[]", peers=tuple(Row(name=f'"peers":[{n}\0') for n in range(peers)))
    assert asyncio.run(report.encoded(whole)) == msgspec.json.encode(whole)


def test_those_who_look_again_and_again_pay_for_one_status_together():
    made: list[float] = []

    async def make() -> Status:
        made.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.01)
        return Status(version=str(len(made)))

    async def body() -> None:
        shared = report.Shared(make)
        first = await asyncio.gather(*(shared.told(10.0) for _ in range(3)))
        assert len(made) == 1 and len(set(first)) == 1
        assert await shared.told(0) != first[0], "who asks once is told what is now"
        assert await shared.told(10.0) == first[0]
        await asyncio.sleep(0.02)
        assert await shared.told(0.01) != first[0] and len(made) == 3

    asyncio.run(body())


def test_what_a_process_uses_is_what_others_see():
    process = psutil.Process()
    cpu_s, rss_bytes = report._used(process.pid)
    times = process.cpu_times()
    assert cpu_s == pytest.approx(times.user + times.system, abs=0.05)
    assert rss_bytes == pytest.approx(process.memory_info().rss, rel=0.05)
