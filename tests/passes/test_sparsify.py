"""`sparsify`: graphs before and after, what it leaves alone, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes import Change, Context
from spa_compiler.passes.sparsify import Sparsify, SparsifyOptions
from tests.onnx_text import assert_becomes, assert_unchanged, model_from


def context() -> Context:
    return Context(targets.parse("cpu:x86-64-v4"), np.random.default_rng(0))


def sparsify(**options: object) -> Callable[[Model], Change]:
    return lambda model: Sparsify(SparsifyOptions(**options)).run(model, context())  # type: ignore[arg-type]


# x [2, 4] -> MatMul with W [4 inputs, 4 outputs] -> norm: nothing is left alone by default.
NORMED = """agraph (float[2, 4] x) => (float[2, 4] y)
<float[4, 4] W = {{{values}}}, float[4] scale = {{1, 1, 1, 1}}>
{{
    [mm] h = MatMul (x, W)
    [norm] y = LayerNormalization (h, scale)
}}"""


def normed(*values: int) -> str:
    return NORMED.format(values=", ".join(map(str, values)))


def test_unstructured_zeros_the_smallest_squares() -> None:
    assert_becomes(
        sparsify(sparsity=0.5),
        normed(1, -9, 2, 16, 15, 3, 14, 4, 5, 13, 6, -12, 11, 7, 10, 8),
        normed(0, -9, 0, 16, 15, 0, 14, 0, 0, 13, 0, -12, 11, 0, 10, 0),
    )


def test_blocks_are_consecutive_outputs_of_one_input() -> None:
    # A row of W is one input's weights to the 4 outputs: 2x1 blocks are pairs along the row.
    assert_becomes(
        sparsify(sparsity=0.5, pattern="block:2x1"),
        normed(1, 2, 9, 9, 8, 8, 3, 4, 5, 6, 1, 9, 1, 0, 7, 1),
        normed(0, 0, 9, 9, 8, 8, 0, 0, 5, 6, 1, 9, 0, 0, 0, 0),
    )


def test_ties_go_by_output_then_input() -> None:
    # Row-major in [outputs, inputs], which is column by column in the file.
    assert_becomes(sparsify(sparsity=0.25), normed(*[1] * 16), normed(*[0, 1, 1, 1] * 4))


def test_zeros_that_are_there_count() -> None:
    assert_unchanged(sparsify(sparsity=0.5), normed(0, 9, 0, 9, 9, 0, 9, 0, 0, 9, 0, 9, 0, 0, 9, 0))


GEMM = """agraph (float[1, 2] x) => (float[1, 3] y)
<float[3, 2] W = {{{values}}}, float[3] scale = {{1, 1, 1}}>
{{
    h = Gemm <transB = 1> (x, W)
    y = LayerNormalization (h, scale)
}}"""


def test_a_transposed_gemm_is_outputs_by_inputs_and_its_last_block_is_short() -> None:
    # Blocks of 2 outputs over 3: the pair (9, 1) has mean square 41, the pair (2, 3) 6.5, the short ones 25 and 1.
    assert_becomes(
        sparsify(sparsity=0.5, pattern="block:2x1"),
        GEMM.format(values="9, 2, 1, 3, 5, 1"),
        GEMM.format(values="9, 0, 1, 0, 5, 0"),
    )


CONV = """agraph (float[1, 1, 4, 4] x) => (float[1, 2, 2, 2] y)
<float[1, 1, 1, 1] First = {{1}}, float[2, 1, 2, 2] W = {{{values}}}, float[2] one = {{1, 1}}, float[2] zero = {{0, 0}}>
{{
    a = Conv (x, First)
    b = Conv <strides = [2, 2]> (a, W)
    y = InstanceNormalization (b, one, zero)
}}"""


def test_a_convolution_is_outputs_by_channels_times_kernel() -> None:
    assert_becomes(
        sparsify(sparsity=0.5, pattern="block:2x1"),
        CONV.format(values="1, 8, 2, 7, 1, 8, 2, 7"),
        CONV.format(values="0, 8, 0, 7, 0, 8, 0, 7"),
    )


# An embedding, a depthwise convolution, a first convolution and a head: all that is left alone.
LEFT_ALONE = """agraph (float[1, 2, 3, 3] x, int64[1, 1] ids) => (float[1, 2] y)
<float[2, 2, 1, 1] First = {1, 2, 3, 4},
 float[2, 1, 3, 3] Depthwise = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9},
 float[2, 2] Table = {1, 2, 3, 4}, float[2, 2] Head = {1, 2, 3, 4}>
{
    [first] a = Conv (x, First)
    [depthwise] b = Conv <group = 2> (a, Depthwise)
    [flat] c = Flatten (b)
    [gather] d = Gather (Table, ids)
    [squeeze] e = Flatten (d)
    [add] f = Add (c, e)
    [head] g = MatMul (f, Head)
    [act] y = Softmax (g)
}"""


def test_what_is_left_alone_and_why() -> None:
    assert_unchanged(sparsify(sparsity=0.9), LEFT_ALONE)
    change = sparsify(sparsity=0.9)(model_from(LEFT_ALONE))
    assert change.sites == ()
    assert change.summary == "no weight taken"
    assert [(skip.node, skip.reason) for skip in change.skipped] == [
        ("first", "first convolution"),
        ("depthwise", "depthwise convolution"),
        ("head", "reaches an output with no residual or norm after it"),
    ]


@pytest.mark.parametrize(
    "wanted, ignored, taken",
    [
        (("head",), (), ["head"]),
        (("Head",), (), ["head"]),
        (("*",), (), ["first", "depthwise", "head"]),
        (("f*", "D*"), (), ["first", "depthwise"]),
        (("*",), ("Conv",), ["head"]),
        (("*",), ("head", "nothing-like-it"), ["first", "depthwise"]),
        (("Conv",), (), []),
        (("Conv", "depthwise"), (), ["depthwise"]),
    ],
)
def test_targets_and_ignore(wanted: tuple[str, ...], ignored: tuple[str, ...], taken: list[str]) -> None:
    change = sparsify(sparsity=0.5, targets=wanted, ignore=ignored)(model_from(LEFT_ALONE))
    assert [site.node for site in change.sites] == taken
    assert len(change.skipped) == 3 - len(taken)


def test_targets_that_match_nothing_name_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"'haed' matches no MatMul.*The model's are: first, depthwise, head"):
        sparsify(sparsity=0.5, targets=("head", "haed"))(model_from(LEFT_ALONE))


SHARED = """agraph (float[1, 2] x) => (float[1, 2] y)
<float[2, 2] W = {1, 2, 3, 4}, float[2] one = {1, 1}>
{
    [a] h = MatMul (x, W)
    [n] i = LayerNormalization (h, one)
    [b] j = MatMul (i, W)
    [m] y = LayerNormalization (j, one)
}"""


def test_a_shared_weight_stays_shared() -> None:
    model = model_from(SHARED)
    sparsify(sparsity=0.5)(model)
    first, second = weighted_ops(model.graph)
    assert first.weight is second.weight
    np.testing.assert_array_equal(first.rows(), [[0, 3], [0, 4]])


def test_a_weight_shared_with_a_site_left_alone_is_not_touched_there() -> None:
    model = model_from(SHARED)
    sparsify(sparsity=0.5, targets=("a",))(model)
    first, second = weighted_ops(model.graph)
    np.testing.assert_array_equal(first.rows(), [[0, 3], [0, 4]])
    np.testing.assert_array_equal(second.rows(), [[1, 3], [2, 4]])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_nan_and_infinity_name_the_node(value: str) -> None:
    model = model_from(normed(*range(16)))
    (op,) = weighted_ops(model.graph)
    rows = op.rows().copy()
    rows[3, 2] = float(value)
    op.replace(rows)
    with pytest.raises(ModelError, match=rf"node 'mm': weight 'W' of MatMul has {value} at output 3, input 2"):
        sparsify(sparsity=0.5)(model)


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 0.5, "scope": "model"}])
def test_bad_options_in_python_are_refused_like_in_recipes(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="SparsifyOptions"):
        sparsify(**options)(model_from(LEFT_ALONE))


def two_layers(rng: np.random.Generator, dtype: str = "float32") -> Model:
    """Two normed MatMuls, the second 100 times larger and with a longer tail."""
    text = "float16" if dtype == "float16" else "float"
    model = model_from(f"""agraph ({text}[1, 64] x) => ({text}[1, 48] y)
