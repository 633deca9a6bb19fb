"""The attention core against numpy: key tiles that are not full, masks, one token, far scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import attention, panel
from tests.kernel_harness import assert_untouched, call, guarded, output

NAMES = tuple(attention.name(lanes) for lanes in panel.LANE_COUNTS)


def run(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float, slack: int = 0) -> np.ndarray:
    """`q` [depth, lanes], `k`, `v` [depth, keys], `mask` [keys, lanes]: one call per tile of keys."""
    depth, lanes = q.shape
    keys = k.shape[1]
    tiles = -(-keys // lanes)
    out, canaries = output(q.shape, slack)
    state = guarded(np.full((2, lanes), np.nan, np.float32), slack)
    scores = guarded(np.full((lanes, lanes), np.nan, np.float32), slack)
    for t in range(tiles):
        part = slice(t * lanes, min(keys, (t + 1) * lanes))
        count = part.stop - part.start
        rows = np.full((lanes, lanes), attention.LOWEST, np.float32)
        rows[:count] = mask[part]
        tile = [guarded(panel.pack_reference(np.ascontiguousarray(x[:, part].T), lanes), slack) for x in (k, v)]
        flags = (attention.FIRST if t == 0 else 0) | (attention.LAST if t == tiles - 1 else 0)
        arrays = [guarded(q, slack), *tile, guarded(rows, slack), scores, state, out]
        call(NAMES, attention.name(lanes), *arrays, depth, count, flags, scale / math.log(2))
    assert_untouched(canaries)
    return np.array(out)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(panel.LANE_COUNTS),
    st.integers(1, 150),
    st.sampled_from([4, 12, 32]),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.sampled_from([0.0, -1e4, -1e30, -3.4028235e38]),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_it_computes_what_the_reference_computes(
    lanes: int, keys: int, depth: int, spread: float, never: float, slack: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    q = (spread * rng.standard_normal((depth, lanes))).astype(np.float32)
    k, v = rng.standard_normal((2, depth, keys)).astype(np.float32)
    mask = np.where(rng.random((keys, lanes)) < 0.3, np.float32(never), np.float32(0))
    mask[rng.integers(keys)] = 0  # every query sees a key
    scale = depth**-0.5
    want = attention.reference(q, k, v, mask, scale)
    # a score is off by its rounding, and so, relatively, is its exponential
    scores = np.abs(k).T @ np.abs(q) * scale + (1e4 if never == -1e4 else 0)
    error = np.abs(run(q, k, v, mask, scale, slack) - want).max()
    assert error <= 1e-6 * (4 + scores.max()) * np.abs(v).max()


@pytest.mark.parametrize("lanes", panel.LANE_COUNTS)
def test_a_query_that_sees_no_key_gets_the_mean(lanes: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((8, lanes)), rng.standard_normal((8, 70)), rng.standard_normal((8, 70))
    mask = np.full((70, lanes), -3.4028235e38, np.float32)
    got = run(*(x.astype(np.float32) for x in (q, k, v)), mask, 0.3)
    assert got == pytest.approx(np.broadcast_to(v.mean(axis=1)[:, None], got.shape), abs=1e-5)


@pytest.mark.parametrize("lanes", [1, 4, 16, 64])
def test_queries_do_not_touch_one_another(lanes: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((16, n)).astype(np.float32) for n in (lanes, 40, 40))
    mask = np.zeros((40, lanes), np.float32)
    clean = run(q, k, v, mask, 0.25)
    q[:, -1] *= 100
    assert (run(q, k, v, mask, 0.25)[:, :-1] == clean[:, :-1]).all()


@pytest.mark.parametrize("lanes", [1, 16])
def test_a_nan_score_is_not_hidden(lanes: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, n)).astype(np.float32) for n in (lanes, 9, 9))
    q[0, -1] = np.nan
    got = run(q, k, v, np.zeros((9, lanes), np.float32), 0.5)
    assert np.isnan(got[:, -1]).all()
    assert np.isfinite(got[:, :-1]).all()
