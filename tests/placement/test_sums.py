"""Two products that are added become one site, with the bias and the activation behind them."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.placement.sites import Site, find_sites, held
from spa_compiler.placement.sums import join_sums
from tests.networks import F32, model_of

RNG = np.random.default_rng(0)


def array(*shape: int) -> F32:
    return RNG.standard_normal(shape).astype(np.float32)


WEIGHTS = {"w": array(8, 6), "d": array(8, 3), "u": array(3, 6), "p": array(6), "q": array(6), "r": array(6)}
THIN = "g (float[N,S,8] x) => (float[N,S,6] y) { z = MatMul(x, d) "


def summed(text: str, **feeds: F32) -> list[Site]:
    given = feeds or {"x": np.zeros((2, 3, 8), np.float32)}
    model = model_of(text, **{n: w for n, w in WEIGHTS.items() if f" {n})" in text or f"({n}," in text})
    return join_sums(find_sites(model)[0], held(model.graph), [graph_shapes.fixed(model, given)])


def names(sites: list[Site]) -> list[list[str]]:
    return [[p.name for p in site.products] for site in sites]


@pytest.mark.parametrize("operands", ["a, b", "b, a"])
def test_both_orders(operands: str) -> None:
    sites = summed(THIN + f"a = MatMul(x, w) b = MatMul(z, u) y = Add({operands}) }}")
    assert names(sites) == [["z"], ["a", "b"]]
    total = sites[1]
    assert (total.output.name, total.source.name, total.bias, total.act) == ("y", "x", None, "none")
    assert total.term is not None
    assert total.term.source.name == "z"
    assert [n.name for n in total.nodes] == ["a", "b", "y"]


@pytest.mark.parametrize(
    ("body", "biases"),
    [
        ("a0 = MatMul(x, w) a = Add(a0, p) b = MatMul(z, u) y = Add(a, b)", "p"),
        ("a = MatMul(x, w) b0 = MatMul(z, u) b = Add(q, b0) y = Add(a, b)", "q"),
        ("a = MatMul(x, w) b = MatMul(z, u) s = Add(b, a) y = Add(s, r)", "r"),
        ("a0 = MatMul(x, w) a = Add(a0, p) b0 = MatMul(z, u) b = Add(q, b0) s = Add(b, a) y = Add(r, s)", "pqr"),
    ],
)
def test_biases_at_either_product_and_behind_the_sum(body: str, biases: str) -> None:
    total = summed(f"{THIN}{body} }}")[1]
    assert total.output.name == "y"
    assert total.bias is not None
    np.testing.assert_allclose(total.bias, sum(WEIGHTS[b] for b in biases), rtol=1e-6)


def test_an_activation_behind_the_sum() -> None:
    (_, total) = summed(THIN + "a = MatMul(x, w) b = MatMul(z, u) s = Add(a, b) t = Add(s, r) y = Relu(t) }")
    assert (total.act, total.output.name) == ("relu", "y")


@pytest.mark.parametrize(
    "body",
    [
        "a0 = MatMul(x, w) a = Relu(a0) b = MatMul(z, u) y = Add(a, b)",  # not linear
        "a = MatMul(x, w) b = MatMul(z, u) t = Tanh(b) y0 = Add(a, b) y = Add(y0, t)",  # one is read elsewhere
        "a = MatMul(x, w) y = Add(a, a)",
    ],
)
def test_what_is_no_sum_of_two_sites(body: str) -> None:
    assert all(s.term is None for s in summed(f"{THIN}{body} }}"))


def test_a_sum_that_broadcasts_stays() -> None:
    text = (
        """g (float[N,S,8] x, float[1,S,8] v) => (float[N,S,6] y) { a = MatMul(x, w) b = MatMul(v, w) y = Add(a, b) }"""
    )
    one, two = np.zeros((1, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)
    assert names(summed(text, x=two, v=one)) == [["a"], ["b"]]
    assert names(summed(text, x=one, v=one)) == [["a", "b"]]


def test_a_convolution_and_a_matrix_product_are_no_sum() -> None:
    """Their panels have their features elsewhere."""
    model = model_of(
        "g (float[1,6,6,6] x) => (float[1,6,6,6] y) { a = Conv(x, c) b = MatMul(x, w) y = Add(a, b) }",
        c=array(6, 6, 1, 1),
        w=array(6, 6),
    )
    known = [graph_shapes.fixed(model, {"x": np.zeros((1, 6, 6, 6), np.float32)})]
    assert names(join_sums(find_sites(model)[0], held(model.graph), known)) == [["a"], ["b"]]


def test_of_three_products_two_are_joined() -> None:
    sites = summed(THIN + "a = MatMul(x, w) b = MatMul(z, u) c = MatMul(x, w) s = Add(a, b) y = Add(s, c) }")
    assert names(sites) == [["z"], ["a", "b"], ["c"]]


def test_planes() -> None:
    model = model_of(
        "g (float[1,8,4,4] x) => (float[1,6,4,4] y) { z = Conv(x, d) a = Conv(x, w, p) b = Conv(z, u, q) y = Add(b, a) }",
        **{n: np.ascontiguousarray(WEIGHTS[n].T)[..., None, None] for n in "wdu"},
        p=WEIGHTS["p"],
        q=WEIGHTS["q"],
    )
    known = [graph_shapes.fixed(model, {"x": np.zeros((1, 8, 4, 4), np.float32)})]
    sites = join_sums(find_sites(model)[0], held(model.graph), known)
    assert names(sites) == [["z"], ["a", "b"]]
    assert sites[1].bias is not None
    np.testing.assert_allclose(sites[1].bias, WEIGHTS["p"] + WEIGHTS["q"], rtol=1e-6)
