"""Proportional and ECoFLaP: kept weights in proportion to scores, above a floor, at most all of them."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.solvers.allocation import ecoflap, proportional
from spa_compiler.solvers.allocation.ecoflap import gradient_norms


def test_density_above_the_floor_is_in_proportion() -> None:
    density = 1 - proportional([1, 2, 4], [100, 200, 300], 0.7, max_sparsity=0.9)
    above = density - 0.1
    np.testing.assert_allclose(above / above[0], [1, 2, 4], rtol=1e-12)


def test_a_factor_changes_nothing_and_power_0_is_uniform() -> None:
    scores, sizes = np.array([1.0, 5.0, 2.0]), [100, 200, 300]
    np.testing.assert_allclose(proportional(1e200 * scores, sizes, 0.6), proportional(scores, sizes, 0.6))
    np.testing.assert_allclose(proportional(scores, sizes, 0.6, power=0), 0.6)
    spread = [np.ptp(proportional(scores, sizes, 0.6, power=power)) for power in (0.5, 1, 2)]
    assert spread == sorted(spread)


def test_no_scores_at_all_are_uniform() -> None:
    np.testing.assert_allclose(proportional([0, 0], [10, 30], 0.5), 0.5)


def test_overflow_goes_to_the_others_in_proportion() -> None:
    # The first would keep more than all of its 10; the others share what is left of 50 in the ratio 1 : 3.
    share = proportional([100, 1, 3], [10, 40, 40], 0.5, max_sparsity=0.9)
    assert share[0] == 0
    above = 45 - 10 - 0.1 * 80
    np.testing.assert_allclose(1 - share[1:], [0.1 + above / 4 / 40, 0.1 + 3 * above / 4 / 40], rtol=1e-12)


def test_gradient_norms_of_a_linear_loss() -> None:
    """L = sum_l g_l . w_l: the difference is 2 eps (g_l . z), whose mean magnitude is sqrt(2 / pi) |g_l|."""
    gradients = [np.array([3.0, 4.0]), np.array([0.0, 1.0, 0.0]), np.zeros(4)]
    eps = 0.1

    def loss(layer: int, direction: int, seed: int) -> float:
        z = np.random.default_rng([seed, layer]).normal(size=gradients[layer].size)
        return 7 + direction * eps * float(gradients[layer] @ z)

    norms = gradient_norms(loss, 3, seeds=range(4000), eps=eps)
    np.testing.assert_allclose(norms, np.sqrt(2 / np.pi) * np.array([5, 1, 0]), rtol=0.05)


def test_ecoflap_divides_kept_weights_not_densities() -> None:
    scores = [1.0, 2.0, 3.0]
    sizes = np.array([100, 300, 200])
    share = ecoflap(lambda layer, direction, seed: direction * scores[layer], sizes, 0.8, seeds=[5], max_sparsity=0.95)
    above = (1 - share) * sizes - 0.05 * sizes
    np.testing.assert_allclose(above / above[0], scores, rtol=1e-12)


def test_ecoflap_does_not_depend_on_the_unit_of_eps() -> None:
    def loss(layer: int, direction: int, seed: int) -> float:
        return float(direction * np.random.default_rng([layer, seed]).random())

    np.testing.assert_allclose(
        ecoflap(loss, [10, 20, 30], 0.5, seeds=[1, 2], eps=1e-3), ecoflap(loss, [10, 20, 30], 0.5, seeds=[1, 2], eps=2)
    )


def test_losses_that_are_not_finite_and_no_draws_are_errors() -> None:
    with pytest.raises(ValueError, match="layer 1"):
        gradient_norms(lambda layer, direction, seed: float("nan") if layer else 0.0, 2, seeds=[0])
    with pytest.raises(ValueError, match="at least one draw"):
        gradient_norms(lambda layer, direction, seed: 0.0, 2, seeds=[])
