"""What LLVM makes of the scripts, at every level; nothing here runs on a machine that lacks it."""

from __future__ import annotations

import re

import pytest

from spa_compiler.kernels import rx1
from spa_compiler.kernels.lower import compile_module
from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime.link import kernel


def loops(assembly: str) -> list[list[str]]:
    """Instructions of every innermost loop: from a label to the jump back to it, with no label in between."""
    found: list[list[str]] = []
    label, body = "", list[str]()
    for line in assembly.splitlines():
        text = line.strip()
        if re.match(r"\.LBB\w+:", text):
            label, body = text.split(":")[0], []
        elif text and not text.startswith((".", "#")):
            body.append(text)
            if re.match(r"j\w+\s", text) and text.split()[-1] == label:
                found.append(list(body))
    return found


def hot_loop(rows: int, lanes: int, level: str) -> tuple[str, list[str]]:
    script = rx1.kernel(rows, lanes, "none", isa=ISAS[level])
    assembly = compile_module([script], level).inspect_source("asm")
    return assembly, max(loops(assembly), key=lambda body: sum("vfmadd" in i for i in body))


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rows", rx1.BLOCK_ROWS)
@pytest.mark.parametrize("lanes", [16, 64])
def test_the_inner_loop_multiplies_and_adds_in_full_registers(rows: int, lanes: int, level: str) -> None:
    assembly, body = hot_loop(rows, lanes, level)
    assert not re.search(r"\bcall", assembly), "a call in a kernel"
    multiply_adds = [i for i in body if "vfmadd" in i]
    assert multiply_adds
    assert all(("zmm" if ISAS[level].width == 16 else "ymm") in i for i in multiply_adds)
    assert len(multiply_adds) % (rows * ISAS[level].passes(rows, lanes)[1]) == 0
    assert not any("vmulps" in i or "vaddps" in i for i in body), "a product and a sum apart"


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rows", rx1.BLOCK_ROWS)
@pytest.mark.parametrize("lanes", [16, 32, 48, 64])
def test_accumulators_stay_in_registers(rows: int, lanes: int, level: str) -> None:
    _, body = hot_loop(rows, lanes, level)
    assert not any("(%rsp" in i or "(%rbp" in i for i in body), "something of the inner loop lies on the stack"
    assert not any(re.match(r"vmov\w+\s+%[yz]mm\d+, .*\(", i) for i in body), "an accumulator is stored in the loop"


def test_one_token_uses_no_512_bit_registers() -> None:
    assembly, body = hot_loop(4, 1, "x86-64-v4")
    assert any("vfmadd" in i and "xmm" in i for i in body)
    assert not re.search(r"\bcall|zmm", assembly)


def test_nothing_made_for_avx2_needs_avx512() -> None:
    for name in ("spa_rx1_4_64_gelu_erf", "spa_attention_64", "spa_layernorm_48", "spa_pack_rows_64", "spa_shift"):
        text = compile_module([kernel(name, "x86-64-v3")], "x86-64-v3").inspect_source("asm")
        assert not re.search(r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3\d)", text), name
