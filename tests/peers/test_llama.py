"""The Llama block against the arithmetic in numpy, and compiled."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spa_compiler
from spa_compiler.graph.session import Feeds, open_session, run
from tests.peers.llama import EPSILON, THETA, Sizes, llama_block
from tests.peers.with_zeros import with_zeros

SMALL = Sizes(hidden=64, inner=128, heads=4, kv_heads=2)


def feeds(past: int, position: int) -> Feeds:
    rng = np.random.default_rng(past)
    cache = (1, SMALL.kv_heads, past, SMALL.head)
    return {
        "hidden": rng.standard_normal((1, 1, SMALL.hidden), np.float32),
        "position": np.array([[position]]),
        "past_key": rng.standard_normal(cache, np.float32),
        "past_value": rng.standard_normal(cache, np.float32),
    }


def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + EPSILON) * gain


def rotate(heads: np.ndarray, position: int) -> np.ndarray:
    """Pairs (i, i + half) as complex numbers, turned: `[heads, head]`."""
    half = SMALL.head // 2
    turn = np.exp(1j * position * THETA ** (-np.arange(half) / half))
    turned = (heads[:, :half] + 1j * heads[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=1)


def reference(model: onnx.ModelProto, feed: Feeds) -> dict[str, np.ndarray]:
    """Llama's own formulas, head by head, in float64."""
    arrays = [numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer if t.data_type == 1]
    gains = [a for a in arrays if a.shape == (SMALL.hidden,)]
    query, key, value, out, gate, up, down = [a for a in arrays if a.ndim == 2 and SMALL.head not in a.shape]
    x = feed["hidden"][0, 0].astype(np.float64)
    position = int(feed["position"][0, 0])
    normed = norm(x, gains[0])
    q = rotate((normed @ query).reshape(SMALL.heads, -1), position)
    k = rotate((normed @ key).reshape(SMALL.kv_heads, -1), position)
    v = (normed @ value).reshape(SMALL.kv_heads, -1)
    keys = np.concatenate([feed["past_key"][0], k[:, None]], axis=1)
    values = np.concatenate([feed["past_value"][0], v[:, None]], axis=1)
    heads = []
    for head in range(SMALL.heads):
        shared = head // (SMALL.heads // SMALL.kv_heads)
        weights = np.exp(keys[shared] @ q[head] / np.sqrt(SMALL.head))
        heads.append(weights / weights.sum() @ values[shared])
    x = x + np.concatenate(heads) @ out
    normed = norm(x, gains[1])
    gated = normed @ gate
    x = x + (gated / (1 + np.exp(-gated)) * (normed @ up)) @ down
    return {"output": x[None, None], "key": keys[None], "value": values[None]}


@pytest.mark.parametrize("past, position", [(0, 0), (5, 5), (9, 1000)])
def test_it_is_llamas_arithmetic(past: int, position: int) -> None:
    model, feed = llama_block(SMALL), feeds(past, position)
    got = run(open_session(model.SerializeToString()), feed)
    for name, want in reference(model, feed).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5)


def test_compiled_it_computes_what_it_did(tmp_path: Path) -> None:
    onnx.save(llama_block(SMALL), tmp_path / "dense.onnx")
    with_zeros(tmp_path / "dense.onnx", tmp_path / "block.onnx", 0.9, "block:4x1")
    shapes = ["hidden=1,1,64", "position=1,1", "past_key=1,2,7,16", "past_value=1,2,7,16"]
    result = spa_compiler.compile(tmp_path / "block.onnx", tmp_path / "spa", shapes=shapes, threads=1)
    assert result.report.checks
    assert all(check.passed for check in result.report.checks)
    session = spa_compiler.load(tmp_path / "spa")
    for past in (0, 1, 40):
        feed = feeds(past, past)
        want = run(open_session(tmp_path / "block.onnx"), feed)
        for name, value in want.items():
            np.testing.assert_allclose(run(session, feed)[name], value, rtol=1e-4, atol=1e-5)
