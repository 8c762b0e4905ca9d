"""What came of merging statements into a directory."""

from __future__ import annotations

import msgspec

from vpnd.membership.roster import Changes
from vpnd.membership.statements import Statement


class Refused(msgspec.Struct, frozen=True):
    """A statement that was not taken. `slot` is empty when it could not even be read."""

    reason: str
    digest: bytes
    slot: bytes = b""


class Merged(msgspec.Struct, frozen=True):
    """What a merge did. Statements known before are neither accepted nor refused."""

    accepted: tuple[Statement, ...]
    refused: tuple[Refused, ...]
    changes: Changes
