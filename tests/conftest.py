"""What all tests share: without root the root tests are skipped, and no VPND_ of the shell comes in."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from root_tests import LONG, RootTestsMustRun
from settings_shown import Freezer

from vpnd.config.values import OWN_USER
from vpnd.privileges import existing

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
    parser.addoption(
        "--interop",
        action="store_true",
        help="also the tests against libp2p of other makers, which need Go and npm and the network",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0:
        existing(OWN_USER)  # as the first node's start does
    if config.getoption("--freeze-settings"):
        config.pluginmanager.register(Freezer())
    if config.getoption("--root-tests-must-run") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(RootTestsMustRun())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not LONG and (long := item.get_closest_marker("long")):
            # The skip found first is the one that is told
            item.add_marker(pytest.mark.skip(reason=f"{long.args[0]}; VPND_LONG_TESTS=1"), append=False)
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root; run: sudo scripts/test"))


@pytest.fixture(autouse=True)
def no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("VPND_"):
            monkeypatch.delenv(variable)
