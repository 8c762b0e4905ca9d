"""Dialing: TCP and Noise, then what the connection is for.

dial_session    the session muxer, and out of libp2p
dial_secured    for a protocol in the place of a muxer: questions (`vpnd.adapter.guests`), meetings and others
connect         an ordinary libp2p connection, with streams
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.exceptions import MuxerUpgradeFailure, SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from vpnd.adapter.addresses import Endpoint, resolve
from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.adapter.handoff import Detached, detach
from vpnd.adapter.identify import agent_untrusted
from vpnd.adapter.transport import WatchfulTcp, close_now
from vpnd.errors import ConfigError, RemoteProtocolError, VpndError

Result = TypeVar("Result")
#: An address, or a relay with its address.
Place = TypeVar("Place")


class DialError(VpndError):
    """A dial failed, for the reason in words; nothing of it is left, try again later.

    `kind`: what that says of the way to the peer: refused (its machine does), silent, unreachable, wrong_key (somebody
    else answers), not_admitted, large (only small messages come through), no_address; failed: anything else.
    """

    def __init__(self, text: str, kind: str = "failed") -> None:
        super().__init__(text)
        self.kind = kind


class NotAdmitted(DialError):
    """The other side proved who it is, and closed: most likely it does not know this node."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "not_admitted")


#: Of the failures of several addresses the one that says most comes first.
_TELLING = ("not_admitted", "wrong_key", "large", "refused", "silent", "unreachable", "failed")


class Patience(NamedTuple):
    """Deadlines in seconds: of all of a dial, and of the TCP connection to one of the endpoints behind an address;
    then the next one has its turn."""

    dial_s: float
    connect_s: float


async def dial_session(
    tcp: WatchfulTcp,
    upgrader: TransportUpgrader,
    address: str,
    peer_id: ID,
    muxers: Mapping[str, str],
    protocol: str,
    patience: Patience,
) -> Detached:
    """A data session with `peer_id` at the multiaddr `address`. `muxers`: muxer ids to ask for, in this order, with the
    cipher of each. `protocol`: what its streams are to carry.

    The holder closes it. Raises DialError.
    """

    async def take_out(session: Any, chosen: str) -> Detached:
        if chosen not in muxers:
            agent = await agent_untrusted(session, peer_id, patience.connect_s)
            raise DialError(
                f"{address}: the node there speaks libp2p, but is not vpnd ({agent or 'it does not say what'})"
            )
        return detach(session, muxers[chosen], protocol)

    # The ordinary muxer last: every vpnd that knows this node agrees to one of the others.
    protocols = list(dict.fromkeys((*muxers, YAMUX)))
    return await dial_secured(tcp, upgrader, address, peer_id, protocols, patience, take_out)


def asking(request: bytes, max_answer: int) -> Callable[[Any, str], Awaitable[bytes]]:
    """For `dial_secured`: one request, and its answer of at most `max_answer` bytes (vpnd.adapter.guests)."""

    async def exchange(session: Any, _: str) -> bytes:
        await write_message(session, request)
        return await read_message_untrusted(session, max_answer)

    return exchange


async def dial_secured(
    tcp: WatchfulTcp,
    upgrader: TransportUpgrader,
    address: str,
    peer_id: ID,
    protocols: Sequence[str],
    patience: Patience,
    use: Callable[[Any, str], Awaitable[Result]],
) -> Result:
    """What `use` makes of a secured connection with `peer_id` at `address` that is for one of `protocols` alone, and of
    that. Raises DialError, and what `use` raises of it."""

    async def secure(raw: Any) -> Result:
        return await secured(raw, upgrader, peer_id, protocols, patience.dial_s, use)

    return await dial_raw(tcp, address, patience, secure)


async def connect(tcp: WatchfulTcp, swarm: Any, address: str, peer_id: ID, patience: Patience) -> Any:
    """A connection of the swarm with `peer_id` at `address`; the swarm owns it. Raises DialError."""

    async def use(raw: Any) -> Any:
        try:
            return await swarm.upgrade_outbound_raw_conn(raw, peer_id)
        except BaseException as error:
            close_now(raw)
            if caused_by(error, (MuxerUpgradeFailure, MultiselectClientError)):
                raise ConnectionAbortedError(_NOT_ADMITTED) from error
            raise

    return await dial_raw(tcp, address, patience, use)


async def dial_raw(
    tcp: WatchfulTcp, address: str, patience: Patience, use: Callable[[Any], Awaitable[Result]]
) -> Result:
    """What `use` makes of a TCP connection, which it owns. Raises DialError for whatever goes wrong."""

    async def dial() -> Result:
        error: Exception | None = None
        for endpoint in await resolve(address):
            try:
                raw = await _connect(tcp, endpoint, patience.connect_s)
            except (BaseLibp2pError, DialError) as failure:
                error = failure
                continue
            return await use(raw)
        raise error or DialError(f"{address}: the name has no address")

    return await patiently(address, patience.dial_s, dial)


async def patiently(address: str, timeout_s: float, work: Callable[[], Awaitable[Result]]) -> Result:
    """What `work` comes to; whatever goes wrong, and what takes longer, is a DialError."""
    try:
        with trio.fail_after(timeout_s):
            return await work()
    except trio.TooSlowError:
        raise DialError(f"{address}: no answer within {timeout_s:g} s", "silent") from None
    except (ConfigError, RemoteProtocolError) as error:
        raise DialError(str(error)) from error
    except DialError:
        raise
    except ConnectionAbortedError as error:
        raise NotAdmitted(f"{address}: {error}") from error
    except Exception as error:  # libp2p lets errors of parsers and ciphers through as they are
        raise DialError(f"{address}: {_in_words(error)}", _kind(error)) from error


