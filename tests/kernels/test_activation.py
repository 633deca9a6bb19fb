"""Activations as the epilogue emits them, against float64: a dense grid, the far ends, NaN and the infinities."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels import activation, rx1
from tests.kernel_harness import run_packed, rx1_names

pytestmark = pytest.mark.usefixtures("level")

# (rows, lanes) that give every register width: rows alone for one lane
SHAPES = {(1, 1): 1, (4, 1): 4, (8, 1): 8, (1, 4): 4, (4, 8): 8, (1, 48): 16, (4, 16): 16}
NAMES = rx1_names(dict.fromkeys(SHAPES, activation.NAMES))
SMOOTH = ("gelu_erf", "gelu_tanh", "silu")
FAR = np.array([20, 88, 100, 127, 1e3, 1e4, 1e10, 1e19, 1e30, 3e38], np.float32)


def apply(x: np.ndarray, act: str, shape: tuple[int, int], low: float = 0.0, high: float = 0.0) -> np.ndarray:
    """`act` of every element of `x`: a weight without entries, with `x` as the residual."""
    rows, lanes = shape
    width = lanes * rows if lanes == 1 else lanes
    count = -(-len(x) // width) * width
    padded = np.resize(x, count).astype(np.float32).reshape(-1, lanes)
    packed = rx1.pack(np.zeros((len(padded), 1), np.float32), None, rows)
    return run_packed(NAMES, packed, np.zeros((1, lanes), np.float32), act, low, high, padded).ravel()[: len(x)]


def reference(x: np.ndarray, act: str, low: float = 0.0, high: float = 0.0) -> np.ndarray:
    with np.errstate(all="ignore"):
        return activation.reference(x.astype(np.float64), act, low, high)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", SMOOTH)
def test_smooth_activations_on_a_dense_grid(act: str, shape: tuple[int, int]) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20_001), np.linspace(-1, 1, 4_001) * 1e-3]).astype(np.float32)
    error = np.abs(apply(x, act, shape) - reference(x, act)) / np.maximum(1, np.abs(x))
    assert error.max() < 1e-6, f"{act} is off by {error.max():.2g} at {x[error.argmax()]}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", SMOOTH)
def test_smooth_activations_far_out(act: str, shape: tuple[int, int]) -> None:
    assert apply(FAR, act, shape) == pytest.approx(FAR, rel=1e-6)
    left = apply(np.append(-FAR, -np.inf), act, shape)
    assert np.abs(left).max() < 1e-6, f"{act} to the left: {left}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", SMOOTH)
def test_smooth_activations_keep_zero_and_nan(act: str, shape: tuple[int, int]) -> None:
    assert apply(np.zeros(9), act, shape).tolist() == [0.0] * 9
    got = apply(np.array([np.nan, 1.0, np.inf], np.float32), act, shape)
    assert np.isnan(got[0])
    assert np.isfinite(got[1])
    assert got[2] == np.inf


@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoid(shape: tuple[int, int]) -> None:
    x = np.concatenate([np.linspace(-30, 30, 20_001), FAR, -FAR, [np.inf, -np.inf]]).astype(np.float32)
    assert np.abs(apply(x, "sigmoid", shape) - reference(x, "sigmoid")).max() < 1e-6
    assert np.isnan(apply(np.array([np.nan], np.float32), "sigmoid", shape)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "act, low, high",
    [("hard_swish", 0, 0), ("hard_sigmoid", 0.2, 0.5), ("hard_sigmoid", 0.5, -0.25), ("leaky_relu", 0.01, 0)],
)
def test_activations_of_straight_lines(act: str, low: float, high: float, shape: tuple[int, int]) -> None:
    x = np.concatenate([np.linspace(-9, 9, 2001), FAR[:-1], -FAR[:-1], [np.nan, 0.0]]).astype(np.float32)
    got, want = apply(x, act, shape, low, high), reference(x, act, low, high)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "act, low, high",
    [("relu", 0, 0), ("clip", 0.0, 6.0), ("clip", -1.5, 2.25), ("clip", -3.4028235e38, 1.0), ("none", 0, 0)],
)
def test_exact_activations_are_exact_and_keep_nan(act: str, low: float, high: float, shape: tuple[int, int]) -> None:
    x = np.concatenate([np.linspace(-9, 9, 501), FAR, -FAR, [np.inf, -np.inf, np.nan, -0.0]]).astype(np.float32)
    got, want = apply(x, act, shape, low, high), reference(x, act, low, high).astype(np.float32)
    np.testing.assert_array_equal(got, want)


def test_references_at_known_points() -> None:
    x = np.array([-1.0, 0.0, 2.0])
    assert reference(x, "gelu_erf") == pytest.approx([-0.15865525, 0, 1.95449974])
    assert reference(x, "gelu_tanh") == pytest.approx([-0.15880801, 0, 1.95459769])
    assert reference(x, "silu") == pytest.approx([-0.26894142, 0, 1.76159416])
    assert reference(x, "clip", -0.5, 1.0).tolist() == [-0.5, 0, 1]
