"""The way of queries, keys and values from a projection to the products of an attention core, walked backwards.

    x [batch, tokens, heads x depth] - Reshape - Transpose 0213 - (rotary positions) - (Concat with a cache)
      - (Unsqueeze, Expand, Reshape: heads of keys, each for several of queries) - (Transpose) - (Mul, Div by scalars)

Where there is always one token, a Reshape alone may stand for the first two.

Rotary positions are  x * cos + Concat(-x[half:], x[:half]) * sin  with cosines and sines from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph.weights import array_of

Shapes = Sequence[dict[str, tuple[int, ...]]]

_PLAIN, _SPLIT = [0, 1, 2, 3], [0, 2, 1, 3]


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines, [batch or 1, 1, tokens, depth] or without leading ones."""

    cos: gs.Variable
    sin: gs.Variable


@dataclass(frozen=True)
class Cache:
    """Keys or values of the tokens before, and those with the new tokens behind: [batch, heads, tokens, depth]."""

    past: gs.Variable
    present: gs.Variable


@dataclass
class Operand:
    """What an operand of a product of attention is made of; `nodes` from the operand back to the Reshape.

    `source` is [batch, tokens, heads x depth], `split` [batch, tokens, heads, depth], or [batch, heads, tokens, depth]
    where `direct`. Where its sizes say that `shared` query heads read one head of it, head `h` reads `h // shared`.
    """

    source: gs.Variable
    split: gs.Variable
    nodes: list[gs.Node]
    scale: float = 1.0
    rotation: Rotation | None = None
    cache: Cache | None = None
    direct: bool = False

    def sizes(self, known: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """(batch, tokens, heads, depth) at a binding; of another length where that is not known."""
        shape = known.get(self.split.name, ())
        return tuple(shape[i] for i in _SPLIT) if self.direct and len(shape) == len(_SPLIT) else shape


@dataclass
class _Walk:
    tensor: gs.Variable
    axes: list[int]  # where each axis of the operand is in `tensor`
    nodes: list[gs.Node] = field(default_factory=list)
    scale: float = 1.0
    rotation: Rotation | None = None
    cache: Cache | None = None
    repeated: bool = False


def find_operand(tensor: gs.Tensor, transposed: bool, outputs: Sequence[gs.Variable], shapes: Shapes) -> Operand | None:
    """The way to `tensor`, [batch, heads, tokens, depth] or, `transposed`, [batch, heads, depth, tokens].

    Each step is read by the next alone, but for a cache's new contents and for shapes.
    """
    if not isinstance(tensor, gs.Variable):
        return None
    headed = [0, 1, 3, 2] if transposed else _PLAIN  # here axes are [batch, heads, tokens, depth]
    whole = [_SPLIT[i] for i in headed]
    walk = _Walk(tensor, _PLAIN)
    if reader(tensor, outputs) is None:
        return None
    while True:
        node = _maker(walk.tensor)
        if node is None:
            return None
        direct = walk.axes == headed and one_token(node.inputs[0])
        if node.op == "Reshape" and (walk.axes == whole or direct):
            split, nodes = walk.tensor, [*walk.nodes, node]
            return Operand(node.inputs[0], split, nodes, walk.scale, walk.rotation, walk.cache, direct)
        stepped = (
            _transpose(walk, node)
            or _factor(walk, node)
            or (walk.axes == headed and (_repeat(walk, node, outputs, shapes) or _concat(walk, node)))
            or (walk.axes == headed and _rotation(walk, node, outputs, shapes))
        )
        if not stepped:
            return None
        # A rotation has looked at the readers of what it turns, and a cache's new contents are an output of the node.
        maker = _maker(walk.tensor)
        is_cache = maker is not None and maker.op == "Concat" and walk.axes == headed
        if node.op != "Add" and not is_cache and reader(walk.tensor, outputs) is None:
            return None


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 else None


def reader(tensor: gs.Variable, outputs: Sequence[gs.Variable]) -> gs.Node | None:
    """The one node that reads the tensor's values; others may ask for its shape."""
    readers = [n for n in tensor.outputs if n.op != "Shape"]
    return readers[0] if len(readers) == 1 and not any(tensor is o for o in outputs) else None


def one_token(tensor: gs.Tensor) -> bool:
    """Whether a tensor [batch, tokens, features] has one token at any binding."""
    return tensor.shape is not None and len(tensor.shape) == 3 and tensor.shape[1] == 1


def _transpose(walk: _Walk, node: gs.Node) -> bool:
    own = [int(i) for i in node.attrs.get("perm", [])]
    if node.op != "Transpose" or len(own) != 4:
        return False
    walk.axes = [own[i] for i in walk.axes]
    return _step(walk, node.inputs[0], node)


def _factor(walk: _Walk, node: gs.Node) -> bool:
    found = factor(node)
    if found is None or walk.cache:  # in front of a cache it would scale new keys alone
        return False
    walk.scale *= found[0]
    return _step(walk, found[1], node)


def _step(walk: _Walk, tensor: gs.Tensor, *nodes: gs.Node) -> bool:
    if not isinstance(tensor, gs.Variable):
        return False
    walk.tensor = tensor
    walk.nodes += nodes
    return True


def _repeat(walk: _Walk, node: gs.Node, outputs: Sequence[gs.Variable], shapes: Shapes) -> bool:
    """Reshape of Expand (or Tile) of Unsqueeze: head `h` becomes heads `h x shared` to `h x shared + shared - 1`."""
    if node.op != "Reshape" or walk.repeated or walk.cache or walk.rotation:
        return False
    expand = _maker(node.inputs[0])
    if expand is None or expand.op not in ("Expand", "Tile") or reader(node.inputs[0], outputs) is None:
        return False
    unsqueeze = _maker(expand.inputs[0])
    if unsqueeze is None or unsqueeze.op != "Unsqueeze" or reader(expand.inputs[0], outputs) is None:
        return False
    if _constants(unsqueeze.attrs.get("axes"), unsqueeze, 1) not in ([2], [-3]):
        return False
    tensors = (unsqueeze.inputs[0], expand.outputs[0], walk.tensor)
    for known in shapes:
        few, wide, many = (known.get(t.name, ()) for t in tensors)
        if len(few) != 4 or len(wide) != 5 or len(many) != 4:
            return False
        batch, heads, *rest = few
        if wide != (batch, heads, wide[2], *rest) or many != (batch, heads * wide[2], *rest):
            return False
    walk.repeated = True
    return _step(walk, unsqueeze.inputs[0], node, expand, unsqueeze)


def _concat(walk: _Walk, node: gs.Node) -> bool:
    if node.op != "Concat" or len(node.inputs) != 2 or walk.cache or walk.rotation:
        return False
    past, new = node.inputs
    if int(node.attrs.get("axis", 0)) not in (2, -2) or not isinstance(past, gs.Variable) or past is new:
        return False
    walk.cache = Cache(past, walk.tensor)
    return _step(walk, new, node)


def _rotation(walk: _Walk, node: gs.Node, outputs: Sequence[gs.Variable], shapes: Shapes) -> bool:
    """Add(Mul(x, cos), Mul(turned, sin)), in any order; nobody else reads x or what lies in between."""
    if node.op != "Add" or walk.rotation:
        return False
    products = [_maker(i) for i in node.inputs]
    if any(p is None or p.op != "Mul" or reader(p.outputs[0], outputs) is None for p in products):
        return False
    for one, two in (products, products[::-1]):
        for turned, sin in _orders(two):
            halves = _turned(turned, outputs, shapes)
            if halves is None:
                continue
            x, nodes = halves
            cos = next((c for other, c in _orders(one) if other is x), None)
            if not isinstance(cos, gs.Variable) or not isinstance(sin, gs.Variable):
                continue
            inside = {id(n) for n in (*nodes, one)}
            if any(id(n) not in inside for n in x.outputs if n.op != "Shape") or any(x is o for o in outputs):
                continue
            walk.rotation = Rotation(cos, sin)
            walk.nodes += [*nodes, one, two]
            return _step(walk, x, node)
    return False


def _orders(node: gs.Node) -> list[tuple[gs.Tensor, gs.Tensor]]:
    a, b = node.inputs
    return [(a, b), (b, a)]


def _turned(
    tensor: gs.Tensor, outputs: Sequence[gs.Variable], shapes: Shapes
) -> tuple[gs.Variable, list[gs.Node]] | None:
    """x and the nodes, if `tensor` is Concat(-x[half:], x[:half]) over the last axis."""
    concat = _maker(tensor)
    if concat is None or concat.op != "Concat" or len(concat.inputs) != 2 or reader(tensor, outputs) is None:
        return None
    negative = _maker(concat.inputs[0])
    if negative is None or negative.op != "Neg" or int(concat.attrs.get("axis", 0)) not in (-1, 3):
        return None
    between = (concat.inputs[0], concat.inputs[1], negative.inputs[0])
    if any(not isinstance(t, gs.Variable) or reader(t, outputs) is None for t in between):
        return None
    high, low = _maker(negative.inputs[0]), _maker(concat.inputs[1])
    if high is None or low is None or high.op != low.op or high.inputs[0] is not low.inputs[0]:
        return None
    x = high.inputs[0]
    depths = {known[x.name][-1] if known.get(x.name) else 0 for known in shapes}
    depth = depths.pop() if len(depths) == 1 else 0
    if not isinstance(x, gs.Variable) or depth < 2 or depth % 2:
        return None
    if high.op == "Split":
        fits = high is low and [t is negative.inputs[0] for t in high.outputs] == [False, True]
        fits = fits and int(high.attrs.get("axis", 0)) in (-1, 3) and _halves(high, depth, shapes)
    else:
        fits = _slice(high, depth) == (depth // 2, depth) and _slice(low, depth) == (0, depth // 2)
    return (x, [concat, negative, *([high] if high is low else [high, low])]) if fits else None


def _halves(split: gs.Node, depth: int, shapes: Shapes) -> bool:
    return all(known.get(t.name, (0,))[-1] == depth // 2 for known in shapes for t in split.outputs)


def _slice(node: gs.Node, depth: int) -> tuple[int, int] | None:
    """(first, end) of a Slice of the last of four axes, in steps of one."""
    if node.op != "Slice" or len(node.inputs) < 4:
        return None
    starts, ends, axes = (_constants(None, node, i) for i in (1, 2, 3))
    steps = _constants(None, node, 4) if len(node.inputs) > 4 else [1]
    if axes not in ([-1], [3]) or steps != [1] or starts is None or ends is None or len(starts) != 1 or len(ends) != 1:
        return None
    first, end = (min(i + depth if i < 0 else i, depth) for i in (starts[0], ends[0]))
    return first, end


def _constants(attribute: object, node: gs.Node, index: int) -> list[int] | None:
    """Integers of an attribute, or of a constant input in its place."""
    if isinstance(attribute, list | tuple):
        return [int(i) for i in attribute]
    if len(node.inputs) > index and isinstance(node.inputs[index], gs.Constant):
        return [int(i) for i in array_of(node.inputs[index]).reshape(-1)]
    return None


def factor(node: gs.Node) -> tuple[float, gs.Variable] | None:
    """(factor, operand) of a Mul or Div by a scalar constant."""
    if node.op not in ("Mul", "Div") or node.domain or len(node.inputs) != 2:
        return None
    for i, other in ((1, 0), (0, 1)):
        constant, operand = node.inputs[i], node.inputs[other]
        if not isinstance(constant, gs.Constant) or int(np.prod(constant.shape)) != 1:
            continue
        if not isinstance(operand, gs.Variable) or (node.op == "Div" and i == 0):
            continue
        value = float(array_of(constant).reshape(()))
        if value == 0.0:
            return None
        return (value if node.op == "Mul" else 1.0 / value), operand
    return None
