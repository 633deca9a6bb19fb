"""N:M kernels against numpy: shapes that fit nothing, missing values, every lane count, mode and activation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import activation, grouped, panel
from tests.kernel_harness import assert_close, n_of_m, run_packed

pytestmark = pytest.mark.usefixtures("level")

# 2:4 with everything, the others with a sample
ACTS = {
    (kind, lanes): activation.NAMES if kind == (2, 4) and lanes in (1, 48) else ("none",)
    for kind in grouped.KINDS
    for lanes in (panel.LANE_COUNTS if kind == (2, 4) else (1, 64))
}
NAMES = tuple(grouped.name(*kind, lanes, act) for (kind, lanes), acts in ACTS.items() for act in acts)


def magnitude(packed: grouped.Packed, tile: np.ndarray) -> float:
    """The largest sum of absolute products: rounding errors grow with it."""
    return float((np.abs(grouped.unpack(packed)) @ np.abs(tile) + np.abs(packed.bias[: packed.n, None])).max() + 4)


@st.composite
def weights(draw: st.DrawFn) -> grouped.Packed:
    """A packed weight: small chunks and blocks, so that there are several, the last ones short."""
    kind = draw(st.sampled_from(grouped.KINDS))
    span = grouped.Groups(*kind).span
    n, k = draw(st.integers(1, 70)), span * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = n_of_m(rng, n, k, *kind)
    weight *= rng.random((n, k)) < draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))  # fewer than N
    if draw(st.booleans()):
        weight[rng.random(n) < 0.5] = 0  # rows without entries
    bias = rng.standard_normal(n).astype(np.float32) if draw(st.booleans()) else None
    chunk, k_block = draw(st.sampled_from([None, 16, 32])), draw(st.sampled_from([None, 64, 128]))
    return grouped.pack(weight, bias, *kind, chunk, k_block)


@settings(max_examples=150, deadline=None)
@given(weights(), st.booleans(), st.data())
def test_a_kernel_computes_what_the_reference_computes(
    packed: grouped.Packed, has_residual: bool, data: st.DataObject
) -> None:
    kind = packed.kept, packed.of
    lanes = data.draw(st.sampled_from([lanes for own, lanes in ACTS if own == kind]), "lanes")
    act = data.draw(st.sampled_from(ACTS[kind, lanes]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    tile = rng.standard_normal((packed.k, lanes)).astype(np.float32)
    residual = rng.standard_normal((packed.n, lanes)).astype(np.float32) if has_residual else None
    got = run_packed(NAMES, packed, tile, act, -0.75, 0.5, residual, slack=data.draw(st.integers(0, 3), "slack"))
    assert_close(got, grouped.reference(tile, packed, residual, act, -0.75, 0.5), magnitude(packed, tile))


@pytest.mark.parametrize("kind, lanes", ACTS)
def test_many_chunks_and_blocks_with_the_default_blocking(kind: tuple[int, int], lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    packed = grouped.pack(n_of_m(rng, 531, 1152, *kind), rng.standard_normal(531).astype(np.float32), *kind)
    assert packed.chunk < packed.n
    assert packed.k_block < packed.k
    tile = rng.standard_normal((1152, lanes)).astype(np.float32)
    want = grouped.reference(tile, packed)
    assert_close(run_packed(NAMES, packed, tile), want, magnitude(packed, tile))


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_a_weight_of_zeros_gives_the_bias_exactly(lanes: int) -> None:
    bias = np.arange(1, 24, dtype=np.float32)
    packed = grouped.pack(np.zeros((23, 64), np.float32), bias, 2, 4)
    got = run_packed(NAMES, packed, np.full((64, lanes), 1e30, np.float32))
    np.testing.assert_array_equal(got, np.repeat(bias[:, None], lanes, 1))


@pytest.mark.parametrize("lanes", [4, 16, 64])
def test_tokens_do_not_touch_one_another(lanes: int) -> None:
    rng = np.random.default_rng(0)
    packed = grouped.pack(n_of_m(rng, 20, 64, 2, 4), None, 2, 4)
    tile = rng.standard_normal((64, lanes)).astype(np.float32)
    clean = run_packed(NAMES, packed, tile)
    tile[:, -1] = np.nan
    dirty = run_packed(NAMES, packed, tile)
    np.testing.assert_array_equal(dirty[:, :-1], clean[:, :-1])
    assert np.isnan(dirty[:, -1]).all()


@settings(max_examples=40, deadline=None)
@given(weights())
def test_unpack_undoes_pack(packed: grouped.Packed) -> None:
    dense = grouped.unpack(packed)
    again = grouped.pack(dense, packed.bias[: packed.n], packed.kept, packed.of, packed.chunk, packed.k_block)
    for one, other in zip(packed.arrays.values(), again.arrays.values(), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_pack_keeps_every_value_and_an_index_takes_two_bits() -> None:
    weight = n_of_m(np.random.default_rng(3), 512, 768, 2, 4)
    packed = grouped.pack(weight, None, 2, 4)
    np.testing.assert_array_equal(grouped.unpack(packed), weight)
    assert packed.values.size == grouped.Groups(2, 4).stored(weight) == np.count_nonzero(weight)
    assert packed.columns.nbytes * 8 == 2 * packed.values.size


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 nonzeros of 4"):
        grouped.pack(np.tile(np.float32([1, 1, 1, 0]), (4, 16)), None, 2, 4)
    for k, chunk, k_block in ((48, None, None), (64, 18, None), (64, None, 16)):
        with pytest.raises(ValueError, match="cut steps"):
            grouped.pack(np.zeros((32, k), np.float32), None, 2, 4, chunk, k_block)


def test_any_code_points_into_its_own_step() -> None:
    """Codes come from files: whatever they are, no input of another step is read, and none behind the last."""
    rng = np.random.default_rng(0)
    packed = grouped.pack(np.abs(n_of_m(rng, 4, 64, 2, 8)), None, 2, 8)
    packed.columns[:] = 0xFFFF
    assert np.isfinite(run_packed(NAMES, packed, np.ones((64, 1), np.float32))).all()
