"""Recurrent layers: X [T, B, I], W [dirs, H + H + .., I], R [dirs, H + H + .., H], B [dirs, H + H + ..],
P [dirs, H + H + H], states [dirs, B, H] -> Y [T, dirs, B, H], with one H per gate. The unit is one of H: a hidden unit,
in both directions.

A hidden unit is read inside of the operator too, by the recurrent product. To mask one means that this product reads
zero as well, which is the same as zeros in its column of R; then everything else that the unit has (rows of all gates,
biases, peepholes, initial states) reaches nothing, whatever the activations make of a zero.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from spa_compiler.analysis.cut import Cut
from spa_compiler.analysis.facts import Axis, Facts, Rule
from spa_compiler.analysis.rules.broadcast import UNKNOWN_RANK
from spa_compiler.analysis.rules.inputs import given, pin_window

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_PEEPHOLES = 3
_LENGTHS, _INITIAL_H, _INITIAL_C, _P = 4, 5, 6, 7


def recurrent(node: gs.Node, facts: Facts) -> str | None:
    """LSTM, GRU and RNN; with `layout = 1` the batch comes first."""
    x, w, r = node.inputs[:3]
    x_axes, w_axes = facts.of(x), facts.of(w)
    optional = [given(node, place) for place in (3, _INITIAL_H, _INITIAL_C, _P)]
    if x_axes is None or w_axes is None or any(t is not None and facts.of(t) is None for t in (r, *optional)):
        return UNKNOWN_RANK
    r_axes, sizes = facts.axes[r.name], facts.algebra.size
    hidden = sizes(r_axes[2])
    if hidden is None or sizes(w_axes[1]) != _GATES[node.op] * hidden:
        return "recurrent weights of unknown size"
    units = facts.algebra.fresh(hidden, "hidden unit")
    facts.couple(node, r, 2, units)
    gates = _GATES[node.op]
    for place, times in ((1, gates), (2, gates), (3, 2 * gates), (_P, _PEEPHOLES)):
        if (tensor := given(node, place)) is not None:  # one run of units after another
            facts.couple(node, tensor, 1, facts.algebra.concat([units] * times))
    _directions(node, facts)
    facts.couple(node, w, 2, x_axes[2])
    _states(node, facts, x_axes, units)
    steps = _product(sizes(x_axes[0]), sizes(x_axes[1]))
    facts.work(node, w_axes, steps)
    facts.work(node, r_axes, steps)
    facts.patch(node, _patch)
    return None


def _directions(node: gs.Node, facts: Facts) -> None:
    """All that has a direction has the same ones, and they stay."""
    w = node.inputs[1]
    facts.pin(node.op, w, 0, "directions of a recurrent layer")
    for place in (2, 3, _P):
        if (tensor := given(node, place)) is not None:
            facts.couple(node, tensor, 0, facts.axes[w.name][0])


def _states(node: gs.Node, facts: Facts, x: tuple[Axis, ...], units: Axis) -> None:
    """Time stays, as a state passes through all of it; the sequences of a batch are independent of each other."""
    x_tensor, w = node.inputs[:2]
    batch_first = bool(node.attrs.get("layout", 0))
    time, batch = (1, 0) if batch_first else (0, 1)
    directions = facts.axes[w.name][0]
    facts.pin(node.op, x_tensor, time, "steps of a recurrent layer", window=True)
    if (lengths := given(node, _LENGTHS)) is not None:  # no sequence may have the length 0
        facts.pin(node.op, x_tensor, batch, "sequences with lengths", window=True)
        pin_window(node, facts, lengths, "sequences with lengths")
    state = (x[batch], directions, units) if batch_first else (directions, x[batch], units)
    for place in (_INITIAL_H, _INITIAL_C):
        if (tensor := given(node, place)) is not None:
            for axis, other in enumerate(state):
                facts.couple(node, tensor, axis, other)
    y = (x[0], x[1], directions, units) if batch_first else (x[0], directions, x[1], units)
    for output, axes in zip(node.outputs, (y, state, state), strict=False):
        if output.name:
            facts.put(output, axes)


def _product(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left * right


def _patch(node: gs.Node, cut: Cut) -> None:
    if (kept := cut.keep(node.inputs[2], 2)) is not None:
        node.attrs["hidden_size"] = len(kept)


RULES: dict[str, Rule] = dict.fromkeys(_GATES, recurrent)
