"""Wanda is the exact loss of zeroing weights that read uncorrelated inputs; DaSS scales outputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_compiler.criteria import dass, magnitude, wanda


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_sums_to_the_loss_of_zeroing_when_inputs_are_uncorrelated(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, k)).astype(np.float32)
    inputs = np.linalg.qr(rng.normal(size=(k + 5, k)))[0] * rng.uniform(0.1, 10, k)
    gone = rng.random((n, k)) < 0.5
    loss = np.square(inputs @ np.where(gone, weight, 0).astype(np.float64).T).mean(axis=0).sum()
    norms = np.sqrt(np.square(inputs).mean(axis=0))
    np.testing.assert_allclose(wanda(weight, norms)[gone].sum(), loss, rtol=1e-9, atol=1e-12)


def test_ranks_as_the_paper_does_within_an_output() -> None:
    rng = np.random.default_rng(1)
    weight, norms = rng.normal(size=(5, 40)).astype(np.float16), rng.uniform(0, 3, 40)
    paper = np.abs(weight.astype(np.float64)) * norms
    np.testing.assert_array_equal(np.argsort(wanda(weight, norms), axis=1), np.argsort(paper, axis=1))
    assert wanda(weight, norms).dtype == np.float64


def test_a_silent_input_does_not_matter() -> None:
    scores = wanda(np.array([[100.0, 1e-3]]), np.array([0.0, 1.0]))
    assert scores[0, 0] == 0 < scores[0, 1]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dass_follows_its_formula(alpha: float) -> None:
    rng = np.random.default_rng(2)
    weight, norms = rng.normal(size=(7, 4)).astype(np.float32), rng.uniform(0.1, 3, 7)
    root = np.abs(weight.astype(np.float64)) * norms[:, None] ** alpha
    np.testing.assert_allclose(dass(weight, norms, alpha), root**2, rtol=1e-12)


def test_dass_is_magnitude_within_an_output_and_not_across() -> None:
    weight = np.array([[1.0, 3.0, 2.0], [1.5, 1.0, 2.5]])
    scores = dass(weight, np.array([100.0, 1.0]))
    np.testing.assert_array_equal(np.argsort(scores, axis=1), np.argsort(magnitude(weight), axis=1))
    assert scores[0].min() > scores[1].max()
