"""Taking an established session out of libp2p: socket, cipher states and what was read too far.

    field of the session     where py-libp2p 0.8 keeps it (session is a SecureSession)
    -----------------------  ------------------------------------------------------------------------------
    send key, nonce          session.conn.noise_state.noise_protocol.cipher_state_encrypt  .k, .n
    receive key, nonce       session.conn.noise_state.noise_protocol.cipher_state_decrypt  .k, .n
    socket                   session.conn.read_writer.read_write_closer  (RawConnection)
                                 .stream (TrioTCPStream) .stream (trio.SocketStream) .socket
    leftover plaintext       session.buf.getvalue()[session.low_watermark : session.high_watermark]

Below that nothing is buffered: Noise messages are read by their exact length, and a write has left for the
kernel when it returns. `shape` checks the names at start-up; what only an instance can show is checked here.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from vpnd.adapter.muxer import derive
from vpnd.endpoint import of_socket_address
from vpnd.errors import VpndError
from vpnd.nat.paths import Path
from vpnd.session import AESGCM, KEY_BYTES, VPND, Established


class NotDetachable(VpndError):
    """The connection has no socket of its own (it is relayed, or wrapped in an unknown way)."""


class Detached(NamedTuple):
    """A session outside libp2p. `fd`: a duplicate of the socket, non-blocking; the holder calls `close` once."""

    session: Established
    fd: int

    def close(self) -> None:
        """Close the duplicate; whoever was given the socket has a duplicate of its own."""
        os.close(self.fd)


def detach(session: Any, cipher: str, protocol: str = VPND) -> Detached:
    """Copy a SecureSession's state and duplicate its socket; `cipher` is what was agreed with the muxer, `protocol`
    what its streams are to carry.

    Synchronous on purpose: no read may be under way, and none may start between copying and closing. The
    caller closes libp2p's own socket afterwards without another word on it; the duplicate lives on.
    Raises NotDetachable; nothing is held then.
    """
    try:
        noise = session.conn.noise_state.noise_protocol
        sending, receiving = noise.cipher_state_encrypt, noise.cipher_state_decrypt
        send_key, receive_key = bytes(sending.k), bytes(receiving.k)
        send_nonce, receive_nonce = int(sending.n), int(receiving.n)
        leftover = bytes(session.buf.getvalue()[session.low_watermark : session.high_watermark])
        stream = session.conn.read_writer.read_write_closer.stream
        fileno = stream.stream.socket.fileno()
        peer_id, initiator = str(session.get_remote_peer()), bool(session.is_initiator)
    except (AttributeError, TypeError) as error:
        raise NotDetachable(f"not a session over a socket: {error}") from error
    if len(send_key) != KEY_BYTES or len(receive_key) != KEY_BYTES or fileno < 0:
        raise NotDetachable("the session has ended or has no keys")
    if cipher == AESGCM:
        if leftover:
            raise NotDetachable("the peer spoke before the cipher was agreed")
        send_key, receive_key = derive(send_key), derive(receive_key)
        send_nonce = receive_nonce = 0
    established = Established(
        peer_id=peer_id,
        initiator=initiator,
        cipher=cipher,
        send_key=send_key,
        send_nonce=send_nonce,
        receive_key=receive_key,
        receive_nonce=receive_nonce,
        leftover=leftover,
        path=_path(stream),
        protocol=protocol,
    )
    return Detached(established, os.dup(fileno))


def _path(stream: Any) -> Path:
    """How it came about, if by a meeting; otherwise it was dialed."""
    path = getattr(stream, "path", None)
    if isinstance(path, Path):
        return path
    try:
        return Path(address=str(of_socket_address(stream.stream.socket.getpeername())))
    except OSError:  # it has ended
        return Path()
