"""Talking to the kernel where descriptors are short."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import errno, os, resource
from supervisor.network.netlink import converse

converse(lambda netlink: netlink.get_links())
fd = os.dup(0)
os.close(fd)
for room in range(12):
    resource.setrlimit(resource.RLIMIT_NOFILE, (fd + room, 4096))
    try:
        converse(lambda netlink: netlink.get_links())
    except OSError as error:
        assert error.errno == errno.EMFILE, error
    else:
        assert room >= 4, room
resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 40, 4096))
assert converse(lambda netlink: netlink.get_links())
"""


@pytest.mark.root
def test_without_descriptors_it_is_refused_and_nothing_is_written() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
