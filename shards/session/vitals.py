"""A link's health on the loop: when to probe, and what to do about what comes of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from shards.session.health import Health, Verdict
from vpnd.config.live import Live

if TYPE_CHECKING:
    from shards.session.link import Link


class Vitals:
    """Owner: the link, which keeps `heard_s`. `suspect`: a probe was not answered in time, and nothing was
    heard since."""

    def __init__(self, link: Link, live: Live) -> None:
        self._link = link
        self._health = Health(live, link.opened_s)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.suspect = False

    def watch(self) -> None:
        """Look again when it is time."""
        self.stop()
        if not self._link.closed:
            wait_s = max(0.0, self._health.next_s - self._link.now())
            self._timer = self._loop.call_later(wait_s, self.check)

    def check(self) -> None:
        """Look now."""
        self._act(self._health.step(self._link.now(), self._link.heard_s))

    def hurry(self) -> None:
        """Something happened that sessions do not always survive: find out now."""
        self._act(self._health.hurry(self._link.now()))

    def retime(self) -> None:
        """The interval may be another one."""
        if self._health.retime(self._link.now()):
            self.watch()

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _act(self, verdict: Verdict) -> None:
        link = self._link
        if link.closed:
            return
        self.suspect = self._health.suspect
        match verdict:
            case Verdict.PROBE:
                link.events.health_probes += 1
                link.probe()
            case Verdict.SUSPECT:
                link.events.health_failures += 1
                link.events.health_probes += 1
                link.probe()
                link.events.link_suspect(link)
            case Verdict.DEAD:
                link.events.health_failures += 1
                link.events.health_deaths += 1
                link.close("no sign of life")
        self.watch()
