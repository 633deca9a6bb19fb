"""Resizing, sampling and rearranging: channels pass, positions are pinned, blocks are whole."""

from __future__ import annotations

import pytest

from tests.analysis.exactness import check_each_unit, check_exact
from tests.analysis.told import analysis_of, reasons_of, removable, units_of, weighted


def between(lines: str, before: int = 6, after: int = 6, dims: str = "4, 4") -> str:
    """Convolution to `before` channels, `lines` from a to b, convolution of `after` channels."""
    return f"""g (float[2, 3, {dims}] x, float[{before}, 3, 1, 1] w0, float[4, {after}, 1, 1] w1)
        => (float[N, 4, A, B] y) {{
      a = Conv(x, w0)
      {lines}
      y = Conv(b, w1)
    }}"""


SCALES = "s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()\n"
SIZES = "s = Constant <value = int64[4] {2, 6, 7, 8}> ()\n"
COMPUTED_SIZES = """h = Shape(a)
      k = Constant <value = int64[1] {0}> ()
      e = Constant <value = int64[1] {2}> ()
      c = Slice(h, k, e)
      hw = Constant <value = int64[2] {7, 8}> ()
      s = Concat <axis = 0> (c, hw)
"""
CHANNELS = {
    "scales": (between(SCALES + "b = Resize <mode = \"linear\"> (a, , s)"), 21),
    "scales at opset 11": (between(
        "r = Constant <value = float[8] {0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0}> ()\n" + SCALES
        + "b = Resize (a, r, s)"), 11),
    "scales at opset 10": (between(SCALES + "b = Resize (a, s)"), 10),
    "scales of Upsample": (between(SCALES + "b = Upsample (a, s)"), 9),
    "scales of an old Upsample": (between("b = Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (a)"), 7),
    "sizes": (between(SIZES + "b = Resize <mode = \"cubic\"> (a, , , s)"), 18),
    "computed sizes": (between(COMPUTED_SIZES + "b = Resize (a, , , s)"), 21),
    "some sizes": (between(
        "s = Constant <value = int64[2] {7, 8}> ()\nb = Resize <axes = [2, 3]> (a, , , s)"), 18),
    "sizes that name the channels": (between(
        "s = Constant <value = int64[3] {8, 6, 7}> ()\nb = Resize <axes = [3, 1, 2]> (a, , , s)"), 18),
    "one size for two": (between(
        "s = Constant <value = int64[2] {7, 9}> ()\n"
        'b = Resize <axes = [2, 3], keep_aspect_ratio_policy = "not_larger"> (a, , , s)'), 18),
    "cropped": (between(
        "r = Constant <value = float[8] {0.0, 0.0, 0.2, 0.1, 1.0, 1.0, 0.7, 0.9}> ()\n" + SCALES
        + 'b = Resize <coordinate_transformation_mode = "tf_crop_and_resize", mode = "linear"> (a, r, s)'), 13),
    "centre": (between("s = Constant <value = int64[2] {3, 6}> ()\nb = CenterCropPad <axes = [2, 3]> (a, s)"), 18),
    "centre of all": (between("s = Constant <value = int64[4] {2, 6, 3, 6}> ()\nb = CenterCropPad(a, s)"), 18),
    "centre of channels": (between(
        "s = Constant <value = int64[2] {3, 6}> ()\nb = CenterCropPad <axes = [2, 1]> (a, s)"), 18),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_axes_that_keep_their_size_pass(name: str) -> None:
    text, opset = CHANNELS[name]
    analysis = analysis_of(text, opset)
    assert removable(analysis) == {("w0", 0), ("w1", 1)}
    assert check_exact(weighted(text, opset), name=name)
    assert check_each_unit(weighted(text, opset), name=name)


def test_resized_positions_are_pinned() -> None:
    text = """g (float[2, 3, 6, 5] x, float[5, 4] wa, float[8, 2] wb) => (float[2, 3, 6, 2] y) {
      a = MatMul(x, wa)
      s = Constant <value = float[4] {1.0, 1.0, 1.0, 2.0}> ()
      b = Resize(a, , s)
      y = MatMul(b, wb)
    }"""
    assert reasons_of(text, "a", 3) == {"resized positions"}
    assert not removable(text)


def test_positions_that_stay_pass() -> None:
    text = """g (float[2, 3, 6, 5] x, float[5, 4] wa, float[4, 2] wb) => (float[2, 3, 12, 2] y) {
      a = MatMul(x, wa)
      s = Constant <value = float[4] {1.0, 1.0, 2.0, 1.0}> ()
      b = Resize(a, , s)
      y = MatMul(b, wb)
    }"""
    assert removable(text) == {("wa", 1), ("wb", 0)}
    assert check_exact(weighted(text))


@pytest.mark.parametrize(
    "line",
    [
        'b = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "ceil"> (a, r, s)',
        'b = Resize <coordinate_transformation_mode = "tf_crop_and_resize", mode = "linear"> (a, r, s)',
    ],
)
def test_axes_that_move_at_scale_one_are_pinned(line: str) -> None:
    text = """r = Constant <value = float[8] {0.0, 0.5, 0.2, 0.1, 1.0, 1.0, 0.7, 0.9}> ()
    s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
    """
    analysis = analysis_of(between(text + line), 11)
    assert "resized positions" in reasons_of(analysis, "a", 1)
    assert not removable(analysis)


def test_a_scale_near_one_pins() -> None:
    lines = "s = Constant <value = float[4] {1.0, 1.01, 2.0, 2.0}> ()\nb = Resize(a, , s)"
    assert not removable(analysis_of(between(lines)))


def test_scales_from_outside_pin() -> None:
    analysis = analysis_of("""g (float[2, 3, 4, 4] x, float[4] x2, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1)
        => (float[N, 4, A, B] y) {
      a = Conv(x, w0)
      b = Resize(a, , x2)
      y = Conv(b, w1)
    }""")
    assert "resized positions" in reasons_of(analysis, "a", 1)


def test_cropped_channels_are_pinned() -> None:
    lines = "s = Constant <value = int64[1] {4}> ()\nb = CenterCropPad <axes = [1]> (a, s)"
    analysis = analysis_of(between(lines, after=4))
    assert not removable(analysis)
    assert reasons_of(analysis, "a", 1) == reasons_of(analysis, "b", 1) == {"cropped positions"}


def test_depth_to_space_strides_over_blocks() -> None:
    text = between("b = DepthToSpace <blocksize = 2> (a)", 12, 3)
    analysis = analysis_of(text)
    assert units_of(analysis, "w1", 1, 1) == [{("w0", 0): [1, 4, 7, 10], ("w1", 1): [1]}]
    assert reasons_of(analysis, "a", 1) == {"position in a block"}
    assert check_exact(weighted(text))
    assert check_each_unit(weighted(text))


def test_depth_to_space_with_depth_outside_takes_runs() -> None:
    text = between('b = DepthToSpace <blocksize = 2, mode = "CRD"> (a)', 12, 3)
    assert units_of(text, "w1", 1, 1) == [{("w0", 0): [4, 5, 6, 7], ("w1", 1): [1]}]
    assert check_exact(weighted(text))


def test_depth_to_space_of_one_channel_says_what_it_pins() -> None:
    analysis = analysis_of("""g (float[2, 3, 4, 4] x, float[4, 3, 1, 1] w0) => (float[2, 1, 8, 8] y) {
      a = Conv(x, w0)
      y = DepthToSpace <blocksize = 2> (a)
    }""")
    (pin,) = [pin for pin in analysis.pins if pin.tensor == "a" and pin.axis == 1]
    assert (pin.reason, pin.params) == ("position in a block", 12)


def test_space_to_depth_strides_over_blocks() -> None:
    text = between("b = SpaceToDepth <blocksize = 2> (a)", 3, 12)
    analysis = analysis_of(text)
    assert units_of(analysis, "w0", 0, 1) == [{("w0", 0): [1], ("w1", 1): [1, 4, 7, 10]}]
    assert reasons_of(analysis, "b", 1) == {"position in a block"}
    assert check_exact(weighted(text))
    assert check_each_unit(weighted(text))


def test_there_and_back() -> None:
    text = between("d = SpaceToDepth <blocksize = 2> (a)\ne = Sigmoid(d)\nb = DepthToSpace <blocksize = 2> (e)")
    assert units_of(text, "w0", 0, 5) == [{("w0", 0): [5], ("w1", 1): [5]}]
    assert check_exact(weighted(text))


@pytest.mark.parametrize("domain, opset", [("", 16), ("", 22), ("com.microsoft.", 16)])
def test_sampling_passes_channels(domain: str, opset: int) -> None:
    text = f"""g (float[2, 3, 4, 4] x, float[2, 5, 5, 2] x2, float[6, 3, 1, 1] w0, float[4, 6, 1, 1] w1)
        => (float[2, 4, A, B] y) {{
      a = Conv(x, w0)
      b = {domain}GridSample(a, x2)
      y = Conv(b, w1)
    }}"""
    analysis = analysis_of(text, opset)
    assert removable(analysis) == {("w0", 0), ("w1", 1)}
    assert "sampling positions" in reasons_of(analysis, "x2", 3)
    assert check_exact(weighted(text, opset))


def test_a_grid_of_coordinates_is_pinned() -> None:
    analysis = analysis_of("""g (float[2, 3] x, float[2, 3, 4, 4] x2, float[3, 5] w0, float[5, 6] w1)
        => (float[2, 3, 4, 4] y) {
      a = MatMul(x, w0)
      b = MatMul(a, w1)
      s = Constant <value = int64[3] {2, 2, 3}> ()
      t = Reshape(b, s)
      size = Constant <value = int64[4] {2, 3, 4, 4}> ()
      g = AffineGrid(t, size)
      y = GridSample(x2, g)
    }""")
    assert removable(analysis) == {("w0", 1), ("w1", 0)}
    assert "coordinates of a grid" in reasons_of(analysis, "t", 2)


def test_columns_of_an_image_go_in_runs() -> None:
    text = """g (float[2, 3, 9] x, float[8, 3, 1] w0, float[4, 2, 1, 1] w1) => (float[2, 4, 4, 4] y) {
      a = Conv(x, w0)
      image = Constant <value = int64[2] {4, 4}> ()
      block = Constant <value = int64[2] {2, 2}> ()
      b = Col2Im(a, image, block)
      y = Conv(b, w1)
    }"""
    analysis = analysis_of(text)
    assert units_of(analysis, "w1", 1, 1) == [{("w0", 0): [4, 5, 6, 7], ("w1", 1): [1]}]
    assert reasons_of(analysis, "a", 1) == {"position in a block"}
    assert check_exact(weighted(text))


@pytest.mark.parametrize(
    "line",
    [
        "Resize(x, , , x2)",
        "CenterCropPad(x, x2)",
        "DepthToSpace <blocksize = 2> (x)",
        "SpaceToDepth <blocksize = 2> (x)",
        "GridSample(x, x)",
        "Col2Im(x, x2, x2)",
    ],
)
def test_an_unknown_rank_is_pinned(line: str) -> None:
    analysis = analysis_of(f"""g (float[2, 3] x0, int64[2] x2, float[6, 3, 1, 1] w0) => (float[A, B, C, D] y) {{
      x = com.microsoft.Unheard(x0)
      a = {line}
      y = Conv(a, w0)
    }}""")
    assert reasons_of(analysis, "w0", 1) == {"a tensor of unknown rank"}


@pytest.mark.parametrize(
    "line, reason",
    [
        ("b = Resize(a, , , x2)", "resized positions"),
        ("b = Resize <axes = [3, 2, 1, 0]> (a, , , x2)", "resized positions"),
        ("b = CenterCropPad(a, x2)", "cropped positions"),
        ("b = CenterCropPad <axes = [3, 2, 1, 0]> (a, x2)", "cropped positions"),
        ("c = Reshape(a, x2)\nb = DepthToSpace <blocksize = 2> (c)", "reshapes to sizes that cannot be told"),
        ("c = Reshape(a, x3)\nb = Col2Im(c, x4, x4)", "blocks of unknown size"),
    ],
)
def test_sizes_from_outside_pin_channels(line: str, reason: str) -> None:
    analysis = analysis_of(f"""g (float[2, 3, 4, 4] x, int64[4] x2, int64[3] x3, int64[2] x4, float[6, 3, 1, 1] w0)
        => (float[A, B, C, D] b) {{
      a = Conv(x, w0)
      {line}
    }}""")
    assert reason in {pin.reason for pin in analysis.pins}
    assert not removable(analysis)
