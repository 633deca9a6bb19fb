"""Which sites, residuals and norms become one node, stated as the names of what each node takes in."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.model import Model
from spa_compiler.placement.attention import find_attention
from spa_compiler.placement.between import find_between
from spa_compiler.placement.depthwise import find_depthwise
from spa_compiler.placement.norms import find_norms
from spa_compiler.placement.regions import Group, join, single
from spa_compiler.placement.sites import Site, find_sites
from spa_compiler.runtime.region import MAX_INPUTS, MAX_OUTPUTS
from tests.networks import F32, model_of

RNG = np.random.default_rng(0)
Feeds = dict[str, F32]


def matrix(k: int = 8, n: int = 8) -> F32:
    return RNG.standard_normal((k, n)).astype(np.float32)


SQUARE = {name: matrix() for name in ("w", "v", "u")}
VECTORS = {"gamma": matrix(1, 8)[0], "beta": matrix(1, 8)[0]}


def joined(model: Model, *feeds: Feeds, only: set[str] | None = None) -> list[Group]:
    """Groups of all sites, or of those named."""
    given = feeds or ({"x": np.zeros((2, 3, 8), np.float32)},)
    known = [graph_shapes.fixed(model, feed) for feed in given]
    sites = [s for s in find_sites(model)[0] if only is None or s.name in only]
    between = [*find_depthwise(model), *find_between(model, known)]
    return join(model, sites, find_norms(model), find_attention(model, known), between, known)


def elements(groups: list[Group]) -> list[list[str]]:
    """Output names of every group's elements."""
    return [[e.output.name for e in g.elements] for g in groups]


def test_single_sites_stay_by_themselves() -> None:
    model = model_of("g (float[N,S,8] x) => (float[N,S,8] y) { h = MatMul(x, w) y = MatMul(h, v) }", **SQUARE)
    assert elements(single(find_sites(model)[0])) == [["h"], ["y"]]


def test_a_chain() -> None:
    model = model_of(
        "g (float[N,S,8] x) => (float[N,S,8] y) { h = MatMul(x, w) r = Relu(h) g = MatMul(r, v) y = MatMul(g, u) }",
        **SQUARE,
    )
    (group,) = joined(model)
    assert elements([group]) == [["r", "g", "y"]]
    assert [t.name for t in group.external()] == ["x"]
    assert [t.name for t in group.results(model.graph.outputs)] == ["y"]


def test_a_chain_with_something_else_in_between_is_cut() -> None:
    model = model_of(
        "g (float[N,S,8] x) => (float[N,S,8] y) { h = MatMul(x, w) r = Tanh(h) y = MatMul(r, v) }", **SQUARE
    )
    assert elements(joined(model)) == [["h"], ["y"]]


def test_sites_that_stay_dense_are_no_part() -> None:
    model = model_of(
        "g (float[N,S,8] x) => (float[N,S,8] y) { h = MatMul(x, w) g = MatMul(h, v) y = MatMul(g, u) }", **SQUARE
    )
    assert elements(joined(model, only={"h", "y"})) == [["h"], ["y"]]


@pytest.mark.parametrize("operands", ["m, x", "x, m"])
def test_a_residual_and_a_norm(operands: str) -> None:
    model = model_of(
        f"""g (float[N,S,8] x) => (float[N,S,8] y) {{
          m = MatMul(x, w) s = Add({operands}) n = LayerNormalization(s, gamma, beta) y = MatMul(n, v) }}""",
        **SQUARE,
        **VECTORS,
    )
    (group,) = joined(model)
    assert elements([group]) == [["s", "n", "y"]]
    site = group.elements[0]
    assert isinstance(site, Site)
    assert site.residual is not None
    assert site.residual.name == "x"
    assert [t.name for t in group.external()] == ["x"]


def test_the_activation_behind_a_residual_comes_along() -> None:
    text = "g (float[N,S,8] x) => (float[N,S,8] y) { m = MatMul(x, w) s = Add(m, x) r = Relu(s) y = MatMul(r, v) }"
    (group,) = joined(model_of(text, **SQUARE))
    assert elements([group]) == [["r", "y"]]
    site = group.elements[0]
    assert isinstance(site, Site)
    assert (site.act, site.residual.name if site.residual else None) == ("relu", "x")


