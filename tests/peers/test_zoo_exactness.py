"""Random units cut out of every group of real graphs: the result is the masked graph, up to rounding.

Units and weights are others in every run; a failure tells the seed, and `SPA_SEED=... pytest` repeats it. The graphs lie
beside the repository (`../shared`); without them these tests are skipped.
"""

from __future__ import annotations

import os
import secrets

import pytest

from tests.analysis.exactness import check_exact
from tests.peers import graphs

pytestmark = [pytest.mark.peers, pytest.mark.slow]

NO_GROUPS: dict[str, str] = {}
"""Graphs from which nothing can be removed, and why."""


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get("SPA_SEED") or secrets.randbelow(1 << 30))
    print(f"SPA_SEED={seed}")
    return seed


@pytest.mark.parametrize("name", graphs.zoo_names())
def test_zoo(name: str, seed: int) -> None:
    model, feeds = graphs.zoo_graph(name, seed)
    assert check_exact(model, seeds=[seed], feeds=feeds, name=name) or name in NO_GROUPS


@pytest.mark.parametrize("name", graphs.zoo_names())
def test_zoo_in_parts(name: str, seed: int) -> None:
    """Units of half of the groups, so that what one group's cut spoils is not hidden by another's."""
    model, feeds = graphs.zoo_graph(name, seed)
    check_exact(model, seeds=[seed], ratios=[0.3], feeds=feeds, every_group=False, name=name)


@pytest.mark.parametrize("name", graphs.model_names())
def test_models(name: str, seed: int) -> None:
    model, feeds = graphs.model(name, seed)
    assert check_exact(model, seeds=[seed, seed + 1], feeds=feeds, name=name)
