"""Attention and its kin: heads go whole, with their rows and columns in every projection.

    query [B, S, (G, R, D)]    key [B, T, (G, D)]    value [B, T, (G, E)]    ->    [B, S, (G, R, E)]

G: key-value heads, R: query heads of each, D: what a query and a key are compared over, E: what a value holds. As
tensors of rank 4, `[B, (G, R), S, D]` and so on. D is contracted, so a masked index adds zero to every score: exact,
as long as the scale stays that of the original D. Softmax runs over the positions T, which stay.

Rotary embeddings turn pairs of D, so a pair is the unit there: D = (2, P) in halves, (P, 2) interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Pin, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import axis_of, given, made, pin_window

HEAD, HEAD_DIMENSION, ROTARY_PAIR = "head", "head dimension", "rotary pair"
SLOT = "query head of each key-value head"
POSITIONS = "positions of queries and keys"
UNKNOWN_SIZE = "heads of unknown size"


@dataclass(frozen=True, eq=False)
class Heads:
    """The factors of one attention: G key-value heads, R query heads for each, D to compare over, E of a value."""

    facts: Facts
    shared: Axis
    slots: Axis
    compared: Axis
    carried: Axis

    @classmethod
    def of(cls, facts: Facts, queries: int, shared: int, compared: int, carried: int) -> Heads | None:
        """For counts of query heads and of key-value heads, and sizes of a key and of a value; None if they are odd."""
        if min(queries, shared, compared, carried) < 1 or queries % shared:
            return None
        fresh = facts.algebra.fresh
        return cls(facts, fresh(shared), fresh(queries // shared), fresh(compared), fresh(carried))

    def name(self) -> None:
        """Says what the factors are, once they are joined: what a rotary embedding said of its pairs stays."""
        for axis, label in zip((self.shared, self.compared, self.carried), (HEAD, *[HEAD_DIMENSION] * 2), strict=True):
            self.facts.algebra.name(axis, label)
        for atom in self.facts.algebra.atoms(self.slots):
            atom.label = SLOT

    def sharing(self) -> Heads:
        """The same with D for E: keys and values lie in one tensor, or must be of one size."""
        return replace(self, carried=self.compared)

    @property
    def queries(self) -> Axis:
        """(G, R)"""
        return self.facts.algebra.merge([self.shared, self.slots])

    @property
    def query(self) -> Axis:
        """(G, R, D)"""
        return self.facts.algebra.merge([self.shared, self.slots, self.compared])

    @property
    def key(self) -> Axis:
        """(G, D)"""
        return self.facts.algebra.merge([self.shared, self.compared])

    @property
    def value(self) -> Axis:
        """(G, E)"""
        return self.facts.algebra.merge([self.shared, self.carried])

    @property
    def packed(self) -> Axis:
        """(G, R, D) + (G, D) + (G, E)"""
        return self.facts.algebra.concat([self.query, self.key, self.value])

    @property
    def result(self) -> Axis:
        """(G, R, E)"""
        return self.facts.algebra.merge([self.shared, self.slots, self.carried])

    def counts(self, cut: Cut) -> tuple[int, int]:
        """Query heads and key-value heads that are left."""
        shared = cut.size_on(self.shared)[1]
        return shared * cut.size_on(self.slots)[1], shared

    def keep_scale(self, node: gs.Node, cut: Cut) -> None:
        """Writes the scale of the original size where the operator would take that of the new one."""
        before, after = cut.size_on(self.compared)
        if not node.attrs.get("scale") and before != after:
            node.attrs["scale"] = 1 / math.sqrt(before)


def sizes(facts: Facts, tensor: Any) -> list[int]:
    """The sizes of a tensor's axes, 0 where unknown."""
    return [facts.algebra.size(axis) or 0 for axis in facts.of(tensor) or ()]


def lay(node: gs.Node, facts: Facts, tensor: Any | None, axes: Mapping[int, Axis], stay: Sequence[int] = ()) -> None:
    """Joins axes of an input that may be left out, and pins those of positions."""
    if tensor is not None and facts.of(tensor) is not None:
        for number, axis in axes.items():
            facts.couple(node, tensor, number, axis)
        for number in stay:
            facts.pin(node.op, tensor, number, POSITIONS, window=True)


def put_stay(node: gs.Node, facts: Facts, place: int, axes: Sequence[Axis | None]) -> None:
    """States an output that may be left out. None: an axis of positions or sizes of its own, which stays."""
    if (output := made(node, place)) is None:
        return
    known = sizes(facts, output) or [0] * len(axes)
    fresh = [facts.algebra.fresh(size or None) for size in known]
    facts.put(output, [fresh[at] if axis is None else axis for at, axis in enumerate(axes)])
    for at, axis in enumerate(axes):
        if axis is None:
            facts.pin(node.op, output, at, POSITIONS, window=True)


