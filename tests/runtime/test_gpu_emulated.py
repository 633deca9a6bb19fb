"""Whole nodes with their real kernels and without a GPU: packed by the form, checked, chosen and launched by the C side, run by
the emulator on the CPU, compared with the reference."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.graph.precision import convert
from spa_compiler.graph.rounding import outputs
from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.cuda import arrays as packed
from spa_compiler.kernels.cuda import form as contract
from spa_compiler.kernels.cuda.blocks import Blocks
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, Form, Kernel, from_bits, rounded, to_bits
from spa_compiler.kernels.cuda.forms import FORMS
from spa_compiler.placement.gpu_nodes import operator_of
from spa_compiler.runtime.gpu import BOUNDED, Code, GpuLibrary, GpuOp, NodeLayout, kernel_layout, operator
from spa_compiler.solvers.four_bits import Grid, nearest
from spa_compiler.targets.cuda import architecture
from tests.cuda_emulator import emulator
from tests.gpu_harness import Node, Operator, Refused, Tensor, build, driver, in_child, register
from tests.networks import model_of, weight
from tests.placement.gpu_placing import chosen as chosen_by_the_model

ARCH = architecture("sm_90")
Case = tuple[Dtype, NodeLayout, Epilogue]
CASES: tuple[Case, ...] = (
    ("fp16", "rows", Epilogue("clip", residual=True)),
    ("fp16", "pixel", Epilogue("clip", residual=True)),  # the kernels of the one before
    ("bf16", "rows", Epilogue()),
    ("fp32", "rows", Epilogue("gelu_erf", residual=True)),
    ("fp16", "planes", Epilogue("relu", residual=True)),
)
TOKENS = (1, 7, 40)
# Of blocks one size of group: the others differ in kernels that tests/kernels/cuda/test_blocks.py compares.
ALL = tuple(f for f in FORMS if not isinstance(f, Blocks) or f.group == 64)
FIRST = {type(form): i for i, form in reversed(list(enumerate(ALL)))}
"""Where the first form of each kind is: compiling a kernel for the emulator takes a second."""


def chosen(form: Form, case: Case, tokens: Sequence[int]) -> tuple[tuple[int | None, Kernel], ...]:
    """The most promising kernel for each number of tokens; none where the form has none."""
    dtype, layout, epilogue = case
    best = [(t, form.kernels(ARCH, dtype, kernel_layout(layout), epilogue, t)) for t in tokens]
    found = [(most, kernels[0]) for most, kernels in best if kernels]
    return tuple((None if i == len(found) - 1 else most, kernel) for i, (most, kernel) in enumerate(found))


@functools.cache
def operators(form: Form, cases: Sequence[Case], tokens: Sequence[int]) -> dict[Case, tuple[GpuOp, Operator]]:
    """Of a form, by type, layout and epilogue; one library, whose code is the kernels for the emulator."""
    ops = {case: operator(form, *case, variants) for case in cases if (variants := chosen(form, case, tokens))}
    if not ops:
        return {}
    there = registered(list(ops.values()))
    return {case: (op, there[op.op_type, "CUDAExecutionProvider"]) for case, op in ops.items()}


def registered(ops: Sequence[GpuOp]) -> dict[tuple[str, str], Operator]:
    """By operator and provider, from a library whose code is the kernels for the emulator."""
    kernels = tuple(dict.fromkeys(v.kernel for op in ops for v in op.variants))
    path = emulator.library(kernels)._name
    codes = {kernel.name: [Code("sm_90", f"emulate {path} {kernel.name}\0".encode())] for kernel in kernels}
    return register(build(GpuLibrary(tuple(ops), ("sm_90",), codes), Path(tempfile.mkdtemp())))


def drawn(form: Form, dtype: Dtype, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A weight that the form can hold, with two values in every four, of odd sizes if that is possible, and its arrays."""
    for n, k in ((45, 70), (64, 256)):
        weight = rng.standard_normal((n, k))
        weight[:, 0::4] = weight[:, 2::4] = 0
        for held in (weight, nearest(weight, Grid(128))):
            with contextlib.suppress(ValueError):
                return held.astype(np.float32), form.pack(held.astype(np.float32), dtype)
    raise AssertionError(f"{form.name} holds neither")


def called(
    there: Operator,
    attributes: Mapping[str, Any],
    constants: Sequence[np.ndarray],
    activations: Sequence[np.ndarray | None],
    dtype: Dtype,
    seed: int,
) -> np.ndarray:
    """A node, made, called and ended: x and the residual as floats, and so is the result."""
    weights = [emulator.guarded(a) for a in constants]
    given = [emulator.guarded(to_bits(v, dtype)) for v in activations if v is not None]

    def allocate(dims: tuple[int, ...]) -> np.ndarray:
        y = emulator.guarded(to_bits(np.full(dims, np.nan, np.float32), dtype))
        driver().emulate_on([*weights, *given, y], seed)
        return y

    driver().reset()
    driver().fake_pointers(len(constants) + 3)
    held = [Tensor.of(w, constant=True) for w in weights]
    made = there.create(Node({"site": "s", **attributes}, [Tensor(None)] * len(given) + held))
    try:
        bits = there.compute(made, Node(inputs=[Tensor.of(v) for v in given], allocate=allocate))
    except Refused as error:
        raise AssertionError(f"{attributes}: {error} {driver().fake_message()}") from error
    y = from_bits(bits.copy(), dtype)
    there.destroy(made)
    driver().assert_clean()
    return y


