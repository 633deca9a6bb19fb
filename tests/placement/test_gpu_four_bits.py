"""Weights of 4 bits on GPUs: found by their values, taken where a token or a few read them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spa_compiler.errors import SpaError
from spa_compiler.graph import shapes
from spa_compiler.kernels.cuda.form import Dtype, rounded
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.placement import gpu_choose
from spa_compiler.placement.gpu_choose import GpuChoice, calculated, candidates, check_packed
from spa_compiler.placement.gpu_sites import find_gpu_sites, tokens_of
from spa_compiler.targets.cuda import architecture
from tests.networks import model_of

SM90 = architecture("sm_90")
N, K = 4096, 512
F32 = np.ndarray


def quantized(group: int, density: float = 1.0) -> F32:
    """[n, k] without other zeros than asked for."""
    rng = np.random.default_rng(0)
    codes = rng.integers(1, 16, (N, K)).astype(np.float32)
    codes = np.where(codes == 8, 0, codes) - 8
    scales = rng.integers(1 << 10, 1 << 11, (N, K // group)).astype(np.float32) / 4096
    return codes * scales.repeat(group, axis=1) * (rng.random((N, K)) < density)


def chosen(weight: F32, tokens: int, dtype: Dtype = "fp16") -> tuple[GpuChoice, list[gpu_choose.Candidate]]:
    n, k = weight.shape
    model = model_of(f"one (float[1,{tokens},{k}] x) => (float[1,{tokens},{n}] y) {{ y = MatMul(x, w) }}", w=weight.T)
    known = shapes.fixed_at(model, [{"x": np.zeros((1, tokens, k), np.float32)}])
    (site,), _ = find_gpu_sites(model, {}, known)
    sizes = [tokens_of(site, known[0])]
    found = candidates(site, [SM90], dtype, sizes)
    return calculated(site, found, [SM90], dtype, sizes), found


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_weight_without_zeros_has_its_form_at_one_token(dtype: Dtype) -> None:
    weight = quantized(128)
    assert weight.all()
    choice, found = chosen(weight, 1, dtype)
    assert [c.form.name for c in found] == ["4-bit in groups of 128"]
    assert (choice.kind, choice.candidate) == ("4-bit", "4-bit in groups of 128")
    assert choice.expected > 1.2
    check_packed(choice)


@pytest.mark.parametrize("group", [64, 32])
def test_groups_are_the_largest_that_hold_the_weight(group: int) -> None:
    choice, found = chosen(quantized(group), 1)
    assert [c.form.name for c in found] == [f"4-bit in groups of {group}"]
    assert choice.form is not None
    assert choice.form.form == FourBit(group)
    check_packed(choice)


def test_half_of_it_zeros_is_faster_in_four_bits_than_as_a_bitmap() -> None:
    choice, found = chosen(quantized(128, 0.5), 1)
    assert {"4-bit in groups of 128", "unstructured bitmap"} <= {c.form.name for c in found}
    assert choice.candidate == "4-bit in groups of 128"


def test_what_has_been_rounded_to_the_model_s_floats_is_found_as_well() -> None:
    choice, _ = chosen(rounded(quantized(128), "bf16"), 1, "bf16")
    assert choice.kind == "4-bit"
    check_packed(choice)


def test_other_weights_and_many_tokens_have_none() -> None:
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((N, K)).astype(np.float32)
    choice, found = chosen(plain, 1)
    assert (choice.form, found, choice.reason) == (None, [], "not measured: it has no zeros")
    half = plain * (rng.random(plain.shape) < 0.5)
    assert "4-bit" not in {c.form.pattern for c in chosen(half, 1)[1]}
    assert chosen(quantized(128), 256)[0].form is None
    assert chosen(quantized(128), 1, "fp32")[1] == []


def test_a_weight_that_is_not_what_was_packed_is_seen() -> None:
    choice, _ = chosen(quantized(128), 1)
    assert choice.arrays is not None
    for name, change in (("codes", 1), ("scales", 1 << 12)):
        arrays = {key: array.copy() for key, array in choice.arrays.items()}
        arrays[name].reshape(-1)[5] ^= np.uint32(change)
        with pytest.raises(SpaError, match="does not hold the weight"):
            check_packed(dataclasses.replace(choice, arrays=arrays))


def test_models_without_grids_are_looked_at_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense weight costs a look at the first groups: nothing counts its zeros, nothing copies it."""
    asked: list[tuple[int, ...]] = []

    @dataclasses.dataclass(frozen=True)
    class Counting(FourBit):
        def stored(self, weight: F32, dtype: Dtype) -> float:
            asked.append(weight.shape)
            return super().stored(weight, dtype)

    monkeypatch.setattr(gpu_choose, "FORMS", (Counting(128),))
    plain = np.random.default_rng(2).standard_normal((N, K)).astype(np.float32)
    assert chosen(plain, 1)[1] == []
    assert asked == [(256, 256)]
