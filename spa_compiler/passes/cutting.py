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
from spa_compiler.analysis.summary import reasons
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
    most = [one for one in reasons(analysis) if one.params >= _LEAST_PIN * analysis.params][:_NAMED_PINS]
    if not most:
        return ""
    texts = [
        f"{one.params / max(1, analysis.params):.0%} of the parameters by {one.op}, {one.reason} ({one.example})"
        for one in most
    ]
    return "pins hold " + "; ".join(texts)


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