def run(operators: Mapping[Case, tuple[GpuOp, Operator]], form: Form, case: Case, tokens: int) -> None:
    """One node, made, called and ended."""
    dtype, layout, epilogue = case
    op, there = operators[case]
    rng = np.random.default_rng(tokens)
    batch = 3 if layout == "planes" else 1
    weight, arrays = drawn(form, dtype, rng)
    (n, k), bias = weight.shape, rng.standard_normal(len(weight)).astype(np.float32)
    packed.check(form.rules(dtype), arrays, n, k)

    def activations(features: int) -> np.ndarray:
        shape = {"planes": (batch, features, tokens), "pixel": (tokens, features, 1, 1), "rows": (tokens, features)}[
            layout
        ]
        return rounded(rng.standard_normal(shape).astype(np.float32), dtype)

    x, residual = activations(k), activations(n) if epilogue.residual else None
    bounds = {"low": -0.75, "high": 0.5} if epilogue.act in BOUNDED else {}

    y = called(there, {"n": n, "k": k, **bounds}, (*arrays.values(), bias), (x, residual), dtype, tokens)

    stored = form.unpack(arrays, n, k, dtype)
    low, high = bounds.get("low", 0.0), bounds.get("high", 0.0)
    if layout == "pixel":
        x, residual, y = (None if v is None else v[:, :, 0, 0] for v in (x, residual, y))
    inside = kernel_layout(layout)
    want = contract.reference(stored, x, bias, residual, epilogue.act, low, high, layout=inside)
    whole = None if residual is None else abs(residual)
    sizes = contract.reference(abs(stored), abs(x), abs(bias), whole, layout=inside)
    emulator.assert_close(y, want, sizes, dtype)
    fitting = [v.kernel.name for v in op.variants if v.most_tokens is None or v.most_tokens >= tokens]
    assert driver().launched()["name"] == fitting[0]


@pytest.mark.parametrize("form", FIRST.values(), ids=[ALL[i].name for i in FIRST.values()])
@in_child
def test_a_node_computes_what_the_reference_computes(form: int) -> None:
    cases = operators(ALL[form], CASES[:2], TOKENS[1:2])
    assert cases
    for case in cases:
        for tokens in TOKENS:
            run(cases, ALL[form], case, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("form", range(len(ALL)), ids=[form.name for form in ALL])
@in_child
def test_all_types_layouts_and_variants(form: int) -> None:
    cases = operators(ALL[form], CASES, TOKENS)
    for case in cases:
        for tokens in TOKENS:
            run(cases, ALL[form], case, tokens)


LAYERS = {
    "rows": """layer (float[1,"t",64] x, float[1,"t",72] other) => (float[1,"t",72] y) {
        z = MatMul(x, v)  m = MatMul(z, u)  a = Add(m, b)  r = Add(other, a)  y = Relu(r) }""",
    "pixel": """squeeze (float["t",64,1,1] x, float["t",72,1,1] other) => (float["t",72,1,1] y) {
        z = Conv(x, v)  m = Conv(z, u, b)  r = Add(m, other)  y = Relu(r) }""",
}


@pytest.mark.parametrize("layout", LAYERS)
@in_child
def test_a_low_rank_layer_of_a_model_runs_as_one_node(layout: NodeLayout) -> None:
    rng = np.random.default_rng(7)
    v, u, b = weight(rng, 64, 20), weight(rng, 20, 72), rng.standard_normal(72).astype(np.float32)
    if layout == "pixel":
        v, u = v.T[:, :, None, None], u.T[:, :, None, None]
    model = model_of(LAYERS[layout], v=v, u=u, b=b)

    def feed(tokens: int) -> dict[str, np.ndarray]:
        shapes = {"rows": lambda f: (1, tokens, f), "pixel": lambda f: (tokens, f, 1, 1)}
        drawn = {name: rng.standard_normal(shapes[layout](f), np.float32) for name, f in (("x", 64), ("other", 72))}
        return {name: rounded(values, "fp16") for name, values in drawn.items()}

    own, choices = chosen_by_the_model(model, feed(3))
    (node,) = (node for node in own.graph.nodes if node.domain == "ai.spa")
    (op,) = {operator_of(choice.form) for choice in choices if choice.form is not None}
    assert (op.op_type, op.layout, op.form) == (node.op, layout, "low rank 32")
    there = registered([op])[op.op_type, "CUDAExecutionProvider"]
    constants = [array_of(tensor) for tensor in node.inputs[2:]]
    for tokens in (3, 13, 40):
        given = feed(tokens)
        (want,) = outputs(convert(model, "fp16").model, [given])
        got = called(there, node.attrs | {"site": "s"}, constants, (given["x"], given["other"]), "fp16", tokens)
        assert got.shape == want["y"].shape
        assert np.abs(got - want["y"]).max() <= 2e-3 * np.abs(want["y"]).max()
        assert driver().launched()["name"] == f"spa_low_rank_fp16_32_{8 if tokens <= 8 else 16}_relu_residual"
