"""The configuration in force: one cell that everything of a shard looks into, because `vpnd reload` changes
it."""

from __future__ import annotations

from vpnd.config.schema import Config


class Live:
    """Read `config` where a setting is used, off the packet path; do not keep parts of it. Owner: shard
    loop."""

    __slots__ = ("config",)

    def __init__(self, config: Config) -> None:
        self.config = config