def test_an_activation_of_a_sum_that_is_read_elsewhere_stays_outside() -> None:
    text = "g (float[N,S,8] x) => (float[N,S,8] y, float[N,S,8] s) { m = MatMul(x, w) s = Add(m, x) y = Relu(s) }"
    (group,) = joined(model_of(text, **SQUARE))
    assert elements([group]) == [["s"]]


def images(text: str, **weights: tuple[int, ...]) -> list[Group]:
    """Of a model of one input x [1, 8, 6, 6], with weights of these shapes."""
    model = model_of(text, **{name: np.ones(shape, np.float32) for name, shape in weights.items()})
    return joined(model, {"x": np.zeros((1, 8, 6, 6), np.float32)})


def test_windows_join_their_neighbours_and_take_a_residual() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
      a = Conv(x, w) b = Conv <pads = [1, 1, 1, 1]> (a, v) s = Add(b, x) r = Relu(s) y = Conv(r, w) }"""
    (group,) = images(text, w=(8, 8, 1, 1), v=(8, 8, 3, 3))
    assert elements([group]) == [["a", "r", "y"]]
    assert [t.name for t in group.external()] == ["x"]


def test_images_of_several_sizes_share_a_region() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,3,3] y) {
      a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, v) b = Conv <strides = [2, 2]> (x, w) y = Add(a, b) }"""
    (group,) = images(text, w=(8, 8, 1, 1), v=(8, 8, 3, 3))
    assert elements([group]) == [["b", "y"]]


def test_depthwise_convolutions_stay_inside() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,3,3] y) {
      a = Conv(x, w) b = Conv <group = 8, strides = [2, 2], pads = [1, 1, 1, 1]> (a, d) r = Relu(b) y = Conv(r, w) }"""
    (group,) = images(text, w=(8, 8, 1, 1), d=(8, 1, 3, 3))
    assert elements([group]) == [["a", "r", "y"]]


def test_a_depthwise_convolution_alone_is_left_to_onnx_runtime() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
      a = Conv <group = 8> (x, d) t = Tanh(a) y = Conv(t, w) }"""
    assert elements(images(text, w=(8, 8, 1, 1), d=(8, 1, 1, 1))) == [["y"]]


def test_a_split_and_a_concatenation_stay_inside() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
      a = Conv(x, w) l, r = Split <axis = 1, num_outputs = 2> (a) c = Conv(r, u) t = Relu(c) s = Add(t, r)
      k = Concat <axis = 1> (l, s) p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (k) y = Conv(p, w) }"""
    (group,) = images(text, w=(8, 8, 1, 1), u=(4, 4, 1, 1))
    assert elements([group]) == [["a", "l", "r", "t", "s", "k", "p", "y"]]
    assert [t.name for t in group.external()] == ["x"]


def test_what_stands_at_the_rim_of_a_region_stays_outside() -> None:
    """A pool on what others made, a concatenation of that, what is only taken apart or made larger on the way out."""
    text = """g (float[1,8,6,6] x) => (float[1,4,6,6] l, float[1,4,6,6] r, float[1,8,12,12] z, float[1,16,6,6] o) {
      p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x) q = Concat <axis = 1> (p, x) a = Conv(q, w)
      l, r = Split <axis = 1, num_outputs = 2> (a) z = Resize <mode = "nearest"> (a, , scales)
      o = Concat <axis = 1> (x, a) }"""
    model = model_of(text, w=matrix(16, 8).reshape(8, 16, 1, 1), scales=np.array([1, 1, 2, 2], np.float32))
    assert elements(joined(model, {"x": np.zeros((1, 8, 6, 6), np.float32)})) == [["a"]]


def test_a_pool_of_what_a_region_makes_comes_along_and_outputs_are_put_together_inside() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,1,1] g, float[1,16,6,6] o) {
      a = Conv(x, w) g = GlobalAveragePool(a) b = Conv(a, w) o = Concat <axis = 1> (a, b) }"""
    assert elements(images(text, w=(8, 8, 1, 1))) == [["a", "g", "b", "o"]]


