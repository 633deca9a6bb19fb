"""What passes that cut have in common: the cut itself, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.analysis.count import Counter
from spa_compiler.analysis.cut import Statistics, apply, removed_slabs
from spa_compiler.analysis.schema import Slab
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.passes.pass_ import Context, Removal

Units: TypeAlias = Sequence[int] | NDArray[np.int64]

_LEAST_PIN = 0.005
"""Share of the parameters below which a pin is not named."""
_NAMED_PINS = 3
"""Reasons that a warning about a shortfall gives."""


def analysis_of(model: Model, context: Context) -> Analysis:
    """The context's, or a new one."""
    return context.analysis if context.analysis is not None else analyzed(model, context)


def analyzed(model: Model, context: Context) -> Analysis:
    """A new one, with MACs counted for the context's first feed."""
    return analyze(model, {name: value.shape for name, value in context.feeds[0].items()} if context.feeds else None)


def cut(
    model: Model, analysis: Analysis, removed: Mapping[int, Units], statistics: Statistics = "masked"
) -> tuple[Removal, ...]:
    """Removes units in place, and says what that came to."""
    told = removals(analysis, removed)
    if told:
        apply(model, analysis, removed, statistics)
        shapes.infer(model)
    return told


def removals(analysis: Analysis, removed: Mapping[int, Units]) -> tuple[Removal, ...]:
    """Units that go, with their slabs: one entry for each group."""
    return tuple(_removal(analysis, group, removed[group]) for group in sorted(removed) if len(removed[group]))


def shares(analysis: Analysis, removed: Mapping[int, Units]) -> dict[str, float]:
    """What remains of the whole model: MACs (where they are known), parameters, and units of all groups."""
    counter = Counter(analysis)
    params, macs = counter.kept(removed)
    all_params, all_macs = counter.kept({})
    units = sum(group.size for group in analysis.groups)
    gone = sum(len(removed[group]) for group in removed)
    out = {} if macs is None or not all_macs else {"macs": macs / all_macs}
    return out | {"params": params / max(1, all_params), "channels": (units - gone) / max(1, units)}


def what_holds_the_rest(analysis: Analysis) -> str:
    """The pins that hold most parameters, in words; empty where none holds any."""
    by_reason: dict[tuple[str, str], int] = {}
    for pin in analysis.pins:
        key = (pin.op, pin.reason)
        by_reason[key] = max(by_reason.get(key, 0), pin.params)
    worth_a_word = [item for item in by_reason.items() if item[1] >= _LEAST_PIN * analysis.params]
    most = sorted(worth_a_word, key=lambda item: (-item[1], item[0]))[:_NAMED_PINS]
    if not most:
        return ""
    named = {
        key: next(pin for pin in analysis.pins if (pin.op, pin.reason, pin.params) == (*key, n)) for key, n in most
    }
    texts = [
        f"{pin.tensor!r} axis {pin.axis} ({pin.op}: {pin.reason}; "
        f"{pin.params / max(1, analysis.params):.0%} of the parameters)"
        for pin in named.values()
    ]
    return "pins hold most of the rest: " + ", ".join(texts)


def _removal(analysis: Analysis, group: int, units: Units) -> Removal:
    parameters, activations = removed_slabs(analysis, {group: units})
    kind = next(own.granularity for own in analysis.groups if own.id == group)
    return Removal(
        group=group,
        granularity=kind,
        units=tuple(int(unit) for unit in np.sort(np.asarray(units))),
        parameters=_slabs(parameters),
        activations=_slabs(activations),
    )


def _slabs(indices: Mapping[tuple[str, int], Any]) -> tuple[Slab, ...]:
    return tuple(Slab(name, axis, np.sort(own).tolist()) for (name, axis), own in indices.items() if len(own))
