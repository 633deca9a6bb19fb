"""Regions -> regions.c: the kernels that an artifact links, a function for each region, a table for each level.

Kernels are made for levels of instructions. The functions of regions are plain C and serve all of them; a table names
the kernels of its level, and at load the highest table that the machine runs is taken (register.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from spa_compiler.kernels import attention, layernorm, panel, window
from spa_compiler.kernels.vector import ZMM
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.region import LinearSpec, RegionSpec
from spa_compiler.targets import level_number

WINDOW_LANES = tuple(lanes for lanes in panel.LANE_COUNTS if lanes >= ZMM)  # whole registers: of window.c
LOG2_E = 1.4426950408889634
_C_TYPES = {
    "pack": "Pack",
    "unpack": "Unpack",
    "linear": "Multiply",
    "layernorm": "Norm",
    "attention": "Attend",
    "shift": "Shift",
    "crop": "Crop",
}


def _functions(linear: LinearSpec, region: RegionSpec) -> tuple[str, ...]:
    """Its kernels, one for each lane count that the region has."""
    lanes = WINDOW_LANES if region.window else panel.LANE_COUNTS
    return tuple(linear.form.kernel(count, linear.act, region.window is not None) for count in lanes)


def _array_of(linear: LinearSpec, region: RegionSpec) -> str:
    """The C array of its kernels."""
    return f"linear_{_functions(linear, region)[0].removeprefix('spa_')}"


def kernels_of(regions: Sequence[RegionSpec]) -> dict[str, tuple[str, ...]]:
    """C array name -> the functions in it (one per lane count), for everything that the regions call."""
    arrays: dict[str, tuple[str, ...]] = {}
    for region in regions:
        if region.window:
            arrays |= {"shift": (window.SHIFT,), "crop": (window.CROP,)}
            for linear in region.linears:
                arrays[_array_of(linear, region)] = _functions(linear, region)
            continue
        for way in ("pack", "unpack"):
            arrays[f"{way}_{region.layout}"] = tuple(f"spa_{way}_{region.layout}_{n}" for n in panel.LANE_COUNTS)
        for linear in region.linears:
            arrays[_array_of(linear, region)] = _functions(linear, region)
        if region.attentions:
            arrays["attention"] = tuple(attention.name(lanes) for lanes in panel.LANE_COUNTS)
        if region.norms:
            arrays["layernorm"] = tuple(layernorm.name(lanes) for lanes in panel.LANE_COUNTS)
    return dict(sorted(arrays.items()))


def symbol(function: str, level: str) -> str:
    """What a kernel is called in the objects of a level: several of them make one library."""
    return f"{function}_{level.replace('-', '_')}"


def _c_float(value: float) -> str:
    return "-3.4028235e38f" if value < -3.4e38 else "3.4028235e38f" if value > 3.4e38 else f"{float(value).hex()}f"


def write_c(regions: Sequence[RegionSpec], levels: Sequence[str]) -> str:
    """regions.c of an artifact.

    Args:
        regions: equal ones are written once.
        levels: to have kernels for, of one architecture; without regions any machine of it will do.
    """
    regions = sorted(set(regions), key=lambda r: r.op_type)
    numbers = {level: level_number(level) for level in levels} if regions else {levels[0]: 1}
    tables = sorted(numbers, key=lambda level: -numbers[level])
    out = ['/* Written by spa-compiler. */\n#include "region.h"\n']
    for region in regions:
        body = "".join(f"  TRY({line});\n" for line in region.lines)
        out.append(f"static Status* {region.op_type}(const Run* r) {{\n{body}  return NULL;\n}}\n")
    for level in tables:
        out += [*_kernels(regions, level), *chain.from_iterable(_data(region, level) for region in regions)]
        rows = "\n".join(_row(region, level) for region in regions) or "  {.name = 0}"
        out.append(f"static const Region {symbol('regions', level)}[] = {{\n{rows}\n}};\n")
    entries = ", ".join(f"{{{numbers[level]}, {symbol('regions', level)}}}" for level in tables)
    out.append(f"const Table spa_tables[] = {{{entries}}};")
    out.append(f"const int spa_table_count = {len(tables)}, spa_region_count = {len(regions)};\n")
    return "\n".join(out)


def _kernels(regions: Sequence[RegionSpec], level: str) -> list[str]:
    """Declarations, and an array for every step that has a kernel for each lane count."""
    out = []
    for array, functions in kernels_of(regions).items():
        kind, names = _C_TYPES[array.split("_")[0]], ", ".join(symbol(f, level) for f in functions)
        out.append(f"extern {kind} {names};")
        if len(functions) > 1:
            out.append(f"static {kind}* const {symbol(array, level)}[] = {{{names}}};\n")
    return out


def _data(region: RegionSpec, level: str) -> list[str]:
    """The arrays that a row of the table points at."""

    def array(kind: str, what: str, items: Sequence[str]) -> list[str]:
        name = symbol(f"{region.op_type}_{what}", level)
        lines = ",\n  ".join(items)
        return [f"static const {kind} {name}[] = {{\n  {lines}}};"] if items else []

    linears = [
        f"{{.n = {s.n}, .k = {s.k}, .rows = {s.form.rows}, .chunk = {s.form.chunk}, .k_block = {s.form.k_block}, "
        f"{''.join(f'.{field} = {value}, ' for field, value in s.form.info.items())}"
        f".low = {_c_float(s.low)}, .high = {_c_float(s.high)}, .kernels = {symbol(_array_of(s, region), level)}}}"
        for s in region.linears
    ]
    norms = [
        f"{{.features = {s.features}, .epsilon = {_c_float(s.epsilon)}, .kernels = {symbol('layernorm', level)}}}"
        for s in region.norms
    ]
    attentions = [
        f"{{.heads = {s.heads}, .depth = {s.depth}, .scale = {_c_float(s.scale * LOG2_E)}, "
        f".kernels = {symbol('attention', level)}}}"
        for s in region.attentions
    ]
    return [
        *array("LinearInfo", "linears", linears),
        *array("NormInfo", "norms", norms),
        *array("AttentionInfo", "attentions", attentions),
        *array("WindowInfo", "window", [_window(region.window, level)] if region.window else []),
    ]


def _window(w: Window, level: str) -> str:
    sizes = ", ".join(
        f".{name} = {{{', '.join(map(str, values))}}}"
        for name, values in (("size", w.size), ("stride", w.stride), ("dilation", w.dilation), ("pads", w.pads))
    )
    functions = f".shift = {symbol(window.SHIFT, level)}, .crop = {symbol(window.CROP, level)}"
    return f"{{.axes = {w.axes}, .channels = {w.channels}, {sizes}, {functions}}}"


def _row(region: RegionSpec, level: str) -> str:
    """A region in the table of a level. Behind a window there are no ways into panels and back."""
    op, layout = region.op_type, region.layout
    arrays = {what: getattr(region, what) for what in ("linears", "norms", "attentions", "window")}
    fields = {
        "op": "SPA_CUSTOM_OP",
        "name": f'"{op}"',
        "run": op,
        **({} if region.window else {way: symbol(f"{way}_{layout}", level) for way in ("pack", "unpack")}),
        **{what: symbol(f"{op}_{what}", level) if there else "NULL" for what, there in arrays.items()},
        "masks": region.masks,
        "whole_sequences": int(bool(region.attentions)),
        "scratch_rows": region.scratch_rows,
        "input_features": f"{{{', '.join(map(str, region.input_features))}}}",
        "output_features": f"{{{', '.join(map(str, region.output_features))}}}",
        "layout": f"LAYOUT_{layout.upper()}",
        "inputs": len(region.input_features),
        "outputs": len(region.output_features),
        "linear_count": len(region.linears),
        "norm_count": len(region.norms),
    }
    return f"  {{{', '.join(f'.{name} = {value}' for name, value in fields.items())}}},"
