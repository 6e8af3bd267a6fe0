"""The inventory of the whole fleet."""

import pytest


@pytest.fixture(scope="session")
def inventory() -> str:
    """The default inventory."""
    return "inventory/local"
