"""R x 1 kernels against numpy: shapes that fit nothing, empty rows, every lane count, mode and activation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation, panel, rx1
from tests.kernel_harness import assert_close, run_packed, rx1_names, sparse

pytestmark = pytest.mark.usefixtures("level")

ROWS = (*rx1.BLOCK_ROWS, *rx1.PRUNED_ROWS)
# R = 4 with everything, the others with a sample
ACTS = {
    (rows, lanes): activation.NAMES if rows == 4 or lanes in (1, 48) else ("none",)
    for rows in rx1.BLOCK_ROWS
    for lanes in panel.LANE_COUNTS
}
ACTS |= {
    (rows, lanes): ("none", "silu") if lanes == 1 else ("none",)
    for rows in rx1.PRUNED_ROWS
    for lanes in panel.LANE_COUNTS
}
NAMES = rx1_names(ACTS)


def magnitude(packed: rx1.Packed, tile: np.ndarray) -> float:
    """The largest sum of absolute products: rounding errors grow with it."""
    return float((np.abs(rx1.unpack(packed)) @ np.abs(tile) + np.abs(packed.bias[: packed.n, None])).max() + 4)


@st.composite
def weights(draw: st.DrawFn) -> rx1.Packed:
    """A packed weight: small chunks and blocks, so that there are several, the last ones short."""
    r = draw(st.sampled_from(ROWS))
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = sparse(rng, n, k, r, density)
    if draw(st.booleans()):
        weight[rng.random(n) < 0.5] = 0  # rows without entries
    chunk = draw(st.sampled_from([None, *(c for c in (8, 16, 32, 48) if c % r == 0)]))
    k_block = draw(st.sampled_from([None, 1, 16, 32, 64, 200]))
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    return rx1.pack(weight, bias, r, chunk, k_block)


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from(panel.LANE_COUNTS), st.booleans(), st.data())
def test_a_kernel_computes_what_the_reference_computes(
    packed: rx1.Packed, lanes: int, has_residual: bool, data: st.DataObject
) -> None:
    act = data.draw(st.sampled_from(ACTS[packed.rows, lanes]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    tile = rng.standard_normal((packed.k, lanes)).astype(np.float32)
    residual = rng.standard_normal((packed.n, lanes)).astype(np.float32) if has_residual else None
    got = run_packed(NAMES, packed, tile, act, -0.75, 0.5, residual, slack=data.draw(st.integers(0, 3), "slack"))
    assert_close(got, rx1.reference(tile, packed, residual, act, -0.75, 0.5), magnitude(packed, tile))


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
@pytest.mark.parametrize("rows", ROWS)
def test_many_chunks_and_blocks_with_the_default_blocking(rows: int, lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    packed = rx1.pack(sparse(rng, 531, 300, rows, 0.15), rng.standard_normal(531).astype(np.float32), rows)
    assert packed.chunk < 531
    tile = rng.standard_normal((300, lanes)).astype(np.float32)
    assert_close(run_packed(NAMES, packed, tile), rx1.reference(tile, packed), magnitude(packed, tile))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_a_weight_of_zeros_gives_the_bias_exactly(rows: int, lanes: int) -> None:
    bias = np.arange(1, 24, dtype=np.float32)
    packed = rx1.pack(np.zeros((23, 40), np.float32), bias, rows, k_block=16)
    assert packed.values.size == 0
    assert packed.fill == 1.0
    got = run_packed(NAMES, packed, np.full((40, lanes), 1e30, np.float32))
    assert (got == bias[:, None]).all()


@pytest.mark.parametrize("lanes", [1, 4, 16, 64])
def test_tokens_do_not_touch_one_another(lanes: int) -> None:
    rng = np.random.default_rng(0)
    packed = rx1.pack(sparse(rng, 20, 33, 4, 0.5), None, 4)
    tile = rng.standard_normal((33, lanes)).astype(np.float32)
    clean = run_packed(NAMES, packed, tile)
    tile[:, -1] = np.nan
    assert (run_packed(NAMES, packed, tile)[:, :-1] == clean[:, :-1]).all()
    assert np.isnan(run_packed(NAMES, packed, tile)[:, -1]).all()


@settings(max_examples=150, deadline=None)
@given(weights())
def test_unpack_undoes_pack(packed: rx1.Packed) -> None:
    dense = rx1.unpack(packed)
    again = rx1.pack(dense, packed.bias[: packed.n], packed.rows, packed.chunk, packed.k_block)
    assert dense.shape == (packed.n, packed.k)
    for one, other in zip(packed.arrays.values(), again.arrays.values(), strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from(ROWS), st.integers(0, 2**32))
def test_pack_keeps_every_bit_of_a_weight(n: int, k: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = sparse(rng, n, k, 1, 0.4) + np.float32(0)  # zeros that do not come in blocks of R, none of them -0
    weight[rng.random((n, k)) < 0.1] = np.float32(1e-42)  # a denormal is not a zero
    packed = rx1.pack(weight, None, rows, k_block=16)
    assert (rx1.unpack(packed).view(np.uint32) == weight.view(np.uint32)).all()
    assert rx1.stored_entries(weight, rows) == packed.values.size
    assert packed.values.size == 0 or packed.fill == pytest.approx(np.count_nonzero(weight) / packed.values.size)


def test_groups_of_a_tile_are_sorted_by_their_entries() -> None:
    rng = np.random.default_rng(3)
    packed = rx1.pack(sparse(rng, 64, 64, 1, 0.3), None, 1, chunk=32, k_block=16)
    counts = np.diff(packed.indptr).reshape(2, 4, 32)
    assert (np.diff(counts, axis=2) >= 0).all()
    assert (np.sort(packed.order.reshape(-1, 32), axis=1) == np.arange(32)).all()


def test_default_blocking_fits_the_format() -> None:
    for rows in ROWS:
        for n, k in ((1, 1), (5, 70000), (300, 128), (4096, 200000)):
            chunk, k_block = rx1.default_blocking(n, k, rows)
            assert chunk % rows == 0
            assert rows <= chunk <= rx1.MAX_CHUNK
            assert 1 <= k_block <= 65536, "columns are 16 bits"


def test_a_full_weight_is_cut_into_blocks_that_stay_in_l1() -> None:
    rng = np.random.default_rng(0)
    full = rng.standard_normal((64, 300)).astype(np.float32)
    for rows in ROWS:
        assert rx1.pack(full, None, rows).k_block == rx1.L1_COLUMNS
    holes = sparse(rng, 64, 300, 4, 0.5)
    assert [rx1.pack(holes, None, rows).k_block for rows in (1, 4)] == [rx1.L1_COLUMNS, 300]


@pytest.mark.parametrize("rows", ROWS)
def test_a_bias_of_its_own_is_what_packing_it_gives(rows: int) -> None:
    rng = np.random.default_rng(0)
    weight, bias = sparse(rng, 21, 30, rows, 0.5), rng.standard_normal(21).astype(np.float32)
    np.testing.assert_array_equal(rx1.pack(weight, bias, rows).bias, rx1.pad_bias(bias, 21, rows))
    np.testing.assert_array_equal(rx1.pack(weight, None, rows).bias, rx1.pad_bias(None, 21, rows))


def test_columns_up_to_65535_are_addressed() -> None:
    weight = np.zeros((4, 65540), np.float32)
    weight[:, [0, 32767, 32768, 65535, 65536, 65539]] = np.arange(1, 7, dtype=np.float32)
    packed = rx1.pack(weight, None, 4, k_block=65536)
    assert packed.columns.max() == 65535
    tile = np.random.default_rng(0).standard_normal((65540, 16)).astype(np.float32)
    assert_close(run_packed(NAMES, packed, tile), rx1.reference(tile, packed), magnitude(packed, tile))
