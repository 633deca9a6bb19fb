"""What LLVM makes of the scripts, at every level; nothing here runs on a machine that lacks it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from spa_compiler.kernels import activation, panel, rx1, rx1_products
from spa_compiler.kernels.lower import compile_module
from spa_compiler.kernels.vector import ISAS
from spa_compiler.runtime.link import kernel


@dataclass(frozen=True)
class Words:
    """What to look for in an assembler's text, as regular expressions."""

    multiply: str  # a multiply-add in full registers, or its product where they are two instructions
    any_multiply: str
    apart: str | None  # a product or a sum by itself
    store: str = r"v?mov\w+\s+%[xyz]mm\d+, .*\("  # of a vector
    vector: str = r"%[xyz]mm\d"
    stack: str = r"\(%rsp"  # %rbp holds any pointer
    call: str = r"\bcallq?\s"


X86_APART = r"v?(mulps|addps)"
WORDS = {
    "x86-64-v4": Words(r"vfmadd\w+\s.*%zmm", "vfmadd", X86_APART),
    "x86-64-v3": Words(r"vfmadd\w+\s.*%ymm", "vfmadd", X86_APART),
    "x86-64": Words(r"mulps\s.*%xmm", "mulps", None),
    "aarch64": Words(
        r"fmla\s+v\d+\.4s",
        "fmla",
        r"f(mul|add)\s+v",
        store=r"st[rp]\s+q",
        vector=r"\bq\d",
        stack=r"\[sp\b",
        call=r"\bblr?\s",
    ),
}


def loops(assembly: str) -> list[list[str]]:
    """Instructions of every innermost loop: from a label to the jump back to it, with no label in between."""
    found: list[list[str]] = []
    label, body = "", list[str]()
    for line in assembly.splitlines():
        text = line.strip()
        if re.match(r"\.LBB\w+:", text):
            label, body = text.split(":")[0], []
        elif text and not text.startswith((".", "#", "//")):
            body.append(text)
            if re.match(r"(j\w+|b|b\.\w+|cbn?z|tbn?z)\s", text) and text.split()[-1] == label:
                found.append(list(body))
    return found


def count(pattern: str, body: list[str]) -> int:
    return sum(re.search(pattern, i) is not None for i in body)


def spills(body: list[str], words: Words) -> list[str]:
    """Vectors that come from the stack or go there."""
    return [i for i in body if re.search(words.stack, i) and re.search(words.vector, i)]


def hot_loop(rows: int, lanes: int, level: str) -> tuple[str, list[str]]:
    script = rx1_products.kernel(rows, lanes, "none", isa=ISAS[level])
    assembly = compile_module([script], level).inspect_source("asm")
    return assembly, max(loops(assembly), key=lambda body: count(WORDS[level].any_multiply, body))


def test_every_level_is_looked_at() -> None:
    assert set(WORDS) == set(ISAS)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rows", [*rx1.BLOCK_ROWS, *rx1.PRUNED_ROWS])
@pytest.mark.parametrize("lanes", [16, 64])
def test_the_inner_loop_multiplies_and_adds_in_full_registers(rows: int, lanes: int, level: str) -> None:
    words = WORDS[level]
    assembly, body = hot_loop(rows, lanes, level)
    assert not re.search(words.call, assembly), "a call in a kernel"
    products = count(words.multiply, body)
    assert products
    assert products == count(words.any_multiply, body), "a narrower one"
    at_once = rx1_products.rows_at_once(rows, ISAS[level])
    assert products % (at_once * ISAS[level].passes(at_once, lanes)[1]) == 0
    if words.apart:
        assert not count(words.apart, body), "a product and a sum apart"


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rows", [*rx1.BLOCK_ROWS, *rx1.PRUNED_ROWS])
@pytest.mark.parametrize("lanes", [16, 32, 48, 64])
def test_accumulators_stay_in_registers(rows: int, lanes: int, level: str) -> None:
    words = WORDS[level]
    _, body = hot_loop(rows, lanes, level)
    assert not count(words.stack, body), "something of the inner loop lies on the stack"
    assert not count(words.store, body), "an accumulator is stored in the loop"


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("block", ["1x2", "2x4", "4x4", "8x2", "8x4"])
@pytest.mark.parametrize("lanes", [1, 16, 64])
def test_blocks_of_columns_keep_their_sums_in_full_registers(block: str, lanes: int, level: str) -> None:
    words, isa = WORDS[level], ISAS[level]
    assembly = compile_module([kernel(f"spa_rxc_{block}_{lanes}_none", level)], level).inspect_source("asm")
    assert not re.search(words.call, assembly), "a call in a kernel"
    body = max(loops(assembly), key=lambda b: count(words.any_multiply, b))
    rows, cols = map(int, block.split("x"))
    if lanes > 1 or rows * cols >= isa.width:
        assert count(words.multiply, body) == count(words.any_multiply, body) > 0, "a narrower one"
    assert not spills(body, words)
    assert not count(words.store, body), "a sum is stored in the loop"


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize(
    "name, products", [("spa_attention_64", 2), ("spa_attention_16", 2), ("spa_rx1w_4_64_relu", 1)]
)
def test_products_of_other_kernels_stay_in_registers(name: str, products: int, level: str) -> None:
    words = WORDS[level]
    assembly = compile_module([kernel(name, level)], level).inspect_source("asm")
    found = [body for body in loops(assembly) if count(words.multiply, body) >= 4 and not count(words.store, body)]
    assert len(found) >= products, "the loops that sum store nothing"
    assert not any(spills(body, words) for body in found)


