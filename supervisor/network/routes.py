"""Addresses, MTU, queue and routes of the TUN device: set through netlink, mended when changed, undone in reverse.

The device and everything on it vanish when its descriptor is closed; undoing is for the cases between: a
start that fails half-way must leave the machine as it was while the device is still open. Mending is the same steps as
setting up, each of which first compares with what the kernel has.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from supervisor.network.netlink import TABLE_LOCAL, TABLE_MAIN, IPRoute, NetlinkError, converse, number_of
from vpnd.config.schema import Retry as RetrySettings
from vpnd.endpoint import IP, IPNetwork
from vpnd.errors import MachineError
from vpnd.packet.offload.headers import UDP_MAX_SEGMENTS
from vpnd.resilience import Retry

IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

#: rtnetlink's IN6_ADDR_GEN_MODE_NONE: no link-local address, hence no router solicitations from it.
ADDR_GEN_MODE_NONE = 1
#: IFA_F_NODAD: nobody on a point-to-point TUN could answer duplicate address detection; without it the
#: address would be unusable for its first second.
IFA_F_NODAD = 0x02
#: rtnetlink's RTPROT_STATIC: shown by `ip route` as "proto static"; routing daemons leave it alone.
RTPROT_STATIC = 4
#: rtnetlink's RTPROT_KERNEL: of the routes that come with an address.
RTPROT_KERNEL = 2
#: The metric of IPv6 routes that come with an address, as the kernel makes them.
IP6_RT_PRIO_ADDRCONF = 256
#: rtnetlink's RTN_LOCAL and IFF_UP.
RTN_LOCAL = 2
IFF_UP = 1

#: What is gone already is what undoing wanted.
_GONE = frozenset({errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT, errno.ENETUNREACH})

#: What the kernel says when it could not do it just now.
_TRANSIENT = frozenset({errno.EBUSY, errno.EAGAIN, errno.ENOBUFS, errno.EINTR})

DEFAULT_RETRY = RetrySettings()

log = logging.getLogger(__name__)

Undo = Callable[[IPRoute], object]
Step = Callable[[], object]


class NetworkSetup:
    """What one TUN device is to be, made true, kept true, and taken back. Owner: the supervisor; any thread may call.

    What the kernel cannot do at the moment is tried again under `retry`, each step by itself; `wait` takes seconds.
    """

    def __init__(
        self, retry: RetrySettings = DEFAULT_RETRY, wait: Callable[[float], object] = time.sleep
    ) -> None:
        #: may be replaced at any time
        self.retry = retry
        self._wait = wait
        self._lock = threading.Lock()
        self._wanted: _Wanted | None = None
        self._undo: dict[str, Undo] = {}  # by what was done, in its order

    def apply(
        self,
        tun_name: str,
        mtu: int,
        addresses: Sequence[str],
        routes: Sequence[str],
        queue_length: int,
    ) -> None:
        """Give `tun_name` its MTU, transmit queue (packets) and addresses, bring it up, route networks into it.

        `addresses` are written "10.86.0.1/16", the first of each family being the one packets are sent from. Their
        subnets are routed by the kernel because of them; `routes` equal to one, and repeated ones, are skipped. The
        device makes no IPv6 address of its own and takes no router advertisement, and without an IPv6 address or route
        in the VPN it has no IPv6 at all.
        Blocks for some milliseconds, and for the waits between tries. Raises MachineError naming the step the
        kernel refused; the steps done until then are undone and `apply` may be called again. Strings that are
        no addresses: ValueError.
        """
        wanted = _Wanted(
            name=tun_name,
            link=0,
            mtu=mtu,
            queue_length=queue_length,
            interfaces=_interfaces(addresses),
            networks=tuple(dict.fromkeys(map(ipaddress.ip_network, routes))),
        )

        def steps(netlink: IPRoute) -> None:
            self._wanted = wanted._replace(link=_lookup(netlink, tun_name))
            for step in self._steps(netlink, self._wanted):
                step()

        with self._lock:
            try:
                converse(steps)
            except BaseException:
                self._undo_everything()
                raise

    def change_addresses(self, before: Sequence[str], after: Sequence[str]) -> None:
        """The device has the addresses `before`, as `apply` or an earlier call gave them: give it `after` instead.

        Those in both stay. What goes, goes first: the kernel drops an IPv4 subnet's other addresses with its first.
        Raises MachineError when the kernel refuses a new one; those before it are there then.
        """
        with self._lock:
            if self._wanted is None:
                return
            new = _interfaces(after)
            wanted = self._wanted = self._wanted._replace(interfaces=new)

            def steps(netlink: IPRoute) -> None:
                for interface in _interfaces(before):
                    what = _address_step(wanted.name, interface)
                    if interface not in new and what in self._undo:
                        self._undo_one(netlink, what, self._undo.pop(what))
                self._set_addresses(netlink, wanted)

            converse(steps)

    def mend(self) -> list[str]:
        """Compare the device with what was wanted last and set anew what is not so. Blocks for some milliseconds.

        Returns what the kernel refused, a line each; the rest is done.
        """
        with self._lock:
            wanted = self._wanted
            if wanted is None:
                return []
            problems: list[str] = []

            def steps(netlink: IPRoute) -> None:
                for step in self._steps(netlink, wanted):
                    try:
                        step()
                    except MachineError as error:
                        problems.append(str(error))

            try:
                converse(steps)
            except MachineError as error:
                problems.append(str(error))
            except (NetlinkError, OSError) as error:
                problems.append(f"{wanted.name} cannot be looked at: {os.strerror(number_of(error))}")
            return problems

    def undo(self) -> None:
        """Take back everything that was done, last first. Safe to call twice; ignores what is gone already."""
        with self._lock:
            self._undo_everything()

    def _undo_everything(self) -> None:
        self._wanted = None
        if not self._undo:
            return
        try:
            converse(self._undo_all)
        except OSError as error:
            log.warning("network setup not undone: %s", error)

    def _undo_all(self, netlink: IPRoute) -> None:
        while self._undo:
            self._undo_one(netlink, *self._undo.popitem())

    def _undo_one(self, netlink: IPRoute, what: str, action: Undo) -> None:
        try:
            self._try(what, lambda: action(netlink))
        except (NetlinkError, OSError) as error:
            if number_of(error) not in _GONE:
                log.warning("not undone: %s: %s", what, os.strerror(number_of(error)))

    def _try(self, what: str, action: Callable[[], object]) -> None:
        """Do it, again and again while the error is a transient one and attempts are left."""
        retry = Retry.by(self.retry, random.uniform)
        while True:
            try:
                action()
                return
            except (NetlinkError, OSError) as error:
                wait_s = retry.fail(0.0) if number_of(error) in _TRANSIENT else None
                if wait_s is None:
                    raise
                log.info("%s: %s; again in %.0f ms", what, os.strerror(number_of(error)), wait_s * 1000)
                self._wait(wait_s)

    def _do(self, what: str, action: Callable[[], object], undo: Undo | None) -> None:
        """One change. `undo` as it is the first time: what it was before we came is what counts."""
        if what in self._undo:
            log.warning("another program changed the machine; repeating: %s", what)
        try:
            self._try(what, action)
        except (NetlinkError, OSError) as error:
            raise MachineError(f"the kernel refused to {what}: {_reason(error)}") from error
        if undo is not None:
            self._undo.setdefault(what, undo)

    # --- the steps, in this order; each compares first and does what is missing

    def _steps(self, netlink: IPRoute, wanted: _Wanted) -> list[Step]:
        return [
            lambda: self._set_name(netlink, wanted),
            lambda: self._set_link(netlink, wanted),
            lambda: self._quiet_ipv6(netlink, wanted),
            lambda: self._bring_up(netlink, wanted),
            lambda: self._set_addresses(netlink, wanted),
            *(partial(self._set_route, netlink, wanted, network) for network in wanted.networks),
            *(partial(self._set_route, netlink, wanted, each.network, each) for each in wanted.interfaces),
        ]

    def _set_name(self, netlink: IPRoute, wanted: _Wanted) -> None:
        try:
            link = netlink.get_links(wanted.link)[0]
        except (NetlinkError, OSError) as error:
            raise MachineError(
                f"{wanted.name} is not in this network namespace any more: stop the node and start it again"
            ) from error
        name = link.get_attr("IFLA_IFNAME")
        if name != wanted.name:
            what = f"rename {name} back to {wanted.name}"
            self._do(what, lambda: netlink.link("set", index=wanted.link, ifname=wanted.name), None)

    def _set_link(self, netlink: IPRoute, wanted: _Wanted) -> None:
        link = netlink.get_links(wanted.link)[0]
        for what, key, value in (
            ("MTU", "mtu", wanted.mtu),
            ("transmit queue length", "txqlen", wanted.queue_length),
            # So no UDP superpacket has more segments than every kernel takes back.
            ("segments of a superpacket", "gso_max_segs", UDP_MAX_SEGMENTS),
        ):
            before = link.get_attr(f"IFLA_{key.upper()}")
            if before != value:
                self._do(
                    f"set the {what} of {wanted.name} to {value}",
                    partial(netlink.link, "set", index=wanted.link, **{key: value}),
                    lambda later, key=key, before=before: later.link(  # type: ignore[misc]
                        "set", index=wanted.link, **{key: before}
                    ),
                )

    def _quiet_ipv6(self, netlink: IPRoute, wanted: _Wanted) -> None:
        conf = f"/proc/sys/net/ipv6/conf/{wanted.name}"
        if not os.path.isdir(conf):
            return  # a kernel without IPv6, or an MTU too small for it
        none = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", ADDR_GEN_MODE_NONE)]})]}
        if _read(f"{conf}/addr_gen_mode") != str(ADDR_GEN_MODE_NONE):
            self._do(
                f"keep IPv6 autoconfiguration off {wanted.name}",
                lambda: netlink.link("set", index=wanted.link, IFLA_AF_SPEC=none),
                lambda _: None,  # harmless on a device that is down, and its former value came from us
            )
        for key, value in (("accept_ra", "0"), ("disable_ipv6", "0" if wanted.with_ipv6 else "1")):
            path = f"{conf}/{key}"
            try:
                before = _read(path)
                if before != value:
                    _write(path, value)
                    self._undo.setdefault(f"set {path}", partial(_undo_write, path, before))
            except OSError as error:
                # A container's /proc/sys is often read-only. Worth a line, not worth refusing to run.
                log.info("%s left as it is: %s", path, error.strerror)

    def _bring_up(self, netlink: IPRoute, wanted: _Wanted) -> None:
        if not netlink.get_links(wanted.link)[0]["flags"] & IFF_UP:
            self._do(
                f"bring {wanted.name} up",
                lambda: netlink.link("set", index=wanted.link, state="up"),
                lambda later: later.link("set", index=wanted.link, state="down"),
            )

    def _set_addresses(self, netlink: IPRoute, wanted: _Wanted) -> None:
        """All addresses, each with its route in the local table; IPv4's in their order, for the first is sent from."""
        present = _addresses_of(netlink, wanted.link)
        for foreign in [each for each in present if each.version == 6 and each.ip.is_link_local]:
            if foreign not in wanted.interfaces:  # made by the kernel while nobody looked
                _ignore_gone(partial(netlink.addr, "delete", **_address_parameters(wanted, foreign)))
        working = [each for each in present if each.ip in _local_of(netlink, wanted.link, each.version)]
        for version in (4, 6):
            ours = [each for each in wanted.interfaces if each.version == version]
            held = [each for each in working if each in ours]
            if version == 4 and held != ours[: len(held)]:
                held = []
            for stale in [each for each in present if each in ours and each not in held]:
                _ignore_gone(partial(netlink.addr, "delete", **_address_parameters(wanted, stale)))
            for interface in ours:
                if interface not in held:
                    self._add_address(netlink, wanted, interface)

    def _add_address(self, netlink: IPRoute, wanted: _Wanted, address: IPInterface) -> None:
        parameters = _address_parameters(wanted, address)
        flags = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        self._do(
            _address_step(wanted.name, address),
            lambda: netlink.addr("add", **parameters, **flags),
            lambda later: later.addr("delete", **parameters),
        )

    def _set_route(
        self, netlink: IPRoute, wanted: _Wanted, network: IPNetwork, connected: IPInterface | None = None
    ) -> None:
        """A route into the device. `connected`: the kernel made it with this address; only put back if it is gone."""
        if network.prefixlen == network.max_prefixlen and connected:
            return
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        found = netlink.get_routes(family=family, table=TABLE_MAIN, oif=wanted.link)
        if network in map(network_of, found):
            return
        parameters: dict[str, Any] = {"dst": str(network), "oif": wanted.link, "proto": RTPROT_STATIC}
        if network.version == 4:
            parameters["scope"] = "link"
        if connected:
            parameters["proto"] = RTPROT_KERNEL
            if network.version == 4:
                parameters["prefsrc"] = str(connected.ip)
            else:
                parameters["priority"] = IP6_RT_PRIO_ADDRCONF
        self._do(
            f"route {network} into {wanted.name}",
            lambda: netlink.route("add", **parameters),
            lambda later: later.route("delete", **parameters),
        )


