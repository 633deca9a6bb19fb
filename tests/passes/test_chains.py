"""Chains of thin operators: the graph before and after, and that they compute what their forms say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.checker
import pytest

from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.passes import chains
from spa_compiler.passes.chains import Beside, Form
from spa_compiler.solvers.problem import F64
from spa_compiler.solvers.svd import Factors
from spa_compiler.solvers.tucker import Tucker
from tests.networks import model_of
from tests.onnx_text import assert_becomes, assert_unchanged, model_from, proto_from


def writing(*forms: Form | None) -> Callable[[Model], None]:
    return lambda model: chains.write(model, weighted_ops(model.graph), forms)


def array(*rows: Sequence[float]) -> F64:
    return np.array(rows, np.float64)


UP, DOWN = array([1], [2], [3]), array([4, 5])  # 3 outputs, 2 inputs


def test_matmul() -> None:
    assert_becomes(
        writing(Factors(UP, DOWN)),
        """agraph (float[1, 5, 2] x) => (float[1, 5, 3] y)
        <float[2, 3] W = {1, 2, 3, 4, 5, 6}> { [mm] y = MatMul (x, W) }""",
        """agraph (float[1, 5, 2] x) => (float[1, 5, 3] y)
        <float[2, 1] W_down = {4, 5}, float[1, 3] W_up = {1, 2, 3}>
        { [mm_down] y_down = MatMul (x, W_down) [mm] y = MatMul (y_down, W_up) }""",
    )


@pytest.mark.parametrize("trans, shape, up", [(0, "2, 3", "1, 3"), (1, "3, 2", "3, 1")])
def test_gemm_keeps_its_layout_and_its_bias(trans: int, shape: str, up: str) -> None:
    assert_becomes(
        writing(Factors(UP, DOWN)),
        f"""agraph (float[4, 2] x) => (float[4, 3] y) <float[{shape}] W = {{1, 2, 3, 4, 5, 6}}, float[3] c = {{7, 8, 9}}>
        {{ [fc] y = Gemm <transB = {trans}> (x, W, c) }}""",
        f"""agraph (float[4, 2] x) => (float[4, 3] y)
        <float[2, 1] W_down = {{4, 5}}, float[{up}] W_up = {{1, 2, 3}}, float[3] c = {{7, 8, 9}}>
        {{ [fc_down] y_down = MatMul (x, W_down) [fc] y = Gemm <transB = {trans}> (y_down, W_up, c) }}""",
    )


def test_a_convolution_keeps_its_geometry_in_front_and_its_bias_behind() -> None:
    geometry = "dilations = [1, 2], kernel_shape = [1, 2], pads = [0, 1, 1, 0], strides = [2, 1]"
    assert_becomes(
        writing(Factors(UP, DOWN)),
        f"""agraph (float[1, 1, 5, 6] x) => (float[1, 3, 3, 5] y)
        <float[3, 1, 1, 2] W = {{1, 2, 3, 4, 5, 6}}, float[3] b = {{7, 8, 9}}>
        {{ [c] y = Conv <{geometry}> (x, W, b) }}""",
        f"""agraph (float[1, 1, 5, 6] x) => (float[1, 3, 3, 5] y)
        <float[1, 1, 1, 2] W_down = {{4, 5}}, float[3, 1, 1, 1] W_up = {{1, 2, 3}}, float[3] b = {{7, 8, 9}}>
        {{ [c_down] y_down = Conv <{geometry}> (x, W_down) [c] y = Conv <kernel_shape = [1, 1]> (y_down, W_up, b) }}""",
    )


def test_a_convolution_over_one_axis() -> None:
    assert_becomes(
        writing(Factors(UP, DOWN)),
        """agraph (float[1, 2, 5] x) => (float[1, 3, 3] y) <float[3, 2, 1] W = {1, 2, 3, 4, 5, 6}>
        { [c] y = Conv <strides = [2]> (x, W) }""",
        """agraph (float[1, 2, 5] x) => (float[1, 3, 3] y) <float[1, 2, 1] W_down = {4, 5}, float[3, 1, 1] W_up = {1, 2, 3}>
        { [c_down] y_down = Conv <strides = [2]> (x, W_down) [c] y = Conv <kernel_shape = [1]> (y_down, W_up) }""",
    )


def test_tucker_is_three_convolutions() -> None:
    form = Tucker(array([1, 2]), np.array([3.0, 4.0]).reshape(1, 1, 1, 2), UP)
    assert_becomes(
        writing(form),
        """agraph (float[1, 2, 4, 4] x) => (float[1, 3, 4, 2] y)
        <float[3, 2, 1, 2] W = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3] b = {7, 8, 9}>
        { [c] y = Conv <pads = [0, 0, 0, 1], strides = [1, 2]> (x, W, b) }""",
        """agraph (float[1, 2, 4, 4] x) => (float[1, 3, 4, 2] y)
        <float[1, 2, 1, 1] W_first = {1, 2}, float[1, 1, 1, 2] W_core = {3, 4}, float[3, 1, 1, 1] W_last = {1, 2, 3},
         float[3] b = {7, 8, 9}>
        {
            [c_first] y_first = Conv <kernel_shape = [1, 1]> (x, W_first)
            [c_core] y_core = Conv <pads = [0, 0, 0, 1], strides = [1, 2]> (y_first, W_core)
            [c] y = Conv <kernel_shape = [1, 1]> (y_core, W_last, b)
        }""",
    )


SPARSE = array([1, 0], [0, 2], [0, 0])


def test_sparse_and_low_rank_side_by_side() -> None:
    assert_becomes(
        writing(Beside(SPARSE, Factors(UP, DOWN))),
        """agraph (float[4, 2] x) => (float[4, 3] y) <float[3, 2] W = {1, 2, 3, 4, 5, 6}, float[3] c = {7, 8, 9}>
        { [fc] y = Gemm <transB = 1> (x, W, c) }""",
        """agraph (float[4, 2] x) => (float[4, 3] y)
        <float[2, 1] W_down = {4, 5}, float[1, 3] W_up = {1, 2, 3}, float[3, 2] W = {1, 0, 0, 2, 0, 0},
         float[3] c = {7, 8, 9}>
        {
            [fc_down] y_down = MatMul (x, W_down)
            [fc_up] y_up = MatMul (y_down, W_up)
            [fc_sparse] y_sparse = Gemm <transB = 1> (x, W, c)
            [fc] y = Add (y_sparse, y_up)
        }""",
    )


def test_a_convolution_beside_a_thin_one() -> None:
    assert_becomes(
        writing(Beside(SPARSE, Factors(UP, DOWN))),
        """agraph (float[1, 1, 5, 6] x) => (float[1, 3, 3, 5] y) <float[3, 1, 1, 2] W = {1, 2, 3, 4, 5, 6}>
        { [c] y = Conv <strides = [2, 1]> (x, W) }""",
        """agraph (float[1, 1, 5, 6] x) => (float[1, 3, 3, 5] y)
        <float[1, 1, 1, 2] W_down = {4, 5}, float[3, 1, 1, 1] W_up = {1, 2, 3}, float[3, 1, 1, 2] W = {1, 0, 0, 2, 0, 0}>
        {
            [c_down] y_down = Conv <strides = [2, 1]> (x, W_down)
            [c_up] y_up = Conv <kernel_shape = [1, 1]> (y_down, W_up)
            [c_sparse] y_sparse = Conv <strides = [2, 1]> (x, W)
            [c] y = Add (y_sparse, y_up)
        }""",
    )


MATMUL = """agraph (float[4, 2] x) => (float[4, 3] y) <float[2, 3] W = {{{}}}> {{ [mm] y = MatMul (x, W) }}"""


def test_sparse_alone_is_the_operator_with_zeros() -> None:
    # SPARSE is [outputs, inputs], the file has it transposed.
    assert_becomes(writing(Beside(SPARSE, None)), MATMUL.format("1, 2, 3, 4, 5, 6"), MATMUL.format("1, 0, 0, 0, 2, 0"))


def test_none_leaves_an_operator_alone() -> None:
    assert_unchanged(writing(None), MATMUL.format("1, 2, 3, 4, 5, 6"))


def test_weights_that_share_a_down_share_its_node() -> None:
    down = DOWN
    assert_becomes(
        writing(Factors(UP, down), Factors(2 * UP, down)),
        """agraph (float[4, 2] x) => (float[4, 3] q, float[4, 3] k)
        <float[2, 3] Q = {1, 2, 3, 4, 5, 6}, float[2, 3] K = {1, 2, 3, 4, 5, 6}>
        { [query] q = MatMul (x, Q) [key] k = MatMul (x, K) }""",
        """agraph (float[4, 2] x) => (float[4, 3] q, float[4, 3] k)
        <float[2, 1] Q_down = {4, 5}, float[1, 3] Q_up = {1, 2, 3}, float[1, 3] K_up = {2, 4, 6}>
        {
            [query_down] q_down = MatMul (x, Q_down)
            [query] q = MatMul (q_down, Q_up)
            [key] k = MatMul (q_down, K_up)
        }""",
    )


TIED = """agraph (float[4, 2] x) => (float[4, 2] y) <float[2, 2] W = {1, 2, 3, 4}>
{ [a] h = MatMul (x, W) [b] y = MatMul (h, W) }"""


def test_a_tied_weight_stays_tied() -> None:
    form = Factors(array([1], [2]), DOWN)
    assert_becomes(
        writing(form, form),
        TIED,
        """agraph (float[4, 2] x) => (float[4, 2] y) <float[2, 1] W_down = {4, 5}, float[1, 2] W_up = {1, 2}>
        {
            [a_down] h_down = MatMul (x, W_down)
            [a] h = MatMul (h_down, W_up)
            [b_down] y_down = MatMul (h, W_down)
            [b] y = MatMul (y_down, W_up)
        }""",
    )


def test_a_tied_sparse_weight_stays_tied() -> None:
    form = Beside(array([1, 0], [0, 2]), Factors(array([1], [2]), DOWN))
    model = model_from(TIED)
    writing(form, form)(model)
    first, second = (op for op in weighted_ops(model.graph) if op.node.name.endswith("_sparse"))
    assert first.weight is second.weight
    assert len(to_proto(model).graph.initializer) == 3


def test_a_tied_weight_of_which_one_stays_whole() -> None:
    form = Factors(array([1], [2]), DOWN)
    model = model_from(TIED)
    writing(form, None)(model)
    assert [op.weight.name for op in weighted_ops(model.graph)] == ["W_down", "W_up", "W"]
    np.testing.assert_array_equal(weighted_ops(model.graph)[2].weight.values, [[1, 2], [3, 4]])


def test_names_that_are_taken_are_left_to_their_owners() -> None:
    before = """agraph (float[4, 2] x, float[4, 3] y_down) => (float[4, 3] z)
    <float[2, 3] W = {1, 2, 3, 4, 5, 6}, float[3] W_up = {1, 1, 1}>
    { [mm] y = MatMul (x, W) [mm_down] a = Add (y, y_down) [last] z = Add (a, W_up) }"""
    model = model_from(before)
    writing(Factors(UP, DOWN))(model)
    down, up = weighted_ops(model.graph)
    assert (down.name, down.node.outputs[0].name, down.weight.name) == ("mm_down_2", "y_down_2", "W_down")
    assert up.weight.name == "W_up_2"
    onnx.checker.check_model(to_proto(model), full_check=True)


def test_shapes_and_types_of_what_lies_between_are_stated() -> None:
    model = model_from("""agraph (float16["batch", 5, 2] x) => (float16["batch", 5, 3] y)
    <float16[2, 3] W = {1, 2, 3, 4, 5, 6}> { [mm] y = MatMul (x, W) }""")
    writing(Factors(UP, DOWN))(model)
    (thin,) = model.graph.nodes[0].outputs
    assert thin.dtype == np.float16
    assert list(thin.shape) == ["batch", 5, 1]


def test_attributes_that_graphsurgeon_cannot_hold_stay_with_the_geometry() -> None:
    proto = proto_from("""agraph (float[1, 1, 5, 6] x) => (float[1, 3, 5, 5] y)
    <float[3, 1, 1, 2] W = {1, 2, 3, 4, 5, 6}> { [c] y = Conv (x, W) }""")
    # An empty list: graphsurgeon loses its type. Where the rank of x is not stated, nobody objects to it.
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.node[0].attribute.add(name="strides", type=onnx.AttributeProto.INTS)
    for form, holder in ((Factors(UP, DOWN), "c_down"), (Beside(SPARSE, Factors(UP, DOWN)), "c_sparse")):
        model = load(proto)
        writing(form)(model)
        named = {node.name: [a.name for a in node.attribute] for node in to_proto(model).graph.node}
        assert [name for name, attributes in named.items() if "strides" in attributes] == [holder]


def forms_of(n: int, shape: tuple[int, ...], rng: np.random.Generator) -> list[Form]:
    """Every form of a weight `[n, k]` whose inputs have `shape`: (k,), or (C, kh, kw)."""
    k = int(np.prod(shape))
    low = Factors(rng.standard_normal((n, 3)), rng.standard_normal((3, k)))
    sparse = rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.3)
    found: list[Form] = [low, Beside(sparse, low), Beside(sparse, None)]
    if len(shape) == 3:
        core = rng.standard_normal((2, 3, *shape[1:]))
        found.append(Tucker(rng.standard_normal((3, shape[0])), core, rng.standard_normal((n, 2))))
    return found


OPERATORS = {
    "matmul": ('("b", 3, 8)', "MatMul (x, W)", (8,), (8, 6)),
    "gemm": ('("b", 8)', "Gemm (x, W, c)", (8,), (8, 6)),
    "gemm transposed": ('("b", 8)', "Gemm <transB = 1> (x, W, c)", (8,), (6, 8)),
    "1x1": ('("b", 4, 7, 6)', "Conv (x, W, c)", (4, 1, 1), (6, 4, 1, 1)),
    "strided": ('("b", 4, 7, 6)', "Conv <strides = [2, 3]> (x, W)", (4, 1, 1), (6, 4, 1, 1)),
    "3x2": (
        '("b", 4, 7, 6)',
        "Conv <strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2]> (x, W, c)",
        (4, 3, 2),
        (6, 4, 3, 2),
    ),
    "same": ('("b", 4, 7, 6)', 'Conv <strides = [2, 2], auto_pad = "SAME_UPPER"> (x, W, c)', (4, 3, 3), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("float16", 4e-3)])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_chain_computes_the_product(name: str, dtype: str, tolerance: float) -> None:
    shape, call, inputs, stored = OPERATORS[name]
    rng = np.random.default_rng(3)
    kind = {"float32": "float", "float16": "float16"}[dtype]
    dims = shape.strip("()")
    text = f"agraph ({kind}[{dims}] x) => ({kind}[{', '.join('abcd'[: dims.count(',') + 1])}] y) {{ y = {call} }}"
    sizes = [2, *(int(size) for size in dims.split(",")[1:])]
    x = rng.standard_normal(sizes).astype(dtype)
    for form in forms_of(6, inputs, rng):
        form = chains.rounded(form, np.dtype(dtype))
        given = {"W": np.zeros(stored, dtype)} | ({"c": np.ones(6, dtype)} if "c)" in call else {})
        whole, chain = (model_of(text, **given) for _ in range(2))
        (op,) = weighted_ops(whole.graph)
        op.replace(chains.product(form))
        expected = run(open_session(to_proto(whole).SerializeToString()), {"x": x})["y"].astype(np.float64)
        writing(form)(chain)
        proto = to_proto(chain)
        onnx.checker.check_model(proto, full_check=True)
        got = run(open_session(proto.SerializeToString()), {"x": x})["y"]
        assert got.dtype == np.dtype(dtype)
        assert np.linalg.norm(got - expected) <= tolerance * np.linalg.norm(expected)


def test_forms_round_to_what_is_stored_and_are_labelled() -> None:
    rng = np.random.default_rng(4)
    labels = []
    for form in forms_of(6, (4, 3, 2), rng):
        stored = chains.rounded(form, np.dtype(np.float16))
        labels.append(chains.label(stored))
        assert chains.product(stored).shape == (6, 24)
        assert np.abs(chains.product(stored) - chains.product(form)).max() < 0.02
        again = chains.rounded(stored, np.dtype(np.float16))
        np.testing.assert_array_equal(chains.product(again), chains.product(stored))
    assert labels == ["rank 3", "rank 3 + sparse", "sparse", "tucker 3x2"]
