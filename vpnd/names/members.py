"""The members a zone answers for, and the labels of DNS that their names become.

A table is a picture of one moment and never changes; when members come or go, a new one is made and handed to the
zone. Control makes one per change of membership, not per query.

A member's name is any 1 to 63 printable characters; a host label has letters, digits and hyphens in its middle
(RFC 1123 section 2.1), and DNS does not tell capitals from small letters. So:

    1. a name that is a host label in small letters is its own label;
    2. one that is a host label but for capitals has it in small letters, when nobody has that yet
       (of several such names, the one that sorts first);
    3. every other has what is left of it, a hyphen, and the first digits of its SHA-256: "büro" is
       "b-ro-7d0b1e".

The outcome depends on the set of names alone, so every node that knows the same members says the same. Labels
with hyphens in the third and fourth place are kept for encodings (RFC 5890 section 2.3.1) and fall under 3.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence

from vpnd.discovery.registry import Member
from vpnd.endpoint import IP

#: RFC 1035 section 2.3.4.
MAX_LABEL = 63
#: Hex digits that tell names apart whose letters are the same; more are taken should that not be enough.
DIGEST_DIGITS = 6
#: What remains of a name without a single letter or digit.
NAMELESS = "member"

_HOST_LABEL = re.compile(r"(?!..--)[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.ASCII)


def assign(names: Iterable[str]) -> dict[str, str]:
    """name -> label, one label for each name and no label twice."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    later = []
    rest = sorted(set(names))
    for exact in (True, False):
        for name in rest:
            label = name if exact else _lower(name)
            if is_label(label) and label not in taken:
                found[name] = label
                taken.add(label)
            else:
                later.append(name)
        rest, later = later, []
    for name in rest:
        found[name] = _marked(name, taken)
        taken.add(found[name])
    return found


def is_label(text: str) -> bool:
    """True for a host label in small letters."""
    return len(text) <= MAX_LABEL and _HOST_LABEL.fullmatch(text) is not None


def _lower(text: str) -> str:
    """A to Z alone: str.lower() makes some other characters letters of ASCII ("K", the Kelvin sign)."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def _marked(name: str, taken: set[str]) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    kept = re.sub(r"[^a-z0-9]+", "-", _lower(name)).strip("-") or NAMELESS
    for digits in range(DIGEST_DIGITS, MAX_LABEL - 1):
        label = f"{kept[: MAX_LABEL - 1 - digits].rstrip('-')}-{digest[:digits]}"
        if is_label(label) and label not in taken:
            return label
    raise AssertionError("62 digits of SHA-256 and a first letter were taken")


class MemberTable:
    """Given names and addresses. An address named twice belongs to the name that sorts first.

    Look-ups are cheap: every query makes some.
    """

    def __init__(self, members: Iterable[tuple[str, Sequence[IP]]]) -> None:
        by_name = {name: tuple(addresses) for name, addresses in members}
        #: name of a member -> its label
        self.labels = assign(by_name)
        self._addresses = {self.labels[name]: addresses for name, addresses in by_name.items()}
        self._owners: dict[IP, str] = {}
        for name in sorted(by_name):
            for address in by_name[name]:
                self._owners.setdefault(address, self.labels[name])

    def addresses(self, label: str) -> Sequence[IP] | None:
        """Addresses behind a label in small letters; None when no member has it."""
        return self._addresses.get(label)

    def label(self, address: IP) -> str | None:
        """The label of the member that owns an address; None when none does."""
        return self._owners.get(address)


def table_of(members: Iterable[Member]) -> MemberTable:
    """A table of the registry's members. Their addresses are the prefixes of one address; networks have no name.

    Of two members with one name, the peer id that sorts first keeps it; the other is found by its name, a dot
    and the end of its peer id, made a label.
    """
    rows: dict[str, list[IP]] = {}
    for member in sorted(members, key=lambda member: (member.name, member.peer_id)):
        name = member.name if member.name not in rows else f"{member.name}.{member.peer_id[-_ID_END:]}"
        rows[name] = [
            network.network_address
            for network in map(ipaddress.ip_network, member.prefixes)
            if network.prefixlen == network.max_prefixlen
        ]
    return MemberTable(rows.items())


#: Characters of a peer id that tell members of one name apart; its beginning is the same for all.
_ID_END = 12
