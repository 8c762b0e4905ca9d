"""The log file of a node that was started with --detach: kept from growing for ever.

All processes of the node append to one open file, whose name cannot be changed behind their backs. So it is copied and
cut short: the kernel lets everybody go on at its new end. What is written between the two is lost, some milliseconds of
it. Done in a thread: nothing waits for a log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from vpnd.config import paths
from vpnd.config.live import Live

#: Which all processes of the node inherit.
STDERR = 2


class LogFile:
    """Looks at its size every status.sample_interval, from now on until `close`. Owner: supervisor loop.

    `fd`: where the log goes; what is not the node's own log file is left alone.
    """

    def __init__(self, live: Live, fd: int = STDERR) -> None:
        self._live, self._fd = live, fd
        self._path = paths.log_file(live.config)
        self._watcher = asyncio.get_running_loop().create_task(self._watch()) if self._ours() else None

    def _ours(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        return False

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._live.config.status.sample_interval)
            settings = self._live.config.log
            if settings.file_bytes and os.fstat(self._fd).st_size >= settings.file_bytes:
                await asyncio.to_thread(self._turn, settings.files)

    def _turn(self, files: int) -> None:
        """Blocks. A disk without room keeps nothing but the end."""
        names = [self._path, *(Path(f"{self._path}.{number}") for number in range(1, files + 1))]
        with contextlib.suppress(OSError):
            for older, newer in zip(names[:0:-1], names[-2:0:-1], strict=False):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer, older)
            shutil.copyfile(self._path, names[1])
            os.chmod(names[1], 0o600)
        os.truncate(self._path, 0)

    def close(self) -> None:
        """Look no more."""
        if self._watcher is not None:
            self._watcher.cancel()
