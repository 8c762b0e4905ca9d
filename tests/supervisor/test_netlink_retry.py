"""Steps of the network setup that the kernel cannot do just now are tried again, others are not."""

from __future__ import annotations

import errno

import pytest

from supervisor.network.netlink import NetlinkError
from supervisor.network.routes import NetworkSetup
from vpnd.config.schema import Retry

SETTINGS = Retry(max_attempts=4, initial_interval=0.5, max_interval=1.0)


class Kernel:
    """Fails with each of `errors` in turn, then does it."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.tries = list(errors), 0

    def __call__(self) -> None:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)


TRANSIENT = [errno.EBUSY, errno.EAGAIN, errno.ENOBUFS, errno.EINTR]
ROWS = [
    ("done at once", [], 1, True),
    *((f"{errno.errorcode[code]} passes", [NetlinkError(code), NetlinkError(code)], 3, True) for code in TRANSIENT),
    ("an error of the socket passes as well", [OSError(errno.ENOBUFS, "")], 2, True),
    ("busy for ever is given up", [NetlinkError(errno.EBUSY)] * 9, SETTINGS.max_attempts, False),
    ("what exists is told at once", [NetlinkError(errno.EEXIST)], 1, False),
    ("so is what comes after a wait", [NetlinkError(errno.EBUSY), NetlinkError(errno.EPERM)], 2, False),
]  # fmt: skip


@pytest.mark.parametrize(("what", "failures", "tries", "done"), ROWS, ids=[row[0] for row in ROWS])
def test_what_is_tried_again(what, failures, tries, done):
    waits: list[float] = []
    kernel, setup = Kernel(*failures), NetworkSetup(SETTINGS, waits.append)
    if done:
        setup._try(what, kernel)
    else:
        with pytest.raises((NetlinkError, OSError)):
            setup._try(what, kernel)
    assert kernel.tries == tries
    assert len(waits) == tries - 1
    assert all(0 <= wait_s <= SETTINGS.max_interval for wait_s in waits)
    assert not waits or waits[0] <= SETTINGS.initial_interval


def test_other_settings_hold_for_what_is_set_up_from_now_on():
    kernel, setup = Kernel(*[NetlinkError(errno.EBUSY)] * 9), NetworkSetup(SETTINGS, lambda wait_s: None)
    setup.retry = Retry(max_attempts=2)
    with pytest.raises(NetlinkError):
        setup._try("busy for ever", kernel)
    assert kernel.tries == 2
