"""The bias of an operator: where it is, where it is none, and what replacing it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.bias import Bias, bias_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import open_model, run
from tests.onnx_text import model_from

W32 = "float[3, 2] w = {1, 2, 3, 4, 5, 6}"


def first(model: Model) -> Bias | None:
    return bias_of(weighted_ops(model.graph)[0], model.graph)


def shifted(model: Model, shape: tuple[int, ...], channel: int) -> None:
    """Replacing the bias by twice itself must add it once more to the result."""
    bias = first(model)
    assert bias is not None
    values, x = np.array(bias.values), np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = run(open_model(model), {"x": x})["y"]
    bias.replace(2 * values.astype(np.float64))
    after = run(open_model(model), {"x": x})["y"]
    along = values.reshape([-1 if axis == channel else 1 for axis in range(before.ndim)])
    np.testing.assert_allclose(after - before, np.broadcast_to(along, before.shape), atol=1e-5)


@pytest.mark.parametrize("shape", ["2", "1, 2", "1, 1, 2"])
@pytest.mark.parametrize("order", ["m, b", "b, m"])
def test_an_add_behind_a_matmul(shape: str, order: str) -> None:
    model = model_from(f"""g (float[N, S, 3] x) => (float[N, S, 2] y) <{W32}, float[{shape}] b = {{7, 8}}> {{
      m = MatMul(x, w)
      y = Add({order})
    }}""")
    shifted(model, (2, 4, 3), 2)


@pytest.mark.parametrize("shape", ["2", "1, 2"])
def test_gemm(shape: str) -> None:
    model = model_from(f"""g (float[N, 3] x) => (float[N, 2] y) <{W32}, float[{shape}] b = {{7, 8}}> {{
      y = Gemm(x, w, b)
    }}""")
    shifted(model, (4, 3), 1)


def test_gemm_without_its_own_has_that_of_an_add() -> None:
    model = model_from(f"""g (float[N, 3] x) => (float[N, 2] y) <{W32}, float[2] b = {{7, 8}}> {{
      m = Gemm(x, w)
      y = Add(m, b)
    }}""")
    shifted(model, (4, 3), 1)


def test_conv() -> None:
    model = model_from("""g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
      <float[2, 1, 1, 1] w = {1, 2}, float[2] b = {7, 8}> { y = Conv(x, w, b) }""")
    shifted(model, (2, 1, 4, 4), 1)


@pytest.mark.parametrize("shape", ["2, 1, 1", "1, 2, 1, 1"])
def test_an_add_behind_a_conv(shape: str) -> None:
    model = model_from(f"""g (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y)
      <float[2, 1, 1, 1] w = {{1, 2}}, float[{shape}] b = {{7, 8}}> {{ c = Conv(x, w) y = Add(c, b) }}""")
    shifted(model, (2, 1, 4, 4), 1)


@pytest.mark.parametrize(
    "shape, values", [("2", "7, 8"), ("2, 2", "1, 2, 3, 4"), ("1, 1", "1"), ("1, 2, 2, 1", "1, 2, 3, 4")]
)
def test_what_no_bias_of_a_conv_is(shape: str, values: str) -> None:
    model = model_from(f"""g (float[N, 1, 2, 2] x) => (float[N, 2, 2, 2] y)
      <float[2, 1, 1, 1] w = {{1, 2}}, float[{shape}] b = {{{values}}}> {{ c = Conv(x, w) y = Add(c, b) }}""")
    assert first(model) is None


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w) y = Mul(m, b)",
        "m = MatMul(x, w) y = Add(m, one)",  # a scalar
        "m = MatMul(x, w) y = Add(m, full)",  # another value at each position
        "m = MatMul(x, w) y = Add(m, m)",
        "m = MatMul(x, w) a = Add(m, b) y = Mul(a, m)",  # used twice
        "y = MatMul(x, w) a = Add(y, b)",  # an output as it is
        "c = Relu(b) y = Gemm(x, w, c)",  # computed
        "y = Gemm(x, w, full)",
        "y = Gemm(x, w, one)",
        "y = Gemm(x, w, column)",
        "y = MatMul(x, w)",
    ],
)
def test_what_is_no_bias(body: str) -> None:
    model = model_from(f"""g (float[2, 3] x) => (float[2, 2] y) <{W32}, float[2] b = {{7, 8}}, float one = {{1}},
      float[2, 2] full = {{1, 2, 3, 4}}, float[2, 1] column = {{1, 2}}> {{ {body} }}""")
    assert first(model) is None


def test_one_output_and_a_scalar() -> None:
    """A scalar is no vector, though it has one value for each of one output."""
    model = model_from(
        "g (float[N, 2] x) => (float[N, 1] y) <float[2, 1] w = {1, 2}, float b = {3}> { y = Gemm(x, w, b) }"
    )
    assert first(model) is None


def test_a_branch_that_reads_the_result() -> None:
    model = model_from(f"""g (float[2, 3] x, bool c) => (float[2, 2] y, float[2, 2] z) <{W32}, float[2] b = {{7, 8}}> {{
      m = MatMul(x, w)
      y = Add(m, b)
      z = If (c) <
        then_branch = t () => (float[2, 2] p) {{ p = Relu(m) }},
        else_branch = e () => (float[2, 2] q) {{ q = Neg(m) }}
      >
    }}""")
    assert first(model) is None


def test_an_add_inside_of_a_branch() -> None:
    """It is the only reader, and runs in one case of two."""
    model = model_from(f"""g (float[2, 3] x, bool c) => (float[2, 2] z) <{W32}, float[2] b = {{7, 8}}> {{
      m = MatMul(x, w)
      z = If (c) <
        then_branch = t () => (float[2, 2] p) {{ p = Add(m, b) }},
        else_branch = e () => (float[2, 2] q) {{ q = MatMul(x, w) }}
      >
    }}""")
    assert first(model) is None


def test_a_shared_constant_is_left_to_the_others() -> None:
    model = model_from(f"""g (float[2, 3] x) => (float[2, 2] y, float[2, 2] z) <{W32}, float[2] b = {{7, 8}}> {{
      m = MatMul(x, w)
      y = Add(m, b)
      r = Relu(x)
      n = MatMul(r, w)
      z = Add(n, b)
    }}""")
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    before = run(open_model(model), {"x": x})
    bias = first(model)
    assert bias is not None
    bias.replace(np.zeros(2))
    after = run(open_model(model), {"x": x})
    np.testing.assert_allclose(before["y"] - after["y"], [[7, 8], [7, 8]], atol=1e-5)
    np.testing.assert_array_equal(before["z"], after["z"])
