"""Errors of vpnd: one class for each thing a caller does differently."""

from __future__ import annotations


class VpndError(Exception):
    """Base of all errors vpnd raises on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(VpndError):
    """The configuration cannot be used; nothing on the machine was changed. Correct it and run again."""

    exit_code = 2


class PrivilegeError(VpndError):
    """The command needs root. Run it with sudo."""

    exit_code = 4


class NotRunningError(VpndError):
    """No daemon answers on the status socket."""

    exit_code = 3


class AlreadyRunningError(VpndError):
    """Another daemon has this state directory, interface or port."""

    exit_code = 5


class MachineError(VpndError):
    """The kernel refused something the node needs (TUN, address, route, socket). What was done is undone."""

    exit_code = 6


class ChildError(VpndError):
    """A child process did not get ready."""

    exit_code = 7


class RefusedError(VpndError):
    """The network, or one of its authorities, said no; nothing was changed. The text says why and what helps."""

    exit_code = 8


class ProtocolViolation(VpndError):
    """A local process broke the message table of vpnd.api: its channel is closed, the process restarted."""


class RemoteProtocolError(VpndError):
    """The peer sent bytes the protocol does not allow. The session that raised this is dead."""


class FloodError(RemoteProtocolError):
    """The peer asks for more work or memory than any honest one does."""


class BadPacket(VpndError):
    """The only error a parser of untrusted packet bytes (`*_untrusted` in vpnd.packet) raises.

    `reason` is the drop counter's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LocalProtocolError(VpndError):
    """Our own code asked the session engine for something its state does not allow: a bug. The session lives."""


def kind_of(error: VpndError) -> str:
    """What another process calls this error: its class, or the nearest one above it that is of this module."""
    return next(each.__name__ for each in type(error).__mro__ if each.__module__ == __name__)


def of_kind(kind: str, text: str, otherwise: type[VpndError] = VpndError) -> VpndError:
    """The error another process calls `kind`; `otherwise` for a name that is none of these, from another version."""
    known = globals().get(kind)
    if isinstance(known, type) and issubclass(known, VpndError) and known is not BadPacket:
        return known(text)
    return otherwise(text)
