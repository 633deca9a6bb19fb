"""Depthwise convolution: the kernel on the buffer that C lays out, against numpy, and that against scipy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from spa_compiler.kernels import activation, depthwise
from spa_compiler.kernels.vector import isa_of
from spa_compiler.kernels.window import Window
from tests import kernel_harness
from tests.kernel_harness import assert_close, assert_untouched, call, guarded, output

pytestmark = pytest.mark.usefixtures("level")

WINDOWS = (
    Window(1, (3, 3), pads=(1, 1, 1, 1)),
    Window(1, (3, 3), (2, 2), pads=(0, 1, 1, 0)),
    Window(1, (5, 5), pads=(2, 2, 2, 2)),
    Window(1, (1, 4), (1, 3), (1, 2), (0, 3, 0, 1)),
    Window(1, (2, 3), (3, 1), (4, 5), (3, 0, 2, 6)),
)
ACTS = {w: activation.NAMES if i == 0 else ("none", "clip") for i, w in enumerate(WINDOWS)}
LARGEST = tuple(map(depthwise.largest_name, WINDOWS))
NAMES = (depthwise.PAD, *LARGEST, *(depthwise.name(w, act) for w, acts in ACTS.items() for act in acts))


def image(w: Window, height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((channels, height, width)).astype(np.float32)


def smallest(w: Window, axis: int) -> int:
    return max(1, (w.size[axis] - 1) * w.dilation[axis] + 1 - w.pads[axis] - w.pads[axis + 2])


@pytest.mark.parametrize("w", WINDOWS)
def test_the_reference_is_a_convolution(w: Window) -> None:
    x, rng = image(w, 20, 31, 2), np.random.default_rng(1)
    weight, bias = rng.standard_normal((2, w.k)).astype(np.float32), rng.standard_normal(2).astype(np.float32)
    top, left, bottom, right = w.pads
    taps = np.zeros((2, *((size - 1) * step + 1 for size, step in zip(w.size, w.dilation, strict=True))))
    taps[:, :: w.dilation[0], :: w.dilation[1]] = weight.reshape(2, *w.size)
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right))).astype(np.float64)
    full = np.stack([signal.correlate2d(p, t, "valid") for p, t in zip(padded, taps, strict=True)])
    want = full[:, :: w.stride[0], :: w.stride[1]] + bias[:, None, None]
    np.testing.assert_allclose(depthwise.reference(x, weight, bias, w), want, atol=1e-6)


def computed(
    x: np.ndarray, weight: np.ndarray, bias: float, w: Window, act: str, first: int, height: int
) -> np.ndarray:
    """What `depthwise.c` does for some rows of the outputs of one channel."""
    isa = isa_of(kernel_harness.level_in_use())
    width = w.outputs(*x.shape)[1]
    pitch = max(width, isa.width) + (w.size[1] - 1) * w.dilation[1] // w.stride[1]
    block = depthwise.rows_at_once(isa)
    rows = (-(-height // block) * block - 1) * w.stride[0] + (w.size[0] - 1) * w.dilation[0] + 1
    buffer = np.full((w.stride[1], rows, pitch), np.float32(np.nan))
    known = depthwise.buffer_reference(x, w, first, height, pitch, depthwise.LOWEST if act == "largest" else 0.0)
    buffer[:, : known.shape[1]] = known
    out, canaries = output((height * width + isa.width - 1,))
    call(
        NAMES,
        depthwise.largest_name(w) if act == "largest" else depthwise.name(w, act),
        guarded(buffer),
        guarded(weight),
        guarded(np.array([bias], np.float32)),
        out,
        height,
        width,
        rows * pitch,
        pitch,
        width,
        -0.5,
        0.75,
    )
    assert_untouched(canaries)
    return np.array(out[: height * width].reshape(height, width))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(WINDOWS), st.data())
def test_any_band_of_any_image(w: Window, data: st.DataObject) -> None:
    act = data.draw(st.sampled_from(ACTS[w]), "act")
    size = [smallest(w, axis) + data.draw(st.integers(0, 40), "size") for axis in range(2)]
    outputs = w.outputs(*size)
    first = data.draw(st.integers(0, outputs[0] - 1), "first")
    height = data.draw(st.integers(1, outputs[0] - first), "height")
    x, rng = image(w, *size), np.random.default_rng(size)
    weight, bias = rng.standard_normal((1, w.k)).astype(np.float32), rng.standard_normal(1).astype(np.float32)
    got = computed(x[0], weight, float(bias[0]), w, act, first, height)
    want = activation.reference(depthwise.reference(x, weight, bias, w)[0], act, -0.5, 0.75)
    assert_close(got, want[first : first + height], w.k + 4)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(WINDOWS), st.data())
def test_the_largest_of_any_band_of_any_image(w: Window, data: st.DataObject) -> None:
    size = [smallest(w, axis) + data.draw(st.integers(0, 40), "size") for axis in range(2)]
    outputs = w.outputs(*size)
    first = data.draw(st.integers(0, outputs[0] - 1), "first")
    height = data.draw(st.integers(1, outputs[0] - first), "height")
    x = image(w, *size) - 3  # below the zeros that the padding of a sum has
    got = computed(x[0], np.zeros((1, w.k), np.float32), 0.0, w, "largest", first, height)
    np.testing.assert_array_equal(got, depthwise.largest_reference(x, w)[0, first : first + height])


@pytest.mark.parametrize("w", WINDOWS)
def test_a_name_says_all_that_the_kernel_is_made_of(w: Window) -> None:
    bare = dataclasses.replace(w, pads=(0, 0, 0, 0))
    assert depthwise.parse(depthwise.name(w, "gelu_erf")) == (bare, "gelu_erf")
    assert depthwise.parse(depthwise.largest_name(w)) == (bare, "largest")


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([1, 2]), st.integers(0, 6), st.integers(0, 40))
def test_rows_are_padded_in_whole_registers(height: int, width: int, step: int, left: int, more: int) -> None:
    fill = float(np.float32(depthwise.LOWEST if more % 2 else 0.0))
    w = Window(1, (1, 1), (1, step), (1, 1), (0, left, 0, 0))
    pitch, top, bottom = -(-(left + width) // step) + more, more % 3, more % 2
    rows = top + height + bottom
    x = image(w, height, width)[0]
    source = guarded(np.concatenate([x.reshape(-1), np.full(31, np.nan, np.float32)]))
    padded, canaries = output((step, rows * pitch + -(-left // step) + 16))
    sizes = (top, height, bottom, width, left, padded.shape[1], pitch, step, fill)
    call(NAMES, depthwise.PAD, source, padded, *sizes)
    assert_untouched(canaries)
    want = np.full((step, rows, pitch), fill, np.float32)
    want[:, top : top + height] = depthwise.padded_reference(x, w, pitch, fill)
    np.testing.assert_array_equal(padded[:, : rows * pitch].reshape(want.shape), want)
