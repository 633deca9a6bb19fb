"""The attention core of one head against float64: tails of keys and queries, several key tiles, masks of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import attention, panel
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

NAMES = tuple(attention.name(lanes) for lanes in panel.LANE_COUNTS)
LOG2_E = 1.4426950408889634


def run(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float, shared: bool = False
) -> np.ndarray:
    """`q` [depth, lanes], `k`, `v` [depth, keys], `mask` [keys, lanes]: tile by tile, as `steps.c` does.

    `shared`: all queries have the mask of the first, and the kernel reads it once.
    """
    depth, lanes = q.shape
    keys, tiles = k.shape[1], -(-k.shape[1] // lanes)
    out, canaries = output((depth, lanes))
    scores, state = (
        guarded(np.full((lanes, lanes), np.nan, np.float32)),
        guarded(np.full((2, lanes), np.nan, np.float32)),
    )
    for t in range(tiles):
        part = slice(t * lanes, min(keys, (t + 1) * lanes))
        count = part.stop - part.start
        tile_k, tile_v = np.full((2, depth, lanes), 7.0, np.float32)  # lanes past the last key hold something finite
        tile_k[:, :count], tile_v[:, :count] = k[:, part], v[:, part]
        tile_mask = np.full((lanes, lanes), attention.LOWEST, np.float32)
        tile_mask[:count] = mask[part]
        which = (attention.FIRST if t == 0 else 0) | (attention.LAST if t == tiles - 1 else 0)
        rows = np.ascontiguousarray(tile_mask[:, 0]) if shared else tile_mask
        arrays = [guarded(a) for a in (q, tile_k, tile_v, rows)]
        numbers = (depth, count, 0 if shared else lanes, which, scale * LOG2_E)
        call(NAMES, attention.name(lanes), *arrays, scores, state, out, *numbers)
    assert_untouched(canaries)
    return np.array(out)


@settings(max_examples=120, deadline=None)
@example(16, 64, 3, "keys", 0.1, 479001600)  # no key is to be seen
@given(
    st.sampled_from(panel.LANE_COUNTS),
    st.sampled_from([4, 8, 32, 64]),
    st.integers(1, 150),
    st.sampled_from(["none", "keys", "causal", "lowest"]),
    st.sampled_from([0.1, 1.0, 6.0]),
    st.integers(0, 2**32),
)
def test_it_computes_what_the_reference_computes(
    lanes: int, depth: int, keys: int, kind: str, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((depth, lanes)) * spread).astype(np.float32)
    k, v = rng.standard_normal((2, depth, keys)).astype(np.float32)
    never = np.float32(np.finfo(np.float32).min) if kind == "lowest" else np.float32(-1e4)
    mask = np.zeros((keys, lanes), np.float32)
    if kind in ("keys", "lowest"):
        mask[rng.random(keys) < 0.4] = never
    elif kind == "causal":
        mask[np.arange(keys)[:, None] > np.arange(lanes)] = -np.inf
        mask[0] = 0.0
    want = attention.reference(q, k, v, mask, depth**-0.5)
    got = run(q, k, v, mask, depth**-0.5)
    # Where all scores are near -1e4, float32 holds them no finer than this.
    coarse = np.spacing(np.float32(1e4)) if kind == "keys" and mask.max() < 0 else 0.0
    assert np.abs(got - want).max() <= (3e-6 * max(1.0, spread) + coarse) * max(1.0, np.abs(v).max())
    if kind != "causal":
        np.testing.assert_array_equal(run(q, k, v, mask, depth**-0.5, shared=True), got)


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_all_keys_masked_gives_their_mean_as_onnxruntime_does(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    q, keys = rng.standard_normal((8, lanes)).astype(np.float32), 2 * lanes + 1
    k, v = rng.standard_normal((2, 8, keys)).astype(np.float32)
    mask = np.full((keys, lanes), np.finfo(np.float32).min, np.float32)
    assert np.abs(run(q, k, v, mask, 1.0) - v.mean(axis=1, keepdims=True)).max() < 1e-5


def test_large_scores_do_not_overflow() -> None:
    q = np.full((4, 16), 200.0, np.float32)
    k = np.linspace(-200, 200, 40, dtype=np.float32)[None].repeat(4, 0)
    v = np.arange(40, dtype=np.float32)[None].repeat(4, 0)
    assert np.abs(run(q, k, v, np.zeros((40, 16), np.float32), 1.0) - 39.0).max() < 1e-4


@pytest.mark.parametrize("lanes", [1, 4, 16, 64])
def test_a_nan_score_is_not_hidden_and_stays_with_its_query(lanes: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, n)).astype(np.float32) for n in (lanes, 70, 70))
    mask = np.zeros((70, lanes), np.float32)
    clean = run(q, k, v, mask, 0.5)
    q[0, -1] = np.nan
    got = run(q, k, v, mask, 0.5)
    assert np.isnan(got[:, -1]).all()
    assert (got[:, :-1] == clean[:, :-1]).all()


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_keys_that_are_never_seen_change_no_bit(lanes: int) -> None:
    """Every further tile multiplies by 2^0, which must be 1."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((8, lanes)).astype(np.float32)
    k, v = rng.standard_normal((2, 8, 6 * lanes + 120)).astype(np.float32)
    mask = np.full((k.shape[1], lanes), -np.inf, np.float32)
    mask[: min(lanes, 3)] = 0.0
    few = run(q, k[:, :lanes], v[:, :lanes], mask[:lanes], 0.3)
    np.testing.assert_array_equal(run(q, k, v, mask, 0.3), few)
    if lanes == 1:
        np.testing.assert_array_equal(few[:, 0], v[:, 0])
