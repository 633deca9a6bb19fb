"""Pooling: X [N, C, ..] -> Y [N, C, ..], each channel by itself.

A spatial axis on which the window is a single position passes, see `window`; others are pinned. What names positions
across channels (flat indices), or mixes neighbouring channels (LRN), pins those.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import made, pin_window
from spa_compiler.analysis.rules.window import one_by_one, put_mixed

WINDOW = "pooling window"
_FLAT = "flat positions count all channels"


def pool(node: gs.Node, facts: Facts) -> str | None:
    """Scales and zero points of quantized pools are single values."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    last = bool(node.attrs.get("channels_last", 0)) or node.op == "NhwcMaxPool"
    spatial = axes[1:-1] if last else axes[2:]
    apart = one_by_one(node, list(node.attrs["kernel_shape"]))
    passing = [axis if single else None for axis, single in zip(spatial, apart, strict=True)]
    put_mixed(node, facts, [axes[0], *passing, axes[-1]] if last else [*axes[:2], *passing], WINDOW)
    return None


def max_pool(node: gs.Node, facts: Facts) -> str | None:
    """The second output has the flat positions of the maxima in all of X."""
    indices = made(node, 1)
    if indices is not None and indices.outputs:
        return _FLAT
    reason = pool(node, facts)
    if indices is not None and reason is None:  # an output of the graph pins what it shares, one that nobody reads not
        facts.put(indices, facts.axes[node.outputs[0].name])
    return reason


def global_pool(node: gs.Node, facts: Facts) -> str | None:
    """All positions of a channel become one."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    spatial = [None] * (len(axes) - 2)
    last = bool(node.attrs.get("channels_last", 0))
    put_mixed(node, facts, [axes[0], *spatial, axes[-1]] if last else [*axes[:2], *spatial], WINDOW)
    return None


def unpool(node: gs.Node, facts: Facts) -> str | None:
    """The second input has flat positions in all of Y."""
    return _FLAT


def regions(node: gs.Node, facts: Facts) -> str | None:
    """X [N, C, ..], regions [R, ..] and further lists -> [R, C, ..]: regions choose images and positions."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    for tensor in node.inputs[1:]:
        pin_window(node, facts, tensor, "regions")
    put_mixed(node, facts, [None, axes[1], *[None] * (len(axes) - 2)], "chosen by regions")
    return None


def masked_pool(node: gs.Node, facts: Facts) -> str | None:
    """MaxPool that leaves out positions; how the mask broadcasts is nowhere said."""
    return "a mask of positions"


def lrn(node: gs.Node, facts: Facts) -> str | None:
    """Each channel is divided by a sum over its neighbours; positions and images are apart."""
    axes = facts.of(node.inputs[0])
    if axes is None:
        return UNKNOWN_RANK
    facts.put(node.outputs[0], axes)
    facts.pin(node.op, node.inputs[0], 1, "neighbour window")
    return None


RULES: dict[str, Rule] = {
    "AveragePool": pool,
    "GlobalAveragePool": global_pool,
    "GlobalLpPool": global_pool,
    "GlobalMaxPool": global_pool,
    "LRN": lrn,
    "LpPool": pool,
    "MaxPool": max_pool,
    "MaxRoiPool": regions,
    "MaxUnpool": unpool,
    "RoiAlign": regions,
}
MICROSOFT: dict[str, Rule] = {
    "CropAndResize": regions,
    "MaxpoolWithMask": masked_pool,
    "NhwcMaxPool": pool,
    "QLinearAveragePool": pool,
    "QLinearGlobalAveragePool": global_pool,
}
