"""The commands' side of the status socket.

A connection carries one exchange: one line of JSON from the command, then JSON from the daemon until it
closes the connection. supervisor/statusd.py lists requests and answers.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from vpnd import errors
from vpnd.errors import ChildError, NotRunningError, PrivilegeError, VpndError
from vpnd.status import Status

#: Bytes asked of the socket at once.
_READ_BYTES = 1 << 16
#: struct ucred: pid, uid, gid
_UCRED = struct.Struct("3i")


def status(path: Path, timeout_s: float, max_age_s: float = 0.0) -> Status:
    """The daemon's status, at most so old. Raises NotRunningError, PrivilegeError, VpndError."""
    request = {"command": "status", "max_age_s": max_age_s}
    try:
        return msgspec.convert(ask(path, request, timeout_s), Status)
    except msgspec.ValidationError as error:
        raise VpndError(f"the daemon is of another version ({error}); start it again") from None


def ask(
    path: Path, request: Mapping[str, Any], timeout_s: float, patience_s: float | None = None
) -> dict[str, Any]:
    """One request and its answer, which may take `patience_s` when that is longer than asking, `timeout_s`.

    Raises NotRunningError, PrivilegeError, or the error the daemon refused with.
    """
    with _connect(path, timeout_s) as sock:
        return _exchange(sock, path, request, patience_s or timeout_s)


def end(
    path: Path, request: Mapping[str, Any], timeout_s: float, gone_within_s: float, poll_interval_s: float
) -> dict[str, Any]:
    """Ask for something after which the daemon ends; return what it answered when its process has ended and its socket
    is gone. Raises NotRunningError when there is none, ChildError when it is still there after `gone_within_s`."""
    with _connect(path, timeout_s) as sock:
        pid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
        # opened before it is told to stop, so that the number cannot be another process's by then;
        # 0: the daemon is in another pid namespace, its socket alone tells
        process = os.pidfd_open(pid) if pid else None
        try:
            answer = _exchange(sock, path, request, timeout_s)
            deadline = time.monotonic() + gone_within_s
            if process is not None and not select.select([process], [], [], gone_within_s)[0]:
                raise ChildError(
                    f"process {pid} has not ended after {gone_within_s:g} s; end it: kill -9 {pid}"
                )
        finally:
            if process is not None:
                os.close(process)
    while _answers(path):
        if time.monotonic() >= deadline:
            raise ChildError(f"{path} still answers after {gone_within_s:g} s; has it been started again?")
        time.sleep(poll_interval_s)
    return answer


def _connect(path: Path, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        # a refused connection is the socket file of a daemon that was killed
        raise NotRunningError(f"no daemon answers on {path}; start it: sudo vpnd start") from None
    except PermissionError:
        sock.close()
        raise PrivilegeError(f"{path} is not open to this user; run with sudo") from None
    except TimeoutError:
        sock.close()
        raise _silent(path, timeout_s) from None
    except OSError as error:
        sock.close()
        raise NotRunningError(f"{path}: {error.strerror}; see status.socket and --state-dir") from None
    return sock


def _exchange(
    sock: socket.socket, path: Path, request: Mapping[str, Any], timeout_s: float
) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    parts = []
    try:
        sock.sendall(msgspec.json.encode(request) + b"\n")
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
            part = sock.recv(_READ_BYTES)
            if not part:
                break
            parts.append(part)
    except TimeoutError:
        raise _silent(path, timeout_s) from None
    except OSError as error:
        raise NotRunningError(f"the daemon on {path} closed the connection ({error.strerror})") from None
    try:
        answer = msgspec.json.decode(b"".join(parts))
    except msgspec.DecodeError:
        raise NotRunningError(f"the daemon on {path} ended before it had answered") from None
    if not isinstance(answer, dict):
        raise VpndError(f"what listens on {path} is not vpnd; see status.socket")
    if "error" in answer:
        if "kind" not in answer:
            raise VpndError(f"the daemon refused: {answer['error']}")
        raise errors.of_kind(str(answer["kind"]), str(answer["error"]))
    return answer


def _answers(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))
        return True
    return False


def _silent(path: Path, timeout_s: float) -> NotRunningError:
    remedy = "look at its log, or wait longer with VPND_STATUS_TIMEOUT"
    return NotRunningError(f"the daemon on {path} has not answered within {timeout_s:g} s; {remedy}")
