"""How a node gets into its network when it starts.

    the state directory holds       without a token            with a token (`start --join`)
    ------------------------------  -------------------------  ------------------------------------------------
    nothing                         makes a network            joins: asks the authority the token names
    a network, a membership         is in it                   is in it; the token is not used
    a network, none any more        is in it, without peers    joins again
    another, that others are in     -                          refuses: one node, one network
    another, that nobody else is in -                          joins, and forgets the other

What says that there is a network (network.bin) is written last, so an attempt that was interrupted is simply begun
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd.adapter.dial import DialError, NotAdmitted
from vpnd.adapter.host import Host
from vpnd.control.common import Common
from vpnd.control.state import LOST, MEMBER, OwnNetwork
from vpnd.errors import ConfigError, RefusedError
from vpnd.membership import enrolment, network
from vpnd.membership import token as tokens
from vpnd.membership.authority import Authority, Wish
from vpnd.membership.enrolment import MAX_ANSWER, MAX_WISHED_NAME, Join, Leave, Refusal, Welcome
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.roster import permitted
from vpnd.membership.statements import parse_untrusted, parse_verified, to_label
from vpnd.membership.store import Store, StoreError
from vpnd.membership.token import Token
from vpnd.printable import many, printable

#: Statements read from disk between two moments in which the loop serves others; a quarter of a millisecond each where
#: they have to be verified.
RESTORE_CHUNK = 256

log = logging.getLogger(__name__)


class Founding:
    """One start of one node. `identity`: its key. Owner: control, before it is ready."""

    def __init__(
        self,
        store: Store,
        common: Common,
        *,
        peer_id: str,
        node_name: str,
        identity: Ed25519PrivateKey,
    ) -> None:
        self._store, self._common, self._config = store, common, common.live.config
        self._peer_id, self._node_name, self._identity = peer_id, node_name, identity
        self._count, self._now_ms, self._dice = common.count, common.now_ms, common.dice

    async def enter(self, host: Host, token: str) -> OwnNetwork:
        """The network this node is in from now on. Raises RefusedError or ConfigError, nothing of a new one kept."""
        try:
            parsed = tokens.parse_untrusted(token) if token else None
            self._store.upgrade()
            held = self._store.load_network()
            if held is None:
                return self._make() if parsed is None else await self._join(host, parsed, None)
            own = await self._restore(held)
            if parsed is None:
                return own
            if not parsed.is_for(own.network.id):
                return await self._change(host, parsed, own)
            if own.state(self._now_ms()) == MEMBER:
                log.info("this node is a member of %s already; the token was not used", held.name)
                return own
            return await self._join(host, parsed, own)
        except MembershipRefused as refusal:
            self._count(f"refused_{refusal.reason}")
            raise RefusedError(str(refusal)) from refusal

    async def move(self, host: Host, token: str, own: OwnNetwork, saved: Callable[[], None]) -> Network:
        """Join another network instead of `own`, which nobody else is in. The node is to be started again then.

        `saved` is called before anything is written: from then on `own` is not to be. Raises MembershipRefused,
        RefusedError or ConfigError, and everything is as it was.
        """
        parsed = tokens.parse_untrusted(token)
        if parsed.is_for(own.network.id):
            raise ConfigError(
                f"this node is in the network {own.network.name} already, which the token is for; nothing is to be done"
            )
        return (await self._change(host, parsed, own, saved)).network

    async def _change(
        self, host: Host, token: Token, own: OwnNetwork, saved: Callable[[], None] = lambda: None
    ) -> OwnNetwork:
        others = len(own.directory.members(self._now_ms())) - own.is_member(self._now_ms())
        if others:
            raise ConfigError(
                f"this node is in the network {own.network.name} already, with {many(others, 'other')}; leave it first "
                "(vpnd leave), or start without --join"
            )
        joined = await self._admitted(host, token, None)
        saved()
        self._keep(joined)
        self._store.forget_authority()
        log.info("the network %s, which nobody else was in, is forgotten", own.network.name)
        return joined

    def _own(self, described: Network, root: Ed25519PrivateKey | None) -> OwnNetwork:
        return OwnNetwork(
            self._config,
            described,
            self._store,
            peer_id=self._peer_id,
            node_name=self._node_name,
            identity=self._identity,
            root=root,
            dice=self._dice,
        )

    async def _restore(self, described: Network) -> OwnNetwork:
        own = self._own(described, self._store.load_key())
        wires, verified = self._store.load_statements()
        if not verified:
            log.warning(
                "the saved directory is damaged: all of it is verified, and other members send what is missing"
            )
        parse = parse_verified if verified else parse_untrusted
        for start in range(0, len(wires), RESTORE_CHUNK):
            own.directory.restore(wires[start : start + RESTORE_CHUNK], self._now_ms(), parse)
            await trio.lowlevel.checkpoint()
        if own.membership() is None:
            own.lost = not any(self._peer_id.encode() in wire for wire in wires)
        if ahead := own.signed_ahead(self._now_ms()):
            self._merge(own, *(one.wire for one in own.signed_again(ahead, self._now_ms())))
            own.directory.give_up(ahead)
            self._store.save_statements(own.directory.statements())
        if own.authority is not None:
            self._renew_own(own, own.authority)
        self._store.heal(described, own.invitations.all(), own.directory.statements)
        log.info("in the network %s as %s", described.name, own.state(self._now_ms()))
        return own

    def _renew_own(self, own: OwnNetwork, authority: Authority) -> None:
        """An authority sees to its own membership: nobody else may be left who could, and it announces what it
        wants."""
        now_ms, body = self._now_ms(), own.directory.newest(self._peer_id)
        advertise = self._config.network.advertise
        if body is None:
            if own.state(now_ms) != LOST:
                return
            # Nobody else may be left who could; its addresses come from its peer id, so they are those it had
            wish = Wish(name=to_label(self._node_name), routes=advertise)
            wire = authority.enrol(self._peer_id, wish, now_ms).wire
        elif permitted(advertise, body.routes) != advertise:
            routes = tuple(dict.fromkeys((*body.routes, *advertise)))
            wish = Wish(name=body.name, addresses=body.addresses, routes=routes, groups=body.groups)
            wire = authority.enrol(self._peer_id, wish, now_ms).wire
        elif not own.is_member(now_ms):
            wire = authority.renew(self._peer_id, now_ms).wire
        else:
            return
        self._merge(own, wire)
        self._store.save_statements(own.directory.statements())

    def _make(self) -> OwnNetwork:
        settings = self._config.membership
        root = self._store.load_key()
        if root is None:
            root = Ed25519PrivateKey.generate()
            self._store.save_key(root)
        public = root.public_key().public_bytes_raw()
        own = self._own(network.create(settings.name, public, settings.subnet), root)
        authority = own.authority
        assert authority is not None  # it has the key the network is made of
        now_ms = self._now_ms()
        self._merge(own, authority.found(self._peer_id, now_ms).wire)
        wish = Wish(name=to_label(self._node_name), routes=self._config.network.advertise)
        self._merge(own, authority.enrol(self._peer_id, wish, now_ms).wire)
        self._keep(own)
        log.info("made the network %s; this node is its authority", own.network.name)
        return own

    async def _join(self, host: Host, token: Token, own: OwnNetwork | None) -> OwnNetwork:
        joined = await self._admitted(host, token, own)
        try:
            self._keep(joined)
        except StoreError:
            await self._give_back(host, token, joined.network)
            raise
        return joined

    async def _admitted(self, host: Host, token: Token, own: OwnNetwork | None) -> OwnNetwork:
        """The network, joined; `own` is what is known of it. Nothing is kept yet."""
        answer = await self._ask(host, token)
        if isinstance(answer, Refusal):
            if own is not None:
                own.directory.merge(answer.statements, self._now_ms())
            self._count(f"refused_{answer.reason}")
            raise RefusedError(f"the network did not let this node in: {printable(answer.text)}")
        described = network.parse_untrusted(answer.network)
        if not token.is_for(described.id):
            raise MembershipRefused(
                "wrong_network", "the node that answered is of another network than the token"
            )
        if own is None:
            own = self._own(described, None)
        self._merge(own, *answer.statements)
        if not own.is_member(self._now_ms()):
            await self._give_back(host, token, described)
            raise MembershipRefused(
                "not_member",
                "the membership that was given is not valid here, and was given back: are the clocks of both machines "
                "right? Then ask for a new token (vpnd invite)",
            )
        log.info("joined the network %s", described.name)
        return own

    async def _give_back(self, host: Host, token: Token, described: Network) -> None:
        """The membership is of no use here: the name and addresses that the authority keeps for it are to be free."""
        request = enrolment.encode(Leave(network=described.id))
        with trio.move_on_after(self._config.p2p.dial_timeout):
            try:
                await host.ask(token.addresses, token.peer_id, request, MAX_ANSWER)
            except DialError as error:
                log.info("the authority does not hear that its membership is given back: %s", error)

    async def _ask(self, host: Host, token: Token) -> Welcome | Refusal:
        """The authority's answer, asked until membership.join_timeout."""
        backoff = self._common.backoff()
        request = enrolment.encode(Join(secret=token.secret, name=self._node_name[:MAX_WISHED_NAME]))
        last = "no answer"
        with trio.move_on_after(self._config.membership.join_timeout):
            while True:
                try:
                    data = await host.ask(
                        token.addresses, token.peer_id, request, MAX_ANSWER, relays=token.relays
                    )
                    return enrolment.parse_answer_untrusted(data)
                except NotAdmitted:
                    raise RefusedError(
                        "the node the token names lets nobody in now; ask for a new token (vpnd invite)"
                    ) from None
                except DialError as error:
                    last = str(error)
                await trio.sleep_until(backoff.fail(trio.current_time()))
        raise RefusedError(
            f"the network could not be joined: {last}; does the node that printed the token run, and is its port open?"
        )

    def _merge(self, own: OwnNetwork, *wires: bytes) -> None:
        merged = own.directory.merge(wires, self._now_ms())
        for refused in merged.refused:
            self._count(f"refused_{refused.reason}")

    def _keep(self, own: OwnNetwork) -> None:
        self._store.save_statements(own.directory.statements())
        self._store.save_network(own.network)
