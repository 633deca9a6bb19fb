"""Sliced kernels against numpy: shapes that fit nothing, empty rows, every lane count, mode and activation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation, panel, sliced
from tests.kernel_harness import assert_close, run_packed, sparse

pytestmark = pytest.mark.usefixtures("level")

ACTS = {lanes: activation.NAMES if lanes in (1, 48) else ("none", "relu") for lanes in panel.LANE_COUNTS}
NAMES = tuple(sliced.name(lanes, act) for lanes, acts in ACTS.items() for act in acts)


def magnitude(packed: sliced.Packed, tile: np.ndarray) -> float:
    """The largest sum of absolute products: rounding errors grow with it."""
    return float((np.abs(sliced.unpack(packed)) @ np.abs(tile) + np.abs(packed.bias[: packed.n, None])).max() + 4)


@st.composite
def weights(draw: st.DrawFn) -> sliced.Packed:
    """A packed weight: small chunks and blocks, so that there are several, the last ones short."""
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = sparse(rng, n, k, 1, draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])))
    if draw(st.booleans()):
        weight[rng.random(n) < 0.5] = 0  # rows without entries
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    chunk, k_block = draw(st.sampled_from([None, 16, 32])), draw(st.sampled_from([None, 1, 16, 64, 200]))
    return sliced.pack(weight, bias, chunk, k_block)


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from(panel.LANE_COUNTS), st.booleans(), st.data())
def test_a_kernel_computes_what_the_reference_computes(
    packed: sliced.Packed, lanes: int, has_residual: bool, data: st.DataObject
) -> None:
    act = data.draw(st.sampled_from(ACTS[lanes]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    tile = rng.standard_normal((packed.k, lanes)).astype(np.float32)
    residual = rng.standard_normal((packed.n, lanes)).astype(np.float32) if has_residual else None
    got = run_packed(NAMES, packed, tile, act, -0.75, 0.5, residual, slack=data.draw(st.integers(0, 3), "slack"))
    assert_close(got, sliced.reference(tile, packed, residual, act, -0.75, 0.5), magnitude(packed, tile))


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_many_chunks_and_blocks_with_the_default_blocking(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    packed = sliced.pack(sparse(rng, 531, 1100, 1, 0.05), rng.standard_normal(531).astype(np.float32))
    assert packed.chunk < packed.n
    assert packed.k_block < packed.k
    tile = rng.standard_normal((1100, lanes)).astype(np.float32)
    assert_close(run_packed(NAMES, packed, tile), sliced.reference(tile, packed), magnitude(packed, tile))


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_a_weight_of_zeros_gives_the_bias_exactly(lanes: int) -> None:
    bias = np.arange(1, 24, dtype=np.float32)
    packed = sliced.pack(np.zeros((23, 40), np.float32), bias, k_block=16)
    assert packed.values.size == 0
    got = run_packed(NAMES, packed, np.full((40, lanes), 1e30, np.float32))
    np.testing.assert_array_equal(got, np.repeat(bias[:, None], lanes, 1))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_unpack_undoes_pack(packed: sliced.Packed) -> None:
    dense = sliced.unpack(packed)
    again = sliced.pack(dense, packed.bias[: packed.n], packed.chunk, packed.k_block)
    for one, other in zip(packed.arrays.values(), again.arrays.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pack_keeps_every_bit_and_pads_next_to_nothing() -> None:
    weight = sparse(np.random.default_rng(3), 512, 768, 1, 0.1)
    packed = sliced.pack(weight, None)
    np.testing.assert_array_equal(sliced.unpack(packed), weight)
    assert packed.values.size == sliced.Slices().stored(weight) < 1.03 * np.count_nonzero(weight)


def test_the_last_column_of_a_block_fits_its_index() -> None:
    weight = np.zeros((2, 65536), np.float32)
    weight[1, -1] = 3.0
    packed = sliced.pack(weight, None, k_block=65536)
    assert packed.columns.max() == 65535
    tile = np.zeros((65536, 1), np.float32)
    tile[-1] = 2.0
    np.testing.assert_array_equal(run_packed(NAMES, packed, tile), [[0.0], [6.0]])
