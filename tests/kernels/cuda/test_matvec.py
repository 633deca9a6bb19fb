"""Weights of 4 bits: against numpy on the emulator, and through NVRTC."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels.cuda import arrays as rules
from spa_compiler.kernels.cuda.form import Dtype, Epilogue, holds, rounded
from spa_compiler.kernels.cuda.matvec import BINS, GROUPS, SHAPES, FourBit, kernel
from spa_compiler.kernels.cuda.roofline import microseconds
from spa_compiler.solvers.four_bits import Grid, nearest
from spa_compiler.targets.cuda import ARCHITECTURES
from tests.cuda_emulator.emulator import check
from tests.cuda_harness import NUMBERS, machine_code, products

CASES: dict[str, tuple[Dtype, FourBit, int, tuple[int, int], Epilogue]] = {
    "fp16": ("fp16", FourBit(128), 8, (2, 8), Epilogue()),
    "groups of 32": ("fp16", FourBit(32), 16, (1, 8), Epilogue("silu", residual=True)),
    "bf16": ("bf16", FourBit(64), 8, (1, 16), Epilogue("relu", residual=True)),
}
KERNELS = {
    name: kernel(dtype, epilogue, form.group, tokens, *shape)
    for name, (dtype, form, tokens, shape, epilogue) in CASES.items()
}
AMONG = tuple(KERNELS.values())


def on_grid(seed: int, n: int, k: int, density: float, group: int, symmetric: bool = False) -> np.ndarray:
    """A weight [n, k] of which `density` is not zero, rounded as the pass `quantize` does it."""
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((n, k)) < density, rng.standard_normal((n, k)), 0)
    return nearest(weight, Grid(group, symmetric)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 50) | st.integers(1, 50).map(lambda i: 8 * i),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(sorted(CASES)),
    st.integers(1, 20),
    st.integers(0, 1 << 30),
)
def test_a_kernel_computes_what_the_reference_computes(
    n: int, k: int, density: float, case: str, tokens: int, seed: int
) -> None:
    dtype, form, _, _, epilogue = CASES[case]
    weight = on_grid(seed, n, k, density, form.group, symmetric=case == "bf16")
    check(form, KERNELS[case], weight, tokens, dtype, epilogue=epilogue, seed=seed, among=AMONG)


def test_a_warp_goes_through_several_steps() -> None:
    check(FourBit(128), KERNELS["fp16"], on_grid(0, 70, 2 * 8 * 128 + 72, 0.5, 128), 1, "fp16", among=AMONG)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weight_on_a_grid_is_held_exactly(group: int, symmetric: bool, dtype: Dtype) -> None:
    form, weight = FourBit(group), on_grid(1, 37, 300, 0.7, group, symmetric)
    packed = form.pack(weight, dtype)
    rules.check(form.rules(dtype), packed, 37, 300)
    stored = form.unpack(packed, 37, 300, dtype)
    assert holds(stored, weight, dtype)
    np.testing.assert_array_equal(stored == 0, weight == 0)
    if group == 128:  # smaller groups of few values may be on coarser grids as well, to the precision of `dtype`
        np.testing.assert_array_equal(stored, weight)
    # a model of 16 bits has had its weights rounded
    again = form.unpack(form.pack(rounded(weight, dtype), dtype), 37, 300, dtype)
    assert holds(again, rounded(weight, dtype), dtype)
    np.testing.assert_allclose(again, weight, rtol={"fp16": 2**-11, "bf16": 2**-8}[dtype])


def test_groups_of_a_grid_are_those_of_the_form() -> None:
    """Halves of groups are on grids, too; twice as large groups are not, and neither are shifted ones."""
    weight = on_grid(2, 20, 512, 1.0, 64)
    for group in (64, 32):
        FourBit(group).pack(weight, "fp16")
    for other, form in ((weight, FourBit(128)), (weight[:, 16:], FourBit(64))):
        with pytest.raises(ValueError, match="4 bits"):
            form.pack(other, "fp16")


@pytest.mark.parametrize("row, column", [(0, 0), (36, 299), (17, 130)])
def test_a_single_weight_off_the_grid_is_seen(row: int, column: int) -> None:
    weight = on_grid(3, 37, 300, 1.0, 128)
    FourBit(128).pack(weight, "fp16")
    weight[row, column] += 0.01
    with pytest.raises(ValueError, match="4 bits"):
        FourBit(128).pack(weight, "fp16")


def test_a_weight_that_nobody_rounded_is_refused_after_a_look_at_its_first_groups() -> None:
    class Looked(np.ndarray):
        """Says what is read of it."""

        seen: ClassVar[list[tuple[int, ...]]] = []

        def __getitem__(self, index: Any) -> Any:
            part = np.asarray(self)[index]
            self.seen.append(part.shape)
            return part

    weight = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32).view(Looked)
    with pytest.raises(ValueError, match="4 bits"):
        FourBit(128).pack(weight, "fp16")
    assert Looked.seen == [(16, 128)]


def test_a_form_says_what_it_takes_and_stores() -> None:
    with pytest.raises(ValueError, match="groups are of"):
        FourBit(48)
    form, weight = FourBit(128), on_grid(0, 64, 1024, 0.5, 128)
    packed = form.pack(weight, "fp16")
    assert sum(a.nbytes for a in packed.values()) == 64 * 1024 * (0.5 + 4 / 128)
    assert form.stored(weight, "bf16") * 2 * weight.size == sum(a.nbytes for a in packed.values())
    assert FourBit(32).rather == FourBit(64)
    assert form.rather is None
    with pytest.raises(ValueError, match="float32"):
        form.pack(weight, "fp32")
    with pytest.raises(ValueError, match="codes"):
        rules.check(FourBit(128).rules("fp16"), packed | {"codes": packed["codes"][1:]}, 64, 1024)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype, group, tokens", [("fp16", 128, 8), ("fp16", 32, 16), ("bf16", 64, 8)])
@pytest.mark.parametrize("shape", [(2, 8), (1, 8)])
def test_it_compiles_without_spills_for_tensor_cores(
    arch: str, dtype: Dtype, group: int, tokens: int, shape: tuple[int, int]
) -> None:
    shape = shape if shape in SHAPES[tokens] else SHAPES[tokens][0]
    made = kernel(dtype, Epilogue("gelu_erf", residual=True), group, tokens, *shape)
    compiled = machine_code(made, arch)
    assert products(compiled, dtype) == 8 * tokens // 8 * shape[0]
    assert compiled.ptx.count(f"fma.rn.{NUMBERS[dtype]}x2") == 32 * shape[0]


def test_few_tokens_have_kernels_and_eight_thousand_columns_of_one_token_are_three_times_faster_by_the_model() -> None:
    arch, form = ARCHITECTURES["sm_90"], FourBit(128)
    for tokens in range(1, BINS[-1] + 1):
        made = form.kernels(arch, "bf16", "rows", Epilogue(), tokens)
        assert all(tokens <= one.tile_tokens and one.fits(arch) for one in made)
        assert made
    assert not form.kernels(arch, "fp32", "rows", Epilogue(), 1)
    assert not form.kernels(arch, "fp16", "planes", Epilogue(), 1)
    assert not form.kernels(arch, "fp16", "rows", Epilogue(), 17)
    n = k = 8192
    packed = {"codes": np.empty(n * k // 8, np.uint32), "scales": np.empty(n * k // 128, np.uint32)}
    made, *_ = form.kernels(arch, "fp16", "rows", Epilogue(), 1)
    dense = microseconds(arch, made.grid(n, 1), 2 * n * k, 2 * k, 0)
    assert dense > 3 * form.cost(arch, made, packed, n, k, 1)
