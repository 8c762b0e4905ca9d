"""The one error of this package: something was refused, and why; and the reading of messages, which raises it.

The reasons are a closed list, because each of them is counted.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vpnd.errors import VpndError

Decoded = TypeVar("Decoded")

#: Why a statement, a message or a token was refused.
REASONS = (
    # statements and messages, by their bytes alone
    "malformed",  # not the encoding, or a field outside its limits
    "too_long",  # longer than its kind may be
    "unknown_version",  # of a version this program does not know
    "forged",  # the signature is not that of the key it names
    # statements, by what the directory knows
    "wrong_network",  # of another network
    "unknown_authority",  # signed by a key no known authority vouches for
    "revoked_authority",  # signed by an authority after it was revoked
    "not_permitted",  # the authority may not do that: it revokes one senior to it
    "not_yet_valid",  # issued further in the future than clocks may differ
    "expired",
    "rolled_back",  # a newer one of the same kind is known
    "removed",  # its subject was removed from the network
    "not_member",  # about a node that is no member
    "directory_full",
    # tokens, invitations and requests to an authority
    "mistyped",  # a token with a typing error, or cut short
    "unknown_token",  # no invitation has this secret
    "used_token",  # all uses are taken
    "expired_token",
    "name_taken",
    "address_taken",
    "address_outside",  # not an address of the network's subnet
    "subnet_full",
    "not_authority",  # this node is none (any more)
)


class MembershipRefused(VpndError):
    """Something was refused; what was known before is unchanged. `reason` is one of `REASONS`."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(text or reason.replace("_", " "))
        self.reason = reason


def decode_untrusted(
    decoder: msgspec.msgpack.Decoder[Decoded], data: bytes, most: int, what: str, *, secret: bool = False
) -> Decoded:
    """What `data`, at most `most` bytes, says; `what` names it in errors. Raises MembershipRefused only.

    `secret`: there is one in it, which the decoder's error may quote: the error does not say what it said.
    """
    if len(data) > most:
        raise MembershipRefused("too_long", f"{what} has at most {most} bytes")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise MembershipRefused(
            "malformed", f"{what} is malformed" + (f": {error}" if not secret else "")
        ) from None
