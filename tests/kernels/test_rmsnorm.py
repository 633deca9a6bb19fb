"""RMS normalization of a panel against float64: one lane and several, tails of features, in place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import panel, rmsnorm
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

NAMES = tuple(rmsnorm.name(lanes) for lanes in panel.LANE_COUNTS)
NO_BETA = np.zeros(0, np.float32)


def run(x: np.ndarray, gamma: np.ndarray, epsilon: float, slack: int = 0) -> np.ndarray:
    out, canaries = output(x.shape, slack)
    arrays = [guarded(a, slack) for a in (x, gamma)]
    call(NAMES, rmsnorm.name(x.shape[1]), *arrays, NO_BETA, out, x.shape[0], epsilon)
    assert_untouched(canaries)
    return np.array(out)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(panel.LANE_COUNTS),
    st.integers(1, 200),
    st.sampled_from([0.0, 1e-12, 1e-5, 1e-3, 1.0]),
    st.sampled_from([0.0, 3.0, -100.0]),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_it_computes_what_the_reference_computes(
    lanes: int, features: int, epsilon: float, mean: float, slack: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((features, lanes)) * rng.choice([0.1, 1, 10]) + mean).astype(np.float32)
    gamma = rng.standard_normal(features).astype(np.float32)
    want = rmsnorm.reference(x, gamma, epsilon)
    assert (np.abs(run(x, gamma, epsilon, slack) - want) <= 2e-6 * np.abs(want) + 1e-30).all()


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
@pytest.mark.parametrize("features", [1, 2, 383, 768])
def test_it_works_in_place(lanes: int, features: int) -> None:
    rng = np.random.default_rng(features)
    x = rng.standard_normal((features, lanes)).astype(np.float32)
    gamma = rng.standard_normal(features).astype(np.float32)
    there = guarded(x)
    call(NAMES, rmsnorm.name(lanes), there, guarded(gamma), NO_BETA, there, features, 1e-5)
    assert (there == run(x, gamma, 1e-5)).all()


@pytest.mark.parametrize("lanes", [1, 4, 64])
def test_tokens_do_not_touch_one_another_and_nan_stays_nan(lanes: int) -> None:
    x = np.random.default_rng(0).standard_normal((30, lanes)).astype(np.float32)
    one = np.ones(30, np.float32)
    clean = run(x, one, 1e-5)
    x[7, -1] = np.nan
    got = run(x, one, 1e-5)
    assert np.isnan(got[:, -1]).all()
    assert (got[:, :-1] == clean[:, :-1]).all()


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_a_token_of_zeros_stays_zero(lanes: int) -> None:
    assert (run(np.zeros((40, lanes), np.float32), np.ones(40, np.float32), 1e-6) == 0).all()
