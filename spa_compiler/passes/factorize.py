"""`factorize`: weights become products of thin ones, where that keeps the outputs with fewer parameters."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from spa_compiler import patterns
from spa_compiler.calibration.samples import Samples
from spa_compiler.errors import UsageError
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.bias import bias_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes import arrays, chains, shares
from spa_compiler.passes.factorize_options import (
    BUDGETS,
    FactorizeOptions,
    check_sparse,
    goal_of,
    method_name,
    multiple_of,
)
from spa_compiler.passes.layerwise import Job, Outcome, Result, Solve, leaders, rewrite
from spa_compiler.passes.low_rank import ByLoss, ByRank, Method, Site, SparseLowRank, clusters, numbers, site_of
from spa_compiler.passes.outcomes import DENSE, check_finite, density, scarce
from spa_compiler.passes.pass_ import Change, Context, SiteChange, SkippedSite, check_options
from spa_compiler.passes.rank_budget import Allocation, Planner, Price, Unit, prices, without_data
from spa_compiler.passes.sites import select
from spa_compiler.patterns import Pattern
from spa_compiler.solvers.problem import F64
from spa_compiler.solvers.svd import Factors
from spa_compiler.targets import Target

__all__ = ["Factorize", "FactorizeOptions"]

_log = logging.getLogger(__name__)

_MIN_KEEP = 0.2
"""Of `sparse-low-rank`: what every weight keeps at least, as a share of the budget."""

_MET = 1e-6
_DENSE = "stays dense: no rank that saves 10 % is worth it"


_WORDS = {"params": "parameters", "macs": "multiply-accumulates"}


class Factorize:
    """y = W x    becomes    y = up (down x)        MatMul, Gemm and Conv; down [r, k], up [n, r]
                  or         y = last (core (first x))                     k x k Conv (Tucker-2)
                  or         y = S x + up (down x)                         sparse + low rank

    Takes weights apart into factors with fewer parameters together. With calibration data, layers are solved in the
    order of the graph, each from what it reads once those before it are rewritten, so that it makes up for what they
    lost, and biases take up the shift of the means; weights that stay dense do so, too. Without, the weights themselves
    are what is kept.

    A weight whose rank would save less than 10 % stays dense. Beside what `sparsify` leaves alone, so do convolutions
    in groups.
    """

    name: ClassVar[str] = "factorize"
    Options: ClassVar[type[Any]] = FactorizeOptions

    def __init__(self, options: FactorizeOptions) -> None:
        """Raises UsageError for options that are out of bounds, contradict each other, or lack a part."""
        check_options(options)
        self.options = options
        self.pattern = patterns.parse(options.pattern)
        self.goal = goal_of(options)
        self.value = float(getattr(options, self.goal))
        self.method = method_name(options, self.goal)
        if self.method == "sparse-low-rank":
            check_sparse(options, self.goal, self.pattern.sparsity)

    def run(self, model: Model, context: Context) -> Change:
        """Takes weights of `model` apart.

        Raises:
            UsageError: an entry of `targets` matches nothing, the method needs samples and there are none, or a file of
                scores does not fit.
            ModelError: a weight that is taken has a NaN or an infinity.
        """
        ops, skipped = select(model.graph, self.options.targets, self.options.ignore)
        skipped += [SkippedSite(op.name, "convolution in groups") for op in ops if op.group > 1]
        ops = [op for op in ops if op.group == 1]
        if self.goal != "macs":
            ops, needed = _free(ops, model)
            skipped += needed
        for op in ops:
            check_finite(op)
        samples = context.calibration
        method, allocation = self._resolved(samples), self._allocation(samples)
        sites = [
            site_of(op, method, samples is not None, bias_of(op, model.graph) is not None, scores)
            for op, scores in zip(ops, self._scores(ops), strict=True)
        ]
        together = clusters(sites, self.options.joint)
        solve = self._solver(model, sites, together, allocation, context)
        if solve is None:
            outcomes = [Outcome(Result(site.op.rows(), 0.0), None, None, 0.0) for site in sites]
        elif samples is None:
            outcomes = _without_data(sites, together, solve, context)
        else:
            number_of = numbers(sites, together)
            outcomes = rewrite(
                model,
                ops,
                samples,
                solve,
                together=number_of.__getitem__,
                threads=context.workers,
                progress=context.progress,
                seed=int(context.rng.integers(1 << 62)),
            )
        unit: Unit = "macs" if self.goal == "macs" else "params"
        got = _kept(sites, outcomes, prices(unit, model, ops, context))
        changes, dense = _told(sites, outcomes)
        _put(model, sites, outcomes)
        if not changes:
            _log.warning("%s took no weight apart", self.name)
        budget = self.goal in BUDGETS
        return Change(
            pass_name=self.name,
            summary=self._summary(changes, len(ops), unit, got, allocation if budget else self.goal),
            sites=tuple(changes),
            skipped=(*skipped, *dense),
            zeros_alone=not changes,
            asked={self.goal: self.value} if budget else {},
            got={unit: got},
            warnings=(*self._missed(got, context.target), *scarce(ops, outcomes)),
        )

    def _resolved(self, samples: Samples | None) -> Method:
        """The method without `auto`."""
        if self.method == "auto":
            if samples is None:
                return "svd"
            return "whitened" if self.options.allocate == "welore" else "tucker"
        if samples is None and (self.method == "whitened" or (self.method == "fwsvd" and not self.options.scores)):
            raise UsageError(
                f"the method {self.method} works from calibration samples, and there are none",
                where="method",
                fix="Give them with --calib DATA (or --calib synthetic), or take method=svd",
            )
        return self.method

    def _allocation(self, samples: Samples | None) -> Allocation:
        name = self.options.allocate
        if name == "auto":
            return "uniform" if samples is None else "error"
        if name == "error" and samples is None:
            raise UsageError(
                "allocate=error measures the model on samples",
                where="allocate",
                fix="Give them with --calib, or take allocate=welore, which looks at the weights alone",
            )
        return name

    def _scores(self, ops: Sequence[WeightedOp]) -> list[F64 | None]:
        """Fisher information of each site, `[n, k]`."""
        path = self.options.scores
        if path is None:
            return [None for _ in ops]
        found = arrays.for_weights(Path(path), "scores", ops)
        for place, op in enumerate(ops):
            if place not in found:
                raise UsageError(
                    f"no scores for {op.weight.name!r}",
                    where=path,
                    fix="Add them, or leave the weight alone with `targets` or `ignore`",
                )
            if (found[place] < 0).any():
                raise UsageError(
                    f"{op.weight.name!r} has negative scores", where=path, fix="Give means of squared gradients"
                )
        return [np.asarray(found[place], np.float64) for place in range(len(ops))]

    def _solver(
        self,
        model: Model,
        sites: Sequence[Site],
        together: Sequence[tuple[int, ...]],
        allocation: Allocation,
        context: Context,
    ) -> Solve | None:
        """What takes each weight apart, with all ranks chosen; None where every weight stays dense."""
        options, data = self.options, context.calibration is not None
        multiple = multiple_of(options, context.target)
        if not sites:
            return None
        if self.method == "sparse-low-rank":
            pattern_of = [self.pattern.on(site.op.kernel_size) for site in sites]
            first = [cluster[0] for cluster in together]  # each weight once
            keep = self._densities(
                model, [sites[s].op for s in first], [pattern_of[s] for s in first], allocation, context
            )
            keep = keep[numbers(sites, together)]
            return SparseLowRank(sites, keep, pattern_of, options.rank, multiple, data).solve
        if self.goal not in BUDGETS:
            loss = 1 - self.value if self.goal == "energy" else self.value**2
            return ByLoss(sites, loss, multiple).solve
        price_of = prices("macs" if self.goal == "macs" else "params", model, [site.op for site in sites], context)
        planner = Planner(model, sites, together, price_of, self.value, multiple, context)
        choices = planner.choose(allocation)
        return ByRank(sites, choices).solve if any(choices) else None

    def _densities(
        self,
        model: Model,
        ops: Sequence[WeightedOp],
        pattern_of: Sequence[Pattern],
        allocation: Allocation,
        context: Context,
    ) -> F64:
        """Share of its parameters that each weight keeps, `[L]`: as if it were sparse alone."""
        if self.pattern.sparsity is not None:
            return np.full(len(ops), self.value)
        request = shares.Request(
            model,
            ops,
            pattern_of,
            1 - self.value,
            _MIN_KEEP,
            context.rng,
            context.calibration,
            context.workers,
            context.progress,
        )
        return np.asarray(1 - shares.allocate("error" if allocation == "error" else "uniform", request))

    def _missed(self, got: float, target: Target) -> tuple[str, ...]:
        """A warning where the budget was not met."""
        if self.goal not in BUDGETS or got <= self.value + _MET:
            return ()
        return (
            f"asked to keep {self.value:.1%} of the {_WORDS[self.goal]}, kept {got:.1%}: ranks are multiples of "
            f"{multiple_of(self.options, target)}, "
            f"and where the smallest of them saves too little a weight stays dense",
        )

    def _summary(self, changes: Sequence[SiteChange], taken: int, unit: Unit, got: float, allocation: str) -> str:
        apart = sum(change.pattern != DENSE for change in changes)
        if not apart:
            return "no weight taken apart"
        joint = ", joint" if self.options.joint else ""
        how = ", ".join(sorted({change.method for change in changes if change.pattern != DENSE}))
        return (
            f"{apart} of {taken} weights taken apart, {got:.1%} of their {_WORDS[unit]} kept "
            f"({how}, {allocation} shares{joint})"
        )


def _free(ops: Sequence[WeightedOp], model: Model) -> tuple[list[WeightedOp], list[SkippedSite]]:
    """Operators whose weight is in nobody's way when it goes, and the others."""
    outputs = {id(tensor) for tensor in model.graph.outputs}
    first = leaders(ops)
    alike: dict[int, set[int]] = {}
    for op, leader in zip(ops, first, strict=True):
        alike.setdefault(leader, set()).add(id(op.node))
    free, needed = [], []
    for op, leader in zip(ops, first, strict=True):
        if id(op.weight) in outputs or any(id(node) not in alike[leader] for node in op.weight.outputs):
            needed.append(SkippedSite(op.name, "its weight is read elsewhere, too, and would have to stay"))
        else:
            free.append(op)
    return free, needed


