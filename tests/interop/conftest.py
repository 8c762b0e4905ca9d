"""Only by `scripts/test --interop`: these tests build programs from other registries than this project's."""

from __future__ import annotations

import pytest
from foreign import PEERS, Unavailable


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    return None if config.getoption("--interop") else True


@pytest.fixture(params=sorted(PEERS))
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The command of a peer of another make."""
    try:
        return PEERS[request.param]()
    except Unavailable as error:
        pytest.skip(str(error))
