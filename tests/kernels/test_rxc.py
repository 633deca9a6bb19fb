"""R x C kernels against numpy: shapes that fit nothing, empty rows, every lane count, mode and activation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation, panel, rxc
from spa_compiler.kernels.vector import ISAS
from tests.kernel_harness import assert_close, run_packed, sparse

pytestmark = pytest.mark.usefixtures("level")

BLOCKS = ((1, 2), (2, 4), (4, 4), (8, 2), (8, 4))
# 4 x 4 with everything, the others with a sample
ACTS = {
    (block, lanes): activation.NAMES if block == (4, 4) and lanes in (1, 48) else ("none",)
    for block in BLOCKS
    for lanes in (panel.LANE_COUNTS if block == (4, 4) else (1, 8, 64))
}
NAMES = tuple(rxc.name(*block, lanes, act) for (block, lanes), acts in ACTS.items() for act in acts)


def magnitude(packed: rxc.Packed, tile: np.ndarray) -> float:
    """The largest sum of absolute products: rounding errors grow with it."""
    return float((np.abs(rxc.unpack(packed)) @ np.abs(tile) + np.abs(packed.bias[: packed.n, None])).max() + 4)


@st.composite
def weights(draw: st.DrawFn) -> rxc.Packed:
    """A packed weight: small chunks and blocks, so that there are several, the last ones short."""
    r, c = draw(st.sampled_from(BLOCKS))
    n, k = draw(st.integers(1, 70)), c * draw(st.integers(1, 90 // c))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = sparse(rng, n, k, r, draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])), c)
    if draw(st.booleans()):
        weight[rng.random(n) < 0.5] = 0  # rows without entries
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    chunk, k_block = draw(st.sampled_from([None, 8, 16, 32])), draw(st.sampled_from([None, 4, 16, 32, 64, 200]))
    return rxc.pack(weight, bias, r, c, chunk, k_block)


@settings(max_examples=200, deadline=None)
@given(weights(), st.booleans(), st.data())
def test_a_kernel_computes_what_the_reference_computes(
    packed: rxc.Packed, has_residual: bool, data: st.DataObject
) -> None:
    block = packed.rows, packed.cols
    lanes = data.draw(st.sampled_from([lanes for own, lanes in ACTS if own == block]), "lanes")
    act = data.draw(st.sampled_from(ACTS[block, lanes]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    tile = rng.standard_normal((packed.k, lanes)).astype(np.float32)
    residual = rng.standard_normal((packed.n, lanes)).astype(np.float32) if has_residual else None
    got = run_packed(NAMES, packed, tile, act, -0.75, 0.5, residual, slack=data.draw(st.integers(0, 3), "slack"))
    assert_close(got, rxc.reference(tile, packed, residual, act, -0.75, 0.5), magnitude(packed, tile))


@pytest.mark.parametrize("block, lanes", ACTS)
def test_many_chunks_and_blocks_with_the_default_blocking(block: tuple[int, int], lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    packed = rxc.pack(sparse(rng, 531, 1100, block[0], 0.05, block[1]), rng.standard_normal(531).astype("f4"), *block)
    assert packed.chunk < packed.n
    assert packed.k_block < packed.k
    tile = rng.standard_normal((1100, lanes)).astype(np.float32)
    assert_close(run_packed(NAMES, packed, tile), rxc.reference(tile, packed), magnitude(packed, tile))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_a_weight_of_zeros_gives_the_bias_exactly(block: tuple[int, int], lanes: int) -> None:
    bias = np.arange(1, 24, dtype=np.float32)
    packed = rxc.pack(np.zeros((23, 40), np.float32), bias, *block, k_block=16)
    assert packed.values.size == 0
    got = run_packed(NAMES, packed, np.full((40, lanes), 1e30, np.float32))
    np.testing.assert_array_equal(got, np.repeat(bias[:, None], lanes, 1))


@pytest.mark.parametrize("lanes", [4, 16, 64])
def test_tokens_do_not_touch_one_another(lanes: int) -> None:
    rng = np.random.default_rng(0)
    packed = rxc.pack(sparse(rng, 20, 36, 4, 0.5, 4), None, 4, 4)
    tile = rng.standard_normal((36, lanes)).astype(np.float32)
    clean = run_packed(NAMES, packed, tile)
    tile[:, -1] = np.nan
    dirty = run_packed(NAMES, packed, tile)
    np.testing.assert_array_equal(dirty[:, :-1], clean[:, :-1])
    assert np.isnan(dirty[:, -1]).all()


def test_columns_outside_of_blocks_are_not_read() -> None:
    """What lies in pruned columns may be anything, with one token too, where a register meets several columns."""
    weight = np.zeros((8, 16), np.float32)
    weight[:, 4:8] = 1
    packed = rxc.pack(weight, None, 4, 4)
    for lanes in (1, 16):
        tile = np.full((16, lanes), np.nan, np.float32)
        tile[4:8] = 1
        np.testing.assert_array_equal(run_packed(NAMES, packed, tile), np.full((8, lanes), 4, np.float32))


@settings(max_examples=100, deadline=None)
@given(weights())
def test_unpack_undoes_pack(packed: rxc.Packed) -> None:
    dense = rxc.unpack(packed)
    again = rxc.pack(dense, packed.bias[: packed.n], packed.rows, packed.cols, packed.chunk, packed.k_block)
    for one, other in zip(packed.arrays.values(), again.arrays.values(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 15), st.sampled_from(BLOCKS), st.integers(0, 2**32))
def test_pack_keeps_every_bit_of_a_weight(n: int, k: int, block: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = sparse(rng, n, 4 * k, 1, 0.2) + np.float32(0)  # zeros that come in no blocks, none of them -0
    weight[rng.random(weight.shape) < 0.1] = np.float32(1e-42)  # a denormal is not a zero
    packed = rxc.pack(weight, None, *block, k_block=16)
    np.testing.assert_array_equal(rxc.unpack(packed).view(np.uint32), weight.view(np.uint32))
    assert rxc.Rectangles(*block).stored(weight) == packed.values.size


@pytest.mark.parametrize("k, chunk, k_block", [(42, None, None), (40, 18, None), (40, None, 10)])
def test_blocks_are_never_cut(k: int, chunk: int | None, k_block: int | None) -> None:
    with pytest.raises(ValueError, match="cut"):
        rxc.pack(np.ones((40, k), np.float32), None, 4, 4, chunk, k_block)


def test_the_last_block_of_columns_fits_its_index() -> None:
    weight = np.zeros((4, 65536), np.float32)
    weight[:, -1] = 3.0
    packed = rxc.pack(weight, None, 4, 4, k_block=65536)
    assert packed.columns.tolist() == [65532]
    tile = np.zeros((65536, 1), np.float32)
    tile[-1] = 2.0
    np.testing.assert_array_equal(run_packed(NAMES, packed, tile), np.full((4, 1), 6.0, np.float32))


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_sums_that_are_kept_at_once_fit_the_registers(isa: object) -> None:
    for rows, lanes in itertools.product((1, 2, 4, 8), panel.LANE_COUNTS[1:]):
        width, q, v = rxc.tile_of(rows, lanes, isa)  # type: ignore[arg-type]
        assert rows % q == lanes % (v * width) == 0
        assert q * v < 32


def test_few_lanes_have_no_window() -> None:
    with pytest.raises(ValueError, match="8 lanes"):
        rxc.kernel(4, 4, 8, "none", window=True)