@pytest.mark.parametrize("lanes", [16, 64])
def test_slices_load_activations_and_hardly_anything_else(lanes: int) -> None:
    """A core loads one 512-bit register a cycle: four values come in one, and no instruction spreads one from memory."""
    assembly = compile_module([kernel(f"spa_sliced_{lanes}_none", "x86-64-v4")], "x86-64-v4").inspect_source("asm")
    body = max(loops(assembly), key=lambda b: count("vfmadd", b))
    products, vectors = count(r"vfmadd\w+\s.*%zmm", body), lanes // 16
    assert products
    assert not count(r"vbroadcastss\s+.*\(|\{1to16\}", body), "a value is spread from memory"
    assert count(r"v\w+\s+.*\(.*zmm", body) <= products * (1 + 1 / (4 * vectors))
    assert not spills(body, WORDS["x86-64-v4"])


@pytest.mark.parametrize("name", ["rx1_4", "rxc_4x4", "grouped_2of4", "sliced"])
@pytest.mark.parametrize("lanes, level", [(1, "prefetcht0"), (8, "prefetcht0"), (16, "prefetcht1"), (64, "prefetcht1")])
def test_weights_are_fetched_past_l1_where_a_panel_needs_it(name: str, lanes: int, level: str) -> None:
    module = compile_module([kernel(f"spa_{name}_{lanes}_none", "x86-64-v4")], "x86-64-v4")
    assert set(re.findall(r"prefetch\w+", module.inspect_source("asm"))) == {level}


@pytest.mark.parametrize("level", ISAS)
def test_a_transpose_is_cut_into_squares_that_fit_the_registers(level: str) -> None:
    assembly = compile_module([panel.pack_kernel(64, ISAS[level])], level).inspect_source("asm")
    body = max(loops(assembly), key=len)
    full = 16 * 16 // ISAS[level].width  # registers of a tile, each is stored once
    assert count(WORDS[level].store, spills(body, WORDS[level])) <= full // 2


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("act", activation.NAMES)
def test_activations_call_nothing(act: str, level: str) -> None:
    """SSE2 rounds no vector to integers and has no fused multiply-add: LLVM would call floorf and fmaf."""
    for rows, lanes in ((1, 1), (16, 1), (4, 16)):
        script = rx1_products.kernel(rows, lanes, act, isa=ISAS[level])
        assert not re.search(WORDS[level].call, compile_module([script], level).inspect_source("asm"))
    if act == "none":
        text = compile_module([kernel("spa_attention_64", level)], level).inspect_source("asm")
        assert not re.search(WORDS[level].call, text)


def test_one_token_uses_no_512_bit_registers() -> None:
    assembly, body = hot_loop(4, 1, "x86-64-v4")
    assert any("vfmadd" in i and "xmm" in i for i in body)
    assert not re.search(r"\bcall|zmm", assembly)


@pytest.mark.parametrize(
    "level, foreign",
    [
        ("x86-64-v3", r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3\d)"),
        # AVX, SSE3 to SSE4.2 as far as LLVM would use them here
        (
            "x86-64",
            r"%[yz]mm|%k\d|^\s+v\w+\s|round[ps]s|pmuld|blendv|insertps|pshufb|movddup|mov\w?hdup|movsldup|fmadd",
        ),
    ],
)
def test_nothing_made_for_a_level_needs_a_higher_one(level: str, foreign: str) -> None:
    for name in (
        "spa_rx1_4_64_gelu_erf",
        "spa_attention_64",
        "spa_layernorm_48",
        "spa_rmsnorm_48",
        "spa_rmsnorm_1",
        "spa_pack_rows_64",
        "spa_shift",
    ):
        text = compile_module([kernel(name, level)], level).inspect_source("asm")
        assert not re.search(foreign, text, re.MULTILINE), name
