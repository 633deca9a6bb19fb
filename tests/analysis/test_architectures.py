"""Every classic family, as raw exports look: what is found in each, and that cutting it is exact."""

from __future__ import annotations

import secrets
from functools import cache

import numpy as np
import pytest

from tests.analysis import architectures
from tests.analysis.exactness import RATIOS, Subject, check_each_unit, check_exact, outputs

NAMES = list(architectures.ALL)


@cache
def subject(name: str) -> Subject:
    return Subject(architectures.ALL[name].build(), name, architectures.SIZES)


def test_there_are_enough() -> None:
    assert len(NAMES) >= 40


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_silently_pinned(name: str) -> None:
    net, analysis = architectures.ALL[name], subject(name).analysis
    held = sorted(analysis.pins, key=lambda pin: -pin.params)[:5]
    words = [f"{pin.tensor}[{pin.axis}] {pin.op}: {pin.reason} ({pin.params})" for pin in held]
    assert len(analysis.groups) >= net.groups, words
    assert analysis.prunable >= net.share * analysis.params, words


@pytest.mark.parametrize("place, name", list(enumerate(NAMES)))
def test_cut_equals_masked(place: int, name: str) -> None:
    """Two ratios each; the slow test has all of them."""
    ratios = [RATIOS[place % len(RATIOS)], RATIOS[(place + 2) % len(RATIOS)]]
    check_exact(subject(name), seeds=[place], ratios=ratios)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_cut_equals_masked_with_new_seeds(name: str) -> None:
    """Other units in every run; a failure tells the seed."""
    seed = secrets.randbelow(1 << 30)
    print(f"seed {seed}")
    check_exact(subject(name), seeds=[seed, seed + 1])
    check_exact(subject(name), seeds=[seed + 2], every_group=False)
    check_each_unit(subject(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_net_computes_something(name: str) -> None:
    """Finite outputs that depend on the input: otherwise exactness would show nothing."""
    for value in outputs(subject(name).model, subject(name).example(0)).values():
        assert np.isfinite(value).all()
        assert np.ptp(value) > 1e-3
