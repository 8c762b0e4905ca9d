"""The log file of a detached node does not grow for ever, and those who write into it go on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.logfile import LogFile
from vpnd.config.live import Live
from vpnd.config.schema import Config, Log, Status

LOOK_S = 0.1
LIMIT = 1000


def turned(tmp_path: Path, files: int, limit: int, times: int, *, ours: bool = True) -> dict[str, str]:
    """What is in the directory after so many times more than the limit was written; each time other letters."""
    file = tmp_path / ("vpnd.log" if ours else "other.log")
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    config = Config(
        state_dir=str(tmp_path), log=Log(file_bytes=limit, files=files), status=Status(sample_interval=LOOK_S)
    )

    async def until(done: Callable[[], bool]) -> None:
        for _ in range(100):
            if done():
                return
            await asyncio.sleep(LOOK_S)

    async def body() -> None:
        log = LogFile(Live(config), fd)
        for letter in "abcdefgh"[:times]:
            os.write(fd, letter.encode() * 1500)
            if ours and limit:
                await until(lambda: os.fstat(fd).st_size == 0)
            else:
                await asyncio.sleep(3 * LOOK_S)
        os.write(fd, b"last")
        log.close()

    asyncio.run(body())
    os.close(fd)
    assert all(not path.stat().st_mode & 0o077 for path in tmp_path.iterdir())
    return {path.name: path.read_text() for path in tmp_path.iterdir()}


@pytest.mark.setting("log.file_bytes", "log.files")
@pytest.mark.parametrize("files", [1, 2, 3])
def test_the_newest_so_many_are_kept(tmp_path: Path, files: int) -> None:
    left = turned(tmp_path, files, LIMIT, 4)
    assert left.pop("vpnd.log") == "last"
    kept = {f"vpnd.log.{number}": letter * 1500 for number, letter in enumerate("dcba"[:files], 1)}
    assert left == kept


def test_without_a_limit_and_of_another_file_nothing_is_cut(tmp_path: Path) -> None:
    for ours, limit in ((True, 0), (False, LIMIT)):
        place = tmp_path / str(limit)
        place.mkdir(mode=0o700)
        (content,) = turned(place, 2, limit, 1, ours=ours).values()
        assert content == "a" * 1500 + "last"
