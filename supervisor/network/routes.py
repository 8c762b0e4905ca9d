"""Addresses, MTU, queue and routes of the TUN device, set through netlink and undone in reverse.

The device and everything on it vanish when its descriptor is closed; undoing is for the cases between: a
start that fails half-way must leave the machine as it was while the device is still open.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from supervisor.network.netlink import IPRoute, NetlinkError, converse
from vpnd.config.streams import Retry as RetrySettings
from vpnd.errors import MachineError
from vpnd.packet.offload.headers import UDP_MAX_SEGMENTS
from vpnd.resilience.backoff import Backoff
from vpnd.resilience.retry import Retry

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

#: rtnetlink's IN6_ADDR_GEN_MODE_NONE: no link-local address, hence no router solicitations from it.
ADDR_GEN_MODE_NONE = 1
#: IFA_F_NODAD: nobody on a point-to-point TUN could answer duplicate address detection; without it the
#: address would be unusable for its first second.
IFA_F_NODAD = 0x02
#: rtnetlink's RTPROT_STATIC: shown by `ip route` as "proto static"; routing daemons leave it alone.
RTPROT_STATIC = 4

#: What is gone already is what undoing wanted.
_GONE = frozenset({errno.ENODEV, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENOENT, errno.ENETUNREACH})

#: What the kernel says when it could not do it just now.
_TRANSIENT = frozenset({errno.EBUSY, errno.EAGAIN, errno.ENOBUFS, errno.EINTR})

DEFAULT_RETRY = RetrySettings()

log = logging.getLogger(__name__)

Undo = Callable[[IPRoute], object]


class NetworkSetup:
    """What was done to one TUN device, and how to take it back. Owner: the supervisor; not thread-safe.

    What the kernel cannot do at the moment is tried again under `retry`, each step by itself; `wait` takes seconds.
    """

    def __init__(
        self, retry: RetrySettings = DEFAULT_RETRY, wait: Callable[[float], object] = time.sleep
    ) -> None:
        #: may be replaced at any time
        self.retry = retry
        self._wait = wait
        self._undo: list[tuple[str, Undo]] = []

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
        interfaces = list(dict.fromkeys(map(ipaddress.ip_interface, addresses)))
        connected = {interface.network for interface in interfaces}
        networks = [net for net in dict.fromkeys(map(ipaddress.ip_network, routes)) if net not in connected]
        with_ipv6 = any(each.version == 6 for each in (*interfaces, *networks))

        def steps(netlink: IPRoute) -> None:
            index = _lookup(netlink, tun_name)
            self._quiet_ipv6(netlink, tun_name, index, with_ipv6)
            self._set_link(netlink, tun_name, index, mtu, queue_length)
            for interface in interfaces:
                self._add_address(netlink, tun_name, index, interface)
            for network in networks:
                self._add_route(netlink, tun_name, index, network)

        try:
            converse(steps)
        except BaseException:
            self.undo()
            raise

    def change_addresses(self, tun_name: str, before: Sequence[str], after: Sequence[str]) -> None:
        """The device has the addresses `before`, as `apply` or an earlier call gave them: give it `after` instead.

        Those in both stay. What goes, goes first: the kernel drops an IPv4 subnet's other addresses with its first.
        Raises MachineError when the kernel refuses a new one; those before it are there then.
        """
        old, new = (list(dict.fromkeys(map(ipaddress.ip_interface, each))) for each in (before, after))

        def steps(netlink: IPRoute) -> None:
            index = _lookup(netlink, tun_name)
            for interface in old:
                if interface not in new:
                    self._take_back(netlink, _address_step(tun_name, interface))
            for interface in new:
                if interface not in old:
                    self._add_address(netlink, tun_name, index, interface)

        converse(steps)

    def _take_back(self, netlink: IPRoute, what: str) -> None:
        """Undo one step out of its turn."""
        for place, (done, action) in enumerate(self._undo):
            if done == what:
                del self._undo[place]
                self._undo_one(netlink, what, action)
                return

    def undo(self) -> None:
        """Take back everything `apply` did, last first. Safe to call twice; ignores what is gone already."""
        if not self._undo:
            return
        try:
            converse(self._undo_all)
        except OSError as error:
            log.warning("network setup not undone: %s", error)

    def _undo_all(self, netlink: IPRoute) -> None:
        while self._undo:
            self._undo_one(netlink, *self._undo.pop())

    def _undo_one(self, netlink: IPRoute, what: str, action: Undo) -> None:
        try:
            self._try(what, lambda: action(netlink))
        except (NetlinkError, OSError) as error:
            if _number(error) not in _GONE:
                log.warning("not undone: %s: %s", what, os.strerror(_number(error)))

    def _try(self, what: str, action: Callable[[], object]) -> None:
        """Do it, again and again while the error is a transient one and attempts are left."""
        settings = self.retry
        backoff = Backoff(
            settings.initial_interval, settings.max_interval, settings.multiplier, random.uniform
        )
        retry = Retry(backoff, settings.max_attempts)
        while True:
            try:
                action()
                return
            except (NetlinkError, OSError) as error:
                wait_s = retry.fail(0.0) if _number(error) in _TRANSIENT else None
                if wait_s is None:
                    raise
                log.info("%s: %s; again in %.0f ms", what, os.strerror(_number(error)), wait_s * 1000)
                self._wait(wait_s)

    def _do(self, netlink: IPRoute, what: str, action: Callable[[], object], undo: Undo) -> None:
        try:
            self._try(what, action)
        except (NetlinkError, OSError) as error:
            raise MachineError(f"the kernel refused to {what}: {_reason(error)}") from error
        self._undo.append((what, undo))

    def _quiet_ipv6(self, netlink: IPRoute, name: str, index: int, with_ipv6: bool) -> None:
        conf = f"/proc/sys/net/ipv6/conf/{name}"
        if not os.path.isdir(conf):
            return  # a kernel without IPv6
        none = {"attrs": [("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", ADDR_GEN_MODE_NONE)]})]}
        self._do(
            netlink,
            f"keep IPv6 autoconfiguration off {name}",
            lambda: netlink.link("set", index=index, IFLA_AF_SPEC=none),
            lambda _: None,  # harmless on a device that is down, and its former value came from us
        )
        for key, value in (("accept_ra", "0"), ("disable_ipv6", "0" if with_ipv6 else "1")):
            try:
                self._set_sysctl(f"{conf}/{key}", value)
            except OSError as error:
                # A container's /proc/sys is often read-only. Worth a line, not worth refusing to run.
                log.info("%s/%s left as it is: %s", conf, key, error.strerror)

    def _set_sysctl(self, path: str, value: str) -> None:
        with open(path) as file:
            before = file.read().strip()
        if before == value:
            return
        _write(path, value)
        self._undo.append((f"set {path}", lambda _: _write(path, before)))

    def _set_link(self, netlink: IPRoute, name: str, index: int, mtu: int, queue_length: int) -> None:
        link = netlink.get_links(index)[0]
        for what, key, value in (
            ("MTU", "mtu", mtu),
            ("transmit queue length", "txqlen", queue_length),
            # So no UDP superpacket has more segments than every kernel takes back.
            ("segments of a superpacket", "gso_max_segs", UDP_MAX_SEGMENTS),
        ):
            before = link.get_attr(f"IFLA_{key.upper()}")
            self._do(
                netlink,
                f"set the {what} of {name} to {value}",
                lambda key=key, value=value: netlink.link("set", index=index, **{key: value}),  # type: ignore[misc]
                lambda later, key=key, before=before: later.link("set", index=index, **{key: before}),  # type: ignore[misc]
            )
        self._do(
            netlink,
            f"bring {name} up",
            lambda: netlink.link("set", index=index, state="up"),
            lambda later: later.link("set", index=index, state="down"),
        )

    def _add_address(self, netlink: IPRoute, name: str, index: int, address: IPInterface) -> None:
        parameters: dict[str, Any] = {
            "index": index,
            "address": str(address.ip),
            "prefixlen": address.network.prefixlen,
        }
        flags = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        self._do(
            netlink,
            _address_step(name, address),
            lambda: netlink.addr("add", **parameters, **flags),
            lambda later: later.addr("delete", **parameters),
        )

    def _add_route(self, netlink: IPRoute, name: str, index: int, network: IPNetwork) -> None:
        parameters: dict[str, Any] = {"dst": str(network), "oif": index, "proto": RTPROT_STATIC}
        if network.version == 4:
            parameters["scope"] = "link"
        self._do(
            netlink,
            f"route {network} into {name}",
            lambda: netlink.route("add", **parameters),
            lambda later: later.route("delete", **parameters),
        )


def _address_step(name: str, address: IPInterface) -> str:
    return f"give {name} the address {address}"


def _lookup(netlink: IPRoute, name: str) -> int:
    found = netlink.link_lookup(ifname=name)
    if not found:
        raise MachineError(f"there is no interface {name}")
    return int(found[0])


def _number(error: NetlinkError | OSError) -> int:
    return int(error.code if isinstance(error, NetlinkError) else error.errno or 0)


def _reason(error: NetlinkError | OSError) -> str:
    if _number(error) == errno.EEXIST:
        return "another one like it exists already (see `ip route`, `ip address`)"
    return os.strerror(_number(error))


def _write(path: str, value: str) -> None:
    with open(path, "w") as file:
        file.write(value)
