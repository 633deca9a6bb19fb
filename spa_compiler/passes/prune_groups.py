"""`prune-groups`: coupled channels, heads and the like are cut out where they matter least, to a budget."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
from msgspec import Meta

from spa_compiler.analysis import Analysis, Group
from spa_compiler.analysis.count import Counter
from spa_compiler.analysis.cut import removed_slabs
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.passes import budget, masks
from spa_compiler.passes.budget import Removed
from spa_compiler.passes.contestants import select
from spa_compiler.passes.cutting import analysis_of, analyzed, cut, shares, what_holds_the_rest
from spa_compiler.passes.importance import Criterion, Importance
from spa_compiler.passes.matching import held_back, match, slabs
from spa_compiler.passes.pass_ import Change, Context, Removal, check_options
from spa_compiler.passes.sites import Ignore
from spa_compiler.targets import Target

_log = logging.getLogger(__name__)

_BUDGETS = ("channels", "macs", "params")
_WORDS = {"channels": "units", "macs": "MACs", "params": "parameters"}
_SHOWN = 3
"""Masked axes that a warning names."""
_MET = 1e-6
"""Shares that differ by less are equal: they are quotients of integers."""
_WIDE = frozenset({"x86-64-v4"})
_WIDE_LANES, _LANES = 16, 8
"""Channels that one vector of float32 holds (AVX-512, AVX2)."""
_TILES = ((64, 0), (32, 0), (1, 8))
"""On GPUs: whole tiles of tensor cores, 64 channels, or 16 of narrow layers; then halves of those; then what their
instructions take at all, multiples of 8."""

_KEPT = "norms over pruned axes count what is left alone, which no masked model does"

_Share: TypeAlias = Annotated[float, Meta(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class PruneGroupsOptions:
    """Options of `prune-groups`."""

    channels: Annotated[
        _Share | None, Meta(description="share of the units that remains, of the groups that are taken")
    ] = None
    macs: Annotated[
        _Share | None, Meta(description="share of the multiply-accumulates that remains, of the whole model")
    ] = None
    params: Annotated[_Share | None, Meta(description="share of the parameters that remains, of the whole model")] = (
        None
    )
    masks: Annotated[
        str | None,
        Meta(
            description="an .npz that says what goes, instead of a budget: `NAME` an array like the parameter, or "
            "`NAME:axis` a vector over that axis, 0 where it goes"
        ),
    ] = None
    criterion: Annotated[
        Literal["auto", "l2", "l1", "random"],
        Meta(description="what goes first: the smallest squares (`l2`, which is `auto`), absolute values, or any"),
    ] = "auto"
    scope: Annotated[
        Literal["global", "group"],
        Meta(description="`global`: units of all groups compete; `group`: every group keeps the same share"),
    ] = "global"
    granularity: Annotated[
        tuple[str, ...], Meta(description="what units must be: `channel`, `head`, ...; empty takes all")
    ] = ()
    round_to: Annotated[
        int,
        Meta(
            ge=0,
            description="kept counts are multiples of it; 0: of what the target's kernels like (whole vectors of "
            "channels, on GPUs 64, 16 or 8, or less where the budget cannot be met so; heads as they come)",
        ),
    ] = 0
    min_keep: Annotated[
        float,
        Meta(ge=0, description="what every axis keeps at least: below 1 a share, else a number; always one"),
    ] = 0.1
    statistics: Annotated[
        Literal["masked", "kept"],
        Meta(
            description="what norms over a pruned axis count: `masked` the whole axis, removed channels as zeros "
            "(exact); `kept` what is left alone: faster, but another model, and never verified"
        ),
    ] = "masked"
    steps: Annotated[
        int, Meta(ge=1, le=1000, description="in how many steps: after each, what is left is scored again")
    ] = 1
    targets: Annotated[
        tuple[str, ...],
        Meta(
            description="what to take: names or globs of tensors (all groups on their axes) or nodes (the groups on "
            "their outputs), or a granularity; empty takes all"
        ),
    ] = ()
    ignore: Ignore = ()


class PruneGroups:
    """x -> Conv(W1 [64, 3, k, k]) -> Relu -> Conv(W2 [10, 64, k, k]) -> y
    becomes    x -> Conv(W1[K] [48, 3, k, k]) -> Relu -> Conv(W2[:, K] [10, 48, k, k]) -> y

    Cuts units out of groups of coupled channels (`spa-analyze` shows them): channels, attention heads, head dimensions,
    hidden units, with all that names their sizes. Say what remains (`channels`, `macs` or `params`), or give the masks
    that a trainer decided on. The cut model computes exactly what the model does with the removed activations set to
    zero wherever they are read; that is checked, and report.json says what was removed.

    A unit is worth the criterion's score of all its weights (of everything that writes and reads it) over the number of
    parameters that go with it, divided by the mean of its group, which makes groups comparable. The units of least
    worth go until the budget is met, never keeping more than asked unless it cannot be met: then a warning names what
    holds the rest. Ties go by position, so the result is always the same for a seed.
    """

    name: ClassVar[str] = "prune-groups"
    Options: ClassVar[type[Any]] = PruneGroupsOptions

    def __init__(self, options: PruneGroupsOptions) -> None:
        """Raises UsageError unless exactly one of `channels`, `macs`, `params` and `masks` is given."""
        check_options(options)
        given = [name for name in (*_BUDGETS, "masks") if getattr(options, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"{' and '.join(given)} contradict each other" if given else "it is not said what should remain",
                where=self.name,
                fix="Give one of channels, macs, params (the share that remains) and masks",
            )
        self.options, self.goal = options, given[0]

    def run(self, model: Model, context: Context) -> Change:
        """Cuts `model` in place.

        Raises:
            UsageError: a name matches nothing, or the masks do not fit the model.
            ModelError: a weight has a NaN or an infinity, or nothing can be removed.
        """
        analysis = analysis_of(model, context)
        groups = select(analysis, model.graph, self.options.targets, self.options.ignore, self.options.granularity)
        if self.goal == "masks":
            removed, warnings = self._masked(model, analysis, groups, context)
        else:
            removed, warnings = self._to_budget(model, analysis, groups, context)
        got = shares(analysis, removed)
        told = cut(model, analysis, removed, self.options.statistics)
        return Change(
            pass_name=self.name,
            summary=self._summary(told, got),
            removed=told,
            unlike=_KEPT if self.options.statistics == "kept" else "",
            asked={} if self.goal == "masks" else {self.goal: getattr(self.options, self.goal)},
            got=got,
            warnings=tuple(warnings),
        )

    def _to_budget(
        self, model: Model, analysis: Analysis, groups: Sequence[Group], context: Context
    ) -> tuple[Removed, list[str]]:
        options = self.options
        asked = float(getattr(options, self.goal))
        cost = self._cost(analysis, groups)
        criterion: Criterion = "l2" if options.criterion == "auto" else options.criterion
        importance = Importance(model, criterion, context.rng)
        removed: Removed = {}
        for step in range(options.steps):
            context.progress(self.name, step, options.steps)
            gone = removed_slabs(analysis, removed)[0] if removed else {}
            worth = [importance.worth(group, gone, removed.get(group.id, ())) for group in groups]
            share = 1 - (1 - asked) * (step + 1) / options.steps
            before = removed
            for lanes, round_to in self._roundings(context.target, last=step + 1 == options.steps):
                fields = [
                    budget.field(
                        group,
                        budget.ranks(own) if options.scope == "group" else own,
                        least=options.min_keep,
                        lanes=lanes,
                        round_to=round_to,
                    )
                    for group, own in zip(groups, worth, strict=True)
                ]
                removed = budget.choose(fields, share, cost, before)
                if cost(removed) <= share + _MET:
                    break
        context.progress(self.name, options.steps, options.steps)
        return removed, self._shortfall(analysis, asked, cost(removed))

    def _roundings(self, target: Target, *, last: bool) -> list[tuple[int, int]]:
        """`lanes` and `round_to` to try, the first that meets the budget counts; before the last step any will do."""
        if self.options.round_to or not last:
            return [(1, self.options.round_to if last else 1)]
        if target.kind == "cuda":
            return [*_TILES, (1, 1)]
        lanes = _lanes(target)
        return [(lanes, 0), (lanes // 4, 0), (1, 1)]

    def _cost(self, analysis: Analysis, groups: Sequence[Group]) -> budget.Cost:
        """What remains, as the option counts it."""
        if self.goal == "channels":
            units = sum(group.size for group in groups)
            return lambda removed: 1 - sum(map(len, removed.values())) / max(1, units)
        counter = Counter(analysis)
        params, macs = counter.kept({})
        if self.goal == "params":
            return lambda removed: counter.kept(removed)[0] / max(1, params)
        if macs is None:
            raise UsageError(
                "the multiply-accumulates of the model are not known, they hang on sizes that the file leaves open",
                where=self.name,
                fix="Ask for a share of the parameters (params=...), or export the model with fixed sizes",
            )
        return lambda removed: (counter.kept(removed)[1] or 0) / max(1, macs)

    def _shortfall(self, analysis: Analysis, asked: float, got: float) -> list[str]:
        if got <= asked + _MET:
            return []
        limits = [f"min_keep={self.options.min_keep:g}"]
        limits += [f"round_to={self.options.round_to}"] if self.options.round_to > 1 else []
        limits += [name for name in ("targets", "ignore", "granularity") if getattr(self.options, name)]
        reasons = (
            f"more is not possible with {', '.join(limits)}" if analysis.groups else "nothing in it can be removed"
        )
        pins = what_holds_the_rest(analysis)
        return [
            f"asked to keep {asked:.1%} of the {_WORDS[self.goal]}, kept {got:.1%}: {reasons}"
            f"{f'; {pins}' if pins else ''}"
        ]

    def _masked(
        self, model: Model, analysis: Analysis, groups: Sequence[Group], context: Context
    ) -> tuple[Removed, list[str]]:
        """What the masks say, through the model as it was loaded: canonicalization may have folded parameters away."""
        warnings = []
        source = model if context.original is None else context.original
        told = analysis if source is model else analyzed(source, context)
        asked = masks.read(Path(str(self.options.masks)), source)
        found, pinned = match(told, asked), held_back(told, asked)
        partly, removed = found.partly, found.removed
        if source is not model:
            wanted = sum(map(len, removed.values()))
            removed = match(analysis, slabs(told, removed)).removed
            if sum(map(len, removed.values())) < wanted:
                _log.info("%s: some units of the file are one unit now", self.name)
        if partly:
            warnings.append(
                f"{partly} units are masked in part only and stay: all of a unit's slabs in the given arrays must be "
                "masked (spa-analyze --json lists them; NAME:axis speaks of one axis alone)"
            )
        taken = {group.id: group for group in groups}
        removed = {group: units for group, units in removed.items() if group in taken}
        back = 0
        for group, units in removed.items():
            kept_again = budget.last_of_their_kind(taken[group], units)
            removed[group] = np.setdiff1d(units, kept_again)
            back += len(kept_again)
        if back:
            warnings.append(f"{back} masked units stay, as every axis must keep one")
        if pinned:
            more = f" and {len(pinned) - _SHOWN} more" if len(pinned) > _SHOWN else ""
            warnings.append(f"masked, but pinned: {', '.join(pinned[:_SHOWN])}{more}")
        elif not removed and not partly:
            warnings.append("the masks keep everything")
        return {group: units for group, units in removed.items() if units.size}, warnings

    def _summary(self, told: Sequence[Removal], got: dict[str, float]) -> str:
        if not told:
            return "nothing removed"
        shares_ = " and ".join(f"{got[name]:.1%} of the {_WORDS[name]}" for name in ("macs", "params") if name in got)
        asked = (
            ""
            if self.goal == "masks"
            else f" (asked: {getattr(self.options, self.goal):.1%} of the {_WORDS[self.goal]})"
        )
        units = sum(len(one.units) for one in told)
        how = (
            "masks"
            if self.goal == "masks"
            else f"{self.options.criterion.replace('auto', 'l2')}, scope {self.options.scope}"
        )
        groups = "1 group" if len(told) == 1 else f"{len(told)} groups"
        return f"{shares_} remain{asked}; {units:,} units of {groups} removed ({how})"


def _lanes(target: Target) -> int:
    """Channels that a CPU's kernels take at a time."""
    return _LANES if _WIDE.isdisjoint(target.archs) else _WIDE_LANES
