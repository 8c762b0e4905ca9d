"""The status report, put together from all processes; vpnd.status says what its fields mean."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import mmap
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import asdict, replace

from supervisor.children import Child
from supervisor.fleet import Fleet
from supervisor.network.tun import Tun
from supervisor.pump import Pump
from supervisor.slots import ShardSlot, drops_with, traffic_with
from vpnd import status
from vpnd.api.messages import ControlStatus, ShardStatus
from vpnd.api.reports import OwnAddresses, PeerReport, ReachReport, SessionReport
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.metrics import (
    CONTROL_HISTOGRAMS,
    CONTROL_METRICS,
    DROP_REASONS,
    SHARD_COUNTERS,
    SHARD_HISTOGRAMS,
    SHARD_METRICS,
    Drops,
    Stage,
    histogram_counters,
    reasons,
)
from vpnd.packet.record import Offload
from vpnd.version import __version__

#: States of datagrams beside a session: that there is none any more first, then the best.
_DATAGRAMS = ("alone", "used", "unused", "silent")
#: Rows made while packets wait; each takes some 10 µs, and thrice that beside a load.
_PEERS_A_TURN = 16
#: Stands for the peers; nowhere else in JSON.
_PEERS_HERE = b"\0"
#: Of a peer's report: what is true of now only, and unknown without control.
_STALE: dict[str, Any] = {
    "state": "unknown", "circuit": "unknown", "circuit_opened": 0, "last_error": "", "next_dial_s": -1.0,
    "seen_s": -1.0, "dials": 0, "dial_failures": 0, "ownership": (), "paths": (),
}  # fmt: skip


class Usage:
    """CPU and memory of all processes, sampled by one timer, so that all who ask get the same. Owner: supervisor loop.

    All processes one after the other every status.sample_interval, each in a turn of its own: the pump never pauses for
    all of them, and an idle node wakes up once. `us`: our pid. As often, rings that have been busy give back their
    memory.
    """

    def __init__(self, live: Live, fleet: Fleet) -> None:
        self._live, self._fleet, self._loop = live, fleet, asyncio.get_running_loop()
        self.us = os.getpid()
        self._samples: dict[int, tuple[float, dict[str, Any]]] = {}
        self._round: list[int] = []
        self._timer: asyncio.Handle = self._loop.call_soon(self._sample)

    def of(self, pid: int) -> dict[str, Any]:
        """cpu_percent, cpu_s and rss_bytes of a process, as status has them; nothing before its first sample."""
        return self._samples.get(pid, (0.0, {}))[1]

    def close(self) -> None:
        """Sample no more."""
        self._timer.cancel()

    def _sample(self) -> None:
        if not self._round:
            pids = (child.pid for child in (*self._fleet.children, *self._fleet.others))
            self._round = [self.us, *(pid for pid in pids if pid)]
            self._samples = {pid: self._samples[pid] for pid in self._round if pid in self._samples}
            for slot, _ in self._fleet.present:
                if slot.port is not None:
                    slot.port.to_shard.rest()
        # one that died this moment, as its pidfd will tell; or this process has no descriptor left just now
        with contextlib.suppress(OSError):
            self._take(self._round.pop())
        if self._round:
            self._timer = self._loop.call_soon(self._sample)
        else:
            self._timer = self._loop.call_later(self._live.config.status.sample_interval, self._sample)

    def _take(self, pid: int) -> None:
        cpu_s, rss_bytes = _used(pid)
        now_s = self._loop.time()
        before = self._samples.get(pid)
        percent = 0.0
        if before is not None and now_s > before[0]:
            percent = 100 * max(0.0, cpu_s - before[1]["cpu_s"]) / (now_s - before[0])
        self._samples[pid] = (
            now_s, {"cpu_percent": round(percent, 1), "cpu_s": cpu_s, "rss_bytes": rss_bytes}
        )  # fmt: skip


def _used(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process, from /proc/PID/stat; proc(5) counts its fields from 1. Raises
    OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # from the third on
    ticks = int(fields[14 - 3]) + int(fields[15 - 3])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[24 - 3]) * mmap.PAGESIZE


def shard_row(
    slot: ShardSlot, child: Child, counts: Mapping[str, int], usage: Usage, answers: bool | None
) -> status.Shard:
    """One row of shards[]. `counts`: its page."""
    drops = {reason: counts[f"dropped_{reason}"] for reason in DROP_REASONS}
    return status.Shard(
        index=slot.index,
        answers=answers,
        **_process(child, usage),
        **_counts(counts),
        drops={reason: count for reason, count in drops.items() if count},
        ring=status.Ring(**slot.ring_use()),
        **_spreads(counts, SHARD_HISTOGRAMS),
    )


def _spreads(counts: Mapping[str, int], names: Iterable[str]) -> dict[str, Any]:
    spreads = {}
    for name in names:
        *buckets, sum_us = (counts[counter] for counter in histogram_counters(name))
        spreads[name] = status.Spread(buckets=tuple(buckets), sum_s=sum_us / 1e6)
    return spreads


def _counts(counts: Mapping[str, int]) -> dict[str, Any]:
    return {name: counts[name] for name in SHARD_METRICS}


def _process(child: Child, usage: Usage) -> dict[str, Any]:
    return {
        "pid": child.pid, "restarts": child.restarts,
        "state": "hung" if child.hung else child.state.value, "confined": child.confined,
        **usage.of(child.pid),
    }  # fmt: skip


async def peer_rows(
    config: Config,
    control: ControlStatus | None,
    last_told: ControlStatus | None,
    shards: Iterable[ShardStatus | None],
    slots: list[ShardSlot],
) -> tuple[status.Peer, ...]:
    """peers[]: who they are by the configuration in force and `last_told`, how they are by what `control` says now and
    what the shards measured. Packets have their turn between every few."""
    sessions: dict[str, list[SessionReport]] = collections.defaultdict(list)
    for shard in shards:
        for session in shard.sessions if shard is not None else ():
            sessions[session.peer_id].append(session)
        await asyncio.sleep(0)
    rows = []
    for who in _who(config, last_told, control is None):
        rows.append(_peer(who, sessions[who.peer_id], slots))
        if not len(rows) % _PEERS_A_TURN:
            await asyncio.sleep(0)
    return tuple(rows)


async def encoded(told: status.Status) -> bytes:
    """As JSON; packets have their turn between every few peers."""
    rows = []
    for start in range(0, len(told.peers), _PEERS_A_TURN):
        rows.append(msgspec.json.encode(told.peers[start : start + _PEERS_A_TURN])[1:-1])
        await asyncio.sleep(0)
    before, _, after = msgspec.json.encode(replace(told, peers=msgspec.Raw(_PEERS_HERE))).partition(
        _PEERS_HERE
    )
    rows = rows or [b""]
    rows[0] = before + b"[" + rows[0]
    rows[-1] += b"]" + after
    return b",".join(rows)  # a megabyte once, of 1,000 peers


class Shared:
    """The status as JSON, for those who look again and again: however many they are, their packets pay for one.
    Owner: supervisor loop. `make`: Node.status."""

    def __init__(self, make: Callable[[], Awaitable[status.Status]]) -> None:
        self._make, self._making = make, asyncio.Lock()
        self._content, self._at_s = b"", -float("inf")

    async def told(self, max_age_s: float) -> bytes:
        """One that is no older; 0: made now."""
        if not max_age_s:
            return await encoded(await self._make())
        async with self._making:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._at_s >= max_age_s:
                self._content, self._at_s = await encoded(await self._make()), now_s
            return self._content


def _who(config: Config, told: ControlStatus | None, stale: bool) -> Iterator[PeerReport]:
    """Configured peers as the configuration has them, then members."""
    known = {peer.peer_id: peer for peer in told.peers} if told is not None else {}
    now: dict[str, Any] = _STALE if stale else {}
    for peer in config.peers:
        said = known.pop(peer.peer_id, None)
        by_contract = said is not None and config.registry.kind == "contract"
        yield replace(
            said or PeerReport(),
            name=peer.name,
            peer_id=peer.peer_id,
            addresses=peer.addresses,
            virtual_ips=said.virtual_ips if said is not None and by_contract else (peer.virtual_ip,),
            routes=(),
            source="configuration",
            **(now if said is not None else _STALE),
        )
    for other in known.values():
        if other.source != "configuration":
            yield replace(other, addresses=tuple(dict.fromkeys(other.addresses)), **now)


def _peer(who: PeerReport, sessions: list[SessionReport], slots: list[ShardSlot]) -> status.Peer:
    """Sums over its sessions, but the best round trip and the longest queue; a session that is up is known better by
    its shard than by control."""
    fields = asdict(who)
    datagrams = _datagrams(sessions)
    sessions = [session for session in sessions if session.state != "alone"]
    if any(session.state == "up" for session in sessions) or datagrams.get("datagrams") == "alone":
        fields["state"] = "connected"
    traffic = [slot.traffic for slot in slots]
    rtts = [session.rtt_ms for session in sessions if session.rtt_ms is not None]
    return status.Peer(
        **fields,
        virtual_ip=who.virtual_ips[0] if who.virtual_ips else "",
        rtt_ms=min(rtts, default=None),
        sessions=len(sessions),
        streams=sum(session.streams for session in sessions),
        suspect=sum(session.health != "healthy" for session in sessions),
        queued_bytes=sum(session.queued_bytes for session in sessions),
        queue_delay_ms=max((session.queue_delay_ms for session in sessions), default=0.0),
        segment_bytes=min(
            (session.segment_bytes for session in sessions if session.segment_bytes), default=0
        ),
        drops=drops_with(who.peer_id, traffic),
        **datagrams,
        **traffic_with(who.peer_id, traffic),
    )


def _datagrams(sessions: list[SessionReport]) -> dict[str, Any]:
    """Of the session whose datagrams are told of first."""
    told = [session.datagrams for session in sessions if session.datagrams is not None]
    if not told:
        return {}
    best = min(told, key=lambda each: (_DATAGRAMS.index(each.state), each.rtt_ms or 0.0))
    return {
        "datagrams": best.state,
        "datagram_rtt_ms": best.rtt_ms,
        "datagram_jitter_ms": best.jitter_ms,
        "datagram_loss_out": best.loss_out,
        "datagram_loss_in": best.loss_in,
        "datagram_bytes": best.size,
    }


def network_part(
    own: OwnAddresses, control: ControlStatus | None, last_told: ControlStatus | None
) -> status.NetworkPart | None:
    """What control said of the network last; None of a static node."""
    if not own.network:
        return None
    said = asdict(last_told.network) if last_told is not None and last_told.network is not None else {}
    return status.NetworkPart(
        **{**said, "name": own.network},
        label=own.label,
        advertised=own.advertised,
        current=control is not None and bool(said),
    )


def dropped(tun: Tun, pump: Pump, sums: Mapping[str, int]) -> Drops:
    """Drops by reason, of all processes; every reason is there. `sums`: of the pages of all slots."""
    total = Drops()
    total.plain("tun_queue_full", tun.queue_drops())
    for reason in DROP_REASONS:
        total[reason] += pump.dropped[reason] + sums[f"dropped_{reason}"]
        total.packets[reason] += pump.dropped.packets[reason] + sums[f"dropped_packets_{reason}"]
    return total


def books(pump: Pump, sums: Mapping[str, int], in_rings: int, drops: Drops) -> status.Books:
    """Both sums. `in_rings`: records that shards have not taken yet."""
    in_flight = sums["packets_queued"] + in_rings
    offered = pump.packets_read + drops["tun_queue_full"]
    out, into = (*reasons(Stage.LOCAL), *reasons(Stage.OUTBOUND)), reasons(Stage.INBOUND)
    lost_out = sum(drops[reason] for reason in out)
    lost_in = sum(drops[reason] for reason in into)
    return status.Books(
        out=status.BookOut(
            offered=offered,
            read=pump.packets_read,
            sent=sums["packets_sent"],
            dropped=lost_out,
            in_flight=in_flight,
            difference=offered - sums["packets_sent"] - lost_out - in_flight,
            sent_packets=sums["segments_sent"],
            dropped_packets=sum(drops.packets[reason] for reason in out),
        ),
        into=status.BookIn(
            received=sums["packets_received"],
            written=sums["packets_to_tun"],
            dropped=lost_in,
            difference=sums["packets_received"] - sums["packets_to_tun"] - lost_in,
            received_packets=sums["segments_received"],
            dropped_packets=sum(drops.packets[reason] for reason in into),
        ),
    )


def build(
    *,
    node: status.NodePart,
    tun: Tun,
    pump: Pump,
    fleet: Fleet,
    usage: Usage,
    own: OwnAddresses,
    control_status: ControlStatus | None,
    last_told: ControlStatus | None,
    shard_statuses: Mapping[int, ShardStatus | None],
    peers: tuple[status.Peer, ...],
    ready: bool,
    ailments: tuple[status.Ailment, ...],
) -> status.Status:
    """The whole report. `shard_statuses` has who was asked, with None for who did not answer in time; when nobody was
    asked it is empty, and `control_status` None. `last_told` is what control answered last. `ready`: the node is.
    `ailments`: what is not to be seen from the rest.
    """
    asked = bool(shard_statuses) or control_status is not None
    control_counts = fleet.control_page.read()
    pages = {slot.index: slot.page.read() for slot in fleet.slots}
    sums = {name: sum(page[name] for page in pages.values()) for name in SHARD_COUNTERS}
    drops = dropped(tun, pump, sums)
    in_rings = sum(slot.in_ring(pages[slot.index]["packets_from_tun"]) for slot in fleet.slots)
    rows = tuple(
        shard_row(
            slot,
            child,
            pages[slot.index],
            usage,
            shard_statuses[slot.index] is not None if slot.index in shard_statuses else None,
        )
        for slot, child in fleet.present
    )
    retired = tuple(shard_row(slot, child, pages[slot.index], usage, None) for slot, child in fleet.retired)
    report = status.Status(
        version=__version__,
        ready=fleet.ready and ready,
        node=replace(node, listen=(control_status or last_told or fleet.control).listen),
        supervisor=status.SupervisorPart(pid=usage.us, **usage.of(usage.us)),
        control=status.ControlPart(
            answers=control_status is not None if asked else None,
            **_process(fleet.control, usage),
            connections=control_status.connections if control_status is not None else None,
            counters={name: control_counts[name] for name in CONTROL_METRICS},
            **_spreads(control_counts, CONTROL_HISTOGRAMS),
        ),
        shards=rows,
        retired=retired,
        others=tuple(
            status.OtherPart(name=child.title, **_process(child, usage))
            for child in fleet.others
            if child.pid
        ),
        flows=status.Flows(
            active=sum(row.flows_active for row in rows),
            idle=sum(row.flows_idle for row in rows),
            stalled=sum(row.flows_stalled for row in rows),
            draining=sum(row.flows_draining for row in rows),
        ),
        network=network_part(own, control_status, last_told),
        reach=control_status.reach if control_status is not None else ReachReport(),
        peers=peers,
        tun=status.TunPart(
            interface=tun.name,
            mtu=tun.mtu,
            offloads=tuple(str(flag.name) for flag in Offload if flag in tun.offloads),
            packets_read=pump.packets_read,
            packets_written=sum(row.packets_to_tun for row in (*rows, *retired)),
            bytes_read=pump.bytes_read,
            bytes_written=sum(row.bytes_to_tun for row in (*rows, *retired)),
            reads=pump.reads,
            merged=pump.merged,
            flows=len(pump.flows),
        ),
        dropped=drops,
        dropped_packets=drops.packets,
        books=books(pump, sums, in_rings, drops),
    )
    return status.judged(report, ailments)