def _without_data(
    sites: Sequence[Site], together: Sequence[tuple[int, ...]], solve: Solve, context: Context
) -> list[Outcome]:
    """Every weight by itself, or with those that share a `down`. The error is that of the weights."""

    def work(cluster: tuple[int, ...]) -> tuple[Sequence[Result], float]:
        start = time.perf_counter()
        problems = [without_data(sites[site].op) for site in cluster]
        jobs = [
            Job(site, sites[site].op, (problem,), (problem.weight,))
            for site, problem in zip(cluster, problems, strict=True)
        ]
        return solve(jobs), (time.perf_counter() - start) / len(jobs)

    with threadpool_limits(1, "blas"):
        solved = joblib.Parallel(n_jobs=context.workers, prefer="threads")(
            joblib.delayed(work)(cluster) for cluster in together
        )
    found = {
        site: (result, seconds)
        for cluster, (several, seconds) in zip(together, solved, strict=True)
        for site, result in zip(cluster, several, strict=True)
    }
    outcomes = []
    for site, leader in enumerate(leaders([site.op for site in sites])):
        result, seconds = found[leader]
        outcomes.append(Outcome(result, None, None, seconds if leader == site else 0.0))
    return outcomes


def _down_parts(sites: Sequence[Site], outcomes: Sequence[Outcome]) -> list[float]:
    """The share of its `down` that each site pays for: by outputs, among the weights that share it."""
    outputs: dict[int, dict[int, int]] = {}
    for site, outcome in zip(sites, outcomes, strict=True):
        form = outcome.result.form
        if isinstance(form, Factors):
            outputs.setdefault(id(form.down), {})[id(form.up)] = site.op.n
    return [
        site.op.n / sum(outputs[id(form.down)].values()) if isinstance(form := outcome.result.form, Factors) else 1.0
        for site, outcome in zip(sites, outcomes, strict=True)
    ]


