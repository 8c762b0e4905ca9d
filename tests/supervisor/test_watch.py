"""Network changes: what counts, how many become one, and the real thing in a namespace."""

from __future__ import annotations

import asyncio
import ipaddress
import random

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from lab import Lab, inside

from supervisor.network import events, watch
from supervisor.network.events import NetworkState, Of
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network

OWN, OWN_TABLE, PORT = 9, 7669, 4711


def nothing(reason: str) -> None:
    """What the node itself has put on the machine is not looked at."""


def live(network: Network) -> Live:
    return Live(Config(network=network))


def attribute(kind: int, value: bytes) -> bytes:
    text = events.RTATTR.pack(events.RTATTR.size + len(value), kind) + value
    return text.ljust(-(-len(text) // events.ALIGNMENT) * events.ALIGNMENT, b"\0")


def message(kind: int, body: bytes, port: int = 0) -> bytes:
    return events.NLMSGHDR.pack(events.NLMSGHDR.size + len(body), kind, 0, 5, port) + body


def link(flags: int, index: int = 2, kind: int = events.RTM_NEWLINK) -> bytes:
    return message(kind, events.IFINFOMSG.pack(0, 1, index, flags, 0))


def address(
    text: str, kind: int = events.RTM_NEWADDR, index: int = 2, flags: int = 0, port: int = 0
) -> bytes:
    packed = ipaddress.ip_address(text).packed
    body = events.IFADDRMSG.pack(2 if len(packed) == 4 else 10, 24, flags, 0, index)
    return message(kind, body + attribute(events.IFA_ADDRESS, packed), port)


def route(
    out: int = 2, kind: int = events.RTM_NEWROUTE, table: int = 254, flags: int = 0, wide_table: int = 0
) -> bytes:
    body = events.RTMSG.pack(2, 24, 0, 0, table, 4, 0, 1, flags)
    values = {events.RTA_OIF: out, events.RTA_TABLE: wide_table or table}
    return message(
        kind, body + b"".join(attribute(key, value.to_bytes(4, "little")) for key, value in values.items())
    )


UP = events.IFF_UP | events.IFF_RUNNING | 0x10000
GONE = events.RTM_DELADDR
#: (sentence, what the kernel said before, what it says now, what is told of it)
NEWS = [
    ("a link goes down", [link(UP)], link(events.IFF_UP), ["eth2 is down"]),
    ("a link comes up", [link(events.IFF_UP)], link(UP), ["eth2 is up"]),
    ("a link tells a scan", [link(UP)], link(UP | 0x100), []),
    ("a link is removed", [link(UP)], link(0, kind=events.RTM_DELLINK), ["interface 2 is gone"]),
    ("an address comes", [], address("192.0.2.1"), ["192.0.2.1 came to eth2"]),
    ("an address is told again", [address("192.0.2.1")], address("192.0.2.1"), []),
    ("an address goes", [address("192.0.2.1")], address("192.0.2.1", GONE), ["192.0.2.1 left eth2"]),
    ("one goes that never was", [], address("192.0.2.1", GONE), []),
    ("an address is tried", [], address("2001:db8::1", flags=0x40), []),
    ("it may be used now", [address("2001:db8::1", flags=0x40)], address("2001:db8::1"),
     ["2001:db8::1 came to eth2"]),
    ("an answer to us", [], address("192.0.2.1", port=PORT), []),
    ("what somebody else did", [], address("192.0.2.1", port=99), ["192.0.2.1 came to eth2"]),
    ("a route comes", [], route(), ["a route came"]),
    ("a route goes", [], route(kind=events.RTM_DELROUTE), ["a route went"]),
    ("the kernel's own route of an address", [], route(table=events.RT_TABLE_LOCAL), []),
    ("a cached route", [], route(flags=events.RTM_F_CLONED), []),
    ("two things in one datagram", [], address("192.0.2.1") + route(),
     ["192.0.2.1 came to eth2", "a route came"]),
    ("another kind of message", [], message(3, b"\0\0\0\0"), []),
]  # fmt: skip


@pytest.mark.parametrize(("what", "before", "now", "told"), NEWS, ids=[row[0] for row in NEWS])
def test_only_news_of_others_counts(what, before, now, told):
    state = NetworkState(OWN, OWN_TABLE, PORT, lambda index: f"eth{index}")
    for each in before:
        list(state.take(each))
    assert list(state.take(now)) == [(Of.MACHINE, reason) for reason in told]


OURS = [
    link(UP, index=OWN),
    link(0, index=OWN, kind=events.RTM_DELLINK),
    address("10.86.0.1", index=OWN),
    address("10.86.0.1", GONE, index=OWN),
    route(out=OWN),
    route(out=OWN, table=events.RT_TABLE_LOCAL, kind=events.RTM_DELROUTE),
    route(wide_table=OWN_TABLE, kind=events.RTM_DELROUTE),
    message(events.RTM_DELRULE, bytes(12)),
]


@pytest.mark.parametrize("now", OURS)
def test_what_the_node_put_on_the_machine_is_told_apart(now: bytes):
    state = NetworkState(OWN, OWN_TABLE, PORT, str)
    for _ in range(2):  # each time, for it may be gone again
        assert [of for of, _ in state.take(now)] == [Of.OURS]


def test_addresses_are_those_another_machine_could_use():
    state = NetworkState(OWN, OWN_TABLE, PORT, str)
    for each in (
        address("127.0.0.1", index=1), address("192.0.2.7", port=PORT), address("10.86.0.1", index=OWN),
        address("2001:db8::1", flags=0x08), address("fe80::1", index=3),
    ):  # fmt: skip
        list(state.take(each))
    assert state.addresses() == ("192.0.2.7", "fe80::1")
    state.forget()
    assert state.addresses() == ()


@given(st.binary(max_size=200))
def test_whatever_is_behind_a_good_message_it_ends(data: bytes):
    assert sum(1 for _ in events.messages(route() + data)) <= 2 + len(data) // events.NLMSGHDR.size
    assert sum(1 for _ in events.attributes_of(data)) <= 1 + len(data) // events.RTATTR.size


def test_reasons_that_come_together_are_one_change():
    gatherer = watch.Gatherer()
    assert gatherer.add("eth0 is down", 10.0, 0.1, 5.0)
    assert gatherer.due_s == pytest.approx(10.1)
    assert not gatherer.add("a route went", 10.05, 0.1, 5.0)
    assert not gatherer.add("a route went", 10.06, 0.1, 5.0)
    assert gatherer.take(10.1) == "eth0 is down, a route went"
    assert gatherer.due_s is None


def test_a_change_that_never_ends_is_told_less_and_less_often_and_a_quiet_time_ends_that():
    gatherer, now_s, told_s = watch.Gatherer(), 0.0, []
    while now_s < 60.0:
        gatherer.add("a route came", now_s, 0.1, 5.0)
        if gatherer.due_s is not None and now_s >= gatherer.due_s:
            gatherer.take(now_s)
            told_s.append(now_s)
        now_s += 0.01
    assert told_s[0] == pytest.approx(0.1, abs=0.02)
    assert len(told_s) < 20
    gatherer.take(now_s)
    assert gatherer.add("eth0 is up", now_s + 5.1, 0.1, 5.0)
    assert gatherer.due_s == pytest.approx(now_s + 5.2)


@given(st.lists(st.floats(0.0, 3.0), max_size=60))
def test_every_reason_is_told_within_the_longest_window(waits: list[float]):
    gatherer, now_s = watch.Gatherer(), 0.0
    for wait_s in waits:
        now_s += wait_s
        if gatherer.due_s is not None and gatherer.due_s <= now_s:
            gatherer.take(gatherer.due_s)
        gatherer.add("something", now_s, 0.1, 2.0)
        assert now_s <= gatherer.due_s <= now_s + 2.0


def test_a_flood_of_reasons_stays_one_line():
    gatherer = watch.Gatherer()
    for number in range(10_000):
        gatherer.add(f"10.0.0.{number} came", 0.0, 0.1, 5.0)
    assert gatherer.take(0.1).count(",") == watch.REASONS_SHOWN


def test_sleep_is_what_the_boot_time_is_ahead_by():
    clock, boottime_s, asleep_s = watch.SuspendClock(1000.0, 900.0), 1000.0, 100.0
    dice = random.Random(7)
    for _ in range(100):
        slept_s = dice.choice([0.0, 0.0, 30.0, 3600.0])
        boottime_s, asleep_s = boottime_s + 1.0 + slept_s, asleep_s + slept_s
        assert clock.slept_s(boottime_s, boottime_s - asleep_s) == pytest.approx(slept_s)


@pytest.mark.setting("network.change_settle", "network.change_settle_max")
def test_windows_are_as_long_as_set_and_double_up_to_the_longest():
    told: list[str] = []

    async def watched() -> list[float]:
        settings = Network(change_settle=0.5, change_settle_max=1.0)
        watching = watch.Watch("lo", live(settings), lambda reason, _: told.append(reason), nothing)
        waits = []
        for _ in range(4):
            watching._note("a route came")
            assert watching._gathering is not None
            waits.append(watching._gathering.when() - asyncio.get_running_loop().time())
            watching._gathering.cancel()
            watching._tell()
        watching.close()
        return waits

    assert asyncio.run(watched()) == pytest.approx([0.5, 1.0, 1.0, 1.0], abs=0.05)
    assert told == ["a route came"] * 4


def routable(addresses: tuple[str, ...]) -> set[str]:
    """Those that are not link-local."""
    return {address for address in addresses if not ipaddress.ip_address(address).is_link_local}


@pytest.mark.root
def test_the_kernels_own_words_in_a_namespace():
    told: list[tuple[str, tuple[str, ...]]] = []

    async def watched(lab: Lab, *steps: tuple[str, ...]) -> None:
        namespace = lab.nodes[0]
        watching = watch.Watch(
            "own0", live(Network(change_settle=0.05)), lambda *each: told.append(each), nothing
        )
        await asyncio.sleep(0.1)
        assert told == [] and routable(watching.addresses()) == {namespace.address}
        for step in steps:
            lab.ip(namespace, *step)
        await asyncio.sleep(0.3)
        watching.close()
        watching.close()

    with Lab(2) as lab, inside(lab.nodes[0]):
        lab.ip(lab.nodes[0], "tuntap", "add", "own0", "mode", "tun")
        own = [("link", "set", "own0", "up"), ("addr", "add", "10.9.9.9/24", "dev", "own0")]
        asyncio.run(watched(lab, *own))
        assert told == [], "nothing of our own device is told"
        address, route = ("addr", "add", "192.0.2.9/24"), ("route", "add", "198.51.100.0/24")
        asyncio.run(watched(lab, (*address, "dev", "eth0"), (*route, "via", "192.0.2.1")))
        (reason, addresses), *more = told
        assert not more and reason == "192.0.2.9 came to eth0, a route came"
        assert routable(addresses) == {lab.nodes[0].address, "192.0.2.9"}


@pytest.mark.root
@pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])
def test_more_than_the_socket_can_hold_is_a_change_and_the_addresses_are_asked_for_again(run):
    told: list[tuple[str, tuple[str, ...]]] = []
    many = [f"10.{n // 250}.{n % 250}.1" for n in range(1000)]

    async def watched(lab: Lab) -> None:
        watching = watch.Watch(
            "lo", live(Network(change_settle=0.2)), lambda *each: told.append(each), nothing
        )
        batch = lab.directory / "batch"
        batch.write_text("".join(f"addr add {each}/32 dev eth0\n" for each in many))
        lab.ip(lab.nodes[0], "-batch", str(batch))  # the loop reads nothing meanwhile
        async with asyncio.timeout(10):
            while not set(many) <= set(watching.addresses()):
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)
        assert any("many changes at once" in reason for reason, _ in told)
        assert set(many) <= set(told[-1][1])
        told.clear()
        lab.ip(lab.nodes[0], "addr", "add", "192.0.2.9/24", "dev", "eth0")
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.05)
        assert "192.0.2.9 came to eth0" in told[-1][0]
        watching.close()

    with Lab(2) as lab, inside(lab.nodes[0]):
        run(watched(lab))


