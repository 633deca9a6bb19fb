"""The planes behind a window: layout and copies against numpy, the product through them against a plain convolution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from spa_compiler.kernels import activation, rx1, rx1_products, sums, window
from spa_compiler.kernels.window import Window
from tests.kernel_harness import assert_close, assert_untouched, call, guarded, output, sparse

pytestmark = pytest.mark.usefixtures("level")

LANES = (16, 32, 48, 64)
ACTS = {
    (rows, lanes): activation.NAMES if (rows, lanes) == (4, 64) else ("none",) for rows in (1, 4, 8) for lanes in LANES
}
PITCHED = tuple(rx1.name(1, lanes, "relu", pitched=True) for lanes in LANES)
PRODUCTS = tuple(rx1.name(rows, lanes, act, window=True) for (rows, lanes), acts in ACTS.items() for act in acts)
NAMES = (window.SHIFT, window.CROP, *PRODUCTS, *PITCHED)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, int, int]:
    """A window, and the size of an image that is not smaller."""
    w = Window(
        draw(st.integers(1, 5)),
        (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        tuple(draw(st.integers(0, 4)) for _ in range(4)),
    )
    sizes = []
    for axis in range(2):
        least = (w.size[axis] - 1) * w.dilation[axis] + 1 - w.pads[axis] - w.pads[axis + 2]
        sizes.append(max(1, least) + draw(st.integers(0, 40)))
    return w, sizes[0], sizes[1]


def image(w: Window, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((w.channels, height, width)).astype(np.float32)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, w: Window) -> np.ndarray:
    """By scipy, tap by tap with the zeros of the dilation in between."""
    top, left, bottom, right = w.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (top, bottom), (left, right)))
    spread = [(size - 1) * step + 1 for size, step in zip(w.size, w.dilation, strict=True)]
    taps = np.zeros((len(weight), w.channels, *spread))
    taps[:, :, :: w.dilation[0], :: w.dilation[1]] = weight.reshape(len(weight), w.channels, *w.size)
    full = [sum(signal.correlate2d(p, t, "valid") for p, t in zip(padded, tap, strict=True)) for tap in taps]
    return np.stack(full)[:, :: w.stride[0], :: w.stride[1]] + bias[:, None, None]


@settings(max_examples=100, deadline=None)
@given(windows())
def test_the_reference_is_a_convolution(drawn: tuple[Window, int, int]) -> None:
    w, height, width = drawn
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((3, w.k)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    x = image(w, height, width)
    want = convolved(x, weight, bias, w)
    assert want.shape[1:] == w.outputs(height, width)
    np.testing.assert_allclose(window.reference(x, weight, bias, w), want, atol=1e-5)


def test_a_window_that_does_not_fit_has_no_outputs() -> None:
    assert Window(1, (3, 3)).outputs(2, 9) == (0, 7)
    assert Window(1, (3, 3), pads=(0, 1, 1, 0)).outputs(2, 2) == (1, 1)


def shifted(x: np.ndarray, w: Window, first: int, height: int, slack: int) -> tuple[np.ndarray, np.ndarray]:
    """What `window.c` does for the output rows first .. first + height: the planes, and the canaries before them."""
    width = w.outputs(*x.shape[1:])[1]
    rows, pitch, step = window.rows_of(w, height), window.pitch_of(width), w.stride[1]
    planes, canaries = output((w.size[1], w.channels, rows, pitch), slack)
    source = guarded(x, slack)
    for kx in range(w.size[1]):
        left = kx * w.dilation[1] - w.pads[1]
        seen = [i for i in range(width) if 0 <= left + i * step < x.shape[2]]
        low, high = (seen[0], seen[-1] + 1) if seen else (width, width)
        for c in range(w.channels):
            call(
                NAMES,
                window.SHIFT,
                source[c],
                planes[kx, c],
                first * w.stride[0] - w.pads[0],
                rows // w.stride[0],
                w.stride[0],
                *x.shape[1:],
                pitch,
                low,
                high,
                left,
                step,
                c * x[0].size,
                x[c:].size,
                0.0,
            )
    return planes, canaries


@settings(max_examples=150, deadline=None)
@given(windows(), st.data())
def test_the_planes_of_any_band(drawn: tuple[Window, int, int], data: st.DataObject) -> None:
    w, height, width = drawn
    outputs = w.outputs(height, width)
    first = data.draw(st.integers(0, outputs[0] - 1), "first")
    rows = data.draw(st.integers(1, outputs[0] - first), "rows")
    x = image(w, height, width)
    planes, canaries = shifted(x, w, first, rows, data.draw(st.integers(0, 3), "slack"))
    assert_untouched(canaries)
    want = window.planes_reference(x, w, first, rows, outputs[1])
    np.testing.assert_array_equal(planes, want)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 90), st.sampled_from(LANES), st.data())
def test_a_tile_is_cropped_to_its_rows(height: int, width: int, lanes: int, data: st.DataObject) -> None:
    tiles = -(-height * window.pitch_of(width) // lanes)
    rng = np.random.default_rng(0)
    plane, canaries = output((height, width))
    pixels = rng.standard_normal(tiles * lanes).astype(np.float32)
    for tile in data.draw(st.permutations(range(tiles)), "order") if tiles < 50 else range(tiles):
        runs = np.array(window.runs_reference(tile * lanes, lanes, height, width), np.int32).reshape(-1, window.RUN)
        call(NAMES, window.CROP, guarded(pixels[tile * lanes :][:lanes]), plane, guarded(runs), len(runs))
    assert_untouched(canaries)
    pitch = window.pitch_of(width)
    want = np.resize(pixels, height * pitch).reshape(height, pitch)[:, :width]
    np.testing.assert_array_equal(plane, want)


@settings(max_examples=60, deadline=None)
@given(windows(), st.sampled_from(sorted(ACTS)), st.data())
def test_the_product_reads_columns_where_the_offsets_say(
    drawn: tuple[Window, int, int], kernel: tuple[int, int], data: st.DataObject
) -> None:
    (w, height, width), (rows, lanes) = drawn, kernel
    act = data.draw(st.sampled_from(ACTS[kernel]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    packed = rx1.pack(sparse(rng, 19, w.k, rows, 0.4), rng.standard_normal(19).astype(np.float32), rows, None, 24)
    size = w.outputs(height, width)
    x = image(w, height, width)
    planes = window.planes_reference(x, w, 0, *size).reshape(-1)
    planes = guarded(np.concatenate([planes, np.zeros(lanes, np.float32)]))
    offsets = guarded(window.offsets_reference(w, *size))
    first = data.draw(st.integers(0, (size[0] * window.pitch_of(size[1]) - 1) // lanes), "tile") * lanes
    groups = len(packed.bias) // rows
    out_pitch, base_pitch = (lanes + data.draw(st.integers(0, 20), what) for what in ("out_pitch", "base_pitch"))
    out, canaries = output((groups * rows, out_pitch), data.draw(st.integers(0, 3), "slack"))
    out[:] = 7.0
    base = guarded(rng.standard_normal((groups * rows, base_pitch)).astype(np.float32))
    first_mode = data.draw(st.sampled_from([sums.BIAS, sums.RESIDUAL]), "mode")
    blocks = -(-packed.k // packed.k_block)
    assert packed.chunk >= packed.n
    for b in range(blocks):
        call(
            NAMES,
            rx1.name(rows, lanes, act, window=True),
            planes[first:],
            offsets[b * packed.k_block :],
            packed.indptr[b * groups :],
            packed.order[b * groups :],
            packed.columns,
            packed.values,
            packed.bias,
            base,
            out,
            groups,
            sums.ACCUMULATE if b else first_mode,
            int(b == blocks - 1),
            base_pitch,
            out_pitch,
            -0.75,
            0.5,
        )
    assert_untouched(canaries)
    assert (out[:, lanes:] == 7.0).all()
    dense = window.reference(x, rx1.unpack(packed), packed.bias[:19], w).reshape(19, -1)
    for lane, length, place in window.runs_reference(first, lanes, *size):
        want = dense[:, place : place + length]
        if first_mode == sums.RESIDUAL:
            want = want + base[:19, lane : lane + length]
        assert_close(out[:19, lane : lane + length], activation.reference(want, act, -0.75, 0.5), w.k + 4)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LANES), st.integers(1, 40), st.integers(0, 90), st.floats(0, 1), st.booleans(), st.data())
def test_columns_that_are_a_pitch_apart_need_no_table(
    lanes: int, k: int, more: int, density: float, residual: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    packed = rx1.pack(sparse(rng, 19, k, 1, density), rng.standard_normal(19).astype(np.float32), 1, None, 24)
    x = rng.standard_normal((k, lanes + more)).astype(np.float32)
    tile = guarded(x.reshape(-1)[: k * (lanes + more) - more])  # nothing behind the last column is read
    base = guarded(rng.standard_normal((19, lanes)).astype(np.float32))
    out, canaries = output((19, lanes))
    for b in range(-(-k // packed.k_block)):
        call(
            NAMES,
            rx1.name(1, lanes, "relu", pitched=True),
            tile[b * packed.k_block * (lanes + more) :],
            guarded(np.array([lanes + more], np.int32)),
            packed.indptr[b * 19 :],
            packed.order[b * 19 :],
            packed.columns,
            packed.values,
            packed.bias,
            base,
            out,
            19,
            sums.ACCUMULATE if b else sums.RESIDUAL if residual else sums.BIAS,
            int((b + 1) * packed.k_block >= k),
            lanes,
            lanes,
            0.0,
            0.0,
        )
    assert_untouched(canaries)
    assert_close(out, rx1.reference(x[:, :lanes], packed, base if residual else None, "relu"), k + 4)


def test_few_lanes_have_no_window() -> None:
    with pytest.raises(ValueError, match="8 lanes"):
        rx1_products.kernel(4, 8, "none", window=True)
    with pytest.raises(ValueError, match="8 lanes"):
        rx1_products.kernel(1, 8, "none", pitched=True)