def _kept(sites: Sequence[Site], outcomes: Sequence[Outcome], price_of: Sequence[Price]) -> float:
    """What is left of what the weights cost."""
    kept = whole = 0.0
    parts = _down_parts(sites, outcomes)
    for site, outcome, price, part in zip(sites, outcomes, price_of, parts, strict=True):
        dense = site.op.n * site.op.k * price.outside
        whole += dense
        kept += dense if outcome.result.form is None else price.of(outcome.result.form, part)
    return kept / whole if whole else 1.0


def _told(sites: Sequence[Site], outcomes: Sequence[Outcome]) -> tuple[list[SiteChange], list[SkippedSite]]:
    """What each weight became, and those that are what they were."""
    changes, dense = [], []
    parts = _down_parts(sites, outcomes)
    for site, outcome, part in zip(sites, outcomes, parts, strict=True):
        op, form = site.op, outcome.result.form
        if form is None and np.array_equal(op.rows(), outcome.result.rows):
            dense.append(SkippedSite(op.name, _DENSE))
            continue
        held = density(outcome.result.rows) if form is None else Price(1.0, 1.0).of(form, part) / (op.n * op.k)
        changes.append(
            SiteChange(
                node=op.name,
                op=op.kind,
                weight=op.weight.name,
                pattern=DENSE if form is None else chains.label(form),
                n=op.n,
                k=op.k,
                density_before=density(op.rows()),
                density_after=held,
                error=outcome.result.error,
                method=site.method,
                seconds=outcome.seconds,
            )
        )
    return changes, dense


def _put(model: Model, sites: Sequence[Site], outcomes: Sequence[Outcome]) -> None:
    """Writes the outcomes into the model."""
    for site, outcome, leader in zip(sites, outcomes, leaders([site.op for site in sites]), strict=True):
        if outcome.bias is not None and outcome.values is not None:
            outcome.bias.replace(outcome.values)
        if outcome.result.form is not None:
            continue
        if sites[leader] is not site:
            site.op.node.inputs[1] = sites[leader].op.weight
        elif not np.array_equal(site.op.rows(), outcome.result.rows):
            site.op.replace(outcome.result.rows)
    chains.write(model, [site.op for site in sites], [outcome.result.form for outcome in outcomes])
    graph_shapes.infer(model)