def test_channels_are_scaled_by_their_means() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
      a = Conv(x, w) r = Relu(a) g = GlobalAveragePool(r) c = Conv(g, w) s = Sigmoid(c) m = Mul(s, r) y = Conv(m, w) }"""
    assert elements(images(text, w=(8, 8, 1, 1))) == [["r", "g", "s", "m", "y"]]


def test_an_activation_belongs_to_one_element() -> None:
    """x sigmoid(x) behind a depthwise convolution is its activation, not a product of two images."""
    text = """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
      a = Conv(x, w) d = Conv <group = 8> (a, v) s = Sigmoid(d) m = Mul(d, s) y = Conv(m, w) }"""
    assert elements(images(text, w=(8, 8, 1, 1), v=(8, 1, 1, 1))) == [["a", "m", "y"]]


def test_other_numbers_of_images_or_axes_forbid_a_merge() -> None:
    text = """g (float[1,8,6,6] x) => (float[6,8,6] y) {
      a = Conv(x, w) t = Transpose <perm = [2, 1, 3, 0]> (a) s = Squeeze(t) y = Conv(s, v) }"""
    assert elements(images(text, w=(8, 8, 1, 1), v=(8, 8, 1))) == [["a"], ["y"]]


def test_a_residual_behind_an_activation_stays_outside() -> None:
    model = model_of("g (float[N,S,8] x) => (float[N,S,8] y) { m = MatMul(x, w) r = Relu(m) y = Add(r, x) }", **SQUARE)
    (group,) = joined(model)
    assert elements([group]) == [["r"]]


def test_a_sum_of_two_sites_is_the_residual_of_one() -> None:
    model = model_of(
        "g (float[N,S,8] x) => (float[N,S,8] y) { a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }", **SQUARE
    )
    groups = joined(model)
    taken = [n for g in groups for n in g.nodes]
    assert len({id(n) for n in taken}) == len(taken) == 3
    assert [t.name for g in groups for t in g.results(model.graph.outputs)] == ["y"]


def test_a_site_added_to_itself() -> None:
    model = model_of("g (float[N,S,8] x) => (float[N,S,8] y) { a = MatMul(x, w) y = Add(a, a) }", **SQUARE)
    assert elements(joined(model)) == [["a"]]


def test_a_broadcast_residual_stays_outside() -> None:
    text = "g (float[N,S,8] x, float[1,1,8] z) => (float[N,S,8] y) { m = MatMul(x, w) y = Add(m, z) }"
    feeds = {"x": np.zeros((2, 3, 8), np.float32), "z": np.zeros((1, 1, 8), np.float32)}
    assert elements(joined(model_of(text, **SQUARE), feeds)) == [["m"]]


def test_a_residual_that_is_broadcast_at_one_of_the_shapes_stays_outside() -> None:
    text = "g (float[N,S,8] x, float[M,S,8] z) => (float[N,S,8] y) { m = MatMul(x, w) y = Add(m, z) }"
    one, two = np.zeros((1, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)
    assert elements(joined(model_of(text, **SQUARE), {"x": one, "z": one})) == [["y"]]
    assert elements(joined(model_of(text, **SQUARE), {"x": one, "z": one}, {"x": two, "z": one})) == [["m"]]


def test_siblings_share_what_they_read() -> None:
    model = model_of(
        "g (float[N,S,8] x) => (float[N,S,8] q, float[N,S,8] k, float[N,S,8] v0) "
        "{ q = MatMul(x, w) k = MatMul(x, v) v0 = MatMul(x, u) }",
        **SQUARE,
    )
    (group,) = joined(model)
    assert elements([group]) == [["q", "k", "v0"]]
    assert [t.name for t in group.external()] == ["x"]
    assert [t.name for t in group.results(model.graph.outputs)] == ["q", "k", "v0"]


def test_a_detour_forbids_a_merge() -> None:
    """y needs t, and t needs h: were h and y one node, it would wait for itself."""
    text = """g (float[N,S,8] x) => (float[N,S,8] y) {
      h = MatMul(x, w) t = Tanh(h) a = MatMul(h, v) y = Add(a, t) }"""
    groups = joined(model_of(text, **SQUARE))
    assert all(not {"h", "y"} <= set(names) for names in elements(groups))


def test_a_detour_between_siblings_forbids_a_merge() -> None:
    """b reads what a gives, by way of an op outside; both read x."""
    text = """g (float[N,S,8] x) => (float[N,S,8] y) {
      a = MatMul(x, w) t = Tanh(a) b = MatMul(x, v) s = Mul(b, t) c = MatMul(s, u) d = Add(c, x) y = Tanh(d) }"""
    model = model_of(text, **SQUARE)
    groups = joined(model)
    _assert_convex(model, groups)
    assert ["a", "b"] in elements(groups), "neither waits for the other"
    text = text.replace("b = MatMul(x, v)", "b0 = MatMul(x, v) b = Add(b0, t)")
    model = model_of(text, **SQUARE)
    _assert_convex(model, joined(model))
    assert not any({"a", "b"} <= set(names) for names in elements(joined(model)))


def test_a_detour_through_a_branch_forbids_a_merge() -> None:
    text = """g (float[N,S,8] x, bool c) => (float[N,S,8] y) {
      h = MatMul(x, w)
      t = If (c) < then_branch = p () => (float[N,S,8] a0) { a0 = Tanh(h) },
                   else_branch = e () => (float[N,S,8] b0) { b0 = Identity(x) } >
      a = MatMul(h, v) y = Add(a, t) }"""
    feeds = {"x": np.zeros((2, 3, 8), np.float32), "c": np.array(True)}
    groups = joined(model_of(text, **SQUARE), feeds)  # type: ignore[arg-type]
    assert all(not {"h", "y"} <= set(names) for names in elements(groups))


def test_an_add_inside_of_a_branch_is_no_residual() -> None:
    text = """g (float[N,S,8] x, bool c) => (float[N,S,8] y) {
      h = MatMul(x, w)
      y = If (c) < then_branch = p () => (float[N,S,8] a0) { a0 = Add(h, x) },
                   else_branch = e () => (float[N,S,8] b0) { b0 = Identity(x) } > }"""
    feeds = {"x": np.zeros((2, 3, 8), np.float32), "c": np.array(True)}
    assert elements(joined(model_of(text, **SQUARE), feeds)) == [["h"]]  # type: ignore[arg-type]


def test_different_tokens_forbid_a_merge() -> None:
    """[N, S, 8] and [N x S, 8] hold the same numbers, but a panel is shared only by tensors of the same tokens."""
    text = """g (float[N,8] x, float[M,8] z) => (float[N,8] y, float[M,8] t) {
      h = MatMul(x, w) y = MatMul(h, v) a = MatMul(z, u) t = MatMul(a, w) }"""
    feeds = {"x": np.zeros((2, 8), np.float32), "z": np.zeros((3, 8), np.float32)}
    assert elements(joined(model_of(text, **SQUARE), feeds)) == [["h", "y"], ["a", "t"]]


def test_rows_and_planes_do_not_mix() -> None:
    text = """g (float[1,8,4,8] x) => (float[1,8,4,8] y, float[1,8,4,8] z) { y = Conv(x, c) z = MatMul(x, w) }"""
    model = model_of(text, c=matrix().reshape(8, 8, 1, 1), w=SQUARE["w"])
    assert elements(joined(model, {"x": np.zeros((1, 8, 4, 8), np.float32)})) == [["y"], ["z"]]


def test_convolutions_chain_across_pixels() -> None:
    text = """g (float[N,8,H,V] x) => (float[N,8,H,V] y) { h = Conv(x, c) r = Relu(h) k = Conv(r, c) y = Add(k, x) }"""
    model = model_of(text, c=matrix().reshape(8, 8, 1, 1))
    (group,) = joined(model, {"x": np.zeros((2, 8, 3, 5), np.float32)})
    assert elements([group]) == [["r", "y"]]


def test_a_norm_alone_is_left_to_onnx_runtime() -> None:
    text = """g (float[N,S,8] x) => (float[N,S,8] y) {
      n = LayerNormalization(x, gamma, beta) m = MatMul(n, w) t = Tanh(m) y = LayerNormalization(t, gamma, beta) }"""
    assert elements(joined(model_of(text, w=SQUARE["w"], **VECTORS))) == [["m"]]


GATES = "a = MatMul(x, w) s = Sigmoid(a) h = Mul(a, s) b = MatMul(x, v)"


@pytest.mark.parametrize("operands", ["h, b", "b, h"])
def test_a_gate_is_multiplied_inside(operands: str) -> None:
    text = f"g (float[N,S,8] x) => (float[N,S,8] y) {{ {GATES} m = Mul({operands}) y = MatMul(m, u) }}"
    (group,) = joined(model_of(text, **SQUARE))
    assert elements([group]) == [["b", "m", "y"]] or elements([group]) == [["h", "m", "y"]]
    taker = group.elements[1]
    assert isinstance(taker, Site)
    assert taker.factor is group.elements[0].output
    assert [t.name for t in group.external()] == ["x"]


@pytest.mark.parametrize(
    "rest",
    [
        "z = Tanh(x) m = Mul(h, z) n = Tanh(b)",  # the factor is none of ours
        "m = Div(h, b) n = Tanh(x)",
        "m = Mul(h, b) n = Add(h, b)",  # both are read elsewhere, too
        "k = Transpose <perm = [1, 0, 2]> (b) m = Mul(h, k) n = Tanh(x)",
        "m = Mul(b, b) n = Tanh(h)",
    ],
)
def test_other_products_stay_outside(rest: str) -> None:
    text = f"g (float[N,N,8] x) => (float[N,N,8] y) {{ {GATES} {rest} p = MatMul(m, u) y = Add(p, n) }}"
    groups = joined(model_of(text, **SQUARE), {"x": np.zeros((3, 3, 8), np.float32)})
    assert "m" not in {name for names in elements(groups) for name in names}
    assert all(site.factor is None for g in groups for site in g.products)


def test_a_gate_that_is_broadcast_at_one_of_the_shapes_stays_outside() -> None:
    text = """g (float[N,8] x, float[M,8] z) => (float[N,8] y) {
      a = MatMul(x, w) b = MatMul(z, v) m = Mul(a, b) y = MatMul(m, u) }"""
    one, two = np.zeros((1, 8), np.float32), np.zeros((2, 8), np.float32)
    assert "m" in str(elements(joined(model_of(text, **SQUARE), {"x": two, "z": two})))
    assert "m" not in str(elements(joined(model_of(text, **SQUARE), {"x": two, "z": two}, {"x": two, "z": one})))


RMS = (
    "q = Pow(x, {2.0}) m = ReduceMean <axes = [-1]> (q) e = Add(m, {1e-6}) r = Sqrt(e) d = Div(x, r) n = Mul(d, gamma)"
)
OPSET_17 = '<ir_version: 8, opset_import: ["" : 17]>\n'


def test_a_norm_in_front_of_a_block_comes_along() -> None:
    """The residual needs the panel of x anyway."""
    text = f"g (float[N,S,8] x) => (float[N,S,8] y) {{ {RMS} a = MatMul(n, w) b = MatMul(a, v) y = Add(x, b) }}"
    (group,) = joined(model_of(text, OPSET_17, **SQUARE, gamma=VECTORS["gamma"]))
    assert elements([group]) == [["n", "a", "y"]]
    assert [t.name for t in group.external()] == ["x"]


def test_a_norm_of_what_others_made_stays_outside_without_a_residual_or_a_reader() -> None:
    for rest in ("a = MatMul(n, w) y = MatMul(a, v)", "a = MatMul(x, w) b = Add(a, x) y = Sub(b, n)"):
        text = f"g (float[N,S,8] x) => (float[N,S,8] y) {{ {RMS} {rest} }}"
        groups = joined(model_of(text, OPSET_17, **SQUARE, gamma=VECTORS["gamma"]))
        assert all("n" not in names for names in elements(groups))


def test_a_norm_that_others_read_too_comes_out() -> None:
    text = f"""g (float[N,S,8] x) => (float[N,S,8] y, float[N,S,8] z) {{
      {RMS} a = MatMul(n, w) y = Add(x, a) z = Tanh(n) }}"""
    model = model_of(text, OPSET_17, **SQUARE, gamma=VECTORS["gamma"])
    (group,) = joined(model)
    assert [t.name for t in group.results(model.graph.outputs)] == ["n", "y"]


def test_values_inside_that_others_read_come_out() -> None:
    text = """g (float[N,S,8] x) => (float[N,S,8] y, float[N,S,8] z, float[N,S,8] h) {
      h = MatMul(x, w) y = MatMul(h, v) z = Tanh(h) }"""
    model = model_of(text, **SQUARE)
    (group,) = joined(model)
    assert [t.name for t in group.results(model.graph.outputs)] == ["h", "y"]


def test_the_c_sides_limits_hold() -> None:
    count = max(MAX_INPUTS, MAX_OUTPUTS) + 3
    outs = [f"y{i}" for i in range(count)]
    body = " ".join(f"{y} = MatMul(x, w)" for y in outs)
    model = model_of(f"g (float[N,S,8] x) => ({', '.join(f'float[N,S,8] {y}' for y in outs)}) {{ {body} }}", w=matrix())
    groups = joined(model)
    assert sum(len(g.elements) for g in groups) == count
    assert all(len(g.results(model.graph.outputs)) <= MAX_OUTPUTS for g in groups)
    inputs = [f"x{i}" for i in range(count)]
    chain = " ".join(
        f"a{i} = MatMul({f'b{i - 1}' if i else 'x0'}, w) b{i} = Add(a{i}, {x})" for i, x in enumerate(inputs)
    )
    model = model_of(
        f"g ({', '.join(f'float[N,8] {x}' for x in inputs)}) => (float[N,8] b{count - 1}) {{ {chain} }}", w=matrix()
    )
    groups = joined(model, {x: np.zeros((2, 8), np.float32) for x in inputs})
    assert sum(len(g.elements) for g in groups) == count
    assert all(len(g.external()) <= MAX_INPUTS for g in groups)


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs_stay_acyclic(seed: int) -> None:
    """Contracting every group leaves a graph without cycles, and no node belongs to two groups."""
    rng = np.random.default_rng(seed)
    lines, made, unread = [], ["x"], set[str]()
    for i in range(14):
        op = rng.choice(["MatMul", "MatMul", "MatMul", "Tanh", "Add", "LayerNormalization"])
        a, b = (made[max(0, len(made) - 1 - int(rng.integers(0, 4)))] for _ in range(2))
        call = {"MatMul": f"MatMul({a}, w)", "Tanh": f"Tanh({a})", "Add": f"Add({a}, {b})"}.get(
            str(op), f"LayerNormalization({a}, gamma, beta)"
        )
        lines.append(f"t{i} = {call}")
        unread -= {a, b} if op == "Add" else {a}
        made.append(f"t{i}")
        unread.add(f"t{i}")
    outs = ", ".join(f"float[N,S,8] {name}" for name in sorted(unread))
    model = model_of(f"g (float[N,S,8] x) => ({outs}) {{ {' '.join(lines)} }}", w=SQUARE["w"], **VECTORS)
    _assert_convex(model, joined(model))


def _assert_convex(model: Model, groups: list[Group]) -> None:
    home = {n.outputs[0].name: i for i, g in enumerate(groups) for n in g.nodes}
    assert len(home) == sum(len(g.nodes) for g in groups), "a node in two groups"
    at = {n.outputs[0].name: home.get(n.outputs[0].name, n.outputs[0].name) for n in model.graph.nodes}
    edges = {
        (at[t.name], at[n.outputs[0].name])
        for n in model.graph.nodes
        for t in n.inputs
        if t.name in at and at[t.name] != at[n.outputs[0].name]
    }
    waiting = set(at.values())
    while waiting:
        ready = {n for n in waiting if all(a not in waiting for a, b in edges if b == n)}
        assert ready, f"a cycle among {waiting}"
        waiting -= ready
