"""What a loop hears of a descriptor that has an error, on the loop that nodes have and on asyncio's own."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from lab.sockets import tcp_on_loopback

from vpnd.api.aio import Descriptors

PATIENCE_S = 5.0
RESET = struct.pack("ii", 1, 0)

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = pytest.mark.parametrize("run", [uvloop.run, asyncio.run], ids=["uvloop", "asyncio"])


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@LOOPS
@pytest.mark.parametrize("writes", [False, True])
def test_what_came_before_a_reset_is_heard_and_then_the_reset(run: Run, writes: bool) -> None:
    async def heard() -> None:
        descriptors, got, errors = Descriptors(), bytearray(), list[int]()
        near, far = tcp_on_loopback()
        near.setblocking(False)
        fd = near.fileno()

        def readable() -> None:
            try:
                got.extend(near.recv(2))
            except OSError as error:
                errors.append(error.errno or 0)
                descriptors.remove_reader(fd)
                descriptors.remove_writer(fd)
                near.close()

        descriptors.add_reader(fd, readable)
        if writes:
            descriptors.add_writer(fd, lambda: None)
        far.send(b"its last words")
        reset(far)
        await until(lambda: errors)
        assert bytes(got) == b"its last words" and len(errors) == 1
        descriptors.close()

    run(heard())


@LOOPS
def test_an_error_that_is_not_the_end_leaves_it_watched(run: Run) -> None:
    async def heard() -> None:
        descriptors, got, errors = Descriptors(), list[bytes](), list[int]()
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            place = gone.getsockname()
        near.connect(place)
        near.setblocking(False)
        fd = near.fileno()

        def readable() -> None:
            try:
                got.append(near.recv(100))
            except OSError as error:
                errors.append(error.errno or 0)
                descriptors.again(fd)

        descriptors.add_reader(fd, readable)
        for number in range(1, 4):
            near.send(b"nobody is there")  # the kernel's answer is an error of the socket
            await until(lambda number=number: len(errors) >= number)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
            here.bind(place)
            here.sendto(b"somebody is", near.getsockname())
            await until(lambda: got)
        assert got == [b"somebody is"]
        descriptors.remove_reader(fd)
        near.close()
        descriptors.close()

    run(heard())


@LOOPS
def test_who_watches_no_more_is_told_nothing_and_its_number_can_be_had_again(run: Run) -> None:
    async def heard() -> None:
        descriptors, told = Descriptors(), list[str]()
        for number in range(3):
            near, far = tcp_on_loopback()
            near.setblocking(False)
            fd = near.fileno()
            descriptors.add_writer(fd, lambda: told.append("writable"))
            descriptors.add_reader(fd, lambda: told.append("readable"))
            await until(lambda: "writable" in told)
            descriptors.remove_writer(fd)
            told.clear()
            far.send(b"x")
            await until(lambda: "readable" in told)
            descriptors.remove_reader(fd)
            descriptors.remove_reader(fd)
            told.clear()
            reset(far)
            await asyncio.sleep(0.05)
            assert told == [], number
            near.close()
        descriptors.close()

    run(heard())
