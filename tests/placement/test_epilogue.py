"""Activations are found by what they compute, in any spelling; what only looks like one is left alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from spa_compiler.placement.epilogue import Epilogue, find
from spa_compiler.placement.sites import find_sites, held
from tests.networks import WITH_MICROSOFT, model_of
from tests.onnx_text import HEADER

OLD = '<ir_version: 4, opset_import: ["" : 7]>\n'
F32_MAX = float(np.finfo(np.float32).max)
ROOT, TANH, CUBE = math.sqrt(2.0), math.sqrt(2 / math.pi), 0.044715


def activation(body: str, header: str = HEADER, outputs: str = "float[N,8] y") -> Epilogue | None:
    """What is found behind `p`."""
    model = model_of(
        f"g (float[N,8] x) => ({outputs}) {{ p = MatMul(x, w) {body} }}", header, w=np.ones((8, 8), np.float32)
    )
    tensor = model.graph.tensors()["p"]
    assert isinstance(tensor, gs.Variable)
    return find(tensor, held(model.graph))


def product(factors: list[str]) -> str:
    """Factors multiplied from left to right; `d = ...` and so on must have come before."""
    return f"t = Mul({factors[0]}, {factors[1]}) y = Mul(t, {factors[2]})"


GELU_ERF = [
    f"d = {scaled} e = Erf(d) f = {plus_one} {product(list(order))}"
    for scaled in (f"Div(p, {{{ROOT}}})", f"Mul(p, {{{1 / ROOT}}})", f"Mul({{{1 / ROOT}}}, p)")
    for plus_one in ("Add(e, {1.0})", "Add({1.0}, e)")
    for order in itertools.permutations(("p", "f", "{0.5}"))
]
GELU_TANH = [
    f"c = {cube} d = Mul({{{CUBE}}}, c) {inner} u = Mul(e, {{{TANH}}}) t0 = Tanh(u) f = Add(t0, {{1.0}}) {last}"
    for cube in ("Pow(p, {3.0})", "Mul(p, q)")
    for inner in ("e = Add(p, d)", "e = Add(d, p)")
    for last in ("h = Mul(p, {0.5}) y = Mul(h, f)", "h = Mul({0.5}, f) y = Mul(h, p)")
]
GELU_TANH = [("q = Mul(p, p) " if "Mul(p, q)" in text else "") + text for text in GELU_TANH]


@pytest.mark.parametrize("body", GELU_ERF)
def test_gelu_erf(body: str) -> None:
    found = activation(body)
    assert found is not None
    assert (found.act, found.output.name) == ("gelu_erf", "y")
    assert {n.outputs[0].name for n in found.nodes} == {"d", "e", "f", "t", "y"}


@pytest.mark.parametrize("body", GELU_TANH)
def test_gelu_tanh(body: str) -> None:
    found = activation(body)
    assert found is not None
    assert (found.act, found.output.name) == ("gelu_tanh", "y")


@pytest.mark.parametrize(
    "body,header,act",
    [
        ("y = Gelu(p)", HEADER, "gelu_erf"),
        ('y = Gelu <approximate="none">(p)', HEADER, "gelu_erf"),
        ('y = Gelu <approximate="tanh">(p)', HEADER, "gelu_tanh"),
        ("y = com.microsoft.Gelu(p)", WITH_MICROSOFT, "gelu_erf"),
        ("y = com.microsoft.FastGelu(p)", WITH_MICROSOFT, "gelu_tanh"),
        ("s = Sigmoid(p) y = Mul(p, s)", HEADER, "silu"),
        ("s = Sigmoid(p) y = Mul(s, p)", HEADER, "silu"),
        ("m = Neg(p) e = Exp(m) f = Add(e, {1.0}) y = Div(p, f)", HEADER, "silu"),
        ("m = Mul({-1.0}, p) e = Exp(m) f = Add({1.0}, e) y = Div(p, f)", HEADER, "silu"),
        ("y = Sigmoid(p)", HEADER, "sigmoid"),
        ("y = HardSwish(p)", HEADER, "hard_swish"),
        ("a = Add(p, {3.0}) r = Clip(a, {0.0}, {6.0}) m = Mul(p, r) y = Div(m, {6.0})", HEADER, "hard_swish"),
        ("h = HardSigmoid <alpha = 0.16666667> (p) y = Mul(h, p)", HEADER, "hard_swish"),
        ("y = Relu(p)", HEADER, "relu"),
        ("y = Max(p, {0.0})", HEADER, "relu"),
        ("y = Max({0.0}, p)", HEADER, "relu"),
        ("y = Clip(p, {0.0})", HEADER, "relu"),
        (f"y = Clip(p, {{0.0}}, {{{F32_MAX}}})", HEADER, "relu"),
    ],
)
def test_other_spellings(body: str, header: str, act: str) -> None:
    found = activation(body, header)
    assert found is not None
    assert (found.act, found.output.name) == (act, "y")


@pytest.mark.parametrize(
    "body,header,low,high",
    [
        ("y = Clip(p, {0.0}, {6.0})", HEADER, 0.0, 6.0),
        ("y = Clip <min = 0.0, max = 6.0> (p)", OLD, 0.0, 6.0),
        ("r = Relu(p) y = Min(r, {6.0})", HEADER, 0.0, 6.0),
        ("r = Relu(p) y = Min({6.0}, r)", HEADER, 0.0, 6.0),
        ("r = Max({-1.0}, p) y = Min(r, {1.0})", HEADER, -1.0, 1.0),
        ("r = Min({1.0}, p) y = Max(r, {-1.0})", HEADER, -1.0, 1.0),
        ("y = Clip(p, {-2.0})", HEADER, -2.0, F32_MAX),
        ("y = Clip(p, , {2.5})", HEADER, -F32_MAX, 2.5),
        ("y = Min(p, {2.5})", HEADER, -F32_MAX, 2.5),
        ("r = Relu(p) y = Relu(r)", HEADER, None, None),
    ],
)
def test_clip(body: str, header: str, low: float | None, high: float | None) -> None:
    found = activation(body, header)
    assert found is not None
    assert found.output.name == "y"
    assert (found.act, found.low, found.high) == (("relu", 0.0, 0.0) if low is None else ("clip", low, high))


@pytest.mark.parametrize(
    "body, act, low, high",
    [
        ("y = HardSigmoid(p)", "hard_sigmoid", 0.2, 0.5),
        ("y = HardSigmoid <alpha = 0.4, beta = 0.25> (p)", "hard_sigmoid", 0.4, 0.25),
        ("a = Add(p, {3.0}) r = Clip(a, {0.0}, {6.0}) y = Div(r, {6.0})", "hard_sigmoid", 1 / 6, 0.5),
        ("y = LeakyRelu(p)", "leaky_relu", 0.01, 0.0),
        ("m = Mul(p, {0.3}) y = Max(m, p)", "leaky_relu", 0.3, 0.0),
    ],
)
def test_activations_with_slopes(body: str, act: str, low: float, high: float) -> None:
    found = activation(body)
    assert found is not None
    assert (found.act, found.output.name) == (act, "y")
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize("body", ["y = LeakyRelu <alpha = -0.5> (p)", "y = LeakyRelu <alpha = 2.0> (p)", "y = Tanh(p)"])
def test_what_is_none_of_them(body: str) -> None:
    assert activation(body) is None


@pytest.mark.parametrize("bound", [30.0, 45.0, 100.0, 20000.0])
def test_far_bounds_are_bounds(bound: float) -> None:
    found = activation(f"y = Clip(p, {{0.0}}, {{{bound}}})")
    assert found is None or (found.act, found.high) == ("clip", bound)


def test_a_clip_of_far_bounds_on_both_sides() -> None:
    found = activation("y = Clip(p, {-50.0}, {50.0})")
    assert found is None or (found.low, found.high) == (-50.0, 50.0)


def test_constants_of_one_element_of_any_rank_up_to_the_tensors() -> None:
    text = "g (float[N,8] x) => (float[N,8] y) { p = MatMul(x, w) y = Max(p, zero) }"
    for shape in ((), (1,), (1, 1)):
        model = model_of(text, w=np.ones((8, 8), np.float32), zero=np.zeros(shape, np.float32))
        assert find_sites(model)[0][0].act == "relu"


def test_a_constant_of_higher_rank_widens_the_result() -> None:
    model = model_of(
        "g (float[N,8] x) => (float[1,N,8] y) { p = MatMul(x, w) y = Max(p, zero) }",
        w=np.ones((8, 8), np.float32),
        zero=np.zeros((1, 1, 1), np.float32),
    )
    assert find_sites(model)[0][0].act == "none"


QUICK = "u = Mul(p, {1.702}) s = Sigmoid(u) y = Mul(p, s)"


@pytest.mark.parametrize(
    "body,header",
    [
        (QUICK, HEADER),
        ("y = com.microsoft.QuickGelu(p)", WITH_MICROSOFT),
        ("y = Tanh(p)", HEADER),
        ("y = Elu(p)", HEADER),
        ("a = Add(p, {3.0}) c = Clip(a, {0.0}, {6.0}) m = Mul(p, c) y = Div(m, {5.0})", HEADER),
        ("y = Mul(p, {1.0})", HEADER),
        ("y = Max(p, p)", HEADER),
        ("y = Max(p, {0.01})", None),
        ("y = Add(p, {1.0})", HEADER),
        ("d = Div(p, {1.4}) e = Erf(d) f = Add(e, {1.0}) t = Mul(p, f) y = Mul(t, {0.5})", HEADER),
        ("d = Div(p, {1.4142135}) e = Erf(d) f = Add(e, {1.0}) t = Mul(p, f) y = Mul(t, {0.51})", HEADER),
        ("y = Abs(p)", HEADER),
        ("y = Mul(p, x)", HEADER),
    ],
)
def test_what_only_looks_alike(body: str, header: str | None) -> None:
    found = activation(body, header or HEADER)
    if header is None:  # a bound above zero is a clip, not a ReLU
        assert found is not None
        assert (found.act, found.low) == ("clip", float(np.float32(0.01)))
    else:
        assert found is None


def test_a_value_that_others_read_stays() -> None:
    assert activation("y = Relu(p) z = Abs(p)", outputs="float[N,8] y, float[N,8] z") is None
    gelu = f"d = Div(p, {{{ROOT}}}) e = Erf(d) f = Add(e, {{1.0}}) t = Mul(p, f) y = Mul(t, {{0.5}})"
    for name in "pdeft":
        assert activation(f"{gelu} z = Abs({name})", outputs="float[N,8] y, float[N,8] z") is None


def test_a_graph_output_in_between_stays() -> None:
    assert activation("y = Relu(p)", outputs="float[N,8] y, float[N,8] p") is None
    gelu = f"d = Div(p, {{{ROOT}}}) e = Erf(d) f = Add(e, {{1.0}}) t = Mul(p, f) y = Mul(t, {{0.5}})"
    assert activation(gelu, outputs="float[N,8] y, float[N,8] e") is None


def test_a_shorter_activation_is_taken_when_the_longer_one_is_read() -> None:
    found = activation("r = Relu(p) y = Min(r, {6.0}) z = Abs(r)", outputs="float[N,8] y, float[N,8] z")
    assert found is not None
    assert (found.act, found.output.name) == ("relu", "r")


def test_the_result_may_be_read_by_many() -> None:
    found = activation("y = Relu(p) z = Abs(y)", outputs="float[N,8] y, float[N,8] z")
    assert found is not None
    assert found.output.name == "y"


def test_nothing_is_taken_into_a_branch() -> None:
    body = """y = If (c) <
      then_branch = t () => (float[N,8] a) { a = Relu(p) },
      else_branch = e () => (float[N,8] b) { b = Identity(x) }>"""
    model = model_of(
        f"g (float[N,8] x, bool c) => (float[N,8] y) {{ p = MatMul(x, w) {body} }}", w=np.ones((8, 8), np.float32)
    )
    (site,), _ = find_sites(model)
    assert (site.act, site.output.name) == ("none", "p")
