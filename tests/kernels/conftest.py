"""Every kernel is called at every level that this machine runs."""

from __future__ import annotations

import pytest

from tests import kernel_harness


@pytest.fixture(scope="module", params=kernel_harness.LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> str:
    kernel_harness.use(request.param)
    return str(request.param)
