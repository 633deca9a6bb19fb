"""LayerNormalization, as one op or in nine; what normalizes otherwise is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.placement.norms import NormSite, find_norms
from tests.networks import F32, model_of

GAMMA = np.linspace(0.5, 1.5, 8, dtype=np.float32)
BETA = np.linspace(-1, 1, 8, dtype=np.float32)
OLD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def norms(body: str, header: str = OLD, outputs: str = "float[N,S,8] y", **weights: F32) -> list[NormSite]:
    text = f"g (float[N,S,8] x) => ({outputs}) {{ {body} }}"
    return find_norms(model_of(text, header, **({"gamma": GAMMA, "beta": BETA} | weights)))


def decomposed(
    mean: str = "ReduceMean <axes = [-1]> (x)",
    square: str = "Pow(c, {2.0})",
    variance: str = "ReduceMean <axes = [-1]> (q)",
    epsilon: str = "Add(v, {1e-6})",
    scale: str = "Mul(d, gamma)",
    shift: str = "Add(t, beta)",
    sub: str = "Sub(x, u)",
    div: str = "Div(c, r)",
) -> str:
    return f"""u = {mean} c = {sub} q = {square} v = {variance} e = {epsilon} r = Sqrt(e) d = {div}
               t = {scale} y = {shift}"""


@pytest.mark.parametrize("axis", ["", "<axis = -1>", "<axis = 2>", "<axis = -1, epsilon = 0.001>"])
def test_one_op(axis: str) -> None:
    (norm,) = norms(f"y = LayerNormalization {axis} (x, gamma, beta)")
    assert (norm.source.name, norm.output.name, norm.features, norm.name) == ("x", "y", 8, "y")
    assert norm.epsilon == pytest.approx(0.001 if "epsilon" in axis else 1e-5)
    np.testing.assert_array_equal(norm.gamma, GAMMA)
    np.testing.assert_array_equal(norm.beta, BETA)


def test_one_op_without_beta() -> None:
    (norm,) = norms("y = LayerNormalization(x, gamma)", beta=np.zeros(0, np.float32))
    np.testing.assert_array_equal(norm.beta, np.zeros(8, np.float32))


def test_further_outputs_that_nobody_reads() -> None:
    (norm,) = norms("y, mean, inverse = LayerNormalization(x, gamma, beta)")
    assert norm.output.name == "y"


@pytest.mark.parametrize(
    "body,outputs",
    [
        ("y = LayerNormalization <axis = 1> (x, g2, b2)", "float[N,S,8] y"),
        ("y, m = LayerNormalization(x, gamma, beta) z = Abs(m)", "float[N,S,8] y, float[N,S,1] z"),
        ("y, m = LayerNormalization(x, gamma, beta)", "float[N,S,8] y, float[N,S,1] m"),
        ("k = Abs(gamma) y = LayerNormalization(x, k, beta)", "float[N,S,8] y"),
        ("k = Abs(beta) y = LayerNormalization(x, gamma, k)", "float[N,S,8] y"),
    ],
)
def test_one_op_that_must_stay(body: str, outputs: str) -> None:
    assert norms(body, outputs=outputs, g2=np.ones((4, 8), np.float32), b2=np.ones((4, 8), np.float32)) == []


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"square": "Mul(c, c)"},
        {"mean": "ReduceMean <axes = [2]> (x)", "variance": "ReduceMean <axes = [2], keepdims = 1> (q)"},
        {"epsilon": "Add({1e-6}, v)"},
        {"scale": "Mul(gamma, d)", "shift": "Add(beta, t)"},
    ],
)
def test_nine_ops(spelling: dict[str, str]) -> None:
    (norm,) = norms(decomposed(**spelling))
    assert (norm.source.name, norm.output.name, len(norm.nodes)) == ("x", "y", 9)
    assert norm.epsilon == pytest.approx(1e-6)
    np.testing.assert_array_equal(norm.gamma, GAMMA)


def test_axes_as_an_input() -> None:
    header = '<ir_version: 8, opset_import: ["" : 18]>\n'
    body = decomposed(mean="ReduceMean(x, axes)", variance="ReduceMean(q, axes)")
    text = f"g (float[N,S,8] x) => (float[N,S,8] y) {{ {body} }}"
    (norm,) = find_norms(model_of(text, header, gamma=GAMMA, beta=BETA, axes=np.array([-1])))
    assert norm.features == 8


@pytest.mark.parametrize(
    "spelling",
    [
        {"mean": "ReduceMean <axes = [1]> (x)"},
        {"variance": "ReduceMean <axes = [1]> (q)"},
        {"square": "Pow(c, {3.0})"},
        {"sub": "Sub(u, x)"},
        {"epsilon": "Add(v, u)"},
        {"div": "Div(x, r)"},
        {"scale": "Mul(d, u)"},
        {"scale": "Mul(d, {2.0})"},
        {"shift": "Add(t, x)"},
        {"scale": "Add(d, gamma)"},
    ],
)
def test_what_only_looks_alike(spelling: dict[str, str]) -> None:
    assert norms(decomposed(**spelling)) == []


@pytest.mark.parametrize("name", list("cqverdt"))
def test_steps_that_others_read(name: str) -> None:
    assert norms(f"{decomposed()} z = Abs({name})", outputs="float[N,S,8] y, float[N,S,A] z") == []
    assert norms(decomposed(), outputs=f"float[N,S,8] y, float[N,S,B] {name}") == []


def test_parameters_that_widen_the_result() -> None:
    text = f"g (float[N,S,1] x) => (float[N,S,8] y) {{ {decomposed()} }}"
    assert find_norms(model_of(text, OLD, gamma=GAMMA, beta=BETA)) == []
    wide = {"gamma": GAMMA.reshape(1, 1, 1, 8), "beta": BETA}
    text = f"g (float[N,S,8] x) => (float[1,N,S,8] y) {{ {decomposed()} }}"
    assert find_norms(model_of(text, OLD, **wide)) == []


def test_parameters_of_other_types() -> None:
    text = "g (double[N,8] x) => (double[N,8] y) { y = LayerNormalization(x, gamma, beta) }"
    assert find_norms(model_of(text, OLD, gamma=GAMMA.astype(np.float64), beta=BETA.astype(np.float64))) == []
