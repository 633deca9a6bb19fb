"""The attention core in a decomposed graph: softmax(scale Q K^T + mask) V, head by head.

    Q [batch, tokens, heads x depth] - Reshape - Transpose 0213 \
    K                                - Reshape - Transpose 0231 - MatMul (Mul, Div by scalars) (Add mask) - Softmax \
    V                                - Reshape - Transpose 0213 ------------------------------------------- MatMul
                                                                          - Transpose 0213 - Reshape - context

On their way queries and keys may be turned by rotary positions, keys and values may be put behind those of a cache, and
heads of keys may serve several of queries (`heads.py`).

The targets of the Reshapes may be computed at run time: what they do is read off the shapes of tensors at every binding
of the model's inputs at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from spa_compiler.graph.model import Model
from spa_compiler.kernels.attention import ROWS
from spa_compiler.placement.heads import Cache, Operand, Rotation, Shapes, factor, find_operand, one_token, reader
from spa_compiler.placement.sites import held
from spa_compiler.runtime.region import MAX_QUERY, MAX_SHARED

_JOIN = [0, 2, 1, 3]


@dataclass(eq=False)
class AttentionSite:
    """`output` = context of `query`, `key`, `value` (each [batch, tokens, heads x depth]), computed by `nodes`.

    Keys and values have `key_heads` heads. `rotations` are those of queries and of keys. `caches`, of keys and of
    values, are there or not; what they become is an output, too.
    """

    query: gs.Variable
    key: gs.Variable
    value: gs.Variable
    mask: gs.Variable | None
    output: gs.Variable
    nodes: list[gs.Node]
    heads: int
    key_heads: int
    depth: int
    scale: float
    rotations: tuple[Rotation | None, Rotation | None] = (None, None)
    caches: tuple[Cache, ...] = ()

    @property
    def shared(self) -> int:
        """Heads of queries for each head of keys."""
        return self.heads // self.key_heads

    @property
    def tables(self) -> list[gs.Variable]:
        """Cosines and sines of the rotations, in order of use."""
        return [t for r in self.rotations if r is not None for t in (r.cos, r.sin)]

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
    second = reader(softmax.outputs[0], outputs)
    if found is None or second is None or second.op != "MatMul" or second.inputs[0] is not softmax.outputs[0]:
        return None
    first, scale, mask, chain = found
    query = find_operand(first.inputs[0], False, outputs, shapes)
    key = find_operand(first.inputs[1], True, outputs, shapes)
    value = find_operand(second.inputs[1], False, outputs, shapes)
    if query is None or key is None or value is None or query.cache or value.rotation:
        return None
    if (key.cache is None) != (value.cache is None) or value.scale != 1.0:
        return None
    back = _back(second, outputs)
    if back is None:
        return None
    site = AttentionSite(
        query.source,
        key.source,
        value.source,
        mask,
        back[-1].outputs[0],
        [*query.nodes, *key.nodes, *value.nodes, first, *chain, softmax, second, *back],
        _size(query, 2, shapes),
        _size(key, 2, shapes),
        _size(query, 3, shapes),
        scale * query.scale * key.scale,
        (query.rotation, key.rotation),
        tuple(o.cache for o in (key, value) if o.cache is not None),
    )
    return site if _fits(site, query, key, value, shapes) and _closed(site) else None


def _back(product: gs.Node, outputs: Sequence[gs.Variable]) -> list[gs.Node] | None:
    """From the last product to the context: Transpose and Reshape, or, of one token, Reshape alone."""
    back = reader(product.outputs[0], outputs)
    if back is not None and back.op == "Reshape" and one_token(back.outputs[0]):
        return [back]
    if back is None or back.op != "Transpose" or list(back.attrs.get("perm", [])) != _JOIN:
        return None
    join = reader(back.outputs[0], outputs)
    return [back, join] if join is not None and join.op == "Reshape" else None


def _scores(
    tensor: gs.Variable, outputs: Sequence[gs.Variable]
) -> tuple[gs.Node, float, gs.Variable | None, list[gs.Node]] | None:
    """Back from softmax to the first product: (MatMul, scale, mask, nodes in between)."""
    scale: float = 1.0
    mask: gs.Tensor | None = None
    nodes: list[gs.Node] = []
    while True:
        if len(tensor.inputs) != 1 or reader(tensor, outputs) is None:
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
        found = factor(node)
        if found is None:
            return None
        scale *= found[0]
        tensor = found[1]


def _leads_to_product(tensor: gs.Tensor) -> bool:
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1:
        node = tensor.inputs[0]
        if node.op == "MatMul":
            return True
        found = factor(node)
        if found is None:
            return False
        tensor = found[1]
    return False


def _closed(site: AttentionSite) -> bool:
    """Takes the shape computations that serve this site alone into its nodes; False if anything else reads inside."""
    inside = {id(n) for n in site.nodes}
    queue = [t.inputs[0] for n in site.nodes for t in n.inputs if isinstance(t, gs.Variable) and t.inputs]
    feeding = {id(t) for t in (site.query, site.key, site.value, site.mask, *site.tables)}
    feeding |= {id(c.past) for c in site.caches}
    given = {id(t) for t in (site.output, *(c.present for c in site.caches))}
    while queue:
        node = queue.pop()
        if id(node) in inside or any(id(t) in feeding for t in node.outputs):
            continue
        if node.outputs and all(id(n) in inside for t in node.outputs for n in t.outputs):
            inside.add(id(node))
            site.nodes.append(node)
            queue += [t.inputs[0] for t in node.inputs if isinstance(t, gs.Variable) and t.inputs]
    if any(id(r) not in inside for n in site.nodes for t in n.outputs if id(t) not in given for r in t.outputs):
        return False
    return not site.caches or not _waits_for_itself(site, inside)


def _waits_for_itself(site: AttentionSite, inside: set[int]) -> bool:
    """Whether something that the site reads comes from what its caches become, as a mask of their length may."""
    tensors = [site.query, site.key, site.value, *site.tables, *(c.past for c in site.caches)]
    queue = [n for t in (*tensors, *([] if site.mask is None else [site.mask])) for n in t.inputs]
    seen: set[int] = set()
    while queue:
        node = queue.pop()
        if id(node) in inside:
            return True
        if id(node) not in seen:
            seen.add(id(node))
            queue += [n for t in node.inputs for n in t.inputs]
    return False


def _rank(tensor: gs.Tensor, shapes: Shapes) -> int | None:
    ranks = {len(known[tensor.name]) if tensor.name in known else -1 for known in shapes}
    return ranks.pop() if len(ranks) == 1 else None


def _size(operand: Operand, axis: int, shapes: Shapes) -> int:
    """A size of (batch, tokens, heads, depth), if it is the same at every binding; else 0."""
    sizes = {found[axis] if len(found := operand.sizes(known)) > axis else 0 for known in shapes}
    return max(0, sizes.pop()) if len(sizes) == 1 else 0


def _fits(site: AttentionSite, query: Operand, key: Operand, value: Operand, shapes: Shapes) -> bool:
    """Whether sizes are at every binding what the kernels take them for."""
    if site.depth < 1 or site.depth % ROWS or site.heads < 1 or site.key_heads < 1 or site.heads % site.key_heads:
        return False
    if site.caches and (site.shared > MAX_SHARED or site.shared * site.depth > MAX_QUERY):
        return False
    return all(_fit_at(site, query, key, value, known) for known in shapes)


def _fit_at(
    site: AttentionSite, query: Operand, key: Operand, value: Operand, known: dict[str, tuple[int, ...]]
) -> bool:
    source = known.get(site.query.name, ())
    if len(source) != 3 or source[2] != site.heads * site.depth or known.get(site.output.name) != source:
        return False
    batch, tokens, _ = source
    if query.sizes(known) != (batch, tokens, site.heads, site.depth):
        return False
    for each in (key, value):
        if each.sizes(known) != (batch, tokens, site.key_heads, site.depth):
            return False
        if known.get(each.source.name) != (batch, tokens, site.key_heads * site.depth):
            return False
    pasts = {known.get(c.past.name, (0, 0, -1)) for c in site.caches} or {(batch, site.key_heads, 0, site.depth)}
    past = pasts.pop()
    if pasts or len(past) != 4 or past != (batch, site.key_heads, past[2], site.depth):
        return False
    keys = past[2] + tokens
    for table in (t for r in site.rotations if r for t in (r.cos, r.sin)):
        shape = _four(known.get(table.name, ()))
        if shape not in ((1, 1, tokens, site.depth), (batch, 1, tokens, site.depth)):
            return False
    if site.mask is None:
        return True
    mask, full = _four(known.get(site.mask.name, ())), (batch, site.heads, tokens, keys)
    return mask is not None and mask[3] == keys and all(m in (1, f) for m, f in zip(mask, full, strict=True))


def _four(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """A shape of 2 to 4 axes with ones before them; None: another number of axes."""
    return (1,) * (4 - len(shape)) + shape if 2 <= len(shape) <= 4 else None
