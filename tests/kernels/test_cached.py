"""The attention core of one token over rows of keys, against float64: tiles of keys, heads that share them, masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import attention, cached
from tests.kernel_harness import assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

SIZES = ((4, 1), (8, 4), (64, 4), (80, 3), (64, 1), (32, 8), (12, 2))  # depth, heads
NAMES = tuple(cached.name(*size) for size in SIZES)


def run(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float, slack: int = 0) -> np.ndarray:
    """As steps.c does: a call for each tile of keys, the mask in a buffer that says never behind the last key."""
    heads, depth = q.shape
    out, canaries = output(q.shape, slack)
    scores, state = (np.full(s, np.nan, np.float32) for s in ((heads, cached.KEYS), (2, heads)))
    held = [guarded(a, slack) for a in (q, k, v)]
    for begin in range(0, len(k), cached.KEYS):
        keys = min(cached.KEYS, len(k) - begin)
        tile = np.full((len(mask), cached.KEYS), attention.LOWEST, np.float32)
        tile[:, :keys] = mask[:, begin : begin + keys]
        part = attention.FIRST * (begin == 0) | attention.LAST * (begin + keys == len(k))
        stride = 0 if len(mask) == 1 else cached.KEYS
        rows = [held[0], held[1][begin:], held[2][begin:], tile, scores, state, out]
        call(NAMES, cached.name(depth, heads), *rows, keys, stride, part, scale * 1.4426950408889634)
    assert_untouched(canaries)
    return np.array(out)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from([0.1, 1.0, 5.0]),
    st.integers(0, 3),
    st.integers(0, 2**32),
)
def test_it_computes_what_the_reference_computes(
    size: tuple[int, int], keys: int, shared_mask: bool, spread: float, slack: int, seed: int
) -> None:
    (depth, heads), rng = size, np.random.default_rng(seed)
    q = (rng.standard_normal((heads, depth)) * spread).astype(np.float32)
    k, v = rng.standard_normal((2, keys, depth)).astype(np.float32)
    mask = rng.standard_normal((1 if shared_mask else heads, keys)).astype(np.float32)
    mask[:, 1:][rng.random(mask[:, 1:].shape) < 0.3] = np.finfo(np.float32).min
    want = cached.reference(q, k, v, np.broadcast_to(mask, (heads, keys)), depth**-0.5)
    got = run(q, k, v, mask, depth**-0.5, slack)
    assert np.abs(got - want).max() <= 3e-6 * max(1.0, np.abs(v).max()) * max(1.0, spread)


@pytest.mark.parametrize("size", SIZES)
def test_all_keys_masked_gives_their_mean_as_onnxruntime_does(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    q = rng.standard_normal(size[::-1]).astype(np.float32)
    k, v = rng.standard_normal((2, 2 * cached.KEYS + 1, size[0])).astype(np.float32)
    mask = np.full((1, len(k)), np.finfo(np.float32).min, np.float32)
    assert np.abs(run(q, k, v, mask, 1.0) - v.mean(axis=0)).max() < 1e-5


def test_large_scores_do_not_overflow_and_nan_stays_with_its_head() -> None:
    q = np.full((4, 8), 200.0, np.float32)
    k = np.linspace(-200, 200, 300, dtype=np.float32)[:, None].repeat(8, 1)
    v = np.arange(300, dtype=np.float32)[:, None].repeat(8, 1)
    none = np.zeros((1, 300), np.float32)
    clean = run(q, k, v, none, 1.0)
    assert np.abs(clean - 299.0).max() < 1e-3
    q[2, 5] = np.nan
    got = run(q, k, v, none, 1.0)
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("shared, heads", [(1, 1), (2, 2), (7, 7), (8, 8), (11, 1), (12, 6), (16, 8)])
def test_as_many_heads_at_once_as_divide_those_that_share(shared: int, heads: int) -> None:
    assert cached.heads_at_once(shared) == heads
