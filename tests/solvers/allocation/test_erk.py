"""Erdos-Renyi-Kernel densities against the formula by hand."""

from __future__ import annotations

import numpy as np

from spa_compiler.solvers.allocation import erk


def test_densities_are_in_the_ratios_of_the_formula() -> None:
    shapes = [(64, 32, 3, 3), (128, 64), (256, 128, 1, 1)]
    density = 1 - erk(shapes, 0.9, max_sparsity=1.0)
    raw = np.array([(64 + 32 + 6) / (64 * 32 * 9), (128 + 64) / (128 * 64), (256 + 128 + 2) / (256 * 128)])
    np.testing.assert_allclose(density / density[0], raw / raw[0], rtol=1e-12)


def test_a_full_layer_gives_the_rest_to_the_others_in_proportion() -> None:
    shapes = [(10, 2), (100, 100), (200, 100)]
    density = 1 - erk(shapes, 0.5, max_sparsity=1.0)
    assert density[0] == 1
    raw = [200 / 10_000, 300 / 20_000]
    scale = (0.5 * 30_020 - 20) / (raw[0] * 10_000 + raw[1] * 20_000)
    np.testing.assert_allclose(density[1:], [scale * raw[0], scale * raw[1]], rtol=1e-12)
