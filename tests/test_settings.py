"""Every setting matters: there is a test in which another value changes what happens."""

from __future__ import annotations

import pytest
from settings_shown import SETTINGS, claims, frozen

from vpnd.config.schema import Worker

CLAIMS = claims()


@pytest.mark.parametrize("path", SETTINGS)
def test_a_test_shows_what_the_setting_changes(path: str) -> None:
    assert CLAIMS.get(path), f'no test has @pytest.mark.setting("{path}")'


def test_only_settings_are_claimed() -> None:
    assert CLAIMS.keys() <= SETTINGS.keys()


def test_a_frozen_setting_is_its_default_until_it_thaws() -> None:
    table = Worker(buffer_size=7)
    with frozen("worker.buffer_size"):
        assert table.buffer_size == Worker().buffer_size
    assert table.buffer_size == 7
