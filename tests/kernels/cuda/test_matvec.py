"""Weights of 4 bits: against numpy on the emulator, and through NVRTC."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels.cuda import arrays as rules
from spa_compiler.kernels.cuda.form import Dtype, Epilogue
from spa_compiler.kernels.cuda.matvec import BINS, GROUPS, SHAPES, FourBit, kernel
from spa_compiler.kernels.cuda.roofline import microseconds
from spa_compiler.kernels.cuda.source import source
from spa_compiler.targets import nvrtc
from spa_compiler.targets.cuda import ARCHITECTURES
from tests.cuda_emulator.emulator import check

CASES: dict[str, tuple[Dtype, FourBit, int, tuple[int, int], Epilogue]] = {
    "fp16": ("fp16", FourBit(128), 8, (2, 8), Epilogue()),
    "groups of 32": ("fp16", FourBit(32), 16, (1, 8), Epilogue("silu", residual=True)),
    "bf16": ("bf16", FourBit(64, symmetric=True), 8, (1, 16), Epilogue("relu", residual=True)),
}
KERNELS = {
    name: kernel(dtype, epilogue, form.group, tokens, *shape)
    for name, (dtype, form, tokens, shape, epilogue) in CASES.items()
}
AMONG = tuple(KERNELS.values())


def sparse(seed: int, n: int, k: int, density: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, k)) < density, rng.standard_normal((n, k)), 0).astype(np.float32)


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
    check(form, KERNELS[case], sparse(seed, n, k, density), tokens, dtype, epilogue=epilogue, seed=seed, among=AMONG)


def test_a_warp_goes_through_several_steps() -> None:
    check(FourBit(128), KERNELS["fp16"], sparse(0, 70, 2 * 8 * 128 + 72, 0.5), 1, "fp16", among=AMONG)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_as_near_as_four_bits_can_be_and_zeros_stay(group: int, symmetric: bool) -> None:
    form, weight = FourBit(group, symmetric), sparse(1, 37, 300, 0.5)
    packed = form.pack(weight, "fp16")
    rules.check(form.rules("fp16"), packed, 37, 300)
    stored = form.unpack(packed, 37, 300, "fp16")
    assert (stored[weight == 0] == 0).all()
    # uniform steps over the range of a group, about 4 standard deviations of the nonzeros: a step of 0.3 to 0.5
    error = np.square(stored - weight)[weight != 0].mean()
    assert error < (0.025 if symmetric else 0.02)
    again = form.pack(stored, "fp16")
    np.testing.assert_allclose(form.unpack(again, 37, 300, "fp16"), stored, atol=1e-5)


def test_a_narrower_range_is_taken_where_it_is_better() -> None:
    weight = np.linspace(-1, 1, 128, dtype=np.float32)[None].copy()
    weight[0, 0] = -1.6
    form = FourBit(128)
    stored = form.unpack(form.pack(weight, "fp16"), 1, 128, "fp16")
    step = (1.6 + 1) / 15
    assert np.square(stored - weight).sum() < 128 * step**2 / 12


def test_special_weights_keep_their_zeros_and_signs() -> None:
    weight = np.zeros((3, 256), np.float32)
    weight[0, :128], weight[1, 128:] = 3.0, -2.0
    weight[2, 5] = 1e-30
    form = FourBit(128)
    stored = form.unpack(form.pack(weight, "fp16"), 3, 256, "fp16")
    np.testing.assert_allclose(stored[:2], weight[:2], rtol=1e-5)
    assert abs(stored[2]).max() <= 1e-29


def test_a_form_says_what_it_takes_and_stores() -> None:
    with pytest.raises(ValueError, match="groups are of"):
        FourBit(48)
    packed = FourBit(128).pack(sparse(0, 64, 1024, 0.5), "fp16")
    assert sum(a.nbytes for a in packed.values()) == 64 * 1024 * (0.5 + 4 / 128)
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
    compiled = nvrtc.compile_source(source(made), arch)
    assert compiled.spilled == compiled.stack == 0
    assert compiled.registers * made.threads * made.min_blocks <= ARCHITECTURES[arch].registers_per_sm
    names = {"fp16": "f16", "bf16": "bf16"}
    assert len(re.findall(rf"mma.sync.aligned.*\.{names[dtype]}\.", compiled.ptx)) == 8 * tokens // 8 * shape[0]
    assert len(re.findall(rf"fma.rn.{names[dtype]}x2", compiled.ptx)) == 32 * shape[0]


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
