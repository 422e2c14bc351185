"""What several test files share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def boston() -> dict[str, Any]:
    """A small simulated city (boston-seaport): a map-expansion dictionary that nobody may alter."""
    from nmp_train.sim.city import generate_city

    return generate_city(5, "boston-seaport", 360.0)
