"""Tensors out of nothing but sizes. What a size that is written in the file makes may shrink with what it meets; what a
size that hangs on the inputs makes stays. Random numbers hang on the shape, so they stay too.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, pin_window

_COMPUTED = "computed size"


def constant_of_shape(node: gs.Node, facts: Facts) -> str | None:
    """Sizes [rank] -> a tensor of one value."""
    sizes, out = node.inputs[0], node.outputs[0]
    pin_window(node, facts, sizes, "a list of sizes")
    if facts.of(out) is None:
        return UNKNOWN_RANK
    known = facts.entries(sizes)
    for axis in range(len(facts.axes[out.name])):
        if known is None or not known[1].reshape(-1)[axis] or facts.varies(out, axis):
            facts.pin(node.op, out, axis, _COMPUTED, window=True)
    facts.patch(node, lambda own, cut: cut.patch_sizes(own, 0))
    return None


def arange(node: gs.Node, facts: Facts) -> str | None:
    """Start, limit, step -> [n]; of constant ones, some numbers may be left out behind the operator."""
    out = node.outputs[0]
    if facts.of(out) is None:
        return UNKNOWN_RANK
    for tensor in node.inputs:
        pin_window(node, facts, tensor, "a number")
    if any(facts.value(tensor) is None for tensor in node.inputs):
        facts.pin(node.op, out, 0, _COMPUTED, window=True)
        return None
    facts.patch(node, _leave_out)
    return None


def _leave_out(node: gs.Node, cut: Cut) -> None:
    if (kept := cut.keep(node.outputs[0], 0)) is not None:
        cut.after(node, 0, "Gather", [np.asarray(kept, np.int64)], {"axis": 0})


def window(node: gs.Node, facts: Facts) -> str | None:
    """A size -> [size] weights of a signal window."""
    for tensor in (given(node, 0), node.outputs[0]):
        pin_window(node, facts, tensor, "positions of a signal window")
    return None


def eye_like(node: gs.Node, facts: Facts) -> str | None:
    """[r, c] -> the ones on a diagonal."""
    return "positions of a diagonal"


def random(node: gs.Node, facts: Facts) -> str | None:
    """Random numbers of a shape, or of the shape of another tensor, or drawn with its chances."""
    return "random numbers hang on the shape"


_RANDOM = "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_RANDOM.split(), random),
    "BlackmanWindow": window,
    "ConstantOfShape": constant_of_shape,
    "EyeLike": eye_like,
    "HammingWindow": window,
    "HannWindow": window,
    "Range": arange,
}
