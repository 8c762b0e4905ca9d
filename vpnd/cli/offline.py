"""Leaving a network without a daemon: it may be the network's files that keep it from starting."""

from __future__ import annotations

import os

from vpnd.config import paths
from vpnd.config.schema import Config
from vpnd.errors import NotRunningError, PrivilegeError, RefusedError


def leave(config: Config, *, force: bool) -> str:
    """Forget the network in the state directory; its name, "" when that cannot be read.

    `force`: also when this node is an authority, of which nobody can say here whether it is the only one. Raises
    NotRunningError when there is no network, AlreadyRunningError when a daemon has the directory after all.
    """
    from supervisor import statedir
    from vpnd.membership.store import KEY, NETWORK, Store, StoreError

    directory = paths.network_dir(config)
    if os.geteuid() != 0:
        raise PrivilegeError("leaving a network needs root: run it with sudo")
    if not (directory / NETWORK).exists():
        raise NotRunningError(f"no daemon answers, and {config.state_dir} holds no network to leave")
    lock = statedir.lock(config)
    try:
        if (directory / KEY).exists() and not force:
            raise RefusedError(
                f"this node holds an authority key ({directory / KEY}), which leaving destroys. Without another "
                "authority the network is closed then; say vpnd leave --force, or start the node and ask it"
            )
        store = Store(directory)
        try:
            network = store.load_network()
        except StoreError:  # a damaged network can be left all the same
            network = None
        store.forget()
        store.close()
    finally:
        os.close(lock)
    return network.name if network is not None else ""