def add_bias(node: gs.Node, facts: Facts, tensor: Any | None, queries: Axis) -> None:
    """What is added to the scores, or a mask of them: [.., H or 1, S, T], aligned on the right; positions stay."""
    if tensor is None or (axes := facts.of(tensor)) is None:
        return
    place = len(axes) - 3
    lay(node, facts, tensor, {}, [axis for axis in range(len(axes)) if axis != place])
    if place >= 0 and facts.algebra.size(axes[place]) != 1:
        facts.couple(node, tensor, place, queries)


def count(facts: Facts, tensor: Any, *axes: int) -> int | None:
    """The product of the sizes of some axes, an open batch on axis 0 as one sample; None if one is unknown."""
    known = sizes(facts, tensor)
    sized = [known[axis] for axis in axes if axis != 0 or (known[0] and not facts.varies(tensor, 0))]
    return None if 0 in sized else math.prod(sized)


def count_products(node: gs.Node, facts: Facts, heads: Heads, rows: int | None, columns: int | None) -> None:
    """The MACs of queries with keys and of scores with values, for `rows` queries and `columns` keys."""
    times = None if rows is None or columns is None else rows * columns
    facts.work(node, (heads.query,), times)
    facts.work(node, (heads.result,), times)


def attention(node: gs.Node, facts: Facts) -> str | None:
    """Q, K, V, mask, past key, past value, lengths -> Y, present key, present value, scores."""
    query, key, value = node.inputs[:3]
    known = [facts.of(tensor) for tensor in (query, key, value)]
    if any(axes is None for axes in known):
        return UNKNOWN_RANK
    ranks = {len(axes or ()) for axes in known}
    if ranks not in ({3}, {4}):
        return "query, key and value of unexpected ranks"
    flat = ranks == {3}
    heads = _heads(node, facts, flat)
    if heads is None:
        return UNKNOWN_SIZE
    batch, positions = facts.axes[query.name][0], 1 if flat else 2
    merged = (heads.query, heads.key, heads.value)
    apart = ((heads.queries, heads.compared), (heads.shared, heads.compared), (heads.shared, heads.carried))
    for tensor, whole, (outer, inner) in zip((query, key, value), merged, apart, strict=True):
        lay(node, facts, tensor, {0: batch, **({2: whole} if flat else {1: outer, 3: inner})}, [positions])
    add_bias(node, facts, given(node, 3), heads.queries)
    lay(node, facts, given(node, 4), {0: batch, 1: heads.shared, 3: heads.compared}, [2])
    lay(node, facts, given(node, 5), {0: batch, 1: heads.shared, 3: heads.carried}, [2])
    lay(node, facts, given(node, 6), {0: batch})
    row = facts.axes[query.name][positions]
    facts.put(node.outputs[0], (batch, row, heads.result) if flat else (batch, heads.queries, row, heads.carried))
    put_stay(node, facts, 1, (batch, heads.shared, None, heads.compared))
    put_stay(node, facts, 2, (batch, heads.shared, None, heads.carried))
    put_stay(node, facts, 3, (batch, heads.queries, row, None))
    heads.name()
    count_products(node, facts, heads, count(facts, query, 0, positions), count(facts, key, positions))

    def patch(node: gs.Node, cut: Cut) -> None:
        if flat:
            node.attrs["q_num_heads"], node.attrs["kv_num_heads"] = heads.counts(cut)
        heads.keep_scale(node, cut)

    facts.patch(node, patch)
    return None


