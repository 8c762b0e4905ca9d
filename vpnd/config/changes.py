"""What is different between two configurations, and what of it a running node takes over.

A setting declared with `restart` is baked into a device, a ring, a socket or a process's rights. The others are live;
some of them (the buffers of a session, say) count for what is made from then on. Peers are live, and compared by id.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vpnd.config import fields
from vpnd.config.fields import PEERS
from vpnd.config.schema import Config, Peer
from vpnd.config.values import toml_value


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `old` and `new` are what the Structs hold: durations in seconds, sizes in bytes.

    `key` is the setting's path; of a peer that stays, its name as it was: peers[b].addresses. `remedy`: how it gets
    into force; empty for one that is in force.
    """

    key: str
    old: object
    new: object
    remedy: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload does. `config` is what is in force afterwards: the new one, with the old value of everything in
    `needs_restart`."""

    config: Config
    applied: tuple[Difference, ...]
    needs_restart: tuple[Difference, ...]
    peers_added: tuple[Peer, ...]
    peers_removed: tuple[Peer, ...]


def compare(running: Config, wanted: Config) -> Change:
    """From the configuration in force to another complete one (see load.complete). Nothing is judged here: that
    `config` is still one that `check` finds good, the caller has to see."""
    different = list(_differences(running, wanted))
    before = {peer.peer_id: peer for peer in running.peers}
    after = {peer.peer_id: peer for peer in wanted.peers}
    moved = [
        Difference(key=f"{PEERS}[{peer.name}].{key}", old=getattr(peer, key), new=getattr(other, key))
        for peer_id, peer in before.items()
        if (other := after.get(peer_id)) is not None
        for key in fields.tables()[PEERS]
        if getattr(peer, key) != getattr(other, key)
    ]
    kept = tuple(difference for difference in different if difference.remedy)
    return Change(
        config=_with_old(wanted, running, {difference.key for difference in kept}),
        applied=(*(difference for difference in different if not difference.remedy), *moved),
        needs_restart=kept,
        peers_added=tuple(peer for peer_id, peer in after.items() if peer_id not in before),
        peers_removed=tuple(peer for peer_id, peer in before.items() if peer_id not in after),
    )


def _differences(running: Config, wanted: Config) -> Iterator[Difference]:
    if running.state_dir != wanted.state_dir:
        remedy = Config.settings["state_dir"].restart
        yield Difference(key="state_dir", old=running.state_dir, new=wanted.state_dir, remedy=remedy)
    for field in fields.all_settings():
        old, new = (getattr(getattr(config, field.table), field.key) for config in (running, wanted))
        if old != new:
            yield Difference(key=field.path, old=old, new=new, remedy=field.restart)


def _with_old(wanted: Config, running: Config, paths: set[str]) -> Config:
    changes: dict[str, object] = {}
    for table in {path.partition(".")[0] for path in paths}:
        if table == "state_dir":
            changes[table] = running.state_dir
            continue
        keys = [path.partition(".")[2] for path in paths if path.startswith(f"{table}.")]
        old = getattr(running, table)
        changes[table] = msgspec.structs.replace(
            getattr(wanted, table), **{key: getattr(old, key) for key in keys}
        )
    return msgspec.structs.replace(wanted, **changes)


def show(key: str, value: object) -> str:
    """A value of a `Difference` as the configuration file would have it."""
    table, _, name = key.rpartition(".")
    field = fields.tables().get(table.partition("[")[0], {}).get(name)
    return toml_value(field, value) if field is not None else str(value)
