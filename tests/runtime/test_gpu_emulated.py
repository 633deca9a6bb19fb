"""Whole nodes with their real kernels and without a GPU: packed by the form, checked, chosen and launched by the C side, run by
the emulator on the CPU, compared with the reference."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.kernels.cuda import arrays as packed
from spa_compiler.kernels.cuda import form as contract
from spa_compiler.kernels.cuda.blocks import Blocks
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, Form, Kernel, Layout, from_bits, rounded, to_bits
from spa_compiler.kernels.cuda.forms import FORMS, LOSSY
from spa_compiler.runtime.gpu import BOUNDED, Code, GpuLibrary, GpuOp, NodeLayout, operator
from spa_compiler.targets.cuda import architecture
from tests.cuda_emulator import emulator
from tests.gpu_harness import Node, Operator, Refused, Tensor, build, driver, in_child, register

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
ALL = (*(f for f in FORMS if not isinstance(f, Blocks) or f.group == 64), *LOSSY)
FIRST = {type(form): i for i, form in reversed(list(enumerate(ALL)))}
"""Where the first form of each kind is: compiling a kernel for the emulator takes a second."""


def kernel_layout(layout: NodeLayout) -> Layout:
    return "planes" if layout == "planes" else "rows"


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
    kernels = tuple(dict.fromkeys(v.kernel for op in ops.values() for v in op.variants))
    path = emulator.library(kernels)._name
    codes = {kernel.name: [Code("sm_90", f"emulate {path} {kernel.name}\0".encode())] for kernel in kernels}
    there = register(build(GpuLibrary(tuple(ops.values()), ("sm_90",), codes), Path(tempfile.mkdtemp())))
    return {case: (op, there[op.op_type, "CUDAExecutionProvider"]) for case, op in ops.items()}


def drawn(form: Form, dtype: Dtype, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A weight of two values in every four, which every form can hold, of odd sizes if that is possible, and its arrays."""
    for n, k in ((45, 70), (64, 256)):
        weight = rng.standard_normal((n, k)).astype(np.float32)
        weight[:, 0::4] = weight[:, 2::4] = 0
        try:
            return weight, form.pack(weight, dtype)
        except ValueError:
            continue
    raise AssertionError(f"{form.name} holds neither")


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

    weights = [emulator.guarded(a) for a in (*arrays.values(), bias)]
    given = [emulator.guarded(to_bits(v, dtype)) for v in (x, residual) if v is not None]

    def allocate(dims: tuple[int, ...]) -> np.ndarray:
        y = emulator.guarded(to_bits(np.full(dims, np.nan, np.float32), dtype))
        driver().emulate_on([*weights, *given, y], tokens)
        return y

    driver().reset()
    driver().fake_pointers(len(arrays) + 4)
    constants = [Tensor.of(w, constant=True) for w in weights]
    made = there.create(
        Node({"site": "s", "n": n, "k": k, **bounds}, [Tensor(None)] * (1 + epilogue.residual) + constants)
    )
    try:
        bits = there.compute(made, Node(inputs=[Tensor.of(v) for v in given], allocate=allocate))
    except Refused as error:
        raise AssertionError(f"{case}: {driver().fake_message()}") from error
    y = from_bits(bits.copy(), dtype)
    there.destroy(made)
    driver().assert_clean()

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
