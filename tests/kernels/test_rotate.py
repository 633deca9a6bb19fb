"""Rotary positions against float64 and against complex numbers, with every tail, in place."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import panel, rotate
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")


def run(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, slack: int = 0) -> np.ndarray:
    out, canaries = output(x.shape, slack)
    call((rotate.NAME,), rotate.NAME, *(guarded(a, slack) for a in (x, cos, sin)), out, x.size // 2)
    assert_untouched(canaries)
    return np.array(out)


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("depth", [2, 6, 8, 64, 80])
@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_it_computes_what_the_reference_computes(lanes: int, depth: int, slack: int) -> None:
    rng = np.random.default_rng(depth)
    x, cos, sin = rng.standard_normal((3, depth, lanes)).astype(np.float32)
    got = run(x, cos, sin, slack)
    assert np.abs(got - rotate.reference(x, cos, sin)).max() <= 2e-6 * np.abs(x).max() * 4
    there = guarded(x)
    call((rotate.NAME,), rotate.NAME, there, guarded(cos), guarded(sin), there, x.size // 2)
    np.testing.assert_array_equal(there, got)


def test_pairs_are_turned_by_their_angles() -> None:
    rng = np.random.default_rng(0)
    x, angle = rng.standard_normal((16, 4)).astype(np.float32), rng.standard_normal((8, 4))
    got = run(x, *(np.tile(f(angle), (2, 1)).astype(np.float32) for f in (np.cos, np.sin)))
    turned = (x[:8] + 1j * x[8:]) * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag]), atol=1e-6)
