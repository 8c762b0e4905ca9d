"""Who a node is, and how it knows who its peers are; decided once, when it starts.

STATIC   the configuration names them, or this node's own address: nothing is made, asked or joined
MEMBER   the state directory holds a network: it is started again in it, configured peers count beside it
NEW      neither: it makes a network of which it is the authority, or joins one by token
"""

from __future__ import annotations

import enum

from vpnd.config import paths
from vpnd.config.schema import Config
from vpnd.errors import ConfigError
from vpnd.peerid import Identity


def identity_of(config: Config) -> Identity:
    """The identity of the node, made when it is new. Raises what `load_or_create` does, and ConfigError when it is lost
    while there is a network: with another identity the node would be a stranger there."""
    from vpnd.identity import load_or_create  # cryptography, for which the daemon has no other use

    path = paths.identity_file(config)
    if not path.exists() and (paths.network_dir(config) / paths.NETWORK_NAME).exists():
        raise ConfigError(
            f"{path}: is missing, and the network in {config.state_dir} knows this node by it; put it back, or leave "
            "the network (vpnd leave) and join again by a new token"
        )
    return load_or_create(path)


class Mode(enum.Enum):
    """See the module's docstring."""

    STATIC = "static"
    MEMBER = "member"
    NEW = "new"

    @property
    def in_network(self) -> bool:
        """Whether addresses and members come from a network."""
        return self is not Mode.STATIC


def decide(config: Config, *, joining: bool) -> Mode:
    """The mode of a node that starts with this configuration; `joining`: it was given a token.

    An address of its own in the configuration is a choice against being given one, so it counts as peers do.
    """
    # a link is as good as a file here: control, which reads it, follows none
    if (paths.network_dir(config) / paths.NETWORK_NAME).exists():
        return Mode.MEMBER
    if joining:
        return Mode.NEW
    return Mode.STATIC if config.peers or config.network.virtual_ip else Mode.NEW
