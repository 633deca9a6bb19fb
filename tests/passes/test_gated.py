"""Gated feed-forward blocks are found where they are, and `dass` looks at their products."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.gated import gates
from tests.networks import model_of
from tests.passes.tiny import context, correlated, rows, samples, sparsify

SILU = "c = Sigmoid (g) act = Mul (g, c)"
GELU = "d = Div (g, {1.4142}) e = Erf (d) o = Add (e, {1.0}) t = Mul (g, o) act = Mul (t, {0.5})"


def gated(middle: str, product: str = "h = Mul (act, u)", width: int = 16) -> Model:
    rng = np.random.default_rng(0)
    text = f"""agraph (float[batch, 8] x) => (float[batch, 8] y)
    {{ g = MatMul (x, G) u = MatMul (x, U) {middle} {product}
       w = MatMul (h, D) s = Add (w, x) y = LayerNormalization (s, ones) }}"""
    shapes = {"G": (8, width), "U": (8, 16), "D": (16, 8)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return model_of(text, ones=np.ones(8, np.float32), **weights)


@pytest.mark.parametrize("middle", [SILU, GELU, "act = Relu (g)", "act = Identity (g)"])
@pytest.mark.parametrize("product", ["h = Mul (act, u)", "h = Mul (u, act)"])
def test_gate_up_and_down_are_found(middle: str, product: str) -> None:
    assert gates(weighted_ops(gated(middle, product).graph)) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    "middle, product",
    [
        ("act = Sigmoid (g)", "h = Mul (g, act)"),  # x * sigmoid(x): an activation, no gate
        ("act = Relu (g)", "h = Add (act, u)"),
        ("act = Softmax (g)", "h = Mul (act, u)"),  # mixes the features
        ("act = Mul (g, x0)", "h = Mul (act, act)"),
        ("act = Add (g, u)", "h = Mul (act, u)"),  # one side is made of both
        ("act = Relu (g)", "h = Mul (act, {2.0})"),
    ],
)
def test_what_is_no_gate(middle: str, product: str) -> None:
    middle = middle.replace("x0", "{0.5}")
    assert gates(weighted_ops(gated(middle, product).graph)) == {}


def test_a_gate_of_another_width_is_none() -> None:
    """One that is stretched over all features says nothing of each."""
    assert gates(weighted_ops(gated("act = Sigmoid (g)", width=1).graph)) == {}


def test_what_is_far_away_is_no_gate() -> None:
    chain = " ".join(f"a{i + 1} = Relu (a{i})" for i in range(70))
    assert gates(weighted_ops(gated(f"a0 = Relu (g) {chain} act = Relu (a70)").graph)) == {}


def test_dass_weighs_outputs_by_what_the_product_makes_of_them() -> None:
    """A feature whose up projection is 0 has no say, so its gate goes first; magnitude cannot know."""
    data = samples({"x": correlated(200, 8, 0)})
    found = {}
    for method in ("dass", "magnitude"):
        model = gated(SILU)
        gate, up, _ = weighted_ops(model.graph)
        quiet = up.rows().copy()
        quiet[:4] = 0
        up.replace(quiet)
        loud = gate.rows().copy()
        loud[:4] *= 10
        gate.replace(loud)
        sparsify(model, context(data), sparsity=0.25, method=method, targets=("g", "u", "w"))
        found[method] = rows(model)[0]
    assert not found["dass"][:4].any()
    assert found["magnitude"][:4].all()


def test_dass_is_wanda_where_there_is_no_gate() -> None:
    data = samples({"x": correlated(200, 8, 0)})
    results = []
    for method in ("dass", "wanda"):
        model = gated("act = Relu (g)", "h = Add (act, u)")
        sparsify(model, context(data), sparsity=0.5, method=method, pattern="fan-in")
        results.append(rows(model))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
