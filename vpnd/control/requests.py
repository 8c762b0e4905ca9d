"""Commands of the user that control carries out, by the names the supervisor passes on.

    command           arguments                              result
    ----------------  -------------------------------------  ---------------------------------------------------------
    invite            name, uses, expires_s, ip, routes,     token, id, uses, expires_s; addresses, relays, reachable
                      groups (routes, groups: with commas)
    members           all: also those who were               rows: name, peer_id, addresses, routes, groups, state,
                                                             expires_s, connected, authority; of who was: ago_s, by
    remove            who                                    removed, peer_id, told; authority: whether it was one
    leave             -                                      told: whether an authority knows; the network's files are
                                                             gone
    join              token                                  network, network_id: of another one, which is on disk now
                                                             in place of this one; the node is to be started again
    invitations       cancel: an id, or None                 rows: id, name, uses, expires_s, state, joined, addresses,
                                                             routes, groups; those left, without what was cancelled
    authority-add     who                                    name, peer_id, told
    authority-list    -                                      rows: name, peer_id, key, root, own, revoked
    authority-revoke  who, stolen; keep (names, with         name, peer_id, told; of a stolen one also names of members:
                      commas), keep_all                      again (signed anew), out (it alone vouched for), back (it
                                                             had removed), and of authorities: lapsed, authorities_back
    resolve           what                                   what, steps, peer_id, name, addresses
    netcheck          -                                      what `Reachability.check` says
    ping              who, count                             rows: seq, rtt_ms (None: not answered), error;
                                                             between the controls, over a libp2p connection

`who` is a name, a peer id or a virtual address. `told`: how many nodes hear of it at once; all others do from them, or
when they come back. Arguments may be absent or None, but for who and what.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
import trio

from vpnd import peerid
from vpnd.adapter.dial import DialError
from vpnd.adapter.host import Host
from vpnd.api.messages import Answer, Request
from vpnd.control.common import Common
from vpnd.control.discovering import LocalDirectory
from vpnd.control.explaining import Explaining
from vpnd.control.membership import NetworkService
from vpnd.control.reachability import Reachability
from vpnd.control.state import EXPIRED, MEMBER, MILLISECONDS, REMOVED, OwnNetwork, end_of, milliseconds
from vpnd.discovery.lookup import AskOwner, Lookup
from vpnd.discovery.registry import PeerRegistry
from vpnd.errors import ConfigError, RefusedError, VpndError, kind_of
from vpnd.membership import token
from vpnd.membership.authority import EVERYBODY, Authority
from vpnd.membership.charter import Standing
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Membership, Removal, Statement
from vpnd.membership.token import SECRET_BYTES, Token

Arguments = Mapping[str, str | int | float | bool | None]
Result = dict[str, Any] | list[dict[str, Any]]

#: Pings of one command, unless it asks for another number.
PINGS = 4

log = logging.getLogger(__name__)


class Requests:
    """Owner: control's loop. `network` None: every peer is configured by hand.

    `connected(peer_id)`: whether packets flow. `lookup`: with all sources; None where this node's own knowledge and
    `owner` are all.
    """

    def __init__(
        self,
        common: Common,
        network: NetworkService | None,
        registry: PeerRegistry,
        host: Host,
        explaining: Explaining,
        *,
        reachability: Reachability,
        connected: Callable[[str], bool],
        lookup: Lookup | None = None,
        owner: AskOwner | None = None,
    ) -> None:
        self._live, self._now_ms = common.live, common.now_ms
        self._network, self._registry, self._host, self._connected = network, registry, host, connected
        self._reachability = reachability
        own = network.own if network is not None else None
        local = LocalDirectory(registry, own, self._now_ms)
        self._lookup = lookup or Lookup(local, trio.current_time, owner=owner)
        self._commands: dict[str, Callable[[Arguments], Awaitable[Result]]] = {
            "invite": self._invite,
            "members": self._members,
            "remove": self._remove,
            "leave": self._leave,
            "join": self._join,
            "invitations": self._invitations,
            "authority-add": self._authority_add,
            "authority-list": self._authority_list,
            "authority-revoke": self._authority_revoke,
            "resolve": self._resolve,
            "ping": self._ping_member,
            "netcheck": lambda _: reachability.check(),
            "standing": explaining.standing,
            "ask": explaining.ask,
        }

    async def carry_out(self, request: Request) -> Answer:
        """The answer to a request; raises nothing."""
        command = self._commands.get(request.command)
        try:
            if command is None:
                raise ConfigError(f"control knows no command {request.command}")
            result = await command(request.arguments)
        except MembershipRefused as refusal:
            return Answer(serial=request.serial, error=str(refusal), kind=RefusedError.__name__)
        except VpndError as error:
            return Answer(serial=request.serial, error=str(error), kind=kind_of(error))
        except Exception as error:
            log.exception("the command %s failed unexpectedly", request.command)
            return Answer(serial=request.serial, error=f"{type(error).__name__}: {error}", kind="VpndError")
        return Answer(serial=request.serial, result=msgspec.json.encode(result))

    # --- who is in

    async def _invite(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        if own.authority is None:
            raise MembershipRefused("not_authority", "this node is no authority; invite on one that is")
        listen, relays = self._host.listen_addresses(), self._reachability.relays_at()
        if not listen and not relays:
            raise ConfigError(
                "no machine could join by a token: this node has no address that others could dial. Connect the "
                "machine to a network, or set p2p.announce to where it can be reached"
            )
        lifetime_s = float(arguments.get("expires_s") or self._live.config.membership.invite_lifetime)
        uses = int(arguments.get("uses") or 1)
        if uses < 1 or lifetime_s <= 0:
            raise ConfigError(
                "an invitation is for one use at least, and for some time; give --uses 1 or more"
            )
        ip = _text(arguments, "ip")
        secret = secrets.token_bytes(SECRET_BYTES)
        before = own.invitations.all()
        own.invitations.prune(now_ms - milliseconds(self._live.config.membership.forget_after))
        made = own.invitations.add(
            secret,
            own.directory,
            now_ms,
            lifetime_ms=milliseconds(lifetime_s),
            uses=uses,
            name=_text(arguments, "name"),
            addresses=(ip,) if ip else (),
            routes=_list(arguments, "routes"),
            groups=_list(arguments, "groups"),
        )
        own.save_invitations(before)
        printed = Token(
            network=own.network.id[: token.HINT_BYTES],
            peer_id=own.peer_id,
            addresses=listen,
            secret=secret,
            relays=relays,
        )
        self._reachability.guests_changed()
        return {
            "token": token.encode(printed),
            "id": made.id,
            "uses": uses,
            "expires_s": lifetime_s,
            "addresses": listen[: token.MAX_ADDRESSES],
            "relays": [self._name(own, relay.peer_id) for relay in relays[: token.MAX_RELAYS]],
            "reachable": self._reachability.report().reachable,
        }

    async def _members(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        authorities = {one.peer_id for one in own.directory.authorities() if not one.revoked}
        rows = []
        for member in own.directory.members(now_ms):
            rows.append(
                {
                    "name": member.name or member.peer_id,
                    "peer_id": member.peer_id,
                    "addresses": member.addresses,
                    "routes": member.routes,
                    "groups": member.groups,
                    "state": EXPIRED if now_ms > member.expires_ms else MEMBER,
                    "expires_s": max(0.0, (member.expires_ms - now_ms) / MILLISECONDS),
                    "connected": member.peer_id == own.peer_id or self._connected(member.peer_id),
                    "authority": member.peer_id in authorities,
                }
            )
        if arguments.get("all"):
            rows += [self._departed(own, body, removal) for body, removal in own.directory.departed(now_ms)]
        return rows

    def _departed(self, own: OwnNetwork, body: Membership, removal: Removal | None) -> dict[str, Any]:
        ago_s = max(
            0.0, (self._now_ms() - (removal.issued_ms if removal else body.expires_ms)) / MILLISECONDS
        )
        state = end_of(removal)
        removed = removal if state == REMOVED else None
        standing = own.directory.authority(removed.signer) if removed is not None else None
        return {
            "name": body.name,
            "peer_id": body.peer_id,
            "addresses": body.addresses,
            "routes": (),
            "groups": body.groups,
            "state": state,
            "expires_s": 0.0,
            "connected": False,
            "authority": False,
            "ago_s": ago_s,
            "by": self._name(own, standing.peer_id) if standing is not None else "",
        }

    async def _remove(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        authority = self._authority(own)
        peer_id = own.whom(_required(arguments, "who"))
        if peer_id == own.peer_id:
            raise ConfigError("this node is not removed by itself; use vpnd leave")
        name = self._name(own, peer_id)
        # One that was an authority could let itself in again.
        held = _authorities_of(own, peer_id)
        revocations = [authority.revoke(standing.key, now_ms) for standing in held if not standing.revoked]
        told = self._publish([*revocations, authority.remove(peer_id, now_ms)])
        log.info("%s was removed from the network", name)
        return {"removed": name, "peer_id": peer_id, "authority": bool(held), "told": told}

    async def _leave(self, arguments: Arguments) -> Result:
        service = self._service()
        told = await service.leave()
        log.info("left the network %s", service.own.network.name)
        return {"told": told}

    async def _join(self, arguments: Arguments) -> Result:
        joined = await self._service().move(_required(arguments, "token"))
        return {"network": joined.name, "network_id": joined.id.hex()}

    async def _invitations(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        if own.authority is None:
            raise MembershipRefused("not_authority", "this node is no authority, so it has no invitations")
        before = own.invitations.all()
        cancelled = _text(arguments, "cancel")
        if cancelled:
            if not own.invitations.withdraw(cancelled):
                raise ConfigError(
                    f"there is no invitation {cancelled}; `vpnd invitations` shows those there are"
                )
            own.save_invitations(before)
        return [
            {
                "id": one.id,
                "name": one.name,
                "state": one.state(now_ms),
                "uses": one.uses_left,
                "expires_s": max(0.0, (one.expires_ms - now_ms) / MILLISECONDS),
                "joined": [self._name(own, peer_id) for peer_id in one.joined],
                "addresses": one.addresses,
                "routes": one.routes,
                "groups": one.groups,
            }
            for one in own.invitations.all()
        ]

    # --- who decides

    async def _authority_add(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        authority = self._authority(own)
        peer_id = own.whom(_required(arguments, "who"))
        if own.directory.find(peer_id, now_ms) is None:
            raise MembershipRefused("not_member", "only a member can be an authority")
        # The key of a node is its authority's key: it is in its peer id, and the node need not be there.
        grant = authority.grant(peerid.public_key_untrusted(peer_id), peer_id, now_ms)
        return {"name": self._name(own, peer_id), "peer_id": peer_id, "told": self._publish([grant])}

    async def _authority_list(self, arguments: Arguments) -> Result:
        own = self._own()
        return [
            {
                "name": self._name(own, standing.peer_id),
                "peer_id": standing.peer_id,
                "key": standing.key.hex(),
                "root": standing.distance == 0,
                "own": standing.peer_id == own.peer_id,
                "revoked": standing.revoked,
            }
            for standing in own.directory.authorities()
        ]

    async def _authority_revoke(self, arguments: Arguments) -> Result:
        own, now_ms = self._own(), self._now_ms()
        authority = self._authority(own)
        peer_id = own.whom(_required(arguments, "who"))
        held = _authorities_of(own, peer_id)
        answer: dict[str, Any] = {"name": self._name(own, peer_id), "peer_id": peer_id}
        if arguments.get("stolen"):
            if not held:
                raise MembershipRefused("unknown_authority", f"{answer['name']} was never an authority")
            return answer | self._revoke_stolen(own, authority, held, arguments)
        valid = [standing for standing in held if not standing.revoked]
        if not valid:
            raise MembershipRefused("unknown_authority", f"{answer['name']} is no authority")
        return answer | {"told": self._publish([authority.revoke(one.key, now_ms) for one in valid])}

    def _revoke_stolen(
        self, own: OwnNetwork, authority: Authority, held: list[Standing], arguments: Arguments
    ) -> dict[str, Any]:
        """What is good is known before what was stolen is void, so that nobody who is good is out in between."""
        now_ms, directory = self._now_ms(), own.directory
        before = {member.peer_id for member in directory.members(now_ms)}
        valid = {one.peer_id for one in directory.authorities() if not one.revoked}
        keep = EVERYBODY if arguments.get("keep_all") else {own.whom(one) for one in _list(arguments, "keep")}
        thefts = [authority.revoke_stolen(standing.key, now_ms, keep) for standing in held]
        again = [statement for theft in thefts for statement in theft.again]
        if again:
            self._publish(again)
        told = self._publish([statement for theft in thefts for statement in theft.final])
        after = {member.peer_id for member in directory.members(now_ms)}
        still = {one.peer_id for one in directory.authorities() if not one.revoked}
        gone = {one.peer_id for one in held}

        def names(peer_ids: Iterable[str]) -> list[str]:
            return sorted(self._name(own, peer_id) for peer_id in peer_ids)

        signed = {one.body.peer_id for one in again if isinstance(one.body, Membership)}
        return {
            "told": told,
            "again": names(signed & after),
            "out": names(before - after - gone),
            "back": names(after - before),
            "lapsed": names(valid - still - gone),
            "authorities_back": names(still - valid),
        }

    # --- where they are

    async def _resolve(self, arguments: Arguments) -> Result:
        found: Result = msgspec.to_builtins(await self._lookup.resolve(_required(arguments, "what")))
        return found

    async def _ping_member(self, arguments: Arguments) -> Result:
        resolution = await self._lookup.resolve(_required(arguments, "who"))
        member = self._registry.find(resolution.peer_id)
        if member is None:
            raise ConfigError(f"{resolution.what} is no peer of this node; see vpnd peers")
        count = int(arguments.get("count") or PINGS)
        trips: list[float | None] = [None] * count
        error = ""
        try:
            trips = await self._host.ping(member.peer_id, member.addresses, count)
        except DialError as failure:
            error = str(failure)
        return [{"seq": place, "rtt_ms": trip, "error": error} for place, trip in enumerate(trips, 1)]

    # --- what they all need

    def _service(self) -> NetworkService:
        if self._network is None:
            raise ConfigError(
                "this node is in no network: its peers are those under [[peers]]; without them it makes or joins one"
            )
        return self._network

    def _own(self) -> OwnNetwork:
        return self._service().own

    def _authority(self, own: OwnNetwork) -> Authority:
        if own.authority is None:
            raise MembershipRefused(
                "not_authority", "this node is no authority of the network; use one that is (vpnd members)"
            )
        if own.clock_is_behind(self._now_ms()):
            raise MembershipRefused(
                "not_yet_valid",
                "this machine's clock is behind what other authorities have signed; set it first",
            )
        return own.authority

    def _publish(self, statements: list[Statement]) -> int:
        """How many nodes hear of it at once. Raises MembershipRefused or StoreError, and nothing is known then."""
        return self._service().publish(statements)

    def _name(self, own: OwnNetwork, peer_id: str) -> str:
        body = own.directory.newest(peer_id) or own.directory.void_membership(peer_id)
        return body.name if body is not None else peer_id


def _authorities_of(own: OwnNetwork, peer_id: str) -> list[Standing]:
    return [one for one in own.directory.authorities() if one.peer_id == peer_id]


def _required(arguments: Arguments, name: str) -> str:
    if not (text := _text(arguments, name)):
        raise ConfigError(f"{name} is missing")
    return text


def _text(arguments: Arguments, name: str) -> str:
    return str(arguments.get(name) or "").strip()


def _list(arguments: Arguments, name: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in _text(arguments, name).split(",") if part.strip())
