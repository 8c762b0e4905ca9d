"""Which flows go in datagrams, where there is a way for them, and which in streams.

    carrier.choice   streams      datagrams
    ---------------  -----------  -----------------------------------------------------------------------------
    auto             TCP          the rest, beside sessions whose round trip is carrier.least_rtt or longer
    datagrams        -            all
    streams          all          -

A rule for the flow's port, else one for its protocol, says otherwise: carrier.streams, carrier.datagrams.
"""

from __future__ import annotations

from vpnd.config.live import Live
from vpnd.packet.flow import kind_of, rule_of

_TCP = 6


def keeps_order(key: int) -> bool:
    """Whether the flow would take packets that overtake each other for loss."""
    return kind_of(key) >> 16 == _TCP


class Choice:
    """Owner: the plane. Rules are those in force when a flow begins, or looks for another place."""

    def __init__(self, live: Live) -> None:
        self._live = live
        #: protocol and port (0: all) of a rule -> whether its flows go in datagrams
        self._rules: dict[int, bool] = {}
        live.watch(lambda config: (config.carrier.streams, config.carrier.datagrams), self._read)
        self._read()

    def _read(self) -> None:
        carrier = self._live.config.carrier
        self._rules = {rule_of(text): False for text in carrier.streams}
        self._rules |= {rule_of(text): True for text in carrier.datagrams}

    def datagrams(self, key: int) -> bool:
        """Whether a flow goes in datagrams, if there is a way for them."""
        kind = kind_of(key)
        for rule in (kind, kind & 0xFF0000):
            if rule in self._rules:
                return self._rules[rule]
        choice = self._live.config.carrier.choice
        return choice == "datagrams" or (choice == "auto" and kind >> 16 != _TCP)
