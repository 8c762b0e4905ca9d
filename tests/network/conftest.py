"""Network namespaces for tests of the TUN device: made, entered and removed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from pyroute2 import netns

Enter = Callable[[str], AbstractContextManager[None]]


@contextmanager
def enter(name: str) -> Iterator[None]:
    """This thread inside the namespace `name`; files and sockets opened there stay there."""
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()


@pytest.fixture
def namespaces() -> Iterator[tuple[str, str, str]]:
    """Three empty network namespaces, loopback up."""
    names = tuple(f"tn{os.getpid()}{letter}" for letter in "abc")
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    try:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.fixture
def entered() -> Enter:
    """The context manager that enters a namespace by name."""
    return enter
