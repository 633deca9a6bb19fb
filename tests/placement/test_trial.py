"""The two sides of a trial compute the same: what is timed against each other is one thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.graph.session import open_session
from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.placement.candidates import classes
from spa_compiler.placement.nodes import Packer
from spa_compiler.placement.regions import single
from spa_compiler.placement.sites import find_sites
from spa_compiler.placement.trial import dense_model, region_of, sparse_model
from spa_compiler.runtime.link import link
from tests.networks import model_of
from tests.region_harness import MCPU, assert_parity

RNG = np.random.default_rng(0)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * (RNG.random(shape) < 0.3)).astype(np.float32)


SITES = {
    "rows": ("(float[2,5,24] x) => (float[2,5,16] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }", (24, 16)),
    "pointwise": ("(float[2,24,5,7] x) => (float[2,16,5,7] y) { y = Conv(x, w, b) }", (16, 24, 1, 1)),
    "signal": ("(float[2,24,9] x) => (float[2,16,9] y) { y = Conv(x, w, b) }", (16, 24, 1)),
    "window": (
        """(float[2,6,9,11] x) => (float[2,16,5,8] y) {
          c = Conv <strides = [2, 1], pads = [1, 0, 2, 3], dilations = [1, 3]> (x, w, b) y = Clip(c, {-0.5}, {0.5}) }""",
        (16, 6, 3, 3),
    ),
    "groups": (
        """(float[2,8,9,11] x) => (float[2,16,5,11] y) {
          c = Conv <group = 4, strides = [2, 1], pads = [1, 1, 1, 1]> (x, w, b) y = HardSwish(c) }""",
        (16, 2, 3, 3),
    ),
    "groups of pixels": (
        """(float[2,24,9,11] x) => (float[2,16,9,11] y) {
          c = Conv <group = 2> (x, w, b) y = HardSigmoid <alpha = 0.25> (c) }""",
        (16, 12, 1, 1),
    ),
    "pixels of their own": (
        """(float[2,6,4,5] x) => (float[2,16,8,15] y) {
          c = ConvTranspose <strides = [2, 3]> (x, w, b) y = Relu(c) }""",
        (6, 16, 2, 3),
    ),
    "turned around": (
        """(float[2,6,9,11] x) => (float[2,16,10,13] y) {
          y = ConvTranspose <pads = [1, 0, 0, 2], dilations = [1, 2]> (x, w, b) }""",
        (6, 16, 3, 3),
    ),
    "pixels of a signal": (
        "(float[2,6,9] x) => (float[2,16,36] y) { y = ConvTranspose <strides = [4]> (x, w, b) }",
        (6, 16, 4),
    ),
    "a gate": ("(float[2,24,1,1] x) => (float[2,16,1,1] y) { c = Conv(x, w, b) y = Sigmoid(c) }", (16, 24, 1, 1)),
    "a leaky gate": ("(float[2,24,9] x) => (float[2,16,9] y) { c = Conv(x, w, b) y = LeakyRelu(c) }", (16, 24, 1)),
    "window on a signal": (
        """(float[2,6,20] x) => (float[2,16,9] y) {
          c = Conv <strides = [2], pads = [1, 3], dilations = [3]> (x, w, b) s = Sigmoid(c) y = Mul(c, s) }""",
        (16, 6, 3),
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_dense_and_sparse_are_the_same(name: str, tmp_path: Path) -> None:
    text, shape = SITES[name]
    (site,), _ = find_sites(model_of(f"g {text}", w=weight(*shape), b=weight(16)))
    groups, packer, forms = single([site]), Packer(), {site.name: Blocks(4)}
    size = tuple(int(d) for d in site.source.shape or ())
    link([region_of(groups[0], forms, packer).spec], (MCPU,), tmp_path / "kernels.so")
    x = RNG.standard_normal(size).astype(np.float32)

    def outputs(model: bytes) -> Sequence[np.ndarray]:
        return open_session(model, threads=1, library=tmp_path / "kernels.so").run(None, {"x": x})

    want = [y.astype(np.float64) for y in outputs(dense_model(groups, size))]
    assert_parity(outputs(sparse_model(groups, size, forms, packer)), want)
    assert site.pixels(size) * site.grow[0] * site.grow[1] == want[0].size // 16


def test_windows_of_equal_size_are_classes_of_their_own() -> None:
    text = """g (float[1,8,9,9] x) => (float[1,16,9,9] a, float[1,16,9,9] b, float[1,16,9,9] c) {
      a = Conv <pads = [1, 1, 1, 1]> (x, u) b = Conv <pads = [0, 4, 0, 4]> (x, v) c = Conv <pads = [1, 1, 1, 1]> (x, w) }"""
    w = weight(16, 8, 3, 3)
    sites, _ = find_sites(model_of(text, u=w, v=w.reshape(16, 8, 1, 9), w=w))
    found = classes(sites, [{"x": (1, 8, 9, 9)}])
    assert [[s.name for s in c.sites] for c in found] == [["a", "c"], ["b"]]
    one, other = (c.question((1, 8, 9, 9), 1) for c in found)
    assert one != other
