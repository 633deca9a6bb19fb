"""Low-rank layers are found by their structure; what is not thin, or read elsewhere, is none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.kernels.sliced import Slices
from spa_compiler.placement.candidates import LOW_RANK, chain_classes, layouts, stored_forms
from spa_compiler.placement.chains import Chain, find_chains
from spa_compiler.placement.sites import find_sites, held
from tests.networks import F32, model_of, weight

RNG = np.random.default_rng(0)
K, N, R = 24, 16, 4
WEIGHTS = {
    "d": weight(RNG, K, R),
    "u": weight(RNG, R, N),
    "v": weight(RNG, R, N),
    "w": weight(RNG, K, N, 0.3),
    "f": weight(RNG, K, N),
    "wide": weight(RNG, K, 20),
    "back": weight(RNG, 20, N),
    "b": weight(RNG, 1, N)[0],
}
HEAD = f"g (float[N,S,{K}] x) => "
ONE = HEAD + f"(float[N,S,{N}] y) "


def chains(text: str, tokens: int = 3, **weights: F32) -> list[Chain]:
    read = {name for call in re.findall(r"\(([^()]*)\)", text) for name in re.split(r",\s*", call)}
    model = model_of(text, **{n: w for n, w in (WEIGHTS | weights).items() if n in read})
    sites = find_sites(model)[0]
    shape = next(tuple(t.shape) for t in model.graph.inputs)
    feed = {"x": np.zeros([s if isinstance(s, int) else tokens for s in shape], np.float32)}
    known = [graph_shapes.fixed(model, feed)]
    return find_chains(sites, {s.name for s in sites if stored_forms(s)}, held(model.graph), known)


def names(chain: Chain) -> list[str]:
    return [s.name for s in chain.products]


def test_two_products_with_bias_and_activation() -> None:
    (chain,) = chains(ONE + "{ z = MatMul(x, d) m = MatMul(z, u) a = Add(m, b) y = Relu(a) }")
    assert names(chain) == ["z", "m"]
    assert chain.sparse == ()
    assert [e.output.name for e in chain.group.elements] == ["z", "y"]
    assert [w.name for w in layouts(chain, {})] == [LOW_RANK]
    assert layouts(chain, {})[0].of(chain) == {"z": Blocks(4), "m": Blocks(4)}


@pytest.mark.parametrize("operands", ["s, m", "m, s"])
def test_a_sparse_weight_beside(operands: str) -> None:
    (chain,) = chains(ONE + f"{{ s = MatMul(x, w) z = MatMul(x, d) m = MatMul(z, u) y = Add({operands}) }}")
    assert names(chain) == ["z", "s", "m"]
    assert [s.name for s in chain.sparse] == ["s"]
    ways = layouts(chain, {})
    assert [w.name for w in ways] == [f"{f.name} + low rank" for f in (Blocks(1), Blocks(4), Blocks(8), Slices())]
    assert ways[2].of(chain) == {"z": Blocks(4), "s": Blocks(8), "m": Blocks(4)}


def test_a_dense_weight_beside_stays_outside() -> None:
    """An adapter: the dense product has nothing to leave out."""
    (chain,) = chains(ONE + "{ s = MatMul(x, f) z = MatMul(x, d) m = MatMul(z, u) y = Add(s, m) }")
    assert names(chain) == ["z", "m"]


def test_a_sparse_weight_that_reads_something_else_stays_outside() -> None:
    (chain,) = chains(ONE + "{ t = Tanh(x) s = MatMul(t, w) z = MatMul(x, d) m = MatMul(z, u) y = Add(s, m) }")
    assert names(chain) == ["z", "m"]


def test_several_share_the_thin_tensor() -> None:
    (chain,) = chains(
        HEAD + f"(float[N,S,{N}] p, float[N,S,{N}] q) "
        "{ z = MatMul(x, d) p = MatMul(z, u) s = MatMul(x, w) m = MatMul(z, v) q = Add(m, s) }"
    )
    assert names(chain) == ["z", "p", "s", "m"]
    assert [s.name for s in chain.sparse] == ["s"]
    assert len(layouts(chain, {})) == 4


def test_convolutions() -> None:
    planes = {n: np.ascontiguousarray(WEIGHTS[n].T)[..., None, None] for n in ("d", "u", "w")}
    text = f"g (float[N,{K},4,4] x) => (float[N,{N},4,4] y) {{ z = Conv(x, d) m = Conv(z, u, b) s = Conv(x, w) y = Add(s, m) }}"
    (chain,) = chains(text, **planes)
    assert names(chain) == ["z", "s", "m"]
    assert chain.group.layout == "planes"


@pytest.mark.parametrize(
    "text",
    [
        ONE + "{ z = MatMul(x, wide) y = MatMul(z, back) }",  # more work than the product
        ONE + "{ z0 = MatMul(x, d) z = Relu(z0) y = MatMul(z, u) }",  # something happens in between
        ONE + "{ z = MatMul(x, d) y0 = MatMul(z, u) t = ReduceMean(z) y = Mul(y0, t) }",  # read elsewhere
        HEAD + f"(float[N,S,{N}] y, float[N,S,{R}] z) {{ z = MatMul(x, d) y = MatMul(z, u) }}",  # given out
        HEAD + f"(float[N,S,{R}] z) {{ z = MatMul(x, d) }}",
    ],
)
def test_what_is_no_low_rank_layer(text: str) -> None:
    assert chains(text) == []


def test_no_site_is_in_two() -> None:
    a, b, c = weight(RNG, K, 12), weight(RNG, 12, 2), weight(RNG, 2, K)
    found = chains(HEAD + f"(float[N,S,{K}] y) {{ p = MatMul(x, a) q = MatMul(p, b) y = MatMul(q, c) }}", a=a, b=b, c=c)
    members = [n for chain in found for n in names(chain)]
    assert len(members) == len(set(members)) == 2


def test_what_widens_for_one_layer_is_not_thin_for_the_next() -> None:
    """`q` is one of the two that read the thin `p`, and would be thin for `o`, too."""
    a, b, c, e = weight(RNG, K, 8), weight(RNG, 8, 2), weight(RNG, 8, 40), weight(RNG, 2, K)
    body = "{ p = MatMul(x, a) q = MatMul(p, b) y = MatMul(p, c) o = MatMul(q, e) }"
    found = chains(HEAD + f"(float[N,S,40] y, float[N,S,{K}] o) {body}", a=a, b=b, c=c, e=e)
    assert [names(chain) for chain in found] == [["p", "q", "y"]]


def test_a_sparse_weight_beside_of_which_no_shape_is_known_stays_outside() -> None:
    model = model_of(
        ONE + "{ s = MatMul(x, w) z = MatMul(x, d) m = MatMul(z, u) y = Add(s, m) }",
        **{name: WEIGHTS[name] for name in "wdu"},
    )
    (chain,) = find_chains(find_sites(model)[0], {"s"}, held(model.graph), [{}])
    assert names(chain) == ["z", "m"]


def test_a_sparse_weight_beside_that_broadcasts_stays_outside() -> None:
    (chain,) = chains(
        ONE + "{ s = MatMul(x, one) z = MatMul(x, d) m = MatMul(z, u) y = Add(s, m) }", one=weight(RNG, K, 1, 0.3, 1)
    )
    assert names(chain) == ["z", "m"]


def test_sparse_weights_beside_one_thin_tensor_have_one_height() -> None:
    body = "{ z = MatMul(x, d) p0 = MatMul(z, u) s = MatMul(x, w) p = Add(p0, s) q0 = MatMul(z, v) t = MatMul(x, f) q = Add(q0, t) }"
    text = HEAD + f"(float[N,S,{N}] p, float[N,S,{N}] q) {body}"
    scattered = weight(RNG, K, N, 0.8, rows=1)  # too dense in 4 x 1 blocks
    (chain,) = chains(text, f=scattered)
    assert names(chain) == ["z", "s", "p0", "t", "q0"]
    assert [way.name for way in layouts(chain, {})] == [
        "unstructured + low rank",
        "unstructured interleaved + low rank",
    ]


def test_factors_with_zeros_of_their_own_keep_their_height() -> None:
    (chain,) = chains(ONE + "{ z = MatMul(x, d) y = MatMul(z, u) }")
    assert layouts(chain, {"y": Blocks(8)})[0].of(chain) == {"z": Blocks(4), "y": Blocks(8)}


def test_like_layers_are_one_class() -> None:
    text = (
        HEAD + f"(float[N,S,{N}] y, float[N,S,{N}] t, float[N,S,{N}] o) "
        "{ z = MatMul(x, d) y = MatMul(z, u) p = MatMul(x, d) t = MatMul(p, v) q = MatMul(x, d) o0 = MatMul(q, u) o = Relu(o0) }"
    )
    found = chains(text)
    classes = chain_classes(found, {}, [{"x": (1, 3, K)}])
    assert [[names(c) for c in each.chains] for each in classes] == [[["z", "y"], ["p", "t"]], [["q", "o0"]]]
    questions = [c.question((1, 3, K), 1) for c in classes]
    assert questions[0] != questions[1]
    assert questions[0] != classes[0].question((1, 5, K), 1)


def test_a_sum_of_two_and_two_results_are_two_classes() -> None:
    text = (
        HEAD + f"(float[N,S,{N}] y, float[N,S,{N}] p, float[N,S,{N}] q) "
        "{ z = MatMul(x, d) m = MatMul(z, u) l = MatMul(z, v) y = Add(m, l) "
        "t = MatMul(x, d) p = MatMul(t, u) q = MatMul(t, v) }"
    )
    classes = chain_classes(chains(text), {}, [{"x": (1, 3, K)}])
    assert [names(c.chains[0]) for c in classes] == [["z", "m", "l"], ["t", "p", "q"]]
    assert len({repr(c.question((1, 3, K), 1)) for c in classes}) == 2


@pytest.mark.parametrize(
    "calls",
    [
        "z = Conv(x, thin) y = Conv <pads = [1, 1, 1, 1]> (z, taps)",
        "z = Conv <pads = [1, 1, 1, 1]> (x, look) y = Conv(z, up)",
    ],
)
def test_a_convolution_with_a_window_is_no_part(calls: str) -> None:
    weights = {
        "thin": np.ones((4, 24, 1, 1), np.float32),
        "taps": np.ones((16, 4, 3, 3), np.float32),
        "look": np.ones((4, 24, 3, 3), np.float32),
        "up": np.ones((16, 4, 1, 1), np.float32),
    }
    text = f"g (float[1,24,5,5] x) => (float[1,16,5,5] y) {{ {calls} }}"
    assert chains(text, **{name: w for name, w in weights.items() if name in calls}) == []
