"""The tests marked root: none of them may be skipped in CI, but for the long ones."""

from __future__ import annotations

import os

import pytest

#: Long variants are run for who asks for them.
LONG = bool(os.environ.get("VPND_LONG_TESTS"))
#: pytest's exit code for root tests that did not run: no second try, as after a failure, makes up for it.
DID_NOT_RUN = 9


class RootTestsMustRun:
    """Remembers the tests marked root that were skipped, but for long ones that nobody asked for.

    With several workers the reports come here too.
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        asked_for = LONG or "long" not in report.keywords
        if report.skipped and not hasattr(report, "wasxfail") and "root" in report.keywords and asked_for:
            self.skipped.append(f"{report.nodeid}: {report.longrepr[2]}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = DID_NOT_RUN

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.skipped:
            terminalreporter.section("root tests that did not run", red=True)
            for line in self.skipped:
                terminalreporter.line(line)
