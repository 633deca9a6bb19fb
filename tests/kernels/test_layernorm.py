"""LayerNormalization of a panel against float64: odd and even features, large means, in place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import layernorm, panel
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

NAMES = tuple(layernorm.name(lanes) for lanes in panel.LANE_COUNTS)


def run(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float, slack: int = 0) -> np.ndarray:
    out, canaries = output(x.shape, slack)
    arrays = [guarded(a, slack) for a in (x, gamma, beta)]
    call(NAMES, layernorm.name(x.shape[1]), *arrays, out, x.shape[0], epsilon)
    assert_untouched(canaries)
    return np.array(out)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(panel.LANE_COUNTS),
    st.integers(1, 90),
    st.sampled_from([1e-12, 1e-5, 1e-3, 1.0]),
    st.sampled_from([0.0, 3.0, -100.0]),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_it_computes_what_the_reference_computes(
    lanes: int, features: int, epsilon: float, mean: float, slack: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((features, lanes)) * rng.choice([0.1, 1, 10]) + mean).astype(np.float32)
    gamma, beta = rng.standard_normal((2, features)).astype(np.float32)
    want = layernorm.reference(x, gamma, beta, epsilon)
    # what a float32 mean can be off by, over the deviation it is divided by
    scale = np.abs(x).max() / np.sqrt(x.astype(np.float64).var(axis=0) + epsilon).min() + np.sqrt(features)
    assert np.abs(run(x, gamma, beta, epsilon, slack) - want).max() <= 1e-6 * scale * np.abs(gamma).max() + 1e-6


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
@pytest.mark.parametrize("features", [1, 2, 383, 768])
def test_it_works_in_place(lanes: int, features: int) -> None:
    rng = np.random.default_rng(features)
    x = rng.standard_normal((features, lanes)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, features)).astype(np.float32)
    there = guarded(x)
    call(NAMES, layernorm.name(lanes), there, guarded(gamma), guarded(beta), there, features, 1e-5)
    assert (there == run(x, gamma, beta, 1e-5)).all()


@pytest.mark.parametrize("lanes", [1, 64])
def test_tokens_do_not_touch_one_another_and_nan_stays_nan(lanes: int) -> None:
    x = np.random.default_rng(0).standard_normal((30, lanes)).astype(np.float32)
    one = np.ones(30, np.float32)
    clean = run(x, one, one, 1e-5)
    x[7, -1] = np.nan
    got = run(x, one, one, 1e-5)
    assert np.isnan(got[:, -1]).all()
    assert (got[:, :-1] == clean[:, :-1]).all()


def test_a_constant_token_gives_beta() -> None:
    beta = np.arange(12, dtype=np.float32)
    got = run(np.full((12, 16), 2.5, np.float32), np.ones(12, np.float32), beta, 1e-5)
    assert (got == beta[:, None]).all()