class _Wanted(NamedTuple):
    """A TUN device as it is to be. `link` is its index, which stays when somebody gives it another name."""

    name: str
    link: int
    mtu: int
    queue_length: int
    interfaces: tuple[IPInterface, ...]
    networks: tuple[IPNetwork, ...]

    @property
    def with_ipv6(self) -> bool:
        return any(each.version == 6 for each in (*self.interfaces, *self.networks))


def network_of(route: Any) -> IPNetwork:
    """The destination of a route the kernel has told."""
    everything = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
    return ipaddress.ip_network(f"{route.get_attr('RTA_DST') or everything}/{route['dst_len']}")


def _interfaces(addresses: Sequence[str]) -> tuple[IPInterface, ...]:
    return tuple(dict.fromkeys(map(ipaddress.ip_interface, addresses)))


def _addresses_of(netlink: IPRoute, index: int) -> list[IPInterface]:
    """In the kernel's order."""
    return [
        ipaddress.ip_interface(
            f"{each.get_attr('IFA_LOCAL') or each.get_attr('IFA_ADDRESS')}/{each['prefixlen']}"
        )
        for each in netlink.get_addr(index=index)
    ]


def _local_of(netlink: IPRoute, index: int, version: int) -> set[IP]:
    """What the kernel takes for this machine's own on that device."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    found = netlink.get_routes(family=family, table=TABLE_LOCAL, oif=index)
    return {network_of(each).network_address for each in found if each["type"] == RTN_LOCAL}


def _address_parameters(wanted: _Wanted, address: IPInterface) -> dict[str, Any]:
    return {"index": wanted.link, "address": str(address.ip), "prefixlen": address.network.prefixlen}


def _ignore_gone(action: Callable[[], object]) -> None:
    try:
        action()
    except (NetlinkError, OSError) as error:
        if number_of(error) not in _GONE:
            raise MachineError(f"the kernel refused to take an address back: {_reason(error)}") from error


def _address_step(name: str, address: IPInterface) -> str:
    return f"give {name} the address {address}"


def _lookup(netlink: IPRoute, name: str) -> int:
    found = netlink.link_lookup(ifname=name)
    if not found:
        raise MachineError(f"there is no interface {name}")
    return int(found[0])


def _reason(error: NetlinkError | OSError) -> str:
    if number_of(error) == errno.EEXIST:
        return "another one like it exists already (see `ip route`, `ip address`)"
    return os.strerror(number_of(error))


def _read(path: str) -> str:
    """A sysctl; "" where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)


def _undo_write(path: str, value: str, _: IPRoute) -> None:
    _write(path, value)