async def _connect(tcp: WatchfulTcp, endpoint: Endpoint, timeout_s: float) -> Any:
    """A RawConnection. A SYN that was lost is sent again by the kernel after 1 s, 3 s, 7 s: whoever gives up
    earlier and dials anew is there sooner when the way opens. Raises DialError, or what libp2p raises."""
    if not tcp.permits(endpoint):
        raise DialError(f"{endpoint.multiaddr()}: an address of this machine alone, which others cannot name")
    try:
        with trio.fail_after(timeout_s):
            return await tcp.dial(Multiaddr(endpoint.multiaddr()))
    except trio.TooSlowError:
        raise DialError(f"{endpoint.multiaddr()}: no connection within {timeout_s:g} s", "silent") from None


async def dial_any(
    dial: Callable[[str], Awaitable[Detached]], addresses: Sequence[str], stagger_s: float
) -> Detached:
    """The first session `dial` gets from one of several addresses of a peer.

    They are tried in order, each with a head start of `stagger_s` before the next is tried beside it; a
    failed one is followed at once. Raises DialError, naming what each address had to say.
    """
    won: Detached | None = None
    errors: list[str] = []

    async def attempt(address: str, failed: trio.Event) -> None:
        nonlocal won
        try:
            session = await dial(address)
        except DialError as error:
            errors.append(str(error))
            failed.set()
            return
        if won is not None:  # two got through between the same two checkpoints
            session.close()
            return
        won = session
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(stagger_s):
                    await failed.wait()
    except BaseException:
        if won is not None:
            won.close()
        raise
    if won is None:
        raise DialError("; ".join(errors))
    return won


async def first(dial: Callable[[Place], Awaitable[Result]], addresses: Sequence[Place]) -> Result:
    """What `dial` gets from the first of several addresses of a peer that works, one after the other.

    Raises DialError with what each had to say; NotAdmitted when one of them came so far.
    """
    errors: list[DialError] = []
    for address in addresses:
        try:
            return await dial(address)
        except DialError as error:
            errors.append(error)
    text = "; ".join(map(str, errors)) or "no address is known"
    kind = min((error.kind for error in errors), key=_TELLING.index, default="no_address")
    raise NotAdmitted(text) if kind == "not_admitted" else DialError(text, kind)


async def either(
    one: Callable[[], Awaitable[Result]], other: Callable[[], Awaitable[Result]], head_start_s: float
) -> Result:
    """What the first of two gets that gets something; the other begins when the one has had its head start, or has
    failed. Raises the error of the one with that of the other behind it; NotAdmitted if the one came so far."""
    got: list[Result] = []
    errors: dict[bool, DialError] = {}
    failed = trio.Event()

    async def attempt(which: bool) -> None:
        try:
            got.append(await (one if which else other)())
            nursery.cancel_scope.cancel()
        except DialError as error:
            errors[which] = error
            failed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, True)
        with trio.move_on_after(head_start_s):
            await failed.wait()
        nursery.start_soon(attempt, False)
    if got:
        return got[0]
    if isinstance(errors[True], NotAdmitted):
        raise errors[True]
    raise DialError(f"{errors[True]}; {errors[False]}")


async def secured(
    raw: Any,
    upgrader: TransportUpgrader,
    peer_id: ID,
    protocols: Sequence[str],
    timeout_s: float,
    use: Callable[[Any, str], Awaitable[Result]],
) -> Result:
    """What `use` makes of the secured connection and the protocol both sides agreed on. `raw` is closed in any case."""
    try:
        try:
            session = await upgrader.upgrade_security(raw, True, peer_id)
        except SecurityUpgradeFailure as error:
            if caused_by(error, (MultiselectClientError,)) and ALL_REFUSED in str(_innermost(error)):
                raise DialError(
                    "the node there speaks libp2p, but not Noise; vpnd speaks nothing else (no TLS)"
                ) from error
            raise
        try:
            chosen = await MultiselectClient().select_one_of(
                list(protocols),  # type: ignore[arg-type]
                MultiselectCommunicator(session),
                timeout_s,  # type: ignore[arg-type]
            )
        except (MultiselectClientError, IOException) as error:
            # Noise succeeded on this side, so the listener hung up because of who we are.
            raise ConnectionAbortedError(_NOT_ADMITTED) from error
        return await use(session, str(chosen))
    finally:
        close_now(raw)


#: How py-libp2p begins to say that the other side answered, and agreed to none of what it was offered.
ALL_REFUSED = "protocols not supported"
_NOT_ADMITTED = (
    "closed after the handshake: does the other node list this one as a peer, run vpnd, and not say in its status "
    "that this one comes too often?"
)


def caused_by(error: BaseException | None, kinds: tuple[type[BaseException], ...]) -> bool:
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error is not None


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _kind(error: BaseException) -> str:
    """DialError.kind."""
    cause = _innermost(error)
    if isinstance(cause, PeerIDMismatchesPubkey):
        return "wrong_key"
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    number = cause.errno if isinstance(cause, OSError) else None
    if number in (errno.ECONNREFUSED, errno.ECONNRESET):
        return "refused"
    if number in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return "unreachable"
    return "silent" if number == errno.ETIMEDOUT else "failed"


def _in_words(error: BaseException) -> str:
    """The innermost cause in one short line."""
    cause = _innermost(error)
    if isinstance(cause, PeerIDMismatchesPubkey):
        return "another node answers there: its peer id is not the one expected"
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.errno:
        # Of the resolver's errors (negative numbers) only the text says anything; of the others it says too much.
        return (os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)).lower()
    return str(cause).replace("\n", " ") or type(cause).__name__
