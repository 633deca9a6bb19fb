"""`drop-blocks`: graphs before and after, what is no block, and what the message lists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.errors import UsageError
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.passes import Change, Context
from spa_compiler.passes.drop_blocks import DropBlocks, DropBlocksOptions, find
from tests.onnx_text import assert_becomes, model_from


def drop(*blocks: str) -> Callable[[Model], Change]:
    context = Context(targets.parse("cpu:x86-64-v4"), np.random.default_rng(0))
    return lambda model: DropBlocks(DropBlocksOptions(blocks=blocks)).run(model, context)


# Two blocks in a row, of which the second is the graph's output; h is used by both branches of the second.
TWO = """agraph (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] A = {1, 2, 3, 4}, float[2, 2] B = {5, 6, 7, 8}, float[2, 2] C = {9, 10, 11, 12}>
{
    [start] s = Relu (x)
    [one_first] a = MatMul (s, A)
    [one_act] b = Relu (a)
    [one_add] h = Add (s, b)
    [two_first] c = MatMul (h, B)
    [two_gate] d = MatMul (h, C)
    [two_mul] e = Mul (c, d)
    [two_add] t = Add (e, h)
    [end] y = Relu (t)
}"""


def test_the_sum_becomes_its_skip_input() -> None:
    after = """agraph (float[n, 2] x) => (float[n, 2] y)
    <float[2, 2] A = {1, 2, 3, 4}>
    {
        [start] s = Relu (x)
        [one_first] a = MatMul (s, A)
        [one_act] b = Relu (a)
        [one_add] h = Add (s, b)
        [end] y = Relu (h)
    }"""
    for name in ("two_first", "two_*", "two_add"):
        assert_becomes(drop(name), TWO, after)


def test_blocks_in_a_row_and_several_names() -> None:
    after = """agraph (float[n, 2] x) => (float[n, 2] y)
    {
        [start] s = Relu (x)
        [end] y = Relu (s)
    }"""
    assert_becomes(drop("*"), TWO, after)
    assert_becomes(drop("two_gate", "one_act"), TWO, after)


def test_a_block_that_makes_a_graph_output() -> None:
    before = """agraph (float[n, 2] x) => (float[n, 2] y)
    <float[2, 2] A = {1, 2, 3, 4}>
    {
        [mm] a = MatMul (x, A)
        [add] y = Add (a, x)
    }"""
    after = """agraph (float[n, 2] x) => (float[n, 2] y)
    {
        [add] y = Identity (x)
    }"""
    assert_becomes(drop("mm"), before, after)


def test_what_is_said() -> None:
    change = drop("one_*")(model_from(TWO))
    assert change.pass_name == "drop-blocks"
    assert change.summary == "1 residual block left out (3 nodes, 4 parameters): one_add"


NOT_A_BLOCK = {
    "the width changes": """agraph (float[2, 1] x) => (float[2, 3] y)
        <float[1, 3] A = {1, 2, 3}> { [mm] a = MatMul (x, A) [add] y = Add (a, x) }""",
    "a projection instead of a skip": """agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] A = {1, 2, 3, 4}> { [l] a = MatMul (x, A) [r] b = Relu (x) [add] y = Add (a, b) }""",
    "used elsewhere": """agraph (float[2, 2] x) => (float[2, 2] y, float[2, 2] z)
        <float[2, 2] A = {1, 2, 3, 4}> { [mm] a = MatMul (x, A) [add] y = Add (a, x) [other] z = Relu (a) }""",
    "an output itself": """agraph (float[2, 2] x) => (float[2, 2] y, float[2, 2] a)
        <float[2, 2] A = {1, 2, 3, 4}> { [mm] a = MatMul (x, A) [add] y = Add (a, x) }""",
    "a bias": """agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2] A = {1, 2}> { [act] a = Relu (x) [add] y = Add (a, A) }""",
}


@pytest.mark.parametrize("text", NOT_A_BLOCK.values(), ids=NOT_A_BLOCK)
def test_what_is_no_block(text: str) -> None:
    model = model_from(text)
    shapes.infer(model)
    assert find(model) == []
    with pytest.raises(UsageError, match="no residual block that could be left out"):
        drop("*")(model)


def test_a_name_that_matches_no_branch_lists_the_blocks() -> None:
    with pytest.raises(UsageError, match=r"'three' matches no node .*one_first \.\. one_add, two_first \.\. two_add"):
        drop("three")(model_from(TWO))
    with pytest.raises(UsageError, match="'start' matches no node"):
        drop("start")(model_from(TWO))


def test_the_innermost_block_is_meant() -> None:
    nested = """agraph (float[2, 2] x) => (float[2, 2] y)
    <float[2, 2] A = {1, 2, 3, 4}, float[2, 2] B = {5, 6, 7, 8}>
    {
        [a] a = MatMul (x, A)
        [inner] b = MatMul (a, B)
        [inner_add] c = Add (a, b)
        [outer_add] y = Add (x, c)
    }"""
    assert_becomes(
        drop("inner"),
        nested,
        """agraph (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] A = {1, 2, 3, 4}>
        {
            [a] a = MatMul (x, A)
            [outer_add] y = Add (x, a)
        }""",
    )
    assert "outer_add" in drop("a")(model_from(nested)).summary


def test_at_least_one_name_is_needed() -> None:
    with pytest.raises(UsageError):
        DropBlocks(DropBlocksOptions(blocks=()))
