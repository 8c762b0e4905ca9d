"""Dialing a data session: TCP, Noise, the session muxer, and out of libp2p."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError, ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from vpnd.adapter.addresses import Endpoint, resolve
from vpnd.adapter.cipher import CHACHAPOLY, SESSION_MUXERS
from vpnd.adapter.handoff import Detached, detach
from vpnd.adapter.transport import WatchfulTcp, close_now
from vpnd.errors import ConfigError, VpndError


class DialError(VpndError):
    """A dial failed, for the reason in words; nothing of it is left, try again later."""


async def dial_session(
    tcp: WatchfulTcp,
    upgrader: TransportUpgrader,
    address: str,
    peer_id: ID,
    ciphers: Sequence[str],
    timeout_s: float,
    connect_timeout_s: float,
) -> Detached:
    """A data session with `peer_id` at the multiaddr `address`, all of it within `timeout_s`.

    `ciphers`: those to ask for, in this order. `connect_timeout_s`: for the TCP connection to one of the endpoints
    behind the address; then the next one has its turn.

    The holder closes it. Raises DialError.
    """
    try:
        with trio.fail_after(timeout_s):
            error: Exception | None = None
            for endpoint in await resolve(address):
                try:
                    raw = await _connect(tcp, endpoint, connect_timeout_s)
                except (BaseLibp2pError, DialError) as failure:
                    error = failure
                    continue
                return await _establish(raw, upgrader, peer_id, ciphers, timeout_s)
            raise error or DialError(f"{address}: the name has no address")
    except trio.TooSlowError:
        raise DialError(f"{address}: no answer within {timeout_s:g} s") from None
    except ConfigError as error:
        raise DialError(str(error)) from error
    except DialError:
        raise
    except Exception as error:  # libp2p lets errors of parsers and ciphers through as they are
        raise DialError(f"{address}: {_in_words(error)}") from error


async def _connect(tcp: WatchfulTcp, endpoint: Endpoint, timeout_s: float) -> Any:
    """A RawConnection. A SYN that was lost is sent again by the kernel after 1 s, 3 s, 7 s: whoever gives up
    earlier and dials anew is there sooner when the way opens. Raises DialError, or what libp2p raises."""
    try:
        with trio.fail_after(timeout_s):
            return await tcp.dial(Multiaddr(endpoint.multiaddr()))
    except trio.TooSlowError:
        raise DialError(f"{endpoint.multiaddr()}: no connection within {timeout_s:g} s") from None


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


async def _establish(
    raw: Any, upgrader: TransportUpgrader, peer_id: ID, ciphers: Sequence[str], timeout_s: float
) -> Detached:
    """Everything behind the TCP connection; `raw` is closed in any case, a session has a duplicate."""
    try:
        session = await upgrader.upgrade_security(raw, True, peer_id)
        try:
            muxers = {SESSION_MUXERS[cipher]: cipher for cipher in ciphers}
            chosen = await MultiselectClient().select_one_of(
                list(muxers),  # type: ignore[arg-type]
                MultiselectCommunicator(session),
                timeout_s,  # type: ignore[arg-type]
            )
        except ProtocolNotSupportedError:
            raise
        except (MultiselectClientError, IOException) as error:
            # Noise succeeded on this side, so the listener hung up because of who we are.
            raise ConnectionAbortedError(
                "closed after the handshake: does the other node list this one as a peer, and run vpnd?"
            ) from error
        return detach(session, muxers[str(chosen)])
    finally:
        close_now(raw)


def _in_words(error: BaseException) -> str:
    """The innermost cause in one short line."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, ConnectionAbortedError):
        cause = cause.__cause__
    if isinstance(cause, PeerIDMismatchesPubkey):
        return "another node answers there: its peer id is not the one expected"
    if isinstance(cause, ProtocolNotSupportedError):
        return f"the node there does not speak {SESSION_MUXERS[CHACHAPOLY]}"
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError) and cause.errno:
        # Of the resolver's errors (negative numbers) only the text says anything; of the others it says too much.
        return (os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)).lower()
    return str(cause).replace("\n", " ") or type(cause).__name__
