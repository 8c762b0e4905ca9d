"""What all tests share: without root the root tests are skipped, and no VPND_ of the shell comes in."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from settings_shown import Freezer

# A busy machine is no finding; pytest-timeout ends what hangs
settings.register_profile("vpnd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vpnd")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--root-tests-must-run",
        action="store_true",
        help="fail when a test marked root was skipped, whatever the reason",
    )
    parser.addoption(
        "--freeze-settings",
        action="store_true",
        help="run the tests that show what a setting changes with that setting frozen: they must fail",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--freeze-settings"):
        config.pluginmanager.register(Freezer())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    needs_root = pytest.mark.skip(reason="needs root; run: sudo scripts/test")
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(needs_root)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("root"):
        item.session.stash.setdefault(_skipped, []).append(f"{item.nodeid}: {report.longrepr[2]}")


_skipped = pytest.StashKey[list]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--root-tests-must-run") and session.stash.get(_skipped, []):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = terminalreporter._session
    skipped = session.stash.get(_skipped, [])
    if skipped and config.getoption("--root-tests-must-run"):
        terminalreporter.section("root tests that did not run", red=True)
        for line in skipped:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("VPND_"):
            monkeypatch.delenv(variable)
