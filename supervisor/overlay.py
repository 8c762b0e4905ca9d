"""What this node is in the VPN, and how that is put on the machine: addresses, routes, names, what shards may deliver.

Of a static node it is known from the configuration. Of a member of a network control says it, when it is up and
whenever it changes; a virtual_ip for configured peers is added to it.
"""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path

import msgspec

from supervisor import claims
from supervisor.network import overlap
from supervisor.network.dns_sockets import Names, Send
from supervisor.network.machine import Machine
from supervisor.network.overlap import Claim
from supervisor.network.routes import NetworkSetup
from vpnd import seccomp
from vpnd.api.messages import RoutesKnown
from vpnd.api.reports import OwnAddresses
from vpnd.config.check import MIN_IPV6_MTU
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.config.values import OWN_USER
from vpnd.errors import ChildError, MachineError, ProtocolViolation
from vpnd.mode import Mode
from vpnd.privileges import SHARED_USER

log = logging.getLogger("supervisor")

#: There in kernels with IPv6.
_IPV6 = Path("/proc/sys/net/ipv6")


class Overlay:
    """Owner: supervisor loop. `establish`, then `open_network`, once device and control are there; `close` at the end.

    `own` is what the node is, complete; of a member not before `establish`.
    """

    def __init__(self, live: Live, mode: Mode, machine: Machine, *, joining: bool) -> None:
        config = live.config
        self._live, self._mode, self._machine, self._joining = live, mode, machine, joining
        self._setup = NetworkSetup(config.retry)
        live.watch(lambda config: config.retry, self._retry_changed)
        self._device = ""
        self._interfaces: list[str] = []
        self._names: Names | None = None
        self._given: OwnAddresses | None = None
        self._not_routed: list[str] = []
        self.own = _configured(config)
        self._warnings: list[str] = []
        if config.process.user == SHARED_USER:
            self._warnings.append(
                f"process.user: vpnd's processes run as {SHARED_USER}, like those of other programs, which can stop "
                f"them: make a user {OWN_USER} (useradd --system {OWN_USER}) and start again"
            )
        if config.process.seccomp and (why_not := seccomp.why_not()):
            self._warnings.append(
                f"process.seccomp: system calls of vpnd's processes are not limited: {why_not}"
            )
        if mode.in_network and config.network.virtual_ip and not config.peers:
            self._warnings.append(
                "network.virtual_ip is not used in a network without [[peers]]: its authority gives addresses"
            )

    def _retry_changed(self) -> None:
        self._setup.retry = self._live.config.retry

    @property
    def in_network(self) -> bool:
        """Whether the node is a member of a network; otherwise its peers are configured."""
        return self._mode.in_network

    @property
    def warnings(self) -> list[str]:
        """What the operator should know, a line each."""
        names = self._names.warnings if self._names is not None else ()
        return [*self._warnings, *self._not_routed, *names, *self._machine.warnings]

    def check_before(self) -> None:
        """What is known before anything is changed is judged then: raises ConfigError when the machine already
        routes a part of it."""
        if self._mode is Mode.NEW and not self._joining:
            subnet = ipaddress.ip_network(self._live.config.membership.subnet)
            self._check([Claim(subnet, "membership.subnet", "choose another membership.subnet")])
        elif not self._mode.in_network:
            self._check([])

    def _check(self, claims: list[Claim]) -> None:
        network = self._live.config.network
        if network.allow_overlap:
            return
        routes = map(ipaddress.ip_network, network.routes)
        if self._uses_virtual_ip:
            nets = overlap.configured([_subnet(network.virtual_ip, network.subnet), *routes])
        else:
            nets = [Claim(each, "network.routes", "choose another route") for each in routes]
        overlap.check([*claims, *nets], network.interface)

    @property
    def _uses_virtual_ip(self) -> bool:
        """A member's own virtual_ip is for its configured peers."""
        wanted = bool(self._live.config.peers) or not self._mode.in_network
        return wanted and bool(self._live.config.network.virtual_ip)

    def establish(self, device: str, given: OwnAddresses | None) -> None:
        """Put everything on the TUN device `device`. `given`: what control said of a member, None of a static node.

        Raises ConfigError when the machine already routes a part of it, MachineError when the kernel refuses
        something; nothing is left then.
        """
        self._device = device
        if self.in_network and given is None:
            raise ChildError("control does not say what this node is in its network")
        if given is not None:
            given = self._given = claims.own_untrusted(given, self._live.config, None)
        self.own = self._with_configured(given)
        if given is not None:
            remedy = "free that range on this machine and start again (without --join: it is a member now)"
            owner = f"network {given.network}"
            self._check([Claim(ipaddress.ip_network(each), owner, remedy) for each in given.subnets])
        self._apply()

    def open_network(self) -> None:
        """Serve names, route what members announce, and keep the machine like that."""
        if self.in_network:
            self._names = Names(self._device, self._live.config.dns)
            self._names.apply(self.own)
        self._machine.is_now(self.own)
        self._machine.begin(self._setup.mend)

    def _apply(self) -> None:
        network = self._live.config.network
        if self._mode.in_network and (reason := self._no_ipv6()):
            self._leave_out_ipv6(reason)
        try:
            self._set_up()
        except MachineError as error:
            if not self._mode.in_network or not _has_ipv6(self.own):
                raise
            # An IPv4 address is all a network needs; the machine may have its reasons against IPv6.
            self._leave_out_ipv6(str(error))
            self._set_up()
        log.debug("%s has %s, mtu %d", self._device, ", ".join(self._interfaces), network.mtu)

    def _set_up(self) -> None:
        network = self._live.config.network
        interfaces = _interfaces(self.own)
        routes = dict.fromkeys((*self.own.subnets, *network.routes))
        self._setup.apply(self._device, network.mtu, interfaces, list(routes), network.queue_length)
        self._interfaces = interfaces

    def _no_ipv6(self) -> str:
        if not _IPV6.is_dir():
            return "this kernel has none"
        if self._live.config.network.mtu < MIN_IPV6_MTU:
            return f"it needs a network.mtu of {MIN_IPV6_MTU}"
        return ""

    def _leave_out_ipv6(self, reason: str) -> None:
        if _has_ipv6(self.own):
            warning = f"no IPv6 in the VPN: {reason}"
            log.warning("%s", warning)
            self._warnings.append(warning)
            self.own = _without_ipv6(self.own)

    def change(self, given: OwnAddresses) -> bool:
        """A member is something else than before: other addresses, other networks it may announce. False, and
        nothing happens, before `establish`. Raises ProtocolViolation for what no honest control says."""
        if not self._device:
            return False
        if self._given is None:
            raise ProtocolViolation("a node that is in no network has no addresses of one")
        given = claims.own_untrusted(given, self._live.config, self._given)
        had_ipv6 = _has_ipv6(self.own)
        after = self._with_configured(given)
        if not had_ipv6:  # left out when it was established
            after = _without_ipv6(after)
        interfaces = _interfaces(after)
        if interfaces != self._interfaces:
            log.warning("this node's addresses are now %s", ", ".join(after.addresses))
            try:
                self._setup.change_addresses(self._interfaces, interfaces)
            except MachineError as error:
                log.error("not all addresses could be set: %s", error)
            self._interfaces = interfaces
        self.own = after
        if self._names is not None:
            self._names.apply(after)
        self._machine.is_now(after)
        return True

    def route(self, known: RoutesKnown) -> None:
        """Members announce other networks from now on. Raises ProtocolViolation for what no honest control says."""
        if not self.in_network:
            raise ProtocolViolation("a node that is in no network has no members")
        wanted, self._not_routed = claims.routes_untrusted(known, self._live.config)
        self._machine.routes_known(wanted)

    @property
    def withheld(self) -> tuple[str, ...]:
        """Networks of our own that others are not to be told of."""
        return self._machine.withheld

    def give_names(self, send: Send) -> None:
        """Give control the sockets on which it answers DNS at our addresses."""
        if self._names is not None:
            self._names.give(send)

    async def close(self) -> None:
        """Take everything back; nothing is changed any more."""
        if self._names is not None:
            await self._names.close()
        self.undo()

    def undo(self) -> None:
        """Take addresses and routes back."""
        self._device = ""
        self._setup.undo()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What packets from peers may be addressed to."""
        own = tuple(str(ipaddress.ip_network(address)) for address in self.own.addresses)
        return tuple(dict.fromkeys((*own, *self.own.advertised)))

    @property
    def virtual_ip(self) -> str:
        """The first of our addresses; empty while none is known."""
        return self.own.addresses[0] if self.own.addresses else ""

    @property
    def subnet(self) -> str:
        """The network `virtual_ip` is in."""
        return str(ipaddress.ip_interface(self._interfaces[0]).network) if self._interfaces else ""

    def _with_configured(self, given: OwnAddresses | None) -> OwnAddresses:
        configured = _configured(self._live.config)
        if given is None:
            return configured
        if not self._uses_virtual_ip:
            return given
        return msgspec.structs.replace(
            given,
            addresses=tuple(dict.fromkeys((*given.addresses, *configured.addresses))),
            subnets=tuple(dict.fromkeys((*given.subnets, *configured.subnets))),
        )


def _configured(config: Config) -> OwnAddresses:
    """What the configuration says a node is, without any network."""
    address, length = config.network.virtual_ip, config.network.subnet
    return OwnAddresses(
        network="",
        label="",
        addresses=(address,) if address else (),
        subnets=(str(_subnet(address, length)),) if address else (),
    )


def _subnet(address: str, length: int) -> overlap.IPNetwork:
    return ipaddress.ip_network(f"{address}/{length}", strict=False)


def _interfaces(own: OwnAddresses) -> list[str]:
    """Each address with the length of the network it is in."""
    networks = [ipaddress.ip_network(each) for each in own.subnets]
    interfaces = []
    for text in own.addresses:
        address = ipaddress.ip_address(text)
        around = (each.prefixlen for each in networks if address in each)
        interfaces.append(f"{address}/{max(around, default=address.max_prefixlen)}")
    return interfaces


def _has_ipv6(own: OwnAddresses) -> bool:
    return any(":" in each for each in (*own.addresses, *own.subnets))


def _without_ipv6(own: OwnAddresses) -> OwnAddresses:
    return msgspec.structs.replace(
        own,
        addresses=tuple(each for each in own.addresses if ":" not in each),
        subnets=tuple(each for each in own.subnets if ":" not in each),
    )
