"""Permuted kernels against numpy: windows that are full, short and empty, every mode and activation, all levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation, panel, permuted, sliced
from tests.kernel_harness import assert_close, run_packed, sparse

pytestmark = pytest.mark.usefixtures("level")

#: a window and less, exactly one, one with a single register, several with the last one short
COLUMNS = (7, 32, 45, 90)
DEPTHS = (1, 2, 5)
ONE = tuple(permuted.name(d, k, act) for d in DEPTHS for k in COLUMNS for act in ("none", "relu"))
MANY = tuple(sliced.name(lanes, "none") for lanes in panel.LANE_COUNTS[1:])
NAMES = (*ONE, *MANY, *(permuted.name(2, 45, act) for act in activation.NAMES if act not in ("none", "relu")))


def magnitude(packed: sliced.Packed, tile: np.ndarray) -> float:
    """The largest sum of absolute products: rounding errors grow with it."""
    return float((np.abs(sliced.unpack(packed)) @ np.abs(tile) + np.abs(packed.bias[: packed.n, None])).max() + 4)


def run(packed: permuted.Packed, tile: np.ndarray, *arguments: object, slack: int = 0) -> np.ndarray:
    """On a panel as the C side has it: whole sixteens of features, behind the last one whatever was there."""
    behind = np.full((-packed.k % 16, tile.shape[1]), np.nan, np.float32)
    return run_packed(NAMES, packed, np.concatenate([tile, behind]), *arguments, slack=slack)  # type: ignore[arg-type]


@st.composite
def weights(draw: st.DrawFn) -> permuted.Packed:
    n, k = draw(st.integers(1, 70)), draw(st.sampled_from(COLUMNS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = sparse(rng, n, k, 1, draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])))
    if draw(st.booleans()):
        weight[rng.random(n) < 0.5] = 0  # rows without entries
    if draw(st.booleans()):
        weight[:, rng.random(k) < 0.5] = 0
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    return permuted.pack(weight, bias, draw(st.sampled_from(DEPTHS)))


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from(("none", "relu")), st.booleans(), st.integers(0, 3), st.integers(0, 2**32))
def test_one_token(packed: permuted.Packed, act: str, has_residual: bool, slack: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tile = rng.standard_normal((packed.k, 1)).astype(np.float32)
    residual = rng.standard_normal((packed.n, 1)).astype(np.float32) if has_residual else None
    got = run(packed, tile, act, -0.75, 0.5, residual, slack=slack)
    assert_close(got, sliced.reference(tile, packed, residual, act, -0.75, 0.5), magnitude(packed, tile))


@pytest.mark.parametrize("act", activation.NAMES)
def test_every_activation(act: str) -> None:
    rng = np.random.default_rng(5)
    packed = permuted.pack(sparse(rng, 40, 45, 1, 0.2), rng.standard_normal(40).astype(np.float32), 2)
    tile = rng.standard_normal((45, 1)).astype(np.float32)
    got = run(packed, tile, act, -0.75, 0.5)
    assert_close(got, sliced.reference(tile, packed, None, act, -0.75, 0.5), magnitude(packed, tile))


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from(panel.LANE_COUNTS[1:]))
def test_more_tokens_read_the_same_arrays(packed: permuted.Packed, lanes: int) -> None:
    tile = np.random.default_rng(lanes).standard_normal((packed.k, lanes)).astype(np.float32)
    got = run(packed, tile)
    assert_close(got, sliced.reference(tile, packed), magnitude(packed, tile))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_pack_is_exact_and_slots_lie_in_their_windows(packed: permuted.Packed) -> None:
    again = permuted.pack(sliced.unpack(packed), packed.bias[: packed.n], packed.depth)
    for one, other in zip(packed.arrays.values(), again.arrays.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    fixed = packed.form.info["least_slots"]
    assert fixed == packed.depth * -(-packed.k // permuted.WINDOW)
    assert (np.diff(packed.indptr) >= fixed).all()
    assert (packed.columns < packed.k).all()
    for begin in packed.indptr[:-1]:
        window = packed.columns[begin : begin + fixed] // permuted.WINDOW
        np.testing.assert_array_equal(
            window, np.repeat(np.arange(fixed // packed.depth), packed.depth)[:, None] + 0 * window
        )


def test_pack_keeps_every_bit_and_says_what_it_stores() -> None:
    weight = sparse(np.random.default_rng(3), 3072, 768, 1, 0.1)
    packed = permuted.Permuted().pack(weight)
    np.testing.assert_array_equal(sliced.unpack(packed), weight)
    assert packed.values.size == permuted.Permuted().stored(weight) < 1.5 * np.count_nonzero(weight)
    assert packed.form == permuted.Permuted(packed.depth, packed.chunk, 768)
    assert packed.form.pack(weight).form == packed.form.cut(16, 32) == packed.form


def test_layers_that_are_alike_get_one_depth_and_denser_ones_a_greater_one() -> None:
    rng = np.random.default_rng(0)
    alike = {permuted.pack(sparse(rng, 512, 768, 1, 0.1), None).depth for _ in range(4)}
    assert len(alike) == 1
    depths = [permuted.depth_of(density, 768) for density in (0.01, 0.1, 0.2, 0.5, 1.0)]
    assert depths == sorted(set(depths))
    assert depths[-1] == permuted.MOST_SLOTS


def test_a_form_that_was_not_packed_has_no_kernel() -> None:
    with pytest.raises(ValueError, match="packed"):
        permuted.Permuted().kernel(1, "none", window=False)
