"""`permute-outputs`: outputs change places, so that zeros fall into blocks more easily; the model computes the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from spa_compiler import patterns
from spa_compiler.analysis.groups import Group
from spa_compiler.calibration.stream import as_it_is
from spa_compiler.errors import UsageError
from spa_compiler.graph.fold import lift_constants
from spa_compiler.graph.model import Model, constants
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.weights import array_of
from spa_compiler.passes.cutting import analysis_of
from spa_compiler.passes.pass_ import Change, Context, SkippedSite, check_options
from spa_compiler.passes.sites import Ignore, Targets, select
from spa_compiler.solvers.problem import F64
from spa_compiler.solvers.row_order import row_order

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PermuteOutputsOptions:
    """Options of `permute-outputs`."""

    pattern: Annotated[str, Meta(description="the pattern that comes after: `block:RxC` with R of 2 or more")] = (
        "block:4x1"
    )
    sparsity: Annotated[float, Meta(gt=0, lt=1, description="the share of zeros that comes after")] = 0.5
    targets: Targets = ()
    ignore: Ignore = ()


class PermuteOutputs:
    """x -> MatMul(W1) -> Add(b1) -> Relu -> MatMul(W2) -> y
    becomes    x -> MatMul(W1[:, P]) -> Add(b1[P]) -> Relu -> MatMul(W2[P]) -> y        P = a permutation

    Outputs that need the same inputs come to lie side by side, so that blocks of R outputs keep more of what matters:
    put it before `sparsify` with that pattern. An element matters by its square times the mean square of its input,
    where there is calibration data, else by its square. Nothing but rounding changes what the model computes, and every
    run compares.

    A group of coupled channels is permuted where it is the whole of every axis that it touches: hidden units, channels
    inside of residual blocks. Heads, concatenations and shuffles, which cut an axis in parts, keep their order, and so
    does what is pinned.
    """

    name: ClassVar[str] = "permute-outputs"
    Options: ClassVar[type[Any]] = PermuteOutputsOptions

    def __init__(self, options: PermuteOutputsOptions) -> None:
        """Raises UsageError for options that are out of bounds, or a pattern whose blocks are one output high."""
        check_options(options)
        self.options = options
        pattern = patterns.parse(options.pattern)
        self.rows = pattern.rows
        if not options.pattern.startswith("block:") or self.rows == 1:
            raise UsageError(
                f"the order of outputs makes no difference to the pattern {pattern.name}",
                where="pattern",
                fix="Take blocks of 2 outputs or more, such as block:4x1",
            )

    def run(self, model: Model, context: Context) -> Change:
        """Permutes constants of `model`; arrays are replaced, never written to.

        Raises:
            UsageError: an entry of `targets` matches nothing.
        """
        analysis = analysis_of(model, context)
        ops, skipped = select(model.graph, self.options.targets, self.options.ignore)
        writers = {group.id: _writers(group, ops) for group in analysis.groups if _is_whole(group)}
        writers = {group: sites for group, sites in writers.items() if sites}
        inside = {site for sites in writers.values() for site in sites}
        skipped += [
            SkippedSite(op.name, "its outputs are in no group that can change places as a whole")
            for site, op in enumerate(ops)
            if site not in inside
        ]
        energies = _energies(model, ops, context) if writers else {}
        lift_constants(model.graph)
        values = {tensor.name: tensor for tensor in constants(model.graph)}
        moved = 0
        for done, (number, sites) in enumerate(writers.items()):
            context.progress(self.name, done, len(writers))
            start = time.perf_counter()
            order = row_order(_scores([ops[site] for site in sites], energies, sites), self.rows, self.options.sparsity)
            if np.array_equal(order, np.arange(len(order))):
                continue
            moved += 1
            for member in analysis.groups[number].parameters:
                tensor = values[member.tensor]
                tensor.values = np.ascontiguousarray(np.take(array_of(tensor), order, member.axis))
            _log.info("%s: group %d, %.1f s", self.name, number, time.perf_counter() - start)
        context.progress(self.name, len(writers), len(writers))
        return Change(
            pass_name=self.name,
            summary=f"outputs changed places in {moved} of {len(analysis.groups)} groups of coupled channels",
            skipped=tuple(skipped),
            exact=True,
        )


def _is_whole(group: Group) -> bool:
    """Whether unit i is index i of every axis that the group touches, so that they may change places."""
    units = np.arange(group.size)
    return all(
        len(member.occurrences) == 1 and np.array_equal(member.occurrences[0], units) for member in group.members
    )


def _writers(group: Group, ops: Sequence[WeightedOp]) -> list[int]:
    """The sites whose outputs are the units."""
    axes = {(member.tensor, member.axis) for member in group.parameters}
    return [site for site, op in enumerate(ops) if (op.weight.name, 1 if op.transposed else 0) in axes]


def _energies(model: Model, ops: Sequence[WeightedOp], context: Context) -> Mapping[int, F64]:
    """Of each site the mean square of its inputs, `[groups, k]`."""
    if context.calibration is None:
        return {site: np.ones((op.group, op.k)) for site, op in enumerate(ops)}
    each = as_it_is(model, ops, context.calibration, threads=context.workers, progress=context.progress)
    return {collected.site: np.diagonal(collected.fit.get("gram"), axis1=1, axis2=2) for collected in each}


def _scores(ops: Sequence[WeightedOp], energies: Mapping[int, F64], sites: Sequence[int]) -> F64:
    """What each element is worth, `[n, sum of k]`: relative to its layer, so that all layers have a say."""
    parts = []
    for op, site in zip(ops, sites, strict=True):
        each = np.repeat(energies[site], op.n // op.group, axis=0)
        part = np.square(np.asarray(op.rows(), np.float64)) * each
        whole = float(part.sum())
        parts.append(part / whole if whole > 0 else part)
    return np.concatenate(parts, axis=1)
