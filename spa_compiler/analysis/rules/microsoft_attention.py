"""ONNX Runtime's own attentions (domain com.microsoft), which its optimizer and exporters put in place of patterns.

    Attention             X [B, S, I], weights [I, (H, D) + (H, D) + (H, E)] -> [B, S, (H, E)]
    MultiHeadAttention    query [B, S, (H, D)], key [B, T, (H, D)], value [B, T, (H, E)], bias (H, D) + (H, D) + (H, E)
    GroupQueryAttention   query [B, S, (G, R, D)], key and value [B, T, (G, D)], or all in one:
                          [B, S, (G, R, D) + (G, D) + (G, D)]

Letters as in `attention`.
"""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Pin, Rule
from spa_compiler.analysis.rules.attention import (
    HEAD,
    HEAD_DIMENSION,
    POSITIONS,
    UNKNOWN_SIZE,
    Heads,
    add_bias,
    count,
    count_products,
    lay,
    linear_attention,
    put_stay,
    rotate,
    sizes,
)
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, made, pin_window

ONE_SIZE = "the kernel wants one size for all heads of queries, keys and values"
INSIDE = "computed and used inside of the operator, where no activation can be masked"


def attention(node: gs.Node, facts: Facts) -> str | None:
    """X, weights, bias, mask, past, attention bias, past length -> Y, present: projections and attention in one."""
    x, weights = node.inputs[:2]
    axes = facts.of(x)
    if axes is None or len(axes) != 3 or len(facts.of(weights) or ()) != 2:
        return UNKNOWN_RANK
    amount, total = int(node.attrs["num_heads"]), sizes(facts, weights)[1]
    widths = [int(width) for width in node.attrs.get("qkv_hidden_sizes") or ()] or [total // 3] * 3
    heads = Heads.of(facts, amount, amount, widths[0] // amount, widths[2] // amount)
    if heads is None or sum(widths) != total or any(width % amount for width in widths):
        return UNKNOWN_SIZE
    lay(node, facts, weights, {0: axes[2], 1: heads.packed})
    lay(node, facts, given(node, 2), {0: heads.packed})
    facts.pins.append(Pin(weights.name, 1, node.op, INSIDE, (heads.compared,)))
    lay(node, facts, x, {}, [1])
    pin_window(node, facts, given(node, 3), POSITIONS)
    cache = (None, axes[0], heads.shared, None, heads.carried)
    past = given(node, 4)
    lay(node, facts, past, {1: axes[0], 2: heads.shared, 4: heads.carried}, [0, 3])
    add_bias(node, facts, given(node, 5), heads.queries)
    pin_window(node, facts, given(node, 6), POSITIONS)
    put_stay(node, facts, 1, cache)
    if past is not None or made(node, 1) is not None:  # keys and values lie in one tensor
        facts.pins.append(Pin(weights.name, 1, node.op, ONE_SIZE, (heads.carried,)))
    facts.put(node.outputs[0], (axes[0], axes[1], heads.value))
    rows = count(facts, x, 0, 1)
    facts.work(node, (axes[2], heads.packed), rows)
    heads.name()
    count_products(node, facts, heads, rows, count(facts, x, 1))

    def patch(node: gs.Node, cut: Cut) -> None:
        amount = node.attrs["num_heads"] = heads.counts(cut)[0]
        narrow = [amount * cut.size_on(axis)[1] for axis in (heads.compared, heads.compared, heads.carried)]
        if node.attrs.get("qkv_hidden_sizes") or narrow[0] != narrow[2]:
            node.attrs["qkv_hidden_sizes"] = narrow

    facts.patch(node, patch)
    return None


def multi_head_attention(node: gs.Node, facts: Facts) -> str | None:
    """Query, key, value, bias, padding, attention bias, past key, past value, .. -> Y, present key, value, scores.

    Packed: one query [B, S, H, 3, D], or a key [B, T, H, 2, D]. From another sequence: key and value [B, H, T, D].
    With a bias on queries and keys, an index of D that is zero before still adds its constant, the same for all keys,
    to the scores of a query: nothing to Softmax.
    """
    query, key, value = node.inputs[0], given(node, 1), given(node, 2)
    axes = facts.of(query)
    if axes is None or any(tensor is not None and facts.of(tensor) is None for tensor in (key, value)):
        return UNKNOWN_RANK
    heads = _heads(node, facts, query, key, value)
    if heads is None:
        return UNKNOWN_SIZE
    batch = axes[0]
    for tensor, whole, inner in (
        (query, heads.query, heads.compared),
        (key, heads.key, heads.compared),
        (value, heads.value, heads.carried),
    ):
        _lay_heads(node, facts, tensor, batch, heads.shared, whole, inner)
    lay(node, facts, given(node, 3), {0: heads.packed})
    pin_window(node, facts, given(node, 4), POSITIONS)
    add_bias(node, facts, given(node, 5), heads.queries)
    lay(node, facts, given(node, 6), {0: batch, 1: heads.shared, 3: heads.compared}, [2])
    lay(node, facts, given(node, 7), {0: batch, 1: heads.shared, 3: heads.carried}, [2])
    for place in (8, 9):
        pin_window(node, facts, given(node, place), POSITIONS)
    if given(node, 3) is not None and (given(node, 6) is not None or made(node, 3) is not None):
        facts.pins.append(Pin(query.name, len(axes) - 1, node.op, "a bias on some of the keys", (heads.compared,)))
    facts.put(node.outputs[0], (batch, axes[1], heads.value))
    put_stay(node, facts, 1, (batch, heads.shared, None, heads.compared))
    put_stay(node, facts, 2, (batch, heads.shared, None, heads.carried))
    put_stay(node, facts, 3, (batch, heads.shared, axes[1], None))
    keys = query if key is None else key
    columns = count(facts, keys, 2 if len(sizes(facts, keys)) == 4 else 1)
    heads.name()
    count_products(node, facts, heads, count(facts, query, 0, 1), columns)

    def patch(node: gs.Node, cut: Cut) -> None:
        node.attrs["num_heads"] = heads.counts(cut)[0]
        heads.keep_scale(node, cut)

    facts.patch(node, patch)
    return None


def _heads(node: gs.Node, facts: Facts, query: Any, key: Any | None, value: Any | None) -> Heads | None:
    """D from the query, E from the value; where these lie in one tensor or behind a cache, E must be D."""
    amount, known = int(node.attrs["num_heads"]), sizes(facts, query)
    width = known[-1] if len(known) == 5 else known[-1] // amount
    heads = Heads.of(facts, amount, amount, width, 1)
    if heads is None:
        return None
    if value is None or len(sizes(facts, value)) == 4 or given(node, 7) is not None:
        return heads.sharing()
    return Heads.of(facts, amount, amount, width, sizes(facts, value)[-1] // amount)


def _lay_heads(
    node: gs.Node, facts: Facts, tensor: Any | None, batch: Axis, heads: Axis, whole: Axis, inner: Axis
) -> None:
    """[B, S, (H, D)], [B, S, H, 2 or 3, D] or [B, H, S, D]"""
    if tensor is None:
        return
    rank = len(sizes(facts, tensor))
    if rank == 3:
        lay(node, facts, tensor, {0: batch, 2: whole}, [1])
    elif rank == 4:
        lay(node, facts, tensor, {0: batch, 1: heads, 3: inner}, [2])
    else:
        lay(node, facts, tensor, {0: batch, 2: heads, 4: inner}, [1, 3])


def group_query_attention(node: gs.Node, facts: Facts) -> str | None:
    """Query, key, value, past key, past value, lengths, .. -> Y, present key, present value, scores."""
    query, key, value = node.inputs[0], given(node, 1), given(node, 2)
    axes = facts.of(query)
    if axes is None or len(axes) != 3:
        return UNKNOWN_RANK
    queries, shared = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    width = sizes(facts, query)[2] // (queries + (2 * shared if key is None else 0))
    heads = Heads.of(facts, queries, shared, width, width)
    if heads is None:
        return UNKNOWN_SIZE
    heads = heads.sharing()
    facts.couple(node, query, 2, heads.packed if key is None else heads.query)
    facts.pins.append(Pin(query.name, 2, node.op, ONE_SIZE, (heads.compared,)))
    lay(node, facts, query, {}, [1])
    for tensor in (key, value):
        lay(node, facts, tensor, {0: axes[0], 2: heads.key}, [1])
    for place in (3, 4):  # the last axis may be packed
        lay(node, facts, given(node, place), {0: axes[0], 1: heads.shared}, [2, 3])
    for place in (5, 6, 7, 8, 9, 14, 15):
        pin_window(node, facts, given(node, place), "lengths, tables and gains of a head size that stays")
    add_bias(node, facts, given(node, 10), heads.queries)
    lay(node, facts, given(node, 11), {0: heads.queries})
    for place in (12, 13):
        _lay_scale(node, facts, given(node, place), heads)
    facts.put(node.outputs[0], (axes[0], axes[1], heads.result))
    put_stay(node, facts, 1, (axes[0], heads.shared, None, None))
    put_stay(node, facts, 2, (axes[0], heads.shared, None, None))
    put_stay(node, facts, 3, (axes[0], heads.queries, axes[1], None))
    heads.name()
    count_products(node, facts, heads, count(facts, query, 0, 1), count(facts, query if key is None else key, 1))

    def patch(node: gs.Node, cut: Cut) -> None:
        node.attrs["num_heads"], node.attrs["kv_num_heads"] = heads.counts(cut)

    facts.patch(node, patch)
    return None


def _lay_scale(node: gs.Node, facts: Facts, scale: Any | None, heads: Heads) -> None:
    """The scale of a quantized cache: of one element, or [1, G, 1, D]."""
    if scale is None or facts.of(scale) is None:
        return
    known = sizes(facts, scale)
    if len(known) == 4 and known[1] != 1:
        lay(node, facts, scale, {1: heads.shared}, [0, 2, 3])
    else:
        pin_window(node, facts, scale, "the scale of a cache")


def rotary_embedding(node: gs.Node, facts: Facts) -> str | None:
    """X, positions, cos, sin -> Y."""
    return rotate(node, facts, (given(node, 2), given(node, 3)), given(node, 1))


def relative_position_bias(node: gs.Node, facts: Facts) -> str | None:
    """A table [buckets, H], lengths -> [1, H, S, T]."""
    table = node.inputs[0]
    axes = facts.of(table)
    if axes is None:
        return UNKNOWN_RANK
    facts.pin(node.op, table, 0, "buckets of distances", window=True)
    put_stay(node, facts, 0, (facts.algebra.fresh(1), axes[1], None, None))
    return None


def gated_relative_position_bias(node: gs.Node, facts: Facts) -> str | None:
    """Query [.., (H, D)], its bias (H, D), bias [1, H, S, S], weight [D, ..], bias, scale [1, H, 1, 1] -> scores."""
    query, query_bias, table, weight, added, scale = node.inputs[:6]
    known, amount = sizes(facts, query), int(node.attrs["num_heads"])
    if not known or not known[-1] or known[-1] % amount:
        return UNKNOWN_SIZE
    heads, inner = facts.algebra.fresh(amount, HEAD), facts.algebra.fresh(known[-1] // amount, HEAD_DIMENSION)
    whole = facts.algebra.merge([heads, inner])
    lay(node, facts, query, {len(known) - 1: whole}, range(1, len(known) - 1))
    lay(node, facts, query_bias, {0: whole})
    lay(node, facts, table, {1: heads}, [0, 2, 3])
    lay(node, facts, scale, {1: heads}, [0, 2, 3])
    pin_window(node, facts, given(node, 6), POSITIONS)
    for tensor in (weight, added):
        if facts.of(tensor) is not None:
            facts.pin_tensor(node.op, tensor, INSIDE)
    facts.pins.append(Pin(query.name, len(known) - 1, node.op, INSIDE, (inner,)))
    put_stay(node, facts, 0, (None, heads, None, None))

    def patch(node: gs.Node, cut: Cut) -> None:
        node.attrs["num_heads"] = cut.size_on(heads)[1]

    facts.patch(node, patch)
    return None


MICROSOFT: dict[str, Rule] = {
    "Attention": attention,
    "GatedRelativePositionBias": gated_relative_position_bias,
    "GroupQueryAttention": group_query_attention,
    "LinearAttention": linear_attention,
    "MultiHeadAttention": multi_head_attention,
    "RelativePositionBias": relative_position_bias,
    "RotaryEmbedding": rotary_embedding,
}
