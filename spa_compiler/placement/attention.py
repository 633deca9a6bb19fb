"""The attention core in a decomposed graph: softmax(scale Q K^T + mask) V, head by head.

    Q [batch, tokens, heads x depth] - Reshape - Transpose 0213 \\
    K                                - Reshape - Transpose 0231 - MatMul (Mul, Div by scalars) (Add mask) - Softmax \\
    V                                - Reshape - Transpose 0213 ------------------------------------------- MatMul
                                                                          - Transpose 0213 - Reshape - context

The targets of the Reshapes may be computed at run time: what they do is read off the shapes of tensors at every binding
of the model's inputs at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.graph.weights import array_of
from spa_compiler.kernels.attention import ROWS
from spa_compiler.placement.sites import held

Shapes = Sequence[dict[str, tuple[int, ...]]]

_SPLIT, _SPLIT_KEYS = [0, 2, 1, 3], [0, 2, 3, 1]


@dataclass(eq=False)
class AttentionSite:
    """`output` = context of `query`, `key`, `value` (each [batch, tokens, heads x depth]), computed by `nodes`."""

    query: gs.Variable
    key: gs.Variable
    value: gs.Variable
    mask: gs.Variable | None
    output: gs.Variable
    nodes: list[gs.Node]
    heads: int
    depth: int
    scale: float

    @property
    def name(self) -> str:
        return str(next(n for n in self.nodes if n.op == "Softmax").name or self.output.name)


def find_attention(model: Model, shapes: Shapes) -> list[AttentionSite]:
    """Every attention core with one additive mask at most, whose shapes fit at every binding, in topological order."""
    outputs = held(model.graph)
    sites = (_around(node, outputs, shapes) for node in model.graph.nodes if node.op == "Softmax")
    return [site for site in sites if site is not None]


def _around(softmax: gs.Node, outputs: Sequence[gs.Variable], shapes: Shapes) -> AttentionSite | None:
    rank = _rank(softmax.inputs[0], shapes)
    if rank != 4 or softmax.attrs.get("axis", -1) not in (-1, 3) or softmax.domain:
        return None
    found = _scores(softmax.inputs[0], outputs)
    second = _reader(softmax.outputs[0], outputs)
    if found is None or second is None or second.op != "MatMul" or second.inputs[0] is not softmax.outputs[0]:
        return None
    first, scale, mask, chain = found
    query, key = _heads(first.inputs[0], _SPLIT, outputs), _heads(first.inputs[1], _SPLIT_KEYS, outputs)
    value = _heads(second.inputs[1], _SPLIT, outputs)
    if query is None or key is None or value is None:
        return None
    back = _reader(second.outputs[0], outputs)
    if back is None or back.op != "Transpose" or list(back.attrs.get("perm", [])) != _SPLIT:
        return None
    join = _reader(back.outputs[0], outputs)
    if join is None or join.op != "Reshape":
        return None
    split = query.nodes[-1].outputs[0]
    heads, depth = _size(split, 2, shapes), _size(split, 3, shapes)
    site = AttentionSite(
        query.source,
        key.source,
        value.source,
        mask,
        join.outputs[0],
        [*query.nodes, *key.nodes, *value.nodes, first, *chain, softmax, second, back, join],
        heads or 0,
        depth or 0,
        scale * query.scale * key.scale,
    )
    return site if value.scale == 1.0 and _fits(site, (query, key, value), shapes) and _closed(site) else None


@dataclass
class _Split:
    source: gs.Variable
    nodes: list[gs.Node]  # from the operand back to the Reshape
    scale: float


def _heads(tensor: gs.Tensor, perm: list[int], outputs: Sequence[gs.Variable]) -> _Split | None:
    """Back from an operand of a product over Transposes and scalar factors to the Reshape that split the heads."""
    nodes: list[gs.Node] = []
    scale, done = 1.0, list(range(4))
    while True:
        if not isinstance(tensor, gs.Variable) or len(tensor.inputs) != 1 or _reader(tensor, outputs) is None:
            return None
        node = tensor.inputs[0]
        nodes.append(node)
        if node.op == "Transpose":
            own = list(node.attrs.get("perm", []))
            if len(own) != 4:
                return None
            done = [own[i] for i in done]
            tensor = node.inputs[0]
        elif node.op == "Reshape":
            return _Split(node.inputs[0], nodes, scale) if done == perm else None
        else:
            factor = _factor(node)
            if factor is None:
                return None
            scale *= factor[0]
            tensor = factor[1]


def _scores(
    tensor: gs.Variable, outputs: Sequence[gs.Variable]
) -> tuple[gs.Node, float, gs.Variable | None, list[gs.Node]] | None:
    """Back from softmax to the first product: (MatMul, scale, mask, nodes in between)."""
    scale: float = 1.0
    mask: gs.Tensor | None = None
    nodes: list[gs.Node] = []
    while True:
        if len(tensor.inputs) != 1 or _reader(tensor, outputs) is None:
            return None
        node = tensor.inputs[0]
        if node.op == "MatMul":
            return node, scale, mask, nodes
        nodes.append(node)
        if node.op == "Add" and mask is None and scale == 1.0:
            a, b = node.inputs
            tensor, mask = (a, b) if _leads_to_product(a) else (b, a)
            if not isinstance(mask, gs.Variable) or not isinstance(tensor, gs.Variable):
                return None
            continue
        factor = _factor(node)
        if factor is None:
            return None
        scale *= factor[0]
        tensor = factor[1]


def _leads_to_product(tensor: gs.Tensor) -> bool:
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if node.op == "MatMul":
            return True
        factor = _factor(node)
        if factor is None:
            return False
        tensor = factor[1]
    return False


def _factor(node: gs.Node) -> tuple[float, gs.Variable] | None:
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


def _reader(tensor: gs.Variable, outputs: Sequence[gs.Variable]) -> gs.Node | None:
    """The one node that reads the tensor's values; others may ask for its shape (`_closed` checks what for)."""
    readers = [n for n in tensor.outputs if n.op != "Shape"]
    return readers[0] if len(readers) == 1 and not any(tensor is o for o in outputs) else None


