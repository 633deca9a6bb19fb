"""`remove-dead-channels`: units that make no difference go, with nothing but rounding as a change."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from spa_compiler.analysis import Analysis
from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import default_shapes
from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph import shapes
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_model, run
from spa_compiler.passes.absorb import absorb, takes
from spa_compiler.passes.budget import Removed, last_of_their_kind
from spa_compiler.passes.constant_channels import MOVERS, ConstantChannels, follows, input_axis
from spa_compiler.passes.cutting import analysis_of, analyzed, cut, removals, shares
from spa_compiler.passes.importance import array, holders
from spa_compiler.passes.matching import match, slabs
from spa_compiler.passes.pass_ import Change, Context, check_options
from spa_compiler.passes.trail import Trail, also

_log = logging.getLogger(__name__)

_SIZES = frozenset({"Shape", "Size"})
"""Nodes that read no value."""


@dataclass(frozen=True, kw_only=True)
class RemoveDeadChannelsOptions:
    """Options of `remove-dead-channels`: none."""


class RemoveDeadChannels:
    """x -> Conv(W1, b1) -> Relu -> Conv(W2, b2) -> y
    becomes    x -> Conv(W1[K], b1[K]) -> Relu -> Conv(W2[:, K], b2 + b) -> y        b = what the others gave

    Cuts out units of coupled channels that make no difference: those whose values are zero wherever they are read (all
    that writes them is zero, as trainers with group sparsity leave it), those that nothing reads but zero weights, and
    those whose values are the same for every input, which go into the biases of what reads them (Gemm, MatMul,
    convolutions without padding; for others such channels stay). What remains computes the same.
    """

    name: ClassVar[str] = "remove-dead-channels"
    Options: ClassVar[type[Any]] = RemoveDeadChannelsOptions

    def __init__(self, options: RemoveDeadChannelsOptions) -> None:
        check_options(options)
        self.options = options

    def run(self, model: Model, context: Context) -> Change:
        """Cuts `model` in place, again and again: what only wrote to dead units is dead itself."""
        shapes.infer(model)
        first = current = analysis_of(model, context)
        trail = Trail()
        units: Removed = {}
        warnings: list[str] = []
        try:
            while dead := _dead(model, current, context):
                removed = _absorbed(model, current, dead, context)
                units = also(units, match(first, trail.cut(current, dead.removed)).removed)
                cut(model, *removed)
                current = analyzed(model, context)
        except EnvironmentFault:
            raise
        except _DoesNotRun as error:
            warnings.append(f"nothing can be shown about a model that does not run: {error}")
        told = removals(first, units)
        count = sum(len(one.units) for one in told)
        for warning in warnings:
            _log.warning("%s: %s", self.name, warning)
        return Change(
            pass_name=self.name,
            summary=_summary(count, len(told)),
            removed=told,
            exact=True,
            got=shares(first, units) if units else {},
            warnings=tuple(warnings),
        )


def _summary(units: int, groups: int) -> str:
    if not units:
        return "no dead channels"
    nouns = "unit" if units == 1 else "units", "group" if groups == 1 else "groups"
    return f"{units:,} {nouns[0]} of {groups} {nouns[1]} that made no difference removed"


class _DoesNotRun(Exception):
    """ONNX Runtime refuses the model or the inputs."""


@dataclass(frozen=True)
class _Dead:
    """Units that can go once `absorbs` is done: node -> values on the axis it sums over."""

    removed: Removed
    absorbs: tuple[tuple[gs.Node, NDArray[np.float64]], ...]

    def __bool__(self) -> bool:
        return bool(self.removed)


def _dead(model: Model, analysis: Analysis, context: Context) -> _Dead:
    """What can go now. Most models have no zero slab at all, and nothing is run for them."""
    candidates = _candidates(model, analysis)
    if not candidates:
        return _Dead({}, ())
    groups = [group for group in analysis.groups if group.id in candidates]
    known = ConstantChannels(model.graph, groups, lambda names: _runs(model, context, names))
    readers = _readers(model.graph)
    removed: Removed = {}
    for group in groups:
        alive = ~candidates[group.id]
        for member in group.members:
            for node, number in () if member.is_parameter else readers.get(member.tensor, ()):
                fine = _fine(node, number, member.axis, member.occurrences[0].size, known)
                outputs = {tensor.name for tensor in node.outputs}
                shown = _units_on(group, outputs)
                for units in member.occurrences:
                    inside = units >= 0
                    free = shown if follows(node, number, member.axis, known.constants) else np.zeros_like(shown)
                    if node.op in MOVERS and number == 0:
                        free = np.ones_like(shown)  # what it leaves out, nobody reads
                    bad = inside & ~fine
                    alive[units[bad][~free[units[bad]]]] = True
        dead = np.flatnonzero(~alive)
        dead = np.setdiff1d(dead, last_of_their_kind(group, dead.tolist()))
        if dead.size:
            removed[group.id] = dead
    return _Dead(removed, _absorbs(model.graph, analysis, removed, known))


def _candidates(model: Model, analysis: Analysis) -> dict[int, NDArray[np.bool_]]:
    """Units with a parameter slab of nothing but zeros."""
    constants = holders(model.graph)
    out: dict[int, NDArray[np.bool_]] = {}
    zeros: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in analysis.groups:
        found = np.zeros(group.size, np.bool_)
        for member in group.parameters:
            key = (member.tensor, member.axis)
            if key not in zeros:
                values = array(constants[member.tensor])
                others = tuple(axis for axis in range(values.ndim) if axis != member.axis)
                zeros[key] = ~(values != 0).any(axis=others)
            for units in member.occurrences:
                live = np.zeros(group.size, np.bool_)
                live[units[(units >= 0) & ~zeros[key]]] = True
                here = np.zeros(group.size, np.bool_)
                here[units[units >= 0]] = True
                found |= here & ~live
        if found.any():
            out[group.id] = found
    return out


def _runs(model: Model, context: Context, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The named tensors for two inputs."""
    try:
        given = {n: a.shape for n, a in context.feeds[0].items()} if context.feeds else default_shapes(model)
        feeds: list[Feeds] = [example_feeds(model, given, np.random.default_rng(seed)) for seed in range(2)]
        known = {tensor.name for node in model.graph.nodes for tensor in node.outputs}
        outputs = {value.name for value in model.signature.outputs}
        session = open_model(model, outputs=[name for name in names if name in known and name not in outputs])
        return [{**feed, **run(session, feed)} for feed in feeds]
    except EnvironmentFault:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common root
        raise _DoesNotRun(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _readers(graph: gs.Graph) -> dict[str, list[tuple[gs.Node, int]]]:
    out: dict[str, list[tuple[gs.Node, int]]] = {}
    for node in graph.nodes:
        for number, tensor in enumerate(node.inputs):
            if tensor.name and node.op not in _SIZES:
                out.setdefault(tensor.name, []).append((node, number))
    return out


def _fine(node: gs.Node, number: int, axis: int, size: int, known: ConstantChannels) -> NDArray[np.bool_]:
    """For each index that a node reads: it is zero, meets zero weights, or can go into the bias."""
    value = known.of(node.inputs[number].name, axis, size)
    fine: NDArray[np.bool_] = value == 0
    place = input_axis(node, known.constants) if number == 0 else None
    if place is not None and place[1] == axis:
        weights = known.zero_slabs(node.inputs[1].name, place[0])
        fine = fine | weights if weights.size == size else fine
        if takes(node, known.constants):
            fine = fine | ~np.isnan(value)
    return fine


def _units_on(group: Any, tensors: set[str]) -> NDArray[np.bool_]:
    """Which units of the group show in the named tensors."""
    shown = np.zeros(group.size, np.bool_)
    for member in group.members:
        if member.tensor in tensors:
            for units in member.occurrences:
                shown[units[units >= 0]] = True
    return shown


def _absorbs(
    graph: gs.Graph, analysis: Analysis, removed: Removed, known: ConstantChannels
) -> tuple[tuple[gs.Node, NDArray[np.float64]], ...]:
    """What must go into biases, by node."""
    gone = slabs(analysis, removed)
    out = []
    for node in graph.nodes:
        place = input_axis(node, known.constants)
        if place is None or (node.inputs[0].name, place[1]) not in gone:
            continue
        mask = gone[node.inputs[0].name, place[1]]
        value = known.of(node.inputs[0].name, place[1], mask.size)
        unread = known.zero_slabs(node.inputs[1].name, place[0])
        share = np.where(mask & ~unread & ~np.isnan(value), value, 0.0)
        if share.any():
            out.append((node, share))
    return tuple(out)


def _absorbed(model: Model, analysis: Analysis, dead: _Dead, context: Context) -> tuple[Analysis, Removed]:
    """Does what must be done before the cut; an Add that had to be put in makes the analysis a new one."""
    if not dead.absorbs:
        return analysis, dead.removed
    constants = {name: array(holder) for name, holder in holders(model.graph).items()}
    for node, values in dead.absorbs:
        absorb(model.graph, node, values, constants)
    after = analyzed(model, context)
    return after, match(after, slabs(analysis, dead.removed)).removed
