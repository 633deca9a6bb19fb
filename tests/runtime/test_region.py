"""Regions as data: the plan of scratch, names, and the C that is written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa_compiler.kernels import cached, depthwise, panel, rx1, window
from spa_compiler.kernels.vector import ISAS
from spa_compiler.kernels.window import Window
from spa_compiler.runtime import images, region
from spa_compiler.runtime.generate import PIXELS, kernels_of, write_c
from spa_compiler.runtime.link import C_FOLDER, FLAGS, kernel, run_linker
from spa_compiler.runtime.region import (
    AttentionSpec,
    LinearSpec,
    NormSpec,
    Panel,
    RegionBuilder,
    RegionSpec,
    Term,
)
from tests import decoder_harness
from tests.image_harness import NETWORKS, network
from tests.kernel_harness import X86
from tests.region_harness import CASES, case
from tests.window_harness import CONVOLUTIONS


def linear(n: int, k: int, rows: int = 4, act: str = "none") -> LinearSpec:
    return LinearSpec(n, k, rx1.Blocks(rows, *rx1.default_blocking(n, k, rows)), act)


def chain(*features: int) -> tuple[RegionSpec, list[Panel]]:
    b = RegionBuilder()
    panels = [b.pack(features[0])]
    for n in features[1:]:
        panels.append(b.linear(panels[-1], linear(n, panels[-1].features)))
    b.unpack(panels[-1])
    return b.finish(), panels


def test_the_lines_are_the_steps_in_order() -> None:
    b = RegionBuilder()
    x = b.pack(10)
    h = b.linear(x, linear(20, 10, act="relu"))
    y = b.norm(b.linear(h, linear(10, 20), residual=x), NormSpec(10, 1e-5))
    b.unpack(y)
    b.linear_out(y, linear(5, 10))
    assert b.finish().lines == (
        "spa_pack(r, 0, 0)",
        "spa_linear(r, 0, 0, -1, 16)",
        "spa_linear(r, 1, 16, 0, 48)",
        "spa_norm(r, 0, 48, 0)",
        "spa_unpack(r, 0, 0)",
        "spa_linear_out(r, 2, 0, -1, 1)",
    )


def test_a_sum_reads_both_panels_and_ends_with_the_second() -> None:
    b = RegionBuilder()
    x = b.pack(40)
    thin = b.linear(x, linear(8, 40))
    y = b.linear(x, linear(24, 40), term=Term(thin, linear(24, 8, act="relu")))
    b.linear_out(y, linear(5, 24), term=Term(x, linear(5, 40)))
    spec = b.finish()
    assert spec.lines == (
        "spa_pack(r, 0, 0)",
        "spa_linear(r, 0, 0, -1, 48)",
        "spa_sum(r, 1, 0, 2, 48, -1, 64)",
        "spa_sum_out(r, 3, 64, 4, 0, -1, 0)",
    )
    assert [s.act for s in spec.linears] == ["none", "none", "relu", "none", "none"]


def test_tables_turn_and_caches_come_in_pairs() -> None:
    b = RegionBuilder()
    x, mask, cos, sin = b.pack(32), b.mask(), b.table(8), b.table(8)
    plain = b.attention(b.rotate(x, cos, sin), x, x, AttentionSpec(4, 8, 0.5), mask)
    kept = b.linear(plain, linear(16, 32))
    first = b.attention(plain, kept, kept, AttentionSpec(4, 8, 0.5, shared=2, cached=True))
    b.unpack(b.attention(first, kept, kept, AttentionSpec(4, 8, 0.5, shared=2, cached=True), mask))
    spec = b.finish()
    assert spec.tables == (8, 8)
    assert spec.caches == ((2, 8),) * 4
    assert spec.lines[:4] == (
        "spa_pack(r, 0, 0)",
        "spa_table(r, 0, 32)",
        "spa_table(r, 1, 48)",
        "spa_rotate(r, 4, 8, 0, 32, 48, 64)",
    )
    cores = [
        re.findall(r"(\w+)\(r, (\d)(?:, \d+){3}, (-?\d), (\d+)", line) for line in spec.lines if "attention" in line
    ]
    assert [core[:3] for ((core),) in cores] == [
        ("spa_attention", "0", "0"),
        ("spa_attention_cached", "1", "-1"),
        ("spa_attention_cached", "2", "0"),
    ]
    assert [core[3] for ((core),) in cores[1:]] == ["0", "2"], "the cache of the keys"


def test_heads_that_the_c_side_has_no_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of queries"):
        AttentionSpec(6, 8, 1.0, shared=4)
    for heads, depth in ((region.MAX_SHARED + 1, 4), (8, region.MAX_QUERY // 8 + 4)):
        AttentionSpec(heads, depth, 1.0, shared=heads)
        with pytest.raises(ValueError, match="more than the C side has room for"):
            AttentionSpec(heads, depth, 1.0, shared=heads, cached=True)


def test_products_with_other_chunks_cannot_be_added() -> None:
    b = RegionBuilder()
    x = b.pack(40)
    with pytest.raises(ValueError, match="cut differently"):
        b.linear(x, linear(300, 40), term=Term(x, LinearSpec(300, 40, rx1.Blocks(4, 64, 40))))
    with pytest.raises(ValueError, match="cut differently"):
        b.linear(x, linear(24, 40), term=Term(x, linear(20, 40)))
    b.linear_out(x, linear(20, 40, rows=1), term=Term(x, linear(20, 40, rows=8)))  # one chunk, of 20 and of 24 rows


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 2000))
def test_weights_of_any_height_have_the_same_chunks(n: int, k: int, other: int) -> None:
    for one in rx1.BLOCK_ROWS:
        for two in rx1.BLOCK_ROWS:
            assert linear(n, k, one).same_chunks(linear(n, other, two))


def test_groups_that_stick_out_of_their_panel_are_refused() -> None:
    linear(66, 40, rows=6)
    with pytest.raises(ValueError, match="64 rows in groups of 6 do not fit"):
        linear(64, 40, rows=6)


def test_a_panel_that_is_not_needed_any_more_gives_its_place() -> None:
    spec, _ = chain(64, 64, 64, 64, 64)
    assert spec.scratch_rows == 128


def test_panels_are_whole_groups_of_sixteen_rows() -> None:
    _, panels = chain(1, 16, 17)
    assert [p.rows for p in panels] == [16, 16, 32]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_panels_that_live_at_once_do_not_overlap(data: st.DataObject) -> None:
    b = RegionBuilder()
    live = [b.pack(data.draw(st.integers(1, 50)))]
    for _ in range(data.draw(st.integers(1, 14))):
        source = data.draw(st.sampled_from(live))
        step = data.draw(st.sampled_from(["pack", "linear", "sum", "residual", "norm", "unpack", "out"]))
        n = data.draw(st.integers(1, 50))
        same = [p for p in live if p.features == source.features]
        if step == "pack":
            live.append(b.pack(n))
        elif step == "linear":
            live.append(b.linear(source, linear(n, source.features)))
        elif step == "sum":
            second = data.draw(st.sampled_from(live))
            term = Term(second, linear(n, second.features))
            live.append(b.linear(source, linear(n, source.features), term=term))
        elif step == "residual":
            spec = linear(source.features, source.features)
            live.append(b.linear(source, spec, residual=data.draw(st.sampled_from(same))))
        elif step == "norm":
            live.append(b.norm(source, NormSpec(source.features, 1e-5)))
        elif step == "unpack":
            b.unpack(source)
        else:
            b.linear_out(source, linear(n, source.features))
    spec = b.finish()
    for i, p in enumerate(live):
        assert p.place >= 0
        assert p.place + p.rows <= spec.scratch_rows
        for q in live[:i]:
            together = p.born <= q.dies and q.born <= p.dies
            assert not together or p.place + p.rows <= q.place or q.place + q.rows <= p.place
    lowest = max(sum(p.rows for p in live if p.born <= s <= p.dies) for s in range(len(spec.lines)))
    assert lowest <= spec.scratch_rows <= sum(p.rows for p in live)


def test_equal_regions_are_one_op_and_any_difference_another() -> None:
    one, other = chain(8, 8)[0], chain(8, 8)[0]
    assert one == other
    assert one.op_type == other.op_type
    assert re.fullmatch(r"Region_[0-9a-f]{10}", one.op_type)
    changed = [
        dataclasses.replace(one, masks=1),
        dataclasses.replace(one, scratch_rows=999),
        dataclasses.replace(one, linears=(dataclasses.replace(one.linears[0], act="relu"),)),
        dataclasses.replace(one, linears=(dataclasses.replace(one.linears[0], high=1.0),)),
    ]
    assert len({one.op_type, *(c.op_type for c in changed)}) == 5


def test_kernels_of_names_one_function_per_lane_count() -> None:
    found = kernels_of([case(name).spec for name in CASES])
    assert {"pack", "unpack", "layernorm", "rmsnorm", "linear_rx1_4_1_gelu_erf"} <= set(found)
    assert len(found.pop("gate")) == 1  # of all elements, whatever the lanes
    assert all(len(functions) == len(panel.LANE_COUNTS) for functions in found.values())
    for function, *_ in found.values():
        assert kernel(function, "x86-64-v3").attrs["global_symbol"] == function


def test_c_does_not_depend_on_the_order_of_the_regions() -> None:
    specs = [case(name).spec for name in CASES]
    assert write_c(specs, X86) == write_c([*reversed(specs), specs[0]], X86)


def test_c_floats_are_exact() -> None:
    low, high = float(np.float32(-0.1)), float("inf")
    spec = chain(8, 8)[0]
    clip = dataclasses.replace(spec.linears[0], act="clip", low=low, high=high)
    text = write_c([dataclasses.replace(spec, linears=(clip,))], X86)
    assert f".low = {low.hex()}f" in text
    assert ".high = 3.4028235e38f" in text


def test_the_c_side_and_python_agree_on_sizes() -> None:
    header = (C_FOLDER / "region.h").read_text()

    def constant(name: str) -> int:
        return int(re.search(rf"\b{name} = (\d+)", header)[1])

    assert constant("MAX_CHUNK") == rx1.MAX_CHUNK
    assert constant("MAX_LANES") == panel.MAX_LANES
    assert constant("LANE_COUNTS") == len(panel.LANE_COUNTS)
    assert constant("MAX_INPUTS") == region.MAX_INPUTS
    assert constant("MAX_OUTPUTS") == region.MAX_OUTPUTS
    assert constant("MAX_MASKS") == region.MAX_MASKS
    assert constant("MAX_TABLES") == region.MAX_TABLES
    assert constant("MAX_CACHES") == region.MAX_CACHES
    assert constant("MAX_SHARED") == region.MAX_SHARED
    assert constant("MAX_QUERY") == region.MAX_QUERY
    assert constant("CACHE_KEYS") == cached.KEYS
    assert constant("MAX_IMAGES") == images.MAX_IMAGES
    assert constant("REGISTER") == PIXELS[0]
    counts = re.search(r"lane_counts\[LANE_COUNTS\] = \{([\d, ]+)\}", (C_FOLDER / "panels.c").read_text())[1]
    assert tuple(map(int, counts.split(","))) == panel.LANE_COUNTS


def test_window_c_and_python_agree_on_the_layout() -> None:
    text = (C_FOLDER / "window.c").read_text()
    found = {name: int(re.search(rf"\b{name} = (\d+)", text)[1]) for name in ("PITCH_STEP", "RUN")}
    assert found == {"PITCH_STEP": window.PITCH_STEP, "RUN": window.RUN}
    assert tuple(i * window.ZMM for i in range(1, panel.MAX_LANES // window.ZMM + 1)) == PIXELS


def test_a_window_has_kernels_of_whole_registers_and_none_for_panels() -> None:
    found = kernels_of([CONVOLUTIONS["same"].region])
    assert set(found) == {"shift", "crop", "pad", "linear_rx1w_4_16_relu"}
    assert len(found["linear_rx1w_4_16_relu"]) == len(PIXELS)
    for function, *_ in found.values():
        assert kernel(function, "x86-64-v3").attrs["global_symbol"] == function


def test_the_window_is_a_part_of_the_name() -> None:
    one, other = (
        dataclasses.replace(CONVOLUTIONS["same"], window=Window(5, (3, 3), stride, pads=(1, 1, 1, 1))).region.op_type
        for stride in ((1, 1), (1, 2))
    )
    assert one != other
    assert one == CONVOLUTIONS["same"].region.op_type


def test_depthwise_c_and_python_agree_on_the_buffer() -> None:
    text = (C_FOLDER / "depthwise.c").read_text()
    block = int(re.search(r"\bBLOCK = (\d+)", text)[1])
    floats = int(re.search(r"\bBUFFER = (\d+) << 10", text)[1]) << 10
    assert block == max(depthwise.rows_at_once(isa) for isa in ISAS.values())
    # a kernel that sees as many rows as fit for one register of outputs, and one row more
    rows = floats // 16 - (block - 1) - 1
    assert images.fits_buffer(Window(1, (rows, 1)))
    assert not images.fits_buffer(Window(1, (rows + 1, 1)))


def spec_of(name: str) -> region.RegionSpec | images.ImageRegion:
    """Of a case, an attention core, a convolution or a network; "line" is a convolution here."""
    if name.endswith("decoder"):
        return decoder_harness.core(name.startswith("cached"))
    if name in CONVOLUTIONS:
        return CONVOLUTIONS[name].region
    return network(name).spec if name in NETWORKS else case(name).spec


@pytest.mark.parametrize("levels", [X86, ("aarch64",)], ids=["x86-64", "aarch64"])
@pytest.mark.parametrize(
    "names", [(), ("mlp",), (*CASES, "decoder", "cached decoder"), ("mlp", "same", "line", *NETWORKS)]
)
def test_the_c_compiles_without_a_warning(names: tuple[str, ...], levels: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "regions.c"
    source.write_text(write_c([spec_of(name) for name in names], levels))
    flags = [f for f in FLAGS if f not in ("-shared", "-s")]
    run_linker([*flags, "-Werror", f"-I{C_FOLDER}", "-c", str(source), "-o", str(tmp_path / "regions.o")], levels[0])


@pytest.mark.parametrize("level", ["x86-64", "aarch64"])
def test_the_c_side_compiles_without_a_warning(level: str, tmp_path: Path) -> None:
    flags = [*(f for f in FLAGS if f not in ("-shared", "-s")), "-Werror", "-Wshadow", "-Wconversion"]
    for source in sorted(C_FOLDER.glob("*.c")):
        run_linker([*flags, "-c", str(source), "-o", str(tmp_path / "x.o")], level)
