"""Shapes of ONNX Runtime's attention operators (domain com.microsoft), and of what comes with them.

B sequences of S positions, T positions that are looked at, N heads of size D.
"""

from __future__ import annotations

from spa_compiler.graph.sizes.dims import part, product, total
from spa_compiler.graph.sizes.known import Dims, Known, Op
from spa_compiler.graph.sizes.onnx_shapes import Rule


def _attention(past_at: int | None = None, typed: int = 0) -> Rule:
    """X [B, S, I] or tokens [S, I], weights [I, 3 N D] -> [B, S, N D], present [2, B, N, T, D].

    Args:
        past_at: the place of the past [2, B, N, T, D] among the inputs.
        typed: the input that has the outputs' type.
    """

    def rule(op: Op, given: list[Known]) -> list[Known]:
        data, weights = given[0].shape, given[1].shape
        past = None if past_at is None else op.optional(given, past_at)
        if not data or not weights:
            return []
        widths, heads, elem = op.attr("qkv_hidden_sizes"), int(op.attr("num_heads", 0)), given[typed].elem
        hidden = int(widths[2]) if widths else part(weights[-1], 3)
        output = Known(elem, (*data[:-1], hidden))
        if len(data) != 3:
            return [output]
        before = 0 if past is None else past.shape[3] if past.shape else None
        length = before if op.attr("past_present_share_buffer", 0) else total((data[1], before))
        return [output, Known(elem, (2, data[0], heads, length, part(hidden, heads)))]

    return rule


def _multi_head(op: Op, given: list[Known]) -> list[Known]:
    """Query [B, S, N D] or [B, S, N, 3, D], key, value, .. -> [B, S, N E], present key and value, scores [B, N, S, T].

    Key and value: [B, T, N D] or [B, N, T, D], or both in one [B, T, N, 2, D].
    """
    query, key, value = given[0].shape, op.optional(given, 1), op.optional(given, 2)
    if query is None or len(query) < 3:
        return []
    batch, length = query[:2]
    heads, elem = int(op.attr("num_heads", 0)), given[0].elem
    compared = part(_width(query), heads)
    carried = compared if value is None else None if value.shape is None else part(_width_of_value(value.shape), heads)
    keys = query if key is None else key.shape
    now = None if keys is None else keys[2] if len(keys) == 4 else keys[1]
    past = op.optional(given, 6)
    before = 0 if past is None else past.shape[2] if past.shape else None
    reached = before if op.optional(given, 8) is not None else total((now, before))
    present = [Known(elem, (batch, heads, reached, depth)) for depth in (compared, carried)]
    return [
        Known(elem, (batch, length, product((carried, heads)))),
        *present,
        Known(elem, (batch, heads, length, reached)),
    ]


def _packed_multi_head(op: Op, given: list[Known]) -> list[Known]:
    """Query [tokens, N D] or [tokens, N, 3, D], key, value [tokens, N E] -> [tokens, N E]."""
    query, value = given[0].shape, op.optional(given, 2)
    if query is None or (value is not None and not value.shape):
        return []
    width = _width(query) if value is None or not value.shape else value.shape[-1]
    return [Known(given[0].elem, (query[0], width))]


def _width(query: Dims) -> int | None:
    """All heads' sizes together: the last axis, or [.., N, 3, D]."""
    return query[-1] if len(query) < 4 else product((query[-3], query[-1]))


def _width_of_value(value: Dims) -> int | None:
    return value[-1] if len(value) == 3 else product((value[1], value[-1]))


def _grouped_query(op: Op, given: list[Known]) -> list[Known]:
    """Query [B, S, N D], key and value [B, S, G D], or all in one -> [B, S, N D], present [B, G, T, D]."""
    query, elem = given[0].shape, given[0].elem
    if query is None or len(query) != 3:
        return []
    heads, shared = int(op.attr("num_heads", 1)), int(op.attr("kv_num_heads", 1))
    packed = op.optional(given, 1) is None
    depth = part(query[2], heads + 2 * shared if packed else heads)
    # a cache may be a buffer that is written in place or one that grows, so its length is known only without one
    length = query[1] if op.optional(given, 3) is None else None
    present = Known(elem, (query[0], shared, length, depth))
    return [Known(elem, (*query[:2], product((depth, heads)))), present, present]


def _linear_attention(op: Op, given: list[Known]) -> list[Known]:
    """Query [B, S, N D], key [B, S, G D], value [B, S, G E] -> [B, S, max(N, G) E], state [.., B, G, D, E]."""
    query, value, past = given[0].shape, given[2].shape, op.optional(given, 3)
    if query is None or value is None or len(query) != 3 or len(value) != 3:
        return []
    heads, shared = int(op.attr("q_num_heads", 0)), int(op.attr("kv_num_heads", 0))
    compared, carried = part(query[2], heads), part(value[2], shared)
    lead = (int(op.attr("state_window", 0)),) if op.attr("state_window", 0) else ()
    output = Known(given[0].elem, (*query[:2], product((carried, max(heads, shared)))))
    return [output, Known((past or given[0]).elem, (*lead, query[0], shared, compared, carried))]


def _pair(first: int, second: int) -> Rule:
    """Two outputs like the inputs at these places."""

    def rule(op: Op, given: list[Known]) -> list[Known]:
        sources = [op.optional(given, place) for place in (first, second)]
        return [Known() if source is None else Known(source.elem, source.shape) for source in sources]

    return rule


def _relative_position_bias(_: Op, given: list[Known]) -> list[Known]:
    """A table [buckets, N], two lengths -> [1, N, S, T]."""
    table, *lengths = given[:3]
    if not table.shape:
        return []
    sizes = [None if known.value is None else int(known.value.item()) for known in lengths]
    return [Known(table.elem, (1, table.shape[-1], *sizes))]


def _gated_relative_position_bias(op: Op, given: list[Known]) -> list[Known]:
    """Query [B, S, N D], or [tokens, N D] with offsets [B, S], bias [1, N, S, S] -> [B, N, S, S]."""
    table, offsets = given[2].shape, op.optional(given, 6)
    source = given[0].shape if offsets is None else offsets.shape
    if not source or not table:
        return []
    return [Known(given[0].elem, (source[0], *table[1:]))]


RULES: dict[str, Rule] = {
    "Attention": _attention(4),
    "GatedRelativePositionBias": _gated_relative_position_bias,
    "GemmaRotaryEmbedding": _pair(1, 3),
    "GroupQueryAttention": _grouped_query,
    "LinearAttention": _linear_attention,
    "LinearAttentionGate": _pair(0, 3),
    "MultiHeadAttention": _multi_head,
    "PackedAttention": _attention(),
    "PackedMultiHeadAttention": _packed_multi_head,
    "QAttention": _attention(8, typed=2),
    "RelativePositionBias": _relative_position_bias,
}
