"""Where a node's files are: the configuration, and what lies in the state directory; and the machine's programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vpnd.config.schema import Config
from vpnd.errors import ConfigError

DEFAULT_STATE_DIR = Path("/var/lib/vpnd")
CONFIG_FILE_NAME = "vpnd.toml"
LOG_FILE_NAME = "vpnd.log"
LOCK_FILE_NAME = "vpnd.lock"
NETWORK_DIR_NAME = "network"
#: In that directory: what makes the node a member.
NETWORK_NAME = "network.bin"
PAGE_TOKEN_NAME = "page.token"
#: Where programs of the machine are looked for: PATH, perhaps of a service, may leave out those of administrators.
PROGRAMS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Places(NamedTuple):
    """Where the node lives, before anything is read. `named`: the flag or variable that chose the file."""

    state_dir: Path
    config_file: Path
    named: str


def places(config_file: Path | None, state_dir: Path | None, environ: Mapping[str, str]) -> Places:
    """The state directory and the configuration file; a flag wins over its variable."""
    home = state_dir or Path(environ.get("VPND_STATE_DIR") or DEFAULT_STATE_DIR)
    # absolute, because the daemon and its children may run in another directory
    home = absolute(home)
    if config_file:
        return Places(home, config_file, "--config")
    if environ.get("VPND_CONFIG"):
        return Places(home, Path(environ["VPND_CONFIG"]), "VPND_CONFIG")
    return Places(home, home / CONFIG_FILE_NAME, "")


def absolute(path: Path) -> Path:
    """The same place from every working directory. Raises ConfigError where this one has been removed."""
    try:
        return path.absolute()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: the working directory has been removed; change to another, or give the whole path"
        ) from None


def identity_file(config: Config) -> Path:
    """The private key of the node."""
    return Path(config.state_dir, config.p2p.identity_file)


def status_socket(config: Config) -> Path:
    """The socket `vpnd status` and `vpnd stop` talk to."""
    return Path(config.state_dir, config.status.socket)


def log_file(config: Config) -> Path:
    """Standard error of a node started with --detach."""
    return Path(config.state_dir, LOG_FILE_NAME)


def lock_file(config: Config) -> Path:
    """Locked by the daemon that has the state directory."""
    return Path(config.state_dir, LOCK_FILE_NAME)


def network_dir(config: Config) -> Path:
    """What the node keeps of the network it is in; belongs to process.user."""
    return Path(config.state_dir, NETWORK_DIR_NAME)


def page_token_file(config: Config) -> Path:
    """What a browser must show to see the page."""
    return Path(config.state_dir, PAGE_TOKEN_NAME)
