"""A real relay process, with the test as its supervisor and its control."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from vpnd.api import messages
from vpnd.api.channel import Channel, first_message
from vpnd.api.ends import pair
from vpnd.config.schema import Config
from vpnd.metrics import create_page

REPOSITORY = Path(__file__).parents[2]


class RelayProcess:
    """`python -m vpnd.relay`. `channel`: control's end of its channel."""

    def __init__(self, config: Config) -> None:
        ours, theirs = pair()
        self.supervisor = Channel(ours, "supervisor", "relay")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vpnd.relay", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"PYTHONPATH": str(REPOSITORY)},
            )
        self.page, page_fd = create_page((), "heartbeat")
        self.supervisor.send(messages.RelayStart(config=config), (page_fd,))
        os.close(page_fd)
        first_message(self.supervisor, messages.Ready)
        self.channel = self.meet()

    def meet(self) -> Channel:
        """A new channel, as after a restart of control."""
        ours, theirs = pair()
        with theirs:
            self.supervisor.send(messages.ControlArrived(), (theirs.fileno(),))
        return Channel(ours, "control", "relay")

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.supervisor.close()
        assert self.process.wait(10.0) == 0
