"""LayerNormalization and RMS norm, as one op or decomposed; what normalizes otherwise is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.load import load
from spa_compiler.placement.norms import NormSite, find_norms
from tests.networks import F32, model_of, network

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


def of_x(found: list[NormSite]) -> list[NormSite]:
    """Without those of what the nodes have centred, which are RMS norms by themselves."""
    return [norm for norm in found if norm.source.name == "x"]


def test_the_norm_of_what_is_centred_is_an_rms_norm() -> None:
    (norm,) = norms(decomposed(shift="Add(t, x)"))
    assert (norm.source.name, norm.output.name, norm.beta) == ("c", "t", None)


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
    assert of_x(norms(decomposed(**spelling))) == []


@pytest.mark.parametrize("name", list("cqverdt"))
def test_steps_that_others_read(name: str) -> None:
    assert of_x(norms(f"{decomposed()} z = Abs({name})", outputs="float[N,S,8] y, float[N,S,A] z")) == []
    assert of_x(norms(decomposed(), outputs=f"float[N,S,8] y, float[N,S,B] {name}")) == []


def test_parameters_that_widen_the_result() -> None:
    text = f"g (float[N,S,1] x) => (float[N,S,8] y) {{ {decomposed()} }}"
    assert find_norms(model_of(text, OLD, gamma=GAMMA, beta=BETA)) == []
    wide = {"gamma": GAMMA.reshape(1, 1, 1, 8), "beta": BETA}
    text = f"g (float[N,S,8] x) => (float[1,N,S,8] y) {{ {decomposed()} }}"
    assert find_norms(model_of(text, OLD, **wide)) == []


def test_parameters_of_other_types() -> None:
    text = "g (double[N,8] x) => (double[N,8] y) { y = LayerNormalization(x, gamma, beta) }"
    assert find_norms(model_of(text, OLD, gamma=GAMMA.astype(np.float64), beta=BETA.astype(np.float64))) == []


NEW = '<ir_version: 11, opset_import: ["" : 23]>\n'
MICROSOFT = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'


def rms(
    square: str = "Pow(x, {2.0})",
    mean: str = "ReduceMean <axes = [-1]> (q)",
    epsilon: str = "Add(m, {1e-6})",
    over: str = "d = Div(x, r)",
    scale: str = "Mul(d, gamma)",
) -> str:
    return f"q = {square} m = {mean} e = {epsilon} r = Sqrt(e) {over} y = {scale}"


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"square": "Mul(x, x)", "scale": "Mul(gamma, d)"},
        {"mean": "ReduceMean <axes = [2]> (q)", "epsilon": "Add({1e-6}, m)"},
        {"over": "i = Reciprocal(r) d = Mul(x, i)"},
        {"over": "i = Div({1.0}, r) d = Mul(i, x)"},
    ],
)
def test_an_rms_norm(spelling: dict[str, str]) -> None:
    (norm,) = norms(rms(**spelling))
    assert (norm.source.name, norm.output.name, norm.beta) == ("x", "y", None)
    assert [n.op for n in norm.nodes][1:4] == ["ReduceMean", "Add", "Sqrt"]
    assert len(norm.nodes) == (7 if "over" in spelling else 6)
    assert norm.epsilon == pytest.approx(1e-6)
    np.testing.assert_array_equal(norm.gamma, GAMMA)


def test_an_rms_norm_as_one_op() -> None:
    text = "g (float[N,S,8] x) => (float[N,S,8] y) { y = RMSNormalization <epsilon = 0.001> (x, gamma) }"
    (norm,) = find_norms(model_of(text, NEW, gamma=GAMMA))
    assert (norm.beta, norm.source.name, norm.epsilon) == (None, "x", pytest.approx(0.001))
    text = text.replace("RMSNormalization <epsilon = 0.001>", "com.microsoft.SimplifiedLayerNormalization")
    proto = network(text, MICROSOFT, check=False, gamma=GAMMA)
    (norm,) = find_norms(load(proto))
    assert (norm.beta, norm.output.name) == (None, "y")


@pytest.mark.parametrize(
    "spelling",
    [
        {"mean": "ReduceMean <axes = [1]> (q)"},
        {"mean": "ReduceMean <axes = [-1, 1]> (q)"},
        {"mean": "ReduceMean <axes = [-1], keepdims = 0> (q)"},
        {"mean": "ReduceMax <axes = [-1]> (q)"},
        {"square": "Pow(x, {3.0})"},
        {"square": "Mul(x, x2)"},
        {"epsilon": "Identity(m)"},
        {"epsilon": "Add(m, m)"},
        {"over": "d = Div(r, x)"},
        {"over": "d = Div(x2, r)"},
        {"over": "d = Mul(x, r)"},
        {"over": "i = Div({2.0}, r) d = Mul(x, i)"},
        {"over": "i = Div(r, {1.0}) d = Mul(x, i)"},
        {"over": "i = Reciprocal(r) d = Mul(x2, i)"},
        {"scale": "Mul(d, x)"},
        {"scale": "Mul(d, {2.0})"},
        {"scale": "Add(d, gamma)"},
    ],
)
def test_what_only_looks_like_an_rms_norm(spelling: dict[str, str]) -> None:
    proto = network(
        f"g (float[N,S,8] x) => (float[N,S,8] y) {{ x2 = Abs(x) {rms(**spelling)} }}", OLD, False, gamma=GAMMA
    )
    assert find_norms(load(proto)) == []


@pytest.mark.parametrize("name", list("qmerd"))
def test_steps_of_an_rms_norm_that_others_read(name: str) -> None:
    assert norms(f"{rms()} z = Abs({name})", outputs="float[N,S,8] y, float[N,S,A] z") == []
    assert norms(rms(), outputs=f"float[N,S,8] y, float[N,S,B] {name}") == []


@pytest.mark.parametrize(
    "node",
    [
        "RMSNormalization <axis = 1> (x, g2)",
        "RMSNormalization <stash_type = 11> (x, gamma)",
        "RMSNormalization(x, k)",
    ],
)
def test_one_rms_op_that_must_stay(node: str) -> None:
    text = f"g (float[N,4,8] x) => (float[N,4,8] y) {{ k = Abs(gamma) y = {node} }}"
    assert find_norms(model_of(text, NEW, gamma=GAMMA, g2=np.ones((4, 8), np.float32))) == []
