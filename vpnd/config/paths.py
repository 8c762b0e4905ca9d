"""Where a node's files are: paths in the configuration are relative to its state directory."""

from __future__ import annotations

from pathlib import Path

from vpnd.config.schema import Config

DEFAULT_STATE_DIR = Path("/var/lib/vpnd")
CONFIG_FILE_NAME = "vpnd.toml"
LOG_FILE_NAME = "vpnd.log"
LOCK_FILE_NAME = "vpnd.lock"
NETWORK_DIR_NAME = "network"


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
