"""Normalizations: channels take their statistics along, and statistics over what shrinks stay those of the masked model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from spa_compiler.analysis import analyze
from spa_compiler.analysis.choose import random_units
from spa_compiler.analysis.cut import cut, removed_slabs
from spa_compiler.analysis.mask import mask
from spa_compiler.graph.load import load
from tests.analysis.exactness import check_each_unit, check_exact, outputs
from tests.analysis.told import analysis_of, reasons_of, removable, weighted


def model_of(text: str, opset: int) -> onnx.ModelProto:
    """Weights named v... are variances: positive."""
    model = weighted(text, opset)
    for tensor in model.graph.initializer:
        if tensor.name.startswith("v"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((np.abs(values) + 0.1).astype(values.dtype), tensor.name))
    return model


def conv(lines: str, weights: str = "", size: str = "4, 4") -> str:
    """Convolution to 12 channels, `lines` from a to b, convolution."""
    return f"""g (float[2, 3, {size}] x, float[12, 3, 1, 1] w0{weights}, float[4, 12, 1, 1] w1) => (float[2, 4, {size}] y) {{
      a = Conv(x, w0)
      {lines}
      y = Conv(b, w1)
    }}"""


def dense(lines: str, weights: str = "", batch: str = "N, 5") -> str:
    """Product to 12 channels, `lines` from a to b, product."""
    return f"""g (float[{batch}, 3] x, float[3, 12] w0{weights}, float[12, 4] w1) => (float[{batch}, 4] y) {{
      a = MatMul(x, w0)
      {lines}
      y = MatMul(b, w1)
    }}"""


VECTORS = ", float[12] s, float[12] c, float[12] m, float[12] v"
GAIN = ", float[12] s, float[12] c"
ENDS = {("w0", 0), ("w1", 1)}
DENSE_ENDS = {("w0", 1), ("w1", 0)}


def exported_group_norm(groups: int) -> str:
    return f"""one = Constant <value = float[{groups}] {{{", ".join(["1.0"] * groups)}}}> ()
      zero = Constant <value = float[{groups}] {{{", ".join(["0.0"] * groups)}}}> ()
      flat = Constant <value = int64[3] {{0, {groups}, -1}}> ()
      r = Reshape(a, flat)
      n = InstanceNormalization <epsilon = 0.1> (r, one, zero)
      shape = Shape(a)
      u = Reshape(n, shape)
      t = Mul(u, s)
      b = Add(t, c)"""


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 21])
def test_batch_norm(opset: int) -> None:
    text = conv("b = BatchNormalization(a, s, c, m, v)", VECTORS)
    assert removable(model_of(text, opset)) == {*ENDS, ("s", 0), ("c", 0), ("m", 0), ("v", 0)}
    assert check_exact(model_of(text, opset))
    assert check_each_unit(model_of(text, opset))


def test_batch_norm_of_vectors() -> None:
    text = dense("b = BatchNormalization(a, s, c, m, v)", VECTORS, "6")
    assert removable(model_of(text, 17)) == {*DENSE_ENDS, ("s", 0), ("c", 0), ("m", 0), ("v", 0)}
    assert check_exact(model_of(text, 17))


def test_batch_norm_that_takes_its_own_statistics() -> None:
    text = conv("b, m1, v1 = BatchNormalization <training_mode = 1> (a, s, c, m, v)", VECTORS)
    assert removable(model_of(text, 15)) == {*ENDS, ("s", 0), ("c", 0), ("m", 0), ("v", 0)}
    assert check_exact(model_of(text, 15))


STANDARDIZED = """g (float[2, 3, 6, 6] x, float[12, 3, 1, 1] w0, float[{shape}] w, float[5] s, float[5] c, float[5] m,
      float[5] v, float[4, 5, 1, 1] w1) => (float[2, 4, 4, 4] y) {{
      a = Conv(x, w0)
      {lines}
      b, m1, v1 = BatchNormalization <training_mode = 1, momentum = 1.0> (f, s, c, m, v)
      back = Constant <value = int64[4] {{5, 12, 3, 3}}> ()
      k = Reshape(b, back)
      d = Conv(a, k)
      e = Sigmoid(d)
      y = Conv(e, w1)
    }}"""


def test_weight_standardization() -> None:
    lines = """flat = Constant <value = int64[3] {1, 5, -1}> ()
      f = Reshape(w, flat)"""
    text = STANDARDIZED.format(shape="5, 12, 3, 3", lines=lines)
    assert {("w0", 0), ("w", 0), ("w", 1), ("s", 0), ("w1", 1)} <= removable(model_of(text, 17))
    assert check_exact(model_of(text, 17)) == 2


def test_weight_standardization_of_a_stored_matrix() -> None:
    text = STANDARDIZED.format(shape="1, 5, 108", lines="").replace("(f, s", "(w, s")
    assert {("w0", 0), ("w", 1), ("w", 2), ("s", 0), ("w1", 1)} <= removable(model_of(text, 17))
    assert check_exact(model_of(text, 17)) == 2


@pytest.mark.parametrize("opset", [7, 13, 22])
def test_instance_norm(opset: int) -> None:
    text = conv("b = InstanceNormalization(a, s, c)", GAIN)
    assert removable(model_of(text, opset)) == {*ENDS, ("s", 0), ("c", 0)}
    assert check_exact(model_of(text, opset))


@pytest.mark.parametrize("opset", [7, 10, 11, 21])
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_exported_group_norm(opset: int, groups: int) -> None:
    text = conv(exported_group_norm(groups), ", float[12, 1, 1] s, float[12, 1, 1] c")
    analysis = analysis_of(model_of(text, opset))
    assert {*ENDS, ("s", 0), ("c", 0)} <= removable(analysis)
    assert sorted(group.size for group in analysis.groups) == sorted({groups, 12 // groups} - {1})
    assert check_exact(model_of(text, opset))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", ["4, 4", "3, 7"])
def test_exported_group_norm_of_images_of_any_size(size: str, groups: int) -> None:
    """Cut while the size is open, compared with the masked model of a size that the analysis did not think of."""
    weights = ", float[12, 1, 1] s, float[12, 1, 1] c"
    any_size, fixed = (load(model_of(conv(exported_group_norm(groups), weights, each), 17)) for each in ("H, W", size))
    analysis, known = analyze(any_size), analyze(fixed)
    assert {*ENDS, ("s", 0), ("c", 0)} <= removable(analysis)
    rng = np.random.default_rng(groups)
    removed = random_units(analysis, 0.5, rng)
    feeds = {"x": rng.normal(size=(2, 3, *map(int, size.split(",")))).astype(np.float32)}
    masked = mask(fixed, removed_slabs(known, removed)[1], known.facts.settled.shapes)
    got, wanted = outputs(cut(any_size, analysis, removed), feeds), outputs(masked, feeds)
    np.testing.assert_allclose(got["y"], wanted["y"], rtol=1e-5, atol=1e-5)


def test_without_a_pad_of_computed_sizes_they_stay() -> None:
    text = conv(exported_group_norm(3), ", float[12, 1, 1] s, float[12, 1, 1] c", "H, W")
    analysis = analysis_of(model_of(text, 10))
    assert [group.size for group in analysis.groups] == [3]
    assert reasons_of(analysis, "r", 2) == {"statistics over an axis whose size varies"}


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("arguments", ["a, s, c", "a, s"])
def test_layer_norm(opset: int, arguments: str) -> None:
    text = dense(f"b = LayerNormalization <epsilon = 0.1> ({arguments})", GAIN)
    assert {*DENSE_ENDS, ("s", 0)} <= removable(model_of(text, opset))
    assert check_exact(model_of(text, opset))
    assert check_each_unit(model_of(dense("b = LayerNormalization(a, s)", ", float[12] s"), opset))


def test_layer_norm_over_several_axes() -> None:
    text = conv("b = LayerNormalization <axis = 1> (a, s, c)", ", float[12, 4, 4] s, float[12, 4, 4] c")
    assert removable(model_of(text, 17)) == {*ENDS, ("s", 0), ("c", 0)}
    assert check_exact(model_of(text, 17))


def test_layer_norm_beside_channels() -> None:
    text = conv("b = LayerNormalization <axis = 2> (a, s)", ", float[4, 4] s")
    assert removable(model_of(text, 17)) == ENDS
    assert check_exact(model_of(text, 17))


def test_layer_norm_with_a_computed_gain_and_its_statistics() -> None:
    lines = """t = Add(s, x1)
      n, mean, deviation = LayerNormalization(a, t, c)
      p = Mul(n, mean)
      b = Div(p, deviation)"""
    text = dense(lines, GAIN + ", float[12] u").replace("float[N, 5, 3] x,", "float[N, 5, 3] x, float[1] x1,")
    assert {*DENSE_ENDS, ("s", 0), ("c", 0)} <= removable(model_of(text, 17))
    assert check_exact(model_of(text, 17))


def test_what_varies_stays_in_a_layer_norm() -> None:
    text = """g (float[2, N, 3] x, float[3, 12] w0, float[1] s, float[12, 4] w1) => (float[2, N, 4] y) {
      a = MatMul(x, w0)
      b = LayerNormalization <axis = 1> (a, s)
      y = MatMul(b, w1)
    }"""
    analysis = analysis_of(model_of(text, 17))
    assert reasons_of(analysis, "a", 1) >= {"statistics over an axis whose size varies"}
    assert removable(analysis) == DENSE_ENDS


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("attributes", ["", "<epsilon = 0.3>"])
def test_rms_norm(opset: int, attributes: str) -> None:
    text = dense(f"b = RMSNormalization {attributes} (a, s)", ", float[12] s")
    assert removable(model_of(text, opset)) == {*DENSE_ENDS, ("s", 0)}
    assert check_exact(model_of(text, opset))
    assert check_each_unit(model_of(text, opset))


@pytest.mark.parametrize("attributes", ["", "<axis = -1, epsilon = 0.3, stash_type = 1>"])
@pytest.mark.parametrize("made", ["b", "n, i"])
def test_rms_norm_as_onnx_runtime_has_it(made: str, attributes: str) -> None:
    """Its second output is the inverse root, which grows with the share that goes."""
    lines = f"{made} = SimplifiedLayerNormalization {attributes} (a, s)"
    text = dense(lines if made == "b" else f"{lines}\n b = Mul(n, i)", ", float[12] s")
    assert removable(model_of(text, 17)) == {*DENSE_ENDS, ("s", 0)}
    assert check_exact(model_of(text, 17))


@pytest.mark.parametrize("gain", ["t = Softplus(s)", "t = Constant <value = float[1] {1.5}> ()"])
def test_rms_norm_with_another_gain(gain: str) -> None:
    text = dense(f"{gain}\n b = RMSNormalization <epsilon = 0.3> (a, t)", ", float[12] s")
    assert removable(model_of(text, 23)) >= DENSE_ENDS
    assert check_exact(model_of(text, 23))


def test_rms_norm_over_several_axes() -> None:
    text = conv("b = RMSNormalization <axis = 1, epsilon = 0.3> (a, s)", ", float[12, 4, 4] s")
    assert removable(model_of(text, 23)) == {*ENDS, ("s", 0)}
    assert check_exact(model_of(text, 23))


@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("size", ["4, 4", "H, W"])
def test_group_norm(size: str, groups: int) -> None:
    text = conv(f"b = GroupNormalization <num_groups = {groups}, epsilon = 0.1> (a, s, c)", GAIN, size)
    analysis = analysis_of(model_of(text, 21))
    assert removable(analysis) == {*ENDS, ("s", 0), ("c", 0)}
    assert sorted(group.size for group in analysis.groups) == sorted({groups, 12 // groups} - {1})
    assert check_exact(model_of(text, 21))


def test_group_norm_with_computed_parameters() -> None:
    lines = """t = Softplus(s)
      b = GroupNormalization <num_groups = 4> (a, t, c)"""
    assert check_exact(model_of(conv(lines, GAIN), 21)) == 2


@pytest.mark.parametrize("attributes, opset", [
    ("", 9), ("<axes = [1, 3]>", 9), ("<axes = [1, 3]>", 13), ("<axes = [-3]>", 13), ("<axes = [0, 2, 3]>", 21),
])  # fmt: skip
def test_mean_variance_norm(attributes: str, opset: int) -> None:
    text = conv(f"b = MeanVarianceNormalization {attributes} (a)")
    assert removable(model_of(text, opset)) == ENDS
    assert check_exact(model_of(text, opset))


@pytest.mark.parametrize("opset", [7, 22])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_norm(opset: int, p: int) -> None:
    for axis in (1, 3):
        text = conv(f"b = LpNormalization <p = {p}, axis = {axis}> (a)")
        assert removable(model_of(text, opset)) == ENDS
        assert check_exact(model_of(text, opset))


@pytest.mark.parametrize("norm, opset", [
    ("LayerNormalization(a, s, c)", 17), ("RMSNormalization(a, s)", 23), ("BatchNormalization(a, s, c, m, v)", 15),
])  # fmt: skip
def test_half_precision(norm: str, opset: int) -> None:
    text = dense(f"b = {norm}", VECTORS, "6").replace("float[", "float16[")
    assert removable(model_of(text, opset)) >= DENSE_ENDS
    assert check_exact(model_of(text, opset))


def test_norms_of_stored_values() -> None:
    """No mask reaches a weight, so its statistics stay those of all of it."""
    lines = """p = {}
      b = Mul(a, p)"""
    for norm, opset, is_free in (
        ("LayerNormalization(k, s, c)", 17, True),
        ("RMSNormalization(k, s)", 23, False),
        ("LpNormalization(k)", 22, False),
        ("MeanVarianceNormalization <axes = [1]> (k)", 13, True),
    ):
        text = dense(lines.format(norm), GAIN + ", float[5, 12] k")
        assert (("w0", 1) in removable(model_of(text, opset))) == is_free
        check_exact(model_of(text, opset))