def test_a_machine_is_looked_after_as_often_as_set_now(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    monkeypatch.setattr(watch, "_clocks", lambda: (1000.0 + 3600.0 * len(told), 1000.0))

    async def watched() -> None:
        settings = live(Network(suspend_check=60.0))
        watching = watch.Watch("lo", settings, lambda reason, _: told.append(reason), nothing)
        watching._suspend = watch.SuspendClock(0.0, 1000.0)
        settings.take(Config(network=Network(suspend_check=0.02)))
        async with asyncio.timeout(5.0):
            while not told:
                await asyncio.sleep(0.01)
        watching.close()

    asyncio.run(watched())


@pytest.mark.setting("network.suspend_check")
def test_a_machine_that_slept_is_told_of_it(monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    asleep_s = 0.0
    monkeypatch.setattr(watch, "_clocks", lambda: (1000.0 + asleep_s, 1000.0))

    async def watched() -> None:
        nonlocal asleep_s
        settings = Network(suspend_check=0.02)
        watching = watch.Watch("lo", live(settings), lambda reason, _: told.append(reason), nothing)
        await asyncio.sleep(0.05)
        asleep_s += 0.01
        await asyncio.sleep(0.05)
        asleep_s += 3600.0
        await asyncio.sleep(0.05)
        watching.close()

    asyncio.run(watched())
    assert told.count("the machine was suspended") == 1
