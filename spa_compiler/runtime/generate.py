"""Regions -> regions.c: the kernels that an artifact links, a function for each region, a table for each level.

Kernels are made for levels of instructions. The functions of regions are plain C and serve all of them; a table names
the kernels of its level, and at load the highest table that the machine runs is taken (register.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from spa_compiler.kernels import (
    attention,
    cached,
    combine,
    depthwise,
    gate,
    layernorm,
    panel,
    rmsnorm,
    rotate,
    rx1,
    window,
)
from spa_compiler.kernels.vector import ZMM
from spa_compiler.kernels.window import Window
from spa_compiler.runtime.image_spec import ImageRegion
from spa_compiler.runtime.region import AttentionSpec, LinearSpec, NormSpec, RegionSpec
from spa_compiler.targets import level_number

Region = RegionSpec | ImageRegion
PIXELS = tuple(lanes for lanes in panel.LANE_COUNTS if lanes >= ZMM)  # lanes of a tile of an image: whole registers
LOG2_E = 1.4426950408889634
_C_TYPES = {
    "pack": "Pack",
    "unpack": "Unpack",
    "linear": "Multiply",
    "layernorm": "Norm",
    "rmsnorm": "Norm",
    "gate": "Gate",
    "rotate": "Rotate",
    "cached": "Cached",
    "attention": "Attend",
    "shift": "Shift",
    "crop": "Crop",
    "pad": "Pad",
    "depthwise": "Depthwise",
    "largest": "Depthwise",
    "combine": "Combine",
}


_COPIES = (window.SHIFT, window.CROP, depthwise.PAD)  # in every region on images


def _functions(linear: LinearSpec, region: Region) -> tuple[str, ...]:
    """Its kernels, one for each lane count that the region has."""
    if linear.pitched:
        return tuple(rx1.name(linear.form.rows, lanes, linear.act, pitched=True) for lanes in PIXELS)
    images = isinstance(region, ImageRegion)
    return tuple(linear.form.kernel(lanes, linear.act, images) for lanes in (PIXELS if images else panel.LANE_COUNTS))


def _array_of(linear: LinearSpec, region: Region) -> str:
    """The C array of its kernels."""
    return f"linear_{_functions(linear, region)[0].removeprefix('spa_')}"


def _cached(spec: AttentionSpec) -> str:
    return cached.name(spec.depth, cached.heads_at_once(spec.shared))


def _array_of_norm(norm: NormSpec) -> str:
    return "layernorm" if norm.centred else "rmsnorm"


def kernels_of(regions: Sequence[Region]) -> dict[str, tuple[str, ...]]:
    """C array name -> the functions in it (one per lane count), for everything that the regions call."""
    arrays: dict[str, tuple[str, ...]] = {}
    for region in regions:
        arrays |= _kernels_of_images(region) if isinstance(region, ImageRegion) else _kernels_of_panels(region)
    return dict(sorted(arrays.items()))


def _kernels_of_images(region: ImageRegion) -> dict[str, tuple[str, ...]]:
    arrays = {_array_of(linear, region): _functions(linear, region) for linear in region.linears}
    names = [depthwise.name(d.window, d.act) for d in region.depthwise]
    names += [depthwise.largest_name(w) for w in region.largest] + [combine.name(c.op, c.act) for c in region.combines]
    return arrays | {n.removeprefix("spa_"): (n,) for n in (*names, *_COPIES)}


def _kernels_of_panels(region: RegionSpec) -> dict[str, tuple[str, ...]]:
    arrays = {way: tuple(f"spa_{way}_rows_{n}" for n in panel.LANE_COUNTS) for way in ("pack", "unpack")}
    for linear in region.linears:
        arrays[_array_of(linear, region)] = _functions(linear, region)
    for core in {_cached(a) for a in region.attentions if a.cached}:
        arrays[core.removeprefix("spa_")] = (core,)
    if region.tables:
        arrays["rotate"] = (rotate.NAME,)
    if not all(a.cached for a in region.attentions):
        arrays["attention"] = tuple(attention.name(lanes) for lanes in panel.LANE_COUNTS)
    if region.gates:
        arrays["gate"] = (gate.NAME,)
    for norm in region.norms:
        name = layernorm.name if norm.centred else rmsnorm.name
        arrays[_array_of_norm(norm)] = tuple(name(lanes) for lanes in panel.LANE_COUNTS)
    return arrays


def symbol(function: str, level: str) -> str:
    """What a kernel is called in the objects of a level: several of them make one library."""
    return f"{function}_{level.replace('-', '_')}"


def _c_float(value: float) -> str:
    return "-3.4028235e38f" if value < -3.4e38 else "3.4028235e38f" if value > 3.4e38 else f"{float(value).hex()}f"


def write_c(regions: Sequence[Region], levels: Sequence[str]) -> str:
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
        body = "".join(f"  {statement}\n" for statement in region.statements)
        out.append(f"static Status* {region.op_type}(const Run* r) {{\n{body}  return NULL;\n}}\n")
    for level in tables:
        out += [*_kernels(regions, level), *chain.from_iterable(_data(region, level) for region in regions)]
        rows = "\n".join(_row(region, level) for region in regions) or "  {.name = 0}"
        out.append(f"static const Region {symbol('regions', level)}[] = {{\n{rows}\n}};\n")
    entries = ", ".join(f"{{{numbers[level]}, {symbol('regions', level)}}}" for level in tables)
    out.append(f"const Table spa_tables[] = {{{entries}}};")
    out.append(f"const int spa_table_count = {len(tables)}, spa_region_count = {len(regions)};\n")
    return "\n".join(out)


def _kernels(regions: Sequence[Region], level: str) -> list[str]:
    """Declarations, and an array for every step that has a kernel for each lane count."""
    out = []
    for array, functions in kernels_of(regions).items():
        kind, names = _C_TYPES[array.split("_")[0]], ", ".join(symbol(f, level) for f in functions)
        out.append(f"extern {kind} {names};")
        if len(functions) > 1:
            out.append(f"static {kind}* const {symbol(array, level)}[] = {{{names}}};\n")
    return out


def _data(region: Region, level: str) -> list[str]:
    """The arrays that a row of the table points at."""

    def array(kind: str, what: str, items: Sequence[str]) -> list[str]:
        return _array(region, level, kind, what, items)

    linears = [
        f"{{.n = {s.n}, .k = {s.k}, .rows = {s.form.rows}, .chunk = {s.form.chunk}, .k_block = {s.form.k_block}, "
        f"{''.join(f'.{field} = {value}, ' for field, value in s.form.info.items())}"
        f"{'.pitched = 1, ' if s.pitched else ''}"
        f".low = {_c_float(s.low)}, .high = {_c_float(s.high)}, .kernels = {symbol(_array_of(s, region), level)}}}"
        for s in region.linears
    ]
    if isinstance(region, ImageRegion):
        return [*array("LinearInfo", "linears", linears), *_data_of_images(region, level)]
    norms = [
        f"{{.features = {s.features}, .epsilon = {_c_float(s.epsilon)}, .arrays = {s.arrays}, "
        f".kernels = {symbol(_array_of_norm(s), level)}}}"
        for s in region.norms
    ]
    attentions = [
        f"{{.heads = {s.heads}, .depth = {s.depth}, .shared = {s.shared}, .scale = {_c_float(s.scale * LOG2_E)}, "
        + (
            f".at_once = {cached.heads_at_once(s.shared)}, .cached = {symbol(_cached(s), level)}}}"
            if s.cached
            else f".kernels = {symbol('attention', level)}}}"
        )
        for s in region.attentions
    ]
    return [
        *array("LinearInfo", "linears", linears),
        *array("NormInfo", "norms", norms),
        *array("AttentionInfo", "attentions", attentions),
        *array("CacheInfo", "caches", [f"{{{_list(cache)}}}" for cache in region.caches]),
    ]


def _array(region: Region, level: str, kind: str, what: str, items: Sequence[str]) -> list[str]:
    name = symbol(f"{region.op_type}_{what}", level)
    lines = ",\n  ".join(items)
    return [f"static const {kind} {name}[] = {{\n  {lines}}};"] if items else []


def _data_of_images(region: ImageRegion, level: str) -> list[str]:
    seen = [i.window for i in region.images if i.window is not None] + [d.window for d in region.depthwise]
    seen += region.largest
    number = {w: i for i, w in enumerate(dict.fromkeys(seen))}
    windows = symbol(f"{region.op_type}_windows", level)
    depthwises = [
        f"{{.channels = {d.window.channels}, .window = {windows} + {number[d.window]}, .low = {_c_float(d.low)}, "
        f".high = {_c_float(d.high)}, .kernel = {symbol(depthwise.name(d.window, d.act), level)}}}"
        for d in region.depthwise
    ]
    largest = [
        f"{{.channels = {w.channels}, .window = {windows} + {number[w]}, "
        f".kernel = {symbol(depthwise.largest_name(w), level)}}}"
        for w in region.largest
    ]
    combines = [
        f"{{.scales = {int(c.op == 'scale')}, .low = {_c_float(c.low)}, .high = {_c_float(c.high)}, "
        f".kernel = {symbol(combine.name(c.op, c.act), level)}}}"
        for c in region.combines
    ]
    images = [
        f"{{.channels = {i.channels}, .kind = IMAGE_{i.kind}, .source = {i.source}, "
        f".window = {f'{windows} + {number[i.window]}' if i.window else 'NULL'}, .slot = {i.slot}, "
        f".home = {i.home}, .first = {i.first}, .grow = {{{_list(i.grow)}}}}}"
        for i in region.images
    ]
    return [
        *_array(region, level, "WindowInfo", "windows", [_window(w) for w in number]),
        *_array(region, level, "DepthwiseInfo", "depthwise", depthwises),
        *_array(region, level, "DepthwiseInfo", "largest", largest),
        *_array(region, level, "CombineInfo", "combines", combines),
        *_array(region, level, "ImageInfo", "images", images),
        *_array(region, level, "ChainInfo", "chains", [f"{{{_list(pair)}}}" for pair in region.chains]),
    ]


def _window(w: Window) -> str:
    parts = (("size", w.size), ("stride", w.stride), ("dilation", w.dilation), ("pads", w.pads))
    return f"{{{', '.join(f'.{name} = {{{_list(values)}}}' for name, values in parts)}}}"


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _row(region: Region, level: str) -> str:
    """A region in the table of a level."""
    op = region.op_type
    fields = {
        "op": "SPA_CUSTOM_OP",
        "name": f'"{op}"',
        "run": op,
        "input_features": f"{{{_list(region.input_features)}}}",
        "output_features": f"{{{_list(region.output_features)}}}",
        "inputs": len(region.input_features),
        "outputs": len(region.output_features),
        "linears": symbol(f"{op}_linears", level) if region.linears else "NULL",
        "linear_count": len(region.linears),
    }
    if isinstance(region, ImageRegion):
        fields |= {
            "depthwise": symbol(f"{op}_depthwise", level) if region.depthwise else "NULL",
            "depthwise_count": len(region.depthwise),
            "largest": symbol(f"{op}_largest", level) if region.largest else "NULL",
            "combines": symbol(f"{op}_combines", level) if region.combines else "NULL",
            "images": symbol(f"{op}_images", level),
            "image_count": len(region.images),
            "output_images": f"{{{_list(region.output_images)}}}",
            "slots": region.slots,
            "chains": symbol(f"{op}_chains", level) if region.chains else "NULL",
            "chain_count": len(region.chains),
            "axes": region.axes,
            **{name.removeprefix("spa_"): symbol(name, level) for name in _COPIES},
        }
    else:
        arrays = {what: getattr(region, what) for what in ("norms", "attentions", "caches")}
        fields |= {
            **{way: symbol(way, level) for way in ("pack", "unpack")},
            **{what: symbol(f"{op}_{what}", level) if there else "NULL" for what, there in arrays.items()},
            "gate": symbol(gate.NAME, level) if region.gates else "NULL",
            "rotate": symbol(rotate.NAME, level) if region.tables else "NULL",
            "masks": region.masks,
            "tables": len(region.tables),
            "cache_count": len(region.caches),
            "whole_sequences": int(bool(region.attentions)),
            "scratch_rows": region.scratch_rows,
            "norm_count": len(region.norms),
            "norm_arrays": sum(s.arrays for s in region.norms),
        }
        if region.tables:
            fields["table_features"] = f"{{{_list(region.tables)}}}"
    return f"  {{{', '.join(f'.{name} = {value}' for name, value in fields.items())}}},"
