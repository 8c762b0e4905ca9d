"""The status socket: one JSON request line, one JSON answer, end.

{"command": "status"}               →  the status report; "max_age_s": one that others were told is new enough
{"command": "stop"}                 →  {"stopping": true}; the node then stops
{"command": "reload"}               →  what of the configuration is in force now, and what needs a restart
{"command": "scale", "shards": N}   →  how many there were and are, once it is done
{"command": "log-level", "level": …}→  what it was and is
{"command": "probe", "address": IP} →  what carries pings to it, measured now (supervisor/requests.py)
{"command": "why", "who": …}        →  why packets to it do not arrive (supervisor/walking.py)
{"command": "invite", …}            →  what control answers (supervisor/requests.py has the names)
anything else                       →  {"error": "…"}
what is refused                     →  {"error": "…", "kind": name of a class of vpnd.errors}; one problem on each line
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from vpnd.config.live import Live
from vpnd.errors import MachineError, VpndError, kind_of

#: Gets the request, as it came.
Command = Callable[[Mapping[str, Any]], Awaitable[object]]
#: A request is one short line; more is somebody else's protocol.
MAX_REQUEST_BYTES = 65_536


_SCRIPT = """
trap '' HUP INT TERM
read -r nothing
[ "$(stat -c %i -- "$1" 2>/dev/null)" = "$2" ] && { rm -f -- "$1"; eval "$3"; }
exit 0
"""


class Janitor:
    """Removes the status socket, and what else outlives the supervisor, when that is killed.

    Children, device, addresses and routes vanish by themselves with the supervisor's descriptors; a socket's name in
    the file system and routing rules do not. A tiny shell waits for the end of a pipe whose other end only the
    supervisor has; it comes with the supervisor's death, however it dies. The inode is compared, so that a new
    daemon's socket is left alone. `close` ends it after a clean stop.

    `commands`: lines of shell, run after a death with the socket still there; one that fails is passed over.
    """

    def __init__(self, path: str, commands: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [
                *("/bin/sh", "-c", _SCRIPT, "vpnd-janitor"),
                *(path, str(os.stat(path).st_ino), "\n".join(commands)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def close(self) -> None:
        """Let it do its work and end; waits for it, which takes a millisecond or two."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


class StatusServer:
    """Listens on a unix socket, mode 0600. Owner: supervisor loop.

    status.timeout bounds how long a client may take to ask and to listen; a command takes its time. A command whose
    client has gone is still carried out. `leftovers`: see Janitor.commands.
    """

    def __init__(
        self, path: str, live: Live, commands: Mapping[str, Command], leftovers: Sequence[str] = ()
    ) -> None:
        self._path, self._live, self._commands, self._leftovers = path, live, commands, leftovers
        self._server: asyncio.Server | None = None
        self._janitor: Janitor | None = None

    async def start(self) -> None:
        """Bind and listen. The caller holds the state directory's lock, so a socket that is there is a dead one's.

        Raises MachineError when the path cannot be bound.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.lstat(self._path).st_mode):  # anything else there is not ours to remove
                    os.unlink(self._path)
            mask = os.umask(0o177)
            try:
                sock.bind(self._path)
            finally:
                os.umask(mask)
        except OSError as error:
            sock.close()
            raise MachineError(
                f"status.socket = {self._path}: {error.strerror}; choose another path"
            ) from error
        self._janitor = Janitor(self._path, self._leftovers)
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=MAX_REQUEST_BYTES)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._live.config.status.timeout):
                line = await reader.readline()
            answer = await self._answer(line)
            async with asyncio.timeout(self._live.config.status.timeout):
                writer.write(msgspec.json.encode(answer))
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            pass  # a client that says nothing, too much, or has gone
        except asyncio.CancelledError:
            pass  # the loop ends while a command runs; asyncio's streams of Python 3.11 log a cancelled task as a bug
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> object:
        try:
            request = msgspec.json.decode(line)
            command = self._commands[request["command"]]
        except (msgspec.DecodeError, KeyError, TypeError):
            known = ", ".join(sorted(self._commands))
            return {"error": f"not a request; send one line of JSON with a command of {known}"}
        try:
            return await command(request)
        except VpndError as error:
            return {"error": str(error), "kind": kind_of(error)}

    async def stop(self) -> None:
        """Stop listening and remove the socket. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._janitor is not None:
            self._janitor.close()
            self._janitor = None
