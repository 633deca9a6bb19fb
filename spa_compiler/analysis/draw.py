"""The graph as a picture: boxes for operators, lines for tensors, colours for groups. SVG alone, or a page with tables.

Both are one self-contained file. Element-wise operators share the box of what they follow, and what only computes sizes
is left out, so that large graphs stay readable. All text comes from the model file, so all of it is escaped.
"""

from __future__ import annotations

import base64
import colorsys
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis import layout
from spa_compiler.analysis.analyze import Analysis
from spa_compiler.analysis.groups import Group
from spa_compiler.analysis.summary import reasons
from spa_compiler.graph.model import Model, scopes

_GREY = "#d9d9d9"
_CHARS = 34
"""Longest line in a box."""
_CHAR_WIDTH, _BOLD_WIDTH, _LINE_HEIGHT, _PAD = 7.0, 7.9, 15.0, 7.0
_CHIPS = 8
"""Groups that a box shows besides its main one."""
_MARGIN = 20.0
_LARGEST = 16_000.0
"""Longest side of a picture in pixels; viewers refuse much longer ones. Larger graphs are scaled."""
_HOVER_LINES, _HOVER_CHARS = 24, 200
_MEMBERS = 6
_INVALID = re.compile("[^\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold, and line breaks and tabs."""

_ELEMENTWISE = frozenset(
    """Abs Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization BiasGelu BitShift BitwiseAnd BitwiseNot BitwiseOr
    BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh DequantizeLinear Div Dropout Elu Equal Erf Exp FastGelu Floor Gelu
    Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish
    Mod Mul Neg Not Or PRelu Pow QuantizeLinear QuickGelu Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh
    Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor
    GroupNormalization InstanceNormalization LayerNormalization LogSoftmax LpNormalization ReduceL2 ReduceMax ReduceMean
    ReduceSum ReduceSumSquare RMSNormalization SimplifiedLayerNormalization Softmax""".split()  # noqa: SIM905
)
"""Join the box of what they read. Reductions are among them, as they are parts of normalizations and of Softmax."""
_MOVES = frozenset(
    ("Concat", "Expand", "Flatten", "Pad", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)
"""Join it where the colour stays the same."""
_SIZES = frozenset(("Shape", "Size", "Constant"))


@dataclass
class _Box:
    """Nodes that are drawn as one, or a graph input or output."""

    tensors: list[Any]
    """What it makes; of an output: what it gives out."""
    nodes: list[gs.Node] = field(default_factory=list)
    interface: str = ""


def svg(model: Model, analysis: Analysis) -> str:
    """The picture alone, as an SVG file."""
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + _Picture(model, analysis).svg() + "\n"


def page(model: Model, analysis: Analysis) -> str:
    """An HTML page with the picture and, beside it, the tables of groups and pins."""
    here = resources.files(__package__)
    script = (here / "draw.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    picture = _Picture(model, analysis)
    return Template((here / "draw.html").read_text("utf-8")).substitute(
        hash=f"sha256-{digest}",
        title=_text(_title(model)),
        summary=_text(_summary(analysis)),
        svg=picture.svg(),
        groups="\n".join(picture.group_rows()),
        pins="\n".join(picture.pin_rows()),
        script=script,
    )


class _Picture:
    def __init__(self, model: Model, analysis: Analysis) -> None:
        self.model, self.analysis = model, analysis
        self.reasons = reasons(analysis)
        self.group = {group.id: group for group in analysis.groups}
        self.on: dict[str, dict[int, list[int]]] = {}
        for group in analysis.groups:
            for member in group.members:
                self.on.setdefault(member.tensor, {}).setdefault(member.axis, []).append(group.id)
        self.told: dict[str, str] = {}
        self.pins: dict[str, list[tuple[int, str]]] = {}
        """Of each tensor: the row in the table of pins, and what to say."""
        row = {(reason.op, reason.reason): number for number, reason in enumerate(self.reasons)}
        for pin in analysis.pins:
            said = f"axis {pin.axis} of {pin.tensor} stays: {pin.reason} ({pin.op})"
            self.pins.setdefault(pin.tensor, []).append((row[pin.op, pin.reason], said))

    # What is drawn

    @cached_property
    def hidden(self) -> set[int]:
        """Nodes, by `id`, that only compute sizes and the like from the sizes of other tensors."""
        out: set[int] = set()
        given = {tensor.name for tensor in self.model.graph.outputs}
        made: dict[str, bool] = {}
        for node in self.model.graph.nodes:
            only_sizes = node.op in _SIZES or (
                bool(node.inputs)
                and all(made.get(tensor.name, _small(tensor)) for tensor in node.inputs)
                and not any(isinstance(value, gs.Graph) for value in node.attrs.values())
            )
            if only_sizes and not any(tensor.name in self.on or tensor.name in given for tensor in node.outputs):
                out.add(id(node))
            for tensor in node.outputs:
                made[tensor.name] = only_sizes
        return out

    @cached_property
    def boxes(self) -> list[_Box]:
        """In topological order."""
        graph = self.model.graph
        out = [_Box([tensor], interface="input") for tensor in graph.inputs]
        maker = {tensor.name: box for box, tensor in zip(out, graph.inputs, strict=True)}
        for node in graph.nodes:
            if id(node) in self.hidden:
                continue
            read = {id(maker[name]): maker[name] for name in _reads(node) if name in maker}
            box = next(iter(read.values())) if len(read) == 1 and self._joins(node, *read.values()) else None
            if box is None:
                out.append(box := _Box([]))
            box.nodes.append(node)
            box.tensors += [tensor for tensor in node.outputs if tensor.name]
            maker.update((tensor.name, box) for tensor in node.outputs)
        return out + [_Box([tensor], interface="output") for tensor in graph.outputs]

    def _joins(self, node: gs.Node, box: _Box) -> bool:
        if box.interface or len(node.outputs) != 1:
            return False
        return node.op in _ELEMENTWISE or (node.op in _MOVES and self.main(node.outputs) == self.main(box.tensors))

    @cached_property
    def nets(self) -> tuple[list[Any], list[layout.Net]]:
        """The tensors between boxes, and what they connect."""
        maker: dict[str, int] = {}
        readers: dict[str, list[int]] = {}
        tensors: dict[str, Any] = {}
        for number, box in enumerate(self.boxes):
            if box.interface != "output":
                for tensor in box.tensors:
                    maker[tensor.name], tensors[tensor.name] = number, tensor
        for number, box in enumerate(self.boxes):
            names = [name for node in box.nodes for name in _reads(node)]
            names += [tensor.name for tensor in box.tensors if box.interface == "output"]
            for name in dict.fromkeys(names):
                if name in maker and maker[name] != number:
                    readers.setdefault(name, []).append(number)
        return (
            [tensors[name] for name in readers],
            [layout.Net(maker[name], tuple(targets)) for name, targets in readers.items()],
        )

    # Groups and colours

    def groups_on(self, tensors: Iterable[Any]) -> list[int]:
        """The groups on any axis of the tensors, those with most parameters first."""
        found = {number for tensor in tensors for on in self.on.get(tensor.name, {}).values() for number in on}
        return sorted(found, key=lambda number: (-self.group[number].params, number))

    def main(self, tensors: Sequence[Any]) -> int | None:
        """The group that gives the colour: of the last tensor that has one."""
        for tensor in reversed(tensors):
            if found := self.groups_on([tensor]):
                return found[0]
        return None

    def keys(self, tensors: Sequence[Any]) -> str:
        """What rows of the tables the tensors belong to."""
        pins = {row for tensor in tensors for row, _ in self.pins.get(tensor.name, ())}
        return " ".join([f"g{number}" for number in self.groups_on(tensors)] + [f"p{row}" for row in sorted(pins)])

    def axes(self, tensor: Any) -> str:
        """`[64 (group 3), 7]`."""
        if tensor.name not in self.told:
            self.told[tensor.name] = self._axes(tensor)
        return self.told[tensor.name]

    def _axes(self, tensor: Any) -> str:
        facts = self.analysis.facts
        axes = facts.axes.get(tensor.name)
        if axes is None:
            return "of unknown rank"
        on = self.on.get(tensor.name, {})
        told = []
        for number, axis in enumerate(axes):
            size = None if facts.varies(tensor, number) else facts.algebra.size(axis)
            groups = ", ".join(str(group) for group in on.get(number, ()))
            told.append(
                (_symbol(tensor, number) if size is None else str(size)) + (f" (group {groups})" if groups else "")
            )
        return f"[{', '.join(told)}]"

    # SVG

    def svg(self) -> str:
        """The element, with what it needs to stand in a file of its own."""
        tensors, nets = self.nets
        lines = [self._lines(box) for box in self.boxes]
        sizes = [(_width(texts), len(texts) * _LINE_HEIGHT + 2 * _PAD) for texts in lines]
        placed = layout.place(sizes, nets)
        width, height = placed.width + 2 * _MARGIN, placed.height + 2 * _MARGIN
        scale = min(1.0, _LARGEST / max(width, height))
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-_MARGIN:g} {-_MARGIN:g} {width:.0f} {height:.0f}" '
            f'width="{width * scale:.0f}" height="{height * scale:.0f}" role="img">',
            f"<title>{_text(_title(self.model))}</title>",
            "<style>.b rect{stroke:#555}.b text{font:12px sans-serif;fill:#111}.b .h{font-weight:bold}"
            ".e{fill:none;stroke-width:2}.e:hover{stroke-width:5}.b:hover rect{stroke:#000;stroke-width:2}</style>",
        ]
        out += [self._line(tensor, pieces) for tensor, pieces in zip(tensors, placed.lines, strict=True)]
        for box, texts, corner, size in zip(self.boxes, lines, placed.corners, sizes, strict=True):
            out.append(self._box(box, texts, corner, size))
        return "\n".join([*out, "</svg>"])

    def _lines(self, box: _Box) -> list[str]:
        """What stands in a box."""
        if box.interface:
            return [box.interface, _short(f"{box.tensors[0].name} {self.axes(box.tensors[0])}")]
        first, *rest = box.nodes
        weight = next((t for t in first.inputs if isinstance(t, gs.Constant) and len(t.shape) > 1), None)
        shape = " " + "x".join(map(str, weight.shape)) if weight is not None else ""
        lines = [_short(first.op + shape)]
        if rest:
            lines.append(_follow([node.op for node in rest]))
        main = self.main(box.tensors)
        if main is not None:
            group = self.group[main]
            lines.append(_short(f"group {main}: {group.size} x {group.granularity}"))
        return lines

    def _box(self, box: _Box, lines: Sequence[str], corner: layout.Point, size: tuple[float, float]) -> str:
        (x, y), (width, height) = corner, size
        main, groups = self.main(box.tensors), self.groups_on(box.tensors)
        fill = _GREY if main is None else _colour(main, 0.8)
        round_ = f' rx="{height / 2:.0f}"' if box.interface else ' rx="4"'
        out = [
            f'<g class="b" data-k="{self.keys([*box.tensors, *_constants(box)])}"><title>{self._hover(box)}</title>',
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{round_} fill="{fill}"/>',
        ]
        for number, text in enumerate(lines):
            kind = ' class="h"' if number == 0 else ""
            base = y + _PAD + (number + 0.8) * _LINE_HEIGHT
            out.append(f'<text{kind} x="{x + width / 2:.1f}" y="{base:.1f}" text-anchor="middle">{_text(text)}</text>')
        for number, group in enumerate([group for group in groups if group != main][:_CHIPS]):
            left = x + 6 + 11 * number
            out.append(
                f'<rect x="{left:.1f}" y="{y + height - 4:.1f}" width="9" height="8" fill="{_colour(group, 0.7)}"/>'
            )
        return "".join([*out, "</g>"])

    def _hover(self, box: _Box) -> str:
        said = []
        for node in box.nodes:
            said.append(f"{node.op} {node.name}".strip())
            read = [t for t in node.inputs if t.name and not (isinstance(t, gs.Constant) and _small(t))]
            said += [f"  reads {tensor.name} {self.axes(tensor)}" for tensor in read]
            said += [f"  makes {tensor.name} {self.axes(tensor)}" for tensor in node.outputs if tensor.name]
        if box.interface:
            said = [f"{box.interface} {tensor.name} {self.axes(tensor)}" for tensor in box.tensors]
        pins = [text for t in [*box.tensors, *_constants(box)] for _, text in self.pins.get(t.name, ())]
        room = max(_HOVER_LINES - len(pins), _HOVER_LINES // 2)
        return "\n".join(_text(_short(line, _HOVER_CHARS)) for line in [*_first(said, room), *_first(pins, room)])

    def _line(self, tensor: Any, pieces: Iterable[tuple[layout.Point, layout.Point]]) -> str:
        main = self.main([tensor])
        colour = "#aaa" if main is None else _colour(main, 0.5)
        path = []
        for (x, y), (to_x, to_y) in pieces:
            middle = (y + to_y) / 2
            bow = (
                f"V{to_y:.1f}" if x == to_x else f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
            )
            path.append(f"M{x:.1f} {y:.1f}{bow}")
        title = _text(_short(f"{tensor.name} {self.axes(tensor)}", _HOVER_CHARS))
        return (
            f'<path class="e" data-k="{self.keys([tensor])}" stroke="{colour}" d="{"".join(path)}">'
            f"<title>{title}</title></path>"
        )

    # Tables

    def group_rows(self) -> Iterable[str]:
        """Rows of HTML, the largest group first."""
        for group in sorted(self.analysis.groups, key=lambda group: -group.params):
            colour = f'<i style="background:{_colour(group.id, 0.8)}"></i>{group.id}'
            macs = "unknown" if group.macs is None else f"{group.macs:,}"
            yield (
                f'<tr data-row="g{group.id}"><td>{colour}</td><td class="n">{group.size:,}</td>'
                f'<td>{_text(group.granularity)}</td><td class="n">{group.params:,}</td><td class="n">{macs}</td>'
                f"<td>{_text(_members(group))}</td></tr>"
            )

    def pin_rows(self) -> Iterable[str]:
        """Rows of HTML, in the order of `reasons`."""
        for number, reason in enumerate(self.reasons):
            example = _short(reason.example, _HOVER_CHARS)
            yield (
                f'<tr data-row="p{number}"><td>{_text(reason.op)}</td><td>{_text(reason.reason)}</td>'
                f'<td class="n">{reason.axes:,}</td><td class="n">{reason.params:,}</td><td>{_text(example)}</td></tr>'
            )


def _reads(node: gs.Node) -> Iterable[str]:
    """Names that a node reads, those that its branches capture included."""
    yield from (tensor.name for tensor in node.inputs if tensor.name)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for scope in scopes(value):
                yield from (tensor.name for inner in scope.nodes for tensor in inner.inputs if tensor.name)
                yield from (tensor.name for tensor in scope.outputs)


def _small(tensor: Any) -> bool:
    """Constants of shapes and indices, single numbers, and inputs left out."""
    if not tensor.name:
        return True
    if not isinstance(tensor, gs.Constant):
        return False
    return int(np.prod(tensor.shape)) <= 1 or tensor.dtype in (np.int64, np.int32, np.bool_)


def _symbol(tensor: Any, axis: int) -> str:
    """What the file calls an open size."""
    known = tensor.shape[axis] if tensor.shape is not None and axis < len(tensor.shape) else None
    return known if isinstance(known, str) and known else "?"


def _constants(box: _Box) -> list[Any]:
    return [tensor for node in box.nodes for tensor in node.inputs if isinstance(tensor, gs.Constant)]


def _members(group: Group) -> str:
    told = [f"{member.tensor}[{member.axis}]" for member in group.parameters]
    return ", ".join(_short(text, _HOVER_CHARS) for text in _first(told, _MEMBERS))


def _summary(analysis: Analysis) -> str:
    share = analysis.prunable / analysis.params if analysis.params else 0.0
    return (
        f"{analysis.prunable:,} of {analysis.params:,} parameters ({share:.1%}) can be removed, in "
        f"{sum(group.size for group in analysis.groups):,} units of {len(analysis.groups):,} groups."
    )


def _title(model: Model) -> str:
    path = model.source.path
    return _short(path.name if path is not None else model.source.name or "model", _HOVER_CHARS)


def _follow(ops: Sequence[str]) -> str:
    """`+ BatchNormalization, Relu`, with a count where they are more than fit."""
    whole = "+ " + ", ".join(ops)
    if len(whole) <= _CHARS:
        return whole
    count = f" ({len(ops)})"
    return _short(whole, _CHARS - len(count)) + count


def _first(lines: Sequence[str], count: int) -> list[str]:
    return [*lines[:count], f"and {len(lines) - count} more"] if len(lines) > count else list(lines)


def _short(text: str, length: int = _CHARS) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def _width(lines: Sequence[str]) -> float:
    return max(len(lines[0]) * _BOLD_WIDTH, *(len(line) * _CHAR_WIDTH for line in lines)) + 2 * _PAD


def _colour(group: int, lightness: float) -> str:
    """Hues a golden section apart, so that groups with neighbouring numbers differ most."""
    red, green, blue = colorsys.hls_to_rgb(0.58 + group * 0.618034 % 1.0, lightness, 0.7)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _text(text: str) -> str:
    """Text for HTML and XML alike, in elements and in quoted attributes."""
    return html.escape(_INVALID.sub("\ufffd", text))