<{text}[64, 40] A, {text}[40, 48] B, {text}[40] one, {text}[48] ones>
{{
    [a] h = MatMul (x, A)
    [n] i = LayerNormalization (h, one)
    [b] j = MatMul (i, B)
    [m] y = LayerNormalization (j, ones)
}}""".replace("A,", f"A = {{{_zeros(64 * 40)}}},").replace("B,", f"B = {{{_zeros(40 * 48)}}},")
        .replace(f"{text}[40] one,", f"{text}[40] one = {{{_zeros(40)}}},")
        .replace(f"{text}[48] ones", f"{text}[48] ones = {{{_zeros(48)}}}"))  # fmt: skip
    first, second = weighted_ops(model.graph)
    first.replace(rng.normal(size=(40, 64)))
    second.replace(100 * rng.standard_t(3, size=(48, 40)))
    return model


def _zeros(count: int) -> str:
    return ", ".join(["0"] * count)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:7x1"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_share_and_the_report(pattern: str, scope: str, sparsity: float, dtype: str) -> None:
    model = two_layers(np.random.default_rng(1), dtype)
    before = [op.rows().copy() for op in weighted_ops(model.graph)]
    sources = [op.rows() for op in weighted_ops(model.graph)]
    run = Sparsify(SparsifyOptions(sparsity=sparsity, pattern=pattern, scope=scope))  # type: ignore[arg-type]
    steps: list[tuple[str, int, int]] = []
    change = run.run(
        model,
        Context(targets.parse("cpu:x86-64-v4"), np.random.default_rng(0), progress=lambda *step: steps.append(step)),
    )
    after = [op.rows() for op in weighted_ops(model.graph)]
    assert steps == [("sparsify", 0, 2), ("sparsify", 1, 2), ("sparsify", 2, 2)]
    total = 0
    for site, old, source, new in zip(change.sites, before, sources, after, strict=True):
        np.testing.assert_array_equal(source, old)  # arrays are replaced, never written to
        assert new.dtype == old.dtype
        assert run.pattern.fits(new)
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
        zeros = np.count_nonzero(new == 0)
        total += zeros
        if scope == "layer":
            assert abs(zeros - sparsity * new.size) <= run.pattern.rows / 2
        else:
            assert zeros <= (1 - 0.2 * (1 - sparsity)) * new.size + run.pattern.rows / 2
        assert site.density_after == np.count_nonzero(new) / new.size
        assert type(site.density_after) is float
        error = np.linalg.norm(new.astype(np.float64) - old) / np.linalg.norm(old.astype(np.float64))
        assert site.error == pytest.approx(error, abs=1e-9)
    assert abs(total - sparsity * sum(old.size for old in before)) <= run.pattern.rows
    assert change.pass_name == "sparsify"
    assert f"{pattern}, magnitude, {'uniform' if scope == 'layer' else scope} shares" in change.summary


def test_global_scope_compares_weights_across_layers_down_to_the_floor() -> None:
    change = sparsify(sparsity=0.7, scope="global")(two_layers(np.random.default_rng(1)))
    first, second = change.sites
    assert first.density_after == pytest.approx(0.2 * 0.3, abs=1e-3)  # 100 times smaller: only the floor stays
    assert second.density_after > 0.6
    change = sparsify(sparsity=0.7, scope="global", min_keep=1)(two_layers(np.random.default_rng(1)))
    assert [site.density_after for site in change.sites] == pytest.approx([0.3, 0.3], abs=1e-3)


def test_the_same_result_every_time() -> None:
    results = []
    for _ in range(2):
        model = two_layers(np.random.default_rng(1))
        sparsify(sparsity=0.8, pattern="block:4x1", scope="global")(model)
        results.append([op.rows().tobytes() for op in weighted_ops(model.graph)])
    assert results[0] == results[1]


def test_a_weight_of_zeros_is_no_problem() -> None:
    change = sparsify(sparsity=0.5, scope="global")(model_from(normed(*[0] * 16)))
    assert change.sites[0].error == 0.0
    assert change.sites[0].density_after == 0.0
