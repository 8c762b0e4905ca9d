"""What several of the attacks begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attack_tools import arena
from lab import Node


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Three that run and know each other, and room for a stranger."""
    with arena(3) as nodes:
        yield nodes
