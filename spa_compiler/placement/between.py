"""What stands between convolutions and has no weights: pools, sums, gates, concatenations, slices, larger images.

None of it is worth a node of ours by itself. Inside of a region it keeps images where they are: a slice or a
concatenation of channels is then a matter of where steps write, and nothing goes through ONNX Runtime's layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.graph.model import Model
from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.window import Window
from spa_compiler.placement import epilogue
from spa_compiler.placement.depthwise import DepthwiseSite
from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.sites import held, take_epilogue, unfit
from spa_compiler.runtime.image_plan import Image
from spa_compiler.runtime.image_spec import CombineSpec, fits_buffer
from spa_compiler.runtime.images import ImageBuilder

F32 = NDArray[np.float32]
Build = Callable[[ImageBuilder, Sequence[Image]], Image]

_MOST_GROWN = 16  # times, for each axis


@dataclass(eq=False)
class ImageOp:
    """One step or view of a region that has no weight, computed by `nodes` now.

    Attributes:
        sources: what it reads, with the channels of each.
        build: adds it to a region.
        view: whether it takes channels apart or puts them together.
        grows: whether there is more of its output than of its inputs.
    """

    name: str
    sources: tuple[gs.Variable, ...]
    channels: tuple[int, ...]
    output: gs.Variable
    nodes: list[gs.Node]
    build: Build
    view: bool = False
    grows: bool = False
    layout: str = field(default="planes", init=False)

    @property
    def images(self) -> int:
        """The most images that it adds to a region: what is put together may have to be copied."""
        return 1 + (len(self.sources) if self.view else 0)


Between = ImageOp | DepthwiseSite


def find_between(model: Model, shapes: Shapes) -> list[Between]:
    """Every operator that regions of convolutions have a step for, in topological order, with activations behind it.

    A Split of channels becomes Slices in the model: a node of ours gives out each part by itself. A Concat that begins
    as an earlier one does reads what that one gives.

    Args:
        shapes: of all tensors, one entry for each binding of the inputs.
    """
    called = _split_in_slices(model)
    _nest_concats(model)
    outputs = held(model.graph)
    found: list[Between] = []
    taken: set[int] = set()
    for node in list(model.graph.nodes):
        if node.domain or id(node) in taken or len(node.outputs) != 1:
            continue
        made = _FINDERS[node.op](node, shapes, outputs) if node.op in _FINDERS else None
        if made is not None:
            taken |= {id(n) for n in made.nodes}
            found.append(replace(made, name=called.get(id(node), made.name)))
    return found


def _split_in_slices(model: Model) -> dict[int, str]:
    """The names of the Splits by the ids of their Slices."""
    nodes, called = [], {}
    for node in model.graph.nodes:
        sizes = _split_sizes(node)
        if not sizes:
            nodes.append(node)
            continue
        axis = gs.Constant(f"{node.name}.axis", np.array([1], np.int64))
        source, parts, at = node.inputs[0], list(node.outputs), 0
        node.inputs.clear()
        node.outputs.clear()
        for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            bounds = [
                gs.Constant(f"{node.name}.{what}{i}", np.array([value], np.int64))
                for what, value in (("from", at), ("to", at + size))
            ]
            name = node.name if i == 0 else f"{node.name}.{i}"
            nodes.append(gs.Node("Slice", name, inputs=[source, *bounds, axis], outputs=[part]))
            called[id(nodes[-1])] = str(node.name)
            at += size
    model.graph.nodes = nodes
    return called


def _nest_concats(model: Model) -> None:
    """Of dense blocks, where each layer reads all before it: a region has few inputs and outputs, and a Concat of many
    tensors would keep it from growing."""
    made: dict[tuple[int, ...], gs.Variable] = {}  # what a Concat along axis 1 reads -> what it gives
    for node in model.graph.nodes:
        if node.op != "Concat" or node.domain or node.attrs["axis"] != 1:
            continue
        sources = tuple(map(id, node.inputs))
        length = next((n for n in range(len(sources) - 1, 1, -1) if sources[:n] in made), 0)
        made.setdefault(sources, node.outputs[0])
        if length:
            node.inputs = [made[sources[:length]], *node.inputs[length:]]


def _split_sizes(node: gs.Node) -> list[int]:
    """Channels of each part of a Split along axis 1 of an image; empty if it is none, or they are not known."""
    if node.op != "Split" or node.domain or node.attrs.get("axis", 0) != 1 or not node.name:
        return []
    shapes = [node.inputs[0].shape, *(o.shape for o in node.outputs)]
    if any(shape is None or len(shape) not in (3, 4) or not isinstance(shape[1], int) for shape in shapes):
        return []
    return [shape[1] for shape in shapes[1:]]


def _shapes_of(tensor: gs.Tensor, shapes: Shapes) -> list[tuple[int, ...]] | None:
    """Of an image with the same channels at every binding."""
    if not isinstance(tensor, gs.Variable):
        return None
    found = [known.get(tensor.name) for known in shapes]
    whole = [s for s in found if s is not None and len(s) in (3, 4)]
    return whole if whole and len(whole) == len(found) and len({s[1] for s in whole}) == 1 else None


def _constant(node: gs.Node, index: int) -> list[float] | None:
    """The values of an input, None where it is computed; nothing where it is left out."""
    if index >= len(node.inputs) or not node.inputs[index].name:
        return []
    tensor = node.inputs[index]
    return [v.item() for v in array_of(tensor).reshape(-1)] if isinstance(tensor, gs.Constant) else None


def _op(node: gs.Node, sources: Sequence[gs.Tensor], shapes: Shapes, build: Build) -> ImageOp | None:
    known = [_shapes_of(s, shapes) for s in sources]
    if any(k is None for k in known):
        return None
    channels = tuple(k[0][1] for k in known if k is not None)
    name = node.name or node.outputs[0].name
    return ImageOp(
        name, tuple(s for s in sources if isinstance(s, gs.Variable)), channels, node.outputs[0], [node], build
    )


# ---- pools ----


def _pool_window(node: gs.Node, shapes: Shapes) -> Window | None:
    """How a pool looks at its input, if kernels look so."""
    known, attrs = _shapes_of(node.inputs[0], shapes), node.attrs
    if known is None or attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attrs.get("storage_order", 0):
        return None
    axes = len(known[0]) - 2
    size, ones = [int(v) for v in attrs["kernel_shape"]], [1] * axes
    stride, dilation = ([int(v) for v in attrs.get(key) or ones] for key in ("strides", "dilations"))
    pads = [int(v) for v in attrs.get("pads") or [0] * (2 * axes)]
    extents = [(s - 1) * d + 1 for s, d in zip(size, dilation, strict=True)]
    if attrs.get("ceil_mode", 0):
        # Rounding up is padding behind, as long as no window would begin there.
        for axis in range(axes):
            pads[axes + axis] += stride[axis] - 1
    if any(pads[i] >= extents[i % axes] for i in range(2 * axes)):
        return None
    lead = [1] * (2 - axes)
    top, bottom = [0] * (2 - axes) + pads[:axes], [0] * (2 - axes) + pads[axes:]
    window = Window(
        known[0][1],
        (*lead, *size),  # type: ignore[arg-type]
        (*lead, *stride),  # type: ignore[arg-type]
        (*lead, *dilation),  # type: ignore[arg-type]
        (*top, *bottom),  # type: ignore[arg-type]
        axes,
    )
    return window if not unfit(window) and fits_buffer(window) else None


def _max_pool(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    window = _pool_window(node, shapes)
    if window is None:
        return None
    return _op(node, node.inputs[:1], shapes, lambda b, images: b.largest(images[0], window))


def _average_pool(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> DepthwiseSite | None:
    window = _pool_window(node, shapes)
    if window is None or node.attrs.get("ceil_mode", 0):
        return None
    if any(window.pads) and not node.attrs.get("count_include_pad", 0):
        return None
    positions = math.prod(window.size)
    return _depthwise(node, window, np.full((window.channels, positions), 1 / positions, np.float32), None, outputs)


def _depthwise(
    node: gs.Node, window: Window, taps: F32, bias: F32 | None, outputs: Sequence[gs.Variable]
) -> DepthwiseSite:
    site = DepthwiseSite(node.name or node.outputs[0].name, window, node.inputs[0], node.outputs[0], [node], taps, bias)
    take_epilogue(site, outputs)
    return site


def _norm(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> DepthwiseSite | None:
    """A BatchNormalization that no convolution took in: a factor and a summand for each channel."""
    known = _shapes_of(node.inputs[0], shapes)
    vectors = [array_of(i) for i in node.inputs[1:] if isinstance(i, gs.Constant)]
    if known is None or len(vectors) != 4 or node.attrs.get("training_mode", 0):
        return None
    if any(v.dtype != np.float32 or v.shape != (known[0][1],) for v in vectors):
        return None
    gamma, beta, mean, variance = (v.astype(np.float64) for v in vectors)
    factor = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    if not np.isfinite(factor).all():
        return None
    window = Window(len(factor), (1, 1), axes=len(known[0]) - 2)
    taps = np.ascontiguousarray(factor[:, None], np.float32)
    return _depthwise(node, window, taps, (beta - mean * factor).astype(np.float32), outputs)


def _global_mean(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    known = _shapes_of(node.inputs[0], shapes)
    if known is None:
        return None
    axes = len(known[0]) - 2
    if node.op == "ReduceMean":
        given = node.attrs.get("axes") if "axes" in node.attrs else _constant(node, 1)
        if not given or not node.attrs.get("keepdims", 1):
            return None
        if sorted(int(a) % len(known[0]) for a in given) != list(range(2, 2 + axes)):
            return None
    return _op(node, node.inputs[:1], shapes, lambda b, images: b.mean(images[0], axes))


# ---- pixel by pixel ----


def _combined(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    """A sum or a product of two images, or one of an image and a factor for each of its channels."""
    known = [_shapes_of(i, shapes) for i in node.inputs]
    if len(known) != 2 or known[0] is None or known[1] is None:
        return None
    sources = list(node.inputs)
    how = node.op.lower()
    if known[0] != known[1]:
        if _is_gate(known[0], known[1]):
            sources, known = sources[::-1], known[::-1]
        elif not _is_gate(known[1], known[0]):
            return None
        how = "scale"
    if how == "scale" and node.op != "Mul":
        return None
    return _activated(node, sources, shapes, outputs, how)


def _is_gate(factors: list[tuple[int, ...]] | None, image: list[tuple[int, ...]] | None) -> bool:
    pairs = zip(factors or [], image or [], strict=True)
    return all(f[:2] == i[:2] and len(f) == len(i) and all(size == 1 for size in f[2:]) for f, i in pairs)


def _activated(
    node: gs.Node, sources: Sequence[gs.Tensor], shapes: Shapes, outputs: Sequence[gs.Variable], how: str
) -> ImageOp | None:
    behind = epilogue.find(node.outputs[0], outputs)
    act = ("none", 0.0, 0.0) if behind is None else (behind.act, behind.low, behind.high)
    spec = CombineSpec(how, *act)
    op = _op(node, sources, shapes, lambda b, images: b.combine(images[0], spec, images[1]))
    if op is None or behind is None:
        return op
    return replace(op, output=behind.output, nodes=[node, *behind.nodes])


# ---- channels ----


def _part(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    known, bounds = _shapes_of(node.inputs[0], shapes), [_constant(node, i) for i in range(1, 5)]
    if known is None or any(b is None for b in bounds):
        return None
    first, last, axes, step = ([int(v) for v in b or []] for b in bounds)
    channels = known[0][1]
    if axes not in ([1], [1 - len(known[0])]) or step not in ([], [1]) or len(first) != 1 or len(last) != 1:
        return None
    low, high = (min(max(v + channels if v < 0 else v, 0), channels) for v in (first[0], last[0]))
    if low >= high:
        return None
    op = _op(node, node.inputs[:1], shapes, lambda b, images: b.part(images[0], low, high - low))
    return None if op is None else replace(op, view=True)


def _concat(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    known = _shapes_of(node.outputs[0], shapes)
    if known is None or node.attrs["axis"] not in (1, 1 - len(known[0])):
        return None
    op = _op(node, node.inputs, shapes, lambda b, images: b.concat(images))
    return None if op is None else replace(op, view=True)


# ---- larger images ----


def _resize(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    """Every pixel several times: the nearest one, at whole factors."""
    known, attrs, scales = _shapes_of(node.inputs[0], shapes), node.attrs, _constant(node, 2)
    how = (attrs.get("coordinate_transformation_mode", "half_pixel"), attrs.get("nearest_mode", "round_prefer_floor"))
    if (
        known is None
        or not scales
        or attrs.get("mode", "nearest") != "nearest"
        or "axes" in attrs
        or attrs.get("antialias")
    ):
        return None
    # From the middle of a pixel its source is the nearest, however halves are rounded; from its corner, the floor is.
    if not (how == ("asymmetric", "floor") or (how[0] == "half_pixel" and how[1].startswith("round"))):
        return None
    axes = len(known[0]) - 2
    if len(scales) != axes + 2 or scales[:2] != [1, 1] or any(s != int(s) or not 1 <= s <= _MOST_GROWN for s in scales):
        return None
    down, right = [1] * (2 - axes) + [int(s) for s in scales[2:]]
    op = _op(node, node.inputs[:1], shapes, lambda b, images: b.repeat(images[0], (down, right), axes))
    return None if op is None else replace(op, grows=True)


def _unfold(node: gs.Node, shapes: Shapes, outputs: Sequence[gs.Variable]) -> ImageOp | None:
    block = int(node.attrs["blocksize"])
    if node.attrs.get("mode", "DCR") != "DCR" or not 1 <= block <= _MOST_GROWN:
        return None
    return _op(node, node.inputs[:1], shapes, lambda b, images: b.unfold(images[0], (block, block)))


_FINDERS: Mapping[str, Callable[[gs.Node, Shapes, Sequence[gs.Variable]], Between | None]] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_mean,
    "ReduceMean": _global_mean,
    "BatchNormalization": _norm,
    "Add": _combined,
    "Mul": _combined,
    "Slice": _part,
    "Concat": _concat,
    "Resize": _resize,
    "DepthToSpace": _unfold,
}


def trim(elements: Sequence[object], read_inside: Callable[[gs.Variable], bool]) -> Iterator[ImageOp]:
    """Elements at the rim of a region that are better left outside: what reads nothing that the region makes, views and
    larger images that nothing in it reads.

    Slices of what comes from outside stay: they cost nothing. So does what puts together images of the region alone.
    """
    ops = [e for e in elements if isinstance(e, ImageOp)]
    made = {id(e.output) for e in elements}  # type: ignore[attr-defined]
    for op in ops:
        inside, slices = sum(id(s) in made for s in op.sources), op.view and len(op.sources) == 1
        joins_own = op.view and inside == len(op.sources) > 1
        first = not inside and not slices
        last = not read_inside(op.output) and (op.grows or (op.view and not joins_own))
        if first or last:
            yield op