def _heads(node: gs.Node, facts: Facts, flat: bool) -> Heads | None:
    query, key, value = (sizes(facts, tensor) for tensor in node.inputs[:3])
    if not flat:
        return Heads.of(facts, query[1], key[1], query[3], value[3])
    queries, shared = (int(node.attrs.get(name, 0)) for name in ("q_num_heads", "kv_num_heads"))
    if not queries or not shared:
        return None
    return Heads.of(facts, queries, shared, query[2] // queries, value[2] // shared)


def linear_attention(node: gs.Node, facts: Facts) -> str | None:
    """Query, key, value, past state, decay, beta -> Y, state [.., B, G, D, E]: a sum over positions instead of Softmax.

    Without a key's index its row of the state stays zero, and the query's index reads nothing from it.
    """
    query, key, value = node.inputs[:3]
    if any(len(facts.of(tensor) or ()) != 3 for tensor in (query, key, value)):
        return UNKNOWN_RANK
    queries, shared = (int(node.attrs.get(name, 0)) for name in ("q_num_heads", "kv_num_heads"))
    if queries < shared:
        return "more key-value heads than query heads"
    width, held = sizes(facts, query)[2] // (queries or 1), sizes(facts, value)[2] // (shared or 1)
    heads = Heads.of(facts, queries, shared, width, held)
    if heads is None:
        return UNKNOWN_SIZE
    batch = facts.axes[query.name][0]
    for tensor, whole in zip((query, key, value), (heads.query, heads.key, heads.value), strict=True):
        lay(node, facts, tensor, {0: batch, 2: whole}, [1])
    for gate in (given(node, 4), given(node, 5)):
        _gate(node, facts, gate, heads, batch)
    lead = 1 if int(node.attrs.get("state_window", 0)) else 0
    state = (batch, heads.shared, heads.compared, heads.carried)
    lay(node, facts, given(node, 3), {lead + at: axis for at, axis in enumerate(state)}, range(lead))
    facts.put(node.outputs[0], (batch, facts.axes[query.name][1], heads.result))
    put_stay(node, facts, 1, (*[None] * lead, *state))
    heads.name()
    for rows in (heads.key, heads.query):
        facts.work(node, (rows, heads.carried), count(facts, query, 0, 1))

    def patch(node: gs.Node, cut: Cut) -> None:
        node.attrs["q_num_heads"], node.attrs["kv_num_heads"] = heads.counts(cut)
        heads.keep_scale(node, cut)

    facts.patch(node, patch)
    return None


def _gate(node: gs.Node, facts: Facts, gate: Any | None, heads: Heads, batch: Axis) -> None:
    """A decay or an update rate: [B, T, (G, D)], [B, T, G] or [B, T, 1]."""
    if gate is None or len(sizes(facts, gate)) != 3:
        return
    width = sizes(facts, gate)[2]
    whole = heads.shared if width == facts.algebra.size(heads.shared) else heads.key
    lay(node, facts, gate, {0: batch} if width == 1 else {0: batch, 2: whole}, [1])


def rotary_embedding(node: gs.Node, facts: Facts) -> str | None:
    """X, cos, sin, positions -> Y."""
    return rotate(node, facts, (given(node, 1), given(node, 2)), given(node, 3))


def rotate(node: gs.Node, facts: Facts, tables: Sequence[Any | None], positions: Any | None) -> str | None:
    """X [B, S, (H, D)] or [B, H, S, D], turned by the angles of tables [.., P]: D = 2 P of pairs + what is not turned.

    Both halves of a pair go together, with their columns of the tables.
    """
    x = node.inputs[0]
    axes, known = facts.of(x), sizes(facts, x)
    if axes is None or any(table is None or facts.of(table) is None for table in tables):
        return UNKNOWN_RANK
    if len(known) not in (3, 4):
        return "a rotary embedding of an unexpected rank"
    flat, pairs = len(known) == 3, sizes(facts, tables[0])[-1]
    named = int(node.attrs.get("num_heads", 0))
    amount = (named or known[2] // (2 * pairs or 1)) if flat else 1
    width = known[-1] // (amount or 1)
    if not pairs or width < 2 * pairs or amount * width != known[-1]:
        return UNKNOWN_SIZE
    algebra = facts.algebra
    two, pair = algebra.fresh(2), algebra.fresh(pairs, ROTARY_PAIR)
    turned = algebra.merge([pair, two] if node.attrs.get("interleaved", 0) else [two, pair])
    inner = turned
    if width > 2 * pairs:
        inner = algebra.concat([turned, algebra.fresh(width - 2 * pairs, HEAD_DIMENSION)])
    heads = algebra.fresh(amount, HEAD) if flat else axes[1]
    lay(node, facts, x, {len(known) - 1: algebra.merge([heads, inner]) if flat else inner}, [1 if flat else 2])
    facts.pins.append(Pin(x.name, len(known) - 1, node.op, "the two sides of a rotation", (two,), window=True))
    for table in tables:
        last = len(sizes(facts, table)) - 1
        lay(node, facts, table, {last: pair}, range(last))
    pin_window(node, facts, positions, POSITIONS)
    facts.put(node.outputs[0], axes)

    def patch(node: gs.Node, cut: Cut) -> None:
        if named:
            node.attrs["num_heads"] = cut.size_on(heads)[1]
        if node.attrs.get("rotary_embedding_dim", 0):
            node.attrs["rotary_embedding_dim"] = 2 * cut.size_on(pair)[1]

    facts.patch(node, patch)
    return None


def tensor_scatter(node: gs.Node, facts: Facts) -> str | None:
    """A cache, an update of some of its positions -> the cache; all other axes are the same."""
    cache, update = node.inputs[:2]
    axes, new = facts.of(cache), facts.of(update)
    if axes is None or new is None:
        return UNKNOWN_RANK
    scattered = axis_of(node, len(axes), -2)
    for tensor in (cache, update):
        same = {number: axis for number, axis in enumerate(axes) if number != scattered}
        lay(node, facts, tensor, same, [scattered])
    lay(node, facts, given(node, 2), {0: axes[0]})
    facts.put(node.outputs[0], axes)
    return None


RULES: dict[str, Rule] = {
    "Attention": attention,
    "LinearAttention": linear_attention,
    "RotaryEmbedding": rotary_embedding,
    "TensorScatter": tensor_scatter,
}
