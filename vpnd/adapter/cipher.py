"""Which cipher a data session's Noise transport messages use, agreed together with the muxer.

libp2p's handshake always ends in ChaCha20-Poly1305. A session may go on with AES-256-GCM, Noise's other cipher
(https://noiseprotocol.org/noise.html, 12.4), where both CPUs have instructions for it: it then costs a third. The muxer
id says which, so a node that does not offer it is simply asked for the next one.

Keys are never used under two ciphers: those for AES-GCM are derived from the ones the handshake gave, by HKDF-SHA256
with a label of their own, and their nonces begin at 0.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from vpnd.session import AESGCM, CHACHAPOLY

#: cipher → the muxer id that makes a connection a data session with it, in order of preference
SESSION_MUXERS = {AESGCM: "/vpnd/yamux-aesgcm/1.0.0", CHACHAPOLY: "/vpnd/yamux/1.0.0"}

_LABEL = b"vpnd session key for AES-256-GCM, version 1"
_CPU = Path("/proc/cpuinfo")
#: Flags of /proc/cpuinfo: the cipher and the multiplication of its authenticator, on x86-64 and on ARMv8.
_INSTRUCTIONS = ({"aes", "pclmulqdq"}, {"aes", "pmull"})


def offered(setting: str) -> tuple[str, ...]:
    """Ciphers this node dials and accepts with, best first. `setting` is session.cipher; "auto" asks the CPU.

    ChaCha20-Poly1305 is always among them, so that two nodes always find one.
    """
    if setting == AESGCM or setting == "auto" and has_aes(_CPU.read_text(encoding="utf-8")):
        return AESGCM, CHACHAPOLY
    return (CHACHAPOLY,)


def has_aes(cpuinfo: str) -> bool:
    """Whether the first CPU in /proc/cpuinfo has what makes AES-GCM fast."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            return any(wanted <= flags for wanted in _INSTRUCTIONS)
    return False


def derive(key: bytes) -> bytes:
    """The AES-256-GCM key that goes with a ChaCha20-Poly1305 key of the handshake; both ends derive the same."""
    return HKDF(algorithm=SHA256(), length=len(key), salt=None, info=_LABEL).derive(key)
