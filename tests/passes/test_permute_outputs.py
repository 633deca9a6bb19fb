"""`permute-outputs`: hidden units change places in all that names them, and what cannot move stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spa_compiler import compress
from spa_compiler.calibration.samples import Samples
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model, constants
from spa_compiler.passes import Change, from_flags
from spa_compiler.passes.permute_outputs import PermuteOutputs, PermuteOutputsOptions
from tests.networks import mlp
from tests.onnx_text import assert_becomes, assert_unchanged, model_from
from tests.passes.tiny import context, samples


def permute(calibration: Samples | None = None, **options: object) -> Callable[[Model], Change]:
    run = PermuteOutputs(PermuteOutputsOptions(**options)).run  # type: ignore[arg-type]
    return lambda model: run(model, context(calibration))


# x [1, 2] -> First (left alone by default, so named) -> 4 hidden units -> Second. Units 0 and 2 need input 0, 1 and 3
# input 1.
HIDDEN = """agraph (float[1, 2] x) => (float[1, 2] y)
<float[2, 4] First = {{{first}}}, float[4] b = {{{bias}}}, float[4, 2] Second = {{{second}}}>
{{
    [first] a = MatMul (x, First)
    [add] c = Add (a, b)
    [act] d = Relu (c)
    [second] y = MatMul (d, Second)
}}"""


def test_units_change_places_everywhere() -> None:
    assert_becomes(
        permute(pattern="block:2x1", targets=("first",)),
        HIDDEN.format(first="9, 0, 8, 0, 0, 7, 0, 6", bias="1, 2, 3, 4", second="1, 2, 3, 4, 5, 6, 7, 8"),
        HIDDEN.format(first="9, 8, 0, 0, 0, 0, 7, 6", bias="1, 3, 2, 4", second="1, 2, 5, 6, 3, 4, 7, 8"),
    )


def test_units_that_lie_well_stay() -> None:
    assert_unchanged(
        permute(pattern="block:2x1", targets=("first",)),
        HIDDEN.format(first="9, 8, 0, 0, 0, 0, 7, 6", bias="1, 3, 2, 4", second="1, 2, 5, 6, 3, 4, 7, 8"),
    )


# The hidden units are a result: their places have a meaning.
HELD = """agraph (float[1, 2] x) => (float[1, 4] y)
<float[2, 4] First = {9, 0, 8, 0, 0, 7, 0, 6}>
{
    [first] a = MatMul (x, First)
    [act] y = Relu (a)
}"""


def test_results_keep_their_order() -> None:
    assert_unchanged(permute(pattern="block:2x1", targets=("first",)), HELD)
    change = permute(pattern="block:2x1", targets=("first",))(model_from(HELD))
    assert [site.node for site in change.skipped] == ["first"]
    assert "no group" in change.skipped[0].reason


def test_units_that_are_concatenated_with_others_keep_their_order() -> None:
    text = """agraph (float[1, 2] x) => (float[1, 2] y)
    <float[2, 4] First = {9, 0, 8, 0, 0, 7, 0, 6}, float[2, 1] Other = {1, 2}, float[5, 2] Second = {1, 2, 3, 4, 5, 6,
     7, 8, 9, 10}>
    {
        [first] a = MatMul (x, First)
        [other] b = MatMul (x, Other)
        [join] c = Concat <axis = 1> (b, a)
        [act] d = Relu (c)
        [second] y = MatMul (d, Second)
    }"""
    assert_unchanged(permute(pattern="block:2x1", targets=("first",)), text)
    change = permute(pattern="block:2x1", targets=("first",))(model_from(text))
    assert "no group" in {site.node: site.reason for site in change.skipped}["first"]


def test_a_model_computes_the_same_and_blocks_keep_more() -> None:
    whole = mlp(1.0, 64)
    made = compress(whole, from_flags("permute-outputs{targets=MatMul,sparsity=0.7}"))
    assert any("permute-outputs: verified against the model before it" in note for note in made.report.notes)

    def error(flags: str) -> float:
        sites = compress(whole, from_flags(flags)).report.passes[-1].sites
        return sum(site.error for site in sites)

    alone = "sparsify{sparsity=0.7,pattern=block:4x1,targets=MatMul}"
    assert error(f"permute-outputs{{targets=MatMul,sparsity=0.7}} {alone}") < error(alone)


def test_calibration_says_what_matters() -> None:
    # By the weights alone, units 0 and 3 belong together, for they need input 1. But it is always 0.
    text = HIDDEN.format(first="5, 0, 5, 0, 9, 0, 0, 9", bias="1, 2, 3, 4", second="1, 2, 3, 4, 5, 6, 7, 8")
    calibration = samples(*({"x": np.array([[value, 0]], np.float32)} for value in (1, 2, 3)))
    for given, bias in ((None, [1, 4, 2, 3]), (calibration, [1, 3, 2, 4])):
        model = model_from(text)
        permute(given, pattern="block:2x1", sparsity=0.75, targets=("first",))(model)
        found = next(tensor for tensor in constants(model.graph) if tensor.name == "b")
        assert found.values.tolist() == bias


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:1x4", "channel"])
def test_patterns_without_high_blocks_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="makes no difference") as caught:
        PermuteOutputs(PermuteOutputsOptions(pattern=pattern))
    assert caught.value.where == "pattern"
