"""Depthwise convolutions as regions see them: taps, window, bias, activation; and what is none, or too large."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.kernels.window import Window
from spa_compiler.placement.depthwise import DepthwiseSite, find_depthwise
from tests.networks import F32, model_of

TAPS = np.arange(6 * 9, dtype=np.float32).reshape(6, 1, 3, 3)
B = np.arange(6, dtype=np.float32)


def found(text: str, **weights: F32) -> list[DepthwiseSite]:
    return find_depthwise(model_of(text, **weights))


def test_with_its_bias_and_activation() -> None:
    text = """g (float[1,6,8,8] x) => (float[1,6,H,V] y) {
      c = Conv <group = 6, strides = [2, 1], pads = [1, 0, 1, 2], dilations = [1, 2]> (x, w, b) y = Relu(c) }"""
    (site,) = found(text, w=TAPS, b=B)
    assert site.window == Window(6, (3, 3), (2, 1), (1, 2), (1, 0, 1, 2))
    assert (site.output.name, site.act, site.n, site.spec.window) == ("y", "relu", 6, site.window)
    np.testing.assert_array_equal(site.taps, TAPS.reshape(6, 9))
    np.testing.assert_array_equal(site.bias_or_zeros, B)


def test_a_bias_behind_it_is_taken_and_none_is_zeros() -> None:
    text = "g (float[1,6,8,8] x) => (float[1,6,H,V] y) { c = Conv <group = 6> (x, w) y = Add(c, b) }"
    assert found(text, w=TAPS, b=B.reshape(6, 1, 1))[0].bias_or_zeros.tolist() == B.tolist()
    text = "g (float[1,6,8,8] x) => (float[1,6,H,V] y) { y = Conv <group = 6> (x, w) }"
    assert found(text, w=TAPS)[0].bias_or_zeros.tolist() == [0] * 6


def test_over_one_axis() -> None:
    text = "g (float[1,6,8] x) => (float[1,6,V] y) { y = Conv <group = 6, pads = [2, 0]> (x, w) }"
    (site,) = found(text, w=TAPS[..., 0])
    assert site.window == Window(6, (1, 3), pads=(0, 2, 0, 0), axes=1)


@pytest.mark.parametrize(
    "attributes, shape",
    [
        ("group = 1", (6, 6, 3, 3)),
        ("group = 3", (6, 2, 3, 3)),
        ("group = 6", (12, 1, 3, 3)),  # two filters a channel
        ("group = 3", (3, 2, 3, 3)),  # two channels a filter
        ('group = 6, auto_pad = "SAME_UPPER"', (6, 1, 3, 3)),
        ("group = 6, dilations = [90, 90]", (6, 1, 3, 3)),  # more rows than the buffer of the kernel has
    ],
)
def test_what_is_none_or_does_not_fit(attributes: str, shape: tuple[int, ...]) -> None:
    text = f"g (float[1,6,H,V] x) => (float[1,C,G,U] y) {{ y = Conv <{attributes}> (x, w) }}"
    assert found(text, w=np.ones(shape, np.float32)) == []
