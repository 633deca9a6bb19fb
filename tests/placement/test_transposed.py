"""Transposed convolutions that are other layers, and those that are none."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.errors import ModelError
from spa_compiler.kernels.window import Window
from spa_compiler.placement.sites import find_sites
from tests.networks import F32, model_of

W = np.arange(3 * 4 * 2 * 2, dtype=np.float32).reshape(3, 4, 2, 2)


def sites(attributes: str, weight: F32 = W, **more: F32):  # type: ignore[no-untyped-def]
    sizes = "5,5" if weight.ndim == 4 else "5"
    dims = ",".join("HVUT"[: weight.ndim - 2])
    bias = ", b" if more else ""
    text = f"g (float[1,3,{sizes}] x) => (float[1,N,{dims}] y) {{ y = ConvTranspose <{attributes}> (x, w{bias}) }}"
    return find_sites(model_of(text, w=weight, **more))


def test_a_stride_as_large_as_the_kernel_is_a_product() -> None:
    (site,), refusals = sites("strides = [2, 2]", b=np.arange(4, dtype=np.float32))
    assert not refusals
    assert (site.n, site.k, site.grow, site.window) == (16, 3, (2, 2), None)
    assert site.bias.tolist() == [0, 1, 2, 3] * 4
    for (y, x, out), row in zip(np.ndindex(2, 2, 4), site.weight, strict=True):
        assert (row == W[:, out, y, x]).all()


def test_a_stride_of_one_is_a_convolution_with_the_kernel_turned_around() -> None:
    (site,), _ = sites("pads = [1, 0, 0, 1]")
    assert (site.n, site.k, site.grow) == (4, 12, (1, 1))
    assert site.window == Window(3, (2, 2), pads=(0, 1, 1, 0))
    assert (site.weight.reshape(4, 3, 2, 2) == W[:, :, ::-1, ::-1].swapaxes(0, 1)).all()


def test_over_one_axis() -> None:
    (site,), _ = sites("strides = [2]", W[..., 0])
    assert (site.n, site.grow) == (8, (1, 2))


@pytest.mark.parametrize(
    "attributes, words",
    [
        ("strides = [1, 2]", "overlap"),
        ("strides = [3, 3]", "overlap"),
        ("strides = [2, 2], pads = [0, 0, 1, 1]", "overlap"),
        ("pads = [2, 2, 2, 2]", "overlap"),
        ("strides = [2, 2], dilations = [2, 2]", "overlap"),
        ("strides = [2, 2], output_padding = [1, 1]", "output is padded"),
        ('strides = [2, 2], auto_pad = "SAME_UPPER"', "padding depends"),
        ("strides = [2, 2], group = 3", "groups"),
    ],
)
def test_what_is_none_has_a_reason(attributes: str, words: str) -> None:
    found, (refusal,) = sites(attributes)
    assert found == []
    assert words in refusal.reason
    assert (refusal.op.n, refusal.op.k) == (4, 12)


def test_three_axes_are_refused() -> None:
    text = "g (float[1,3,5,5,5] x) => (float[1,4,H,V,U] y) { y = ConvTranspose <strides = [2, 2, 2]> (x, w) }"
    found, (refusal,) = find_sites(model_of(text, w=np.ones((3, 4, 2, 2, 2), np.float32)))
    assert found == []
    assert "over 3 axes" in refusal.reason


def test_weights_that_are_no_numbers_are_refused() -> None:
    bad = W.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="NaN or Inf"):
        sites("strides = [2, 2]", bad)
