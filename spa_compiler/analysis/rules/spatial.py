"""Images are resized, sampled and rearranged: batch and channels pass, positions are pinned.

    DepthToSpace   DCR: X [N, (bh, bw, C), H, W], CRD: X [N, (C, bh, bw), H, W] -> Y [N, C, H bh, W bw]
    SpaceToDepth   X [N, C, H bh, W bw] -> Y [N, (bh, bw, C), H, W], or (C, bh, bw)
    Col2Im         X [N, (C, taps), L] -> Y [N, C, ..]

`bh`, `bw` and `taps` are pinned: a unit of `C` is all that belongs to one channel of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Array, Axis, Dim, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, pin_window
from spa_compiler.analysis.rules.window import pin_part, put_mixed

if TYPE_CHECKING:
    from spa_compiler.analysis.cut import Cut

_RESIZED = "resized positions"
_SHIFTS = ("ceil", "round_prefer_ceil")
"""Ways to round half a position up: with them `tf_half_pixel_for_nn` moves an axis that keeps its size."""


def resize(node: gs.Node, facts: Facts) -> str | None:
    """Axes that keep their size pass: their scale is 1, or their entry in `sizes` is what they have."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    for place in range(1, len(node.inputs)):
        pin_window(node, facts, given(node, place), "sizes")
    listed = _listed(node, len(axes))
    if given(node, 3) is None:
        same = {axis for axis, scale in zip(listed, _scales(node, facts), strict=False) if scale == 1}
    elif node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch":
        same = _same_by_sizes(node, facts, 3, listed)
    else:  # one scale for all that are listed
        same = set()
    same &= _unmoved(node, facts, listed)
    passing = [axis if place in same or place not in listed else None for place, axis in enumerate(axes)]
    put_mixed(node, facts, passing, _RESIZED)
    return None


def center_crop_pad(node: gs.Node, facts: Facts) -> str | None:
    """Axes that are not listed, or keep their size, pass."""
    x = node.inputs[0]
    axes = facts.of(x)
    if axes is None:
        return UNKNOWN_RANK
    facts.pin_tensor(node.op, node.inputs[1], "sizes", window=True)
    listed = _listed(node, len(axes))
    same = _same_by_sizes(node, facts, 1, listed)
    passing = [axis if place in same or place not in listed else None for place, axis in enumerate(axes)]
    put_mixed(node, facts, passing, "cropped positions")
    return None