def _closed(site: AttentionSite) -> bool:
    """Takes the shape computations that serve this site alone into its nodes; False if anything else reads inside."""
    inside = {id(n) for n in site.nodes}
    queue = [t.inputs[0] for n in site.nodes for t in n.inputs if isinstance(t, gs.Variable) and t.inputs]
    feeding = {id(t) for t in (site.query, site.key, site.value)}
    while queue:
        node = queue.pop()
        if id(node) in inside or any(id(t) in feeding for t in node.outputs):
            continue
        if node.outputs and all(id(reader) in inside for t in node.outputs for reader in t.outputs):
            if site.mask is not None and any(t is site.mask for t in node.outputs):
                continue
            inside.add(id(node))
            site.nodes.append(node)
            queue += [t.inputs[0] for t in node.inputs if isinstance(t, gs.Variable) and t.inputs]
    return all(
        id(reader) in inside for n in site.nodes for t in n.outputs if t is not site.output for reader in t.outputs
    )


def _rank(tensor: gs.Tensor, shapes: Shapes) -> int | None:
    ranks = {len(known[tensor.name]) if tensor.name in known else -1 for known in shapes}
    return ranks.pop() if len(ranks) == 1 else None


def _size(tensor: gs.Tensor, axis: int, shapes: Shapes) -> int | None:
    """The size of an axis, if it is the same at every binding."""
    sizes = {known[tensor.name][axis] if len(known.get(tensor.name, ())) > axis else -1 for known in shapes}
    size = sizes.pop() if len(sizes) == 1 else -1
    return size if size > 0 else None


def _fits(site: AttentionSite, splits: Sequence[_Split], shapes: Shapes) -> bool:
    if site.depth < 1 or site.depth % ROWS or site.heads < 1:
        return False
    for known in shapes:
        source = known.get(site.query.name, ())
        if len(source) != 3 or source[2] != site.heads * site.depth:
            return False
        batch, tokens, _ = source
        wanted = (batch, tokens, site.heads, site.depth)
        if any(known.get(s.nodes[-1].outputs[0].name) != wanted for s in splits):
            return False
        if any(known.get(t.name) != source for t in (site.key, site.value, site.output)):
            return False
        mask = None if site.mask is None else known.get(site.mask.name, ())
        full = (batch, site.heads, tokens, tokens)
        if mask is not None and (
            len(mask) != len(full) or mask[3] != tokens or any(m not in (1, f) for m, f in zip(mask, full, strict=True))
        ):
            return False
    return True
