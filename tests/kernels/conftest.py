"""Modules that call kernels do so at every level that this machine runs: `usefixtures("level")`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import kernel_harness


@pytest.fixture(scope="module", params=kernel_harness.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernel_harness.using(request.param):
        yield request.param