def depth_to_space(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    depth = facts.algebra.size(axes[1])
    if depth is None:
        return "blocks of an unknown number of channels"
    block, channel, merged = _blocks(node, facts, depth // int(node.attrs["blocksize"]) ** 2)
    facts.couple(node, node.inputs[0], 1, merged)
    pin_part(node, facts, node.inputs[0], 1, block, "position in a block")
    put_mixed(node, facts, [axes[0], channel, None, None], "blocks of positions")
    return None


def space_to_depth(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    block, channel, merged = _blocks(node, facts, facts.algebra.size(axes[1]))
    facts.couple(node, node.inputs[0], 1, channel)
    put_mixed(node, facts, [axes[0], merged, None, None], "blocks of positions")
    pin_part(node, facts, node.outputs[0], 1, block, "position in a block")
    return None


def grid_sample(node: gs.Node, facts: Facts) -> str | None:
    """X [N, C, ..], grid [N, .., coordinates] -> Y [N, C, ..]."""
    x, grid = node.inputs[:2]
    axes = facts.of(x)
    if axes is None or facts.of(grid) is None:
        return UNKNOWN_RANK
    facts.couple(node, grid, 0, axes[0])
    for axis in range(1, len(facts.axes[grid.name])):
        facts.pin(node.op, grid, axis, "sampling positions", window=True)
    put_mixed(node, facts, [*axes[:2], *[None] * (len(axes) - 2)], "sampling positions")
    return None


def affine_grid(node: gs.Node, facts: Facts) -> str | None:
    """theta [N, k, k + 1], size [k + 2] -> grid [N, .., k]."""
    return "coordinates of a grid"


def col2im(node: gs.Node, facts: Facts) -> str | None:
    """See the file's docstring; the sum is over blocks that overlap in positions, not in channels."""
    x, image, block = node.inputs[:3]
    axes, shape = facts.of(x), facts.value(block)
    for tensor in (image, block):
        facts.pin_tensor(node.op, tensor, "sizes", window=True)
    if axes is None:
        return UNKNOWN_RANK
    columns = facts.algebra.size(axes[1])
    if shape is None or columns is None:
        return "blocks of unknown size"
    taps = facts.algebra.fresh(math.prod(shape.tolist()))
    channel = facts.algebra.fresh(columns // math.prod(shape.tolist()))
    facts.couple(node, x, 1, facts.algebra.merge([channel, taps]))
    pin_part(node, facts, x, 1, taps, "position in a block")
    put_mixed(node, facts, [axes[0], channel, *[None] * shape.size], "blocks of positions")
    return None


def _blocks(node: gs.Node, facts: Facts, channels: int | None) -> tuple[Axis, Axis, Axis]:
    """The two block axes as one, the channels, and both merged in the order of the node's mode."""
    size = int(node.attrs["blocksize"])
    block, channel = Axis.of(Dim(size), Dim(size)), facts.algebra.fresh(channels)
    order = [channel, block] if node.attrs.get("mode", "DCR") == "CRD" else [block, channel]
    return block, channel, facts.algebra.merge(order)


def _listed(node: gs.Node, rank: int) -> list[int]:
    """The axes that the entries of sizes, scales and regions are about."""
    return [int(axis) % rank for axis in node.attrs.get("axes") or range(rank)]


def _scales(node: gs.Node, facts: Facts) -> Sequence[float | None]:
    """Upsample up to opset 8 has an attribute, up to Resize 10 they are the second input, then the third."""
    if "scales" in node.attrs:
        return [float(scale) for scale in node.attrs["scales"]]
    place = 1 if len(node.inputs) == 2 else 2
    return _entries(facts, node.inputs[place]) if len(node.inputs) > place else []


def _entries(facts: Facts, tensor: Any) -> list[float | None]:
    """The entries of a vector, None where one hangs on the inputs."""
    found = facts.entries(tensor) if tensor.name else None
    if found is None:
        return []
    return [float(value) if known else None for value, known in zip(*(part.reshape(-1) for part in found), strict=True)]


def _same_by_sizes(node: gs.Node, facts: Facts, place: int, listed: Sequence[int]) -> set[int]:
    """The axes that keep their size although input `place` could set it; their entries follow a cut."""
    x, y, sizes = node.inputs[0], node.outputs[0], node.inputs[place]
    same = {axis for axis in listed if _same_size(facts, x, y, axis)}
    if list(listed) == list(range(len(facts.axes[x.name]))):
        facts.patch(node, lambda node, cut: cut.patch_sizes(node, place))
        return same
    values = facts.value(sizes)
    if values is None:
        return set()
    facts.patch(node, _shrink_entries(place, values, listed))
    return same


def _same_size(facts: Facts, x: Any, y: Any, axis: int) -> bool:
    if x.shape is None or y.shape is None or not isinstance(x.shape[axis], int):
        return False
    return bool(x.shape[axis] == y.shape[axis] and facts.varies(x, axis) == facts.varies(y, axis))


def _shrink_entries(place: int, values: Array, listed: Iterable[int]) -> Callable[[gs.Node, Cut], None]:
    """A patch: entry k of input `place` is the size of the output's axis `listed[k]`."""

    def apply(node: gs.Node, cut: Cut) -> None:
        y = node.outputs[0]
        shrunk = [(entry, axis) for entry, axis in enumerate(listed) if cut.keep(y, axis) is not None]
        if not shrunk:
            return
        sizes = values.copy()
        for entry, axis in shrunk:
            sizes[entry] = cut.sizes(y, axis)[1]
        cut.set_input(node, place, sizes)

    return apply


def _unmoved(node: gs.Node, facts: Facts, listed: Sequence[int]) -> set[int]:
    """The axes on which each position stays where it is as long as their size does."""
    mode = node.attrs.get("coordinate_transformation_mode", "")
    if mode == "tf_half_pixel_for_nn" and node.attrs.get("nearest_mode", "round_prefer_floor") in _SHIFTS:
        return set()
    if mode != "tf_crop_and_resize":
        return set(listed)
    corners = _entries(facts, node.inputs[1])
    ends = zip(listed, corners, corners[len(listed) :], strict=False)
    return {axis for axis, start, stop in ends if start == 0 and stop == 1}


RULES: dict[str, Rule] = {
    "AffineGrid": affine_grid,
    "CenterCropPad": center_crop_pad,
    "Col2Im": col2im,
    "DepthToSpace": depth_to_space,
    "GridSample": grid_sample,
    "Resize": resize,
    "SpaceToDepth": space_to_depth,
    "Upsample": resize,
}
MICROSOFT: dict[str, Rule] = {"GridSample": grid_sample}
