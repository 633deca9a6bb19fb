"""Layer after layer: every site is solved from what it reads once the sites before it are rewritten.

A site's result should come near what it was before anything was rewritten, y = W0 z + b0, though what it reads now is
x, not z; and where it is added to a residual stream, near enough to make up for what that stream has lost, d:

    minimize over W, b      E | W0 z + b0 + d - W x - b |^2

With all moments centred where there is a bias to take up the means, the best weight without a pattern is

    W1 = W0 + ((G + lam I)^-1 (C - G) W0^T + (G + lam I)^-1 E[x d^T])^T,      G = E[x x^T],  C = E[x z^T]

(ridge towards W0), and the solvers come near W1 in the metric of G: a quadratic's level sets have one centre. This is
SparseGPT's sequential order with the target of asymmetric calibration (Li et al., "GPTAQ", 2025) and the residual
stream as in K-prune (Park et al., 2024).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import joblib
import numpy as np
import onnx_graphsurgeon as gs
import scipy.linalg
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Collected, Stream
from spa_compiler.graph.bias import Bias, bias_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import F64, Problem, relative_loss
from spa_compiler.solvers.shrinkage import shrinkage, shrunk
from spa_compiler.targets import host

RIDGE = 0.3
"""Of the Gram matrix's mean diagonal: how strongly W1 is drawn to W0. On calibration hold-outs (2:4 on MiniLM, 50 % on
EfficientNet-Lite0) the outputs change least between 0.1 and 1; SparseGPT's 0.01 follows chance."""

_NOISE = 1e-6
"""Of a weight's norm: what rounding may make of the moments of two equal runs."""

_ENOUGH = 2
"""Positions for each input from which on a repair is trusted."""

_FEWEST = 8
_SMALLEST_HALF = 0.25
"""Positions of a half, and its share of all, from which on it is asked."""

_ROUNDING = 1e-6
"""Of an input's mean square: a variance below it is what single precision leaves of none."""

_PLENTY = 512
"""Positions for each input from which on nobody asks what is chance: EfficientNet-Lite0's layers answer 0 there."""


@dataclass(frozen=True)
class Job:
    """One site, ready to be solved: a problem for each group of a grouped convolution, one in all else."""

    site: int
    op: WeightedOp
    problems: tuple[Problem, ...]
    original: tuple[F64, ...]
    """The weights of each problem before anything was repaired."""

    @property
    def repaired(self) -> bool:
        """Whether there was anything to make up for: what is less is rounding."""
        whole, rows = np.concatenate(self.original), np.concatenate([problem.weight for problem in self.problems])
        return bool(np.linalg.norm(rows - whole) > _NOISE * np.linalg.norm(whole))


@dataclass(frozen=True)
class Result:
    """What became of a site. `rows [n, k]` is what it computes with; `form` is whatever else a solver hands back."""

    rows: NDArray[Any]
    error: float
    """Relative to the output that the site should give, in the metric that it was solved in: over the samples, with
    what is taken for chance left out. Without samples, or where that output is always 0, relative to the weight."""
    form: Any = None

    @classmethod
    def of(cls, job: Job, solved: Sequence[F64]) -> Result:
        """New weights of the groups of a site."""
        rows, before = np.concatenate(solved), np.concatenate(job.original)
        if job.problems[0].count and (lost := relative_loss(job.problems, solved)) is not None:
            return cls(rows, float(np.sqrt(lost)))
        size = float(np.square(before).sum())
        return cls(rows, float(np.sqrt(np.square(rows - before).sum() / size)) if size else 0.0)


@dataclass(frozen=True)
class Outcome:
    """A result with what it did to the bias, `[n]` or None where there is none, and how long it took.

    `positions` is how many the statistics were taken over; 0 without samples.
    """

    result: Result
    bias: Bias | None
    values: F64 | None
    seconds: float
    positions: int = 0


Solve = Callable[[Sequence[Job]], Sequence[Result]]
"""Solves sites that belong together, one result each; runs in threads of their own."""


def rewrite(
    model: Model,
    ops: Sequence[WeightedOp],
    samples: Samples,
    solve: Solve,
    *,
    repair: bool = True,
    together: Callable[[int], Hashable] = lambda site: site,
    threads: int = 1,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Outcome]:
    """Solves every site in the order of the graph. Nothing in the model is changed: the caller writes the outcomes.

    Args:
        repair: whether sites make up for what was lost before them; else each comes near its own weight.
        together: sites of one wave with equal keys, that read the same, are solved in one call.
        threads: sites that are solved at a time; the result does not depend on it.
    """
    numbers = {id(node): number for number, node in enumerate(model.graph.nodes)}
    biases = [bias_of(op, model.graph) for op in ops]
    targets = _residuals(ops, biases) if repair else {}
    stream = Stream(model, ops, samples, targets=targets, threads=host().cores_physical, progress=progress, seed=seed)
    first = leaders(ops, stream.waves.waves)
    outcomes: dict[int, Outcome] = {}
    with contextlib.closing(stream.__iter__()) as waves:  # what waits on disk goes, whatever happens
        for wave in waves:
            clusters: dict[Hashable, list[Collected]] = {}
            for collected in wave:
                if first[collected.site] == collected.site:
                    clusters.setdefault(together(collected.site), []).append(collected)

            def work(cluster: Sequence[Collected]) -> tuple[Sequence[Result], float]:
                start = time.perf_counter()
                jobs = [_job(c.site, ops[c.site], c.fit, biases[c.site] is not None, repair) for c in cluster]
                return solve(jobs), (time.perf_counter() - start) / len(jobs)

            # One thread of BLAS for each: the bits of a result must not depend on how many sites are solved at a time.
            with threadpool_limits(1, "blas"):
                solved = joblib.Parallel(n_jobs=threads, prefer="threads")(
                    joblib.delayed(work)(cluster) for cluster in clusters.values()
                )
            results = {
                c.site: (result, seconds)
                for cluster, (several, seconds) in zip(clusters.values(), solved, strict=True)
                for c, result in zip(cluster, several, strict=True)
            }
            for collected in wave:
                site = collected.site
                leader = first[site]
                result, seconds = results[leader] if leader in results else (outcomes[leader].result, 0.0)
                values = _shifted(ops[site], biases[site], result.rows, collected.fit, repair)
                outcomes[site] = Outcome(result, biases[site], values, seconds, collected.fit.count)
                bias = biases[site]
                held = None
                if bias is not None and values is not None:
                    held = ((numbers[id(bias.node)], bias.place), bias.laid_out(values))
                stream.replace(site, result.rows, held)
    return [outcomes[site] for site in range(len(ops))]


def solve_alone(
    ops: Sequence[WeightedOp], solve: Solve, *, name: str, progress: Progress = no_progress
) -> list[Outcome]:
    """Solves every site without samples: of a problem its weight is all that is known.

    Args:
        name: of what is done, for `progress`.
    """
    first = leaders(ops)
    outcomes: list[Outcome] = []
    for site, op in enumerate(ops):
        progress(name, site, len(ops))
        start = time.perf_counter()
        if first[site] == site:
            weights = split(op)
            unknown = np.broadcast_to(np.zeros(()), (op.k, op.k))
            problems = tuple(Problem(weight, unknown, np.zeros(op.k), 0) for weight in weights)
            (result,) = solve([Job(site, op, problems, weights)])
        else:
            result = outcomes[first[site]].result
        outcomes.append(Outcome(result, None, None, time.perf_counter() - start))
    progress(name, len(ops), len(ops))
    return outcomes


def problem_of(weight: F64, moments: Moments, group: int = 0, *, centred: bool = False, chance: bool = True) -> Problem:
    """The problem of one group, from moments of one run.

    What is chance in the Gram matrix is taken out, by how far two halves of the samples agree. Where they cannot tell
    or there are fewer than two positions for each input, it is drawn to its diagonal by up to a half.

    Args:
        chance: whether to ask the halves, which takes time: what only looks at norms need not.
    """
    share = (1 - _trust(moments)) / 2
    if chance and (found := _chance(weight, moments, group, centred)):
        # The best odds of chance against truth are in proportion to 1 / samples: there are twice as many as in a half.
        share = max(share, found / (2 - found))
    gram = shrunk(gram_of(moments, group, centred), share)
    return Problem(weight, gram, moments.get("mean")[group], moments.count, centred)


def judged(weight: F64, moments: Moments, group: int, *, centred: bool) -> tuple[Problem, Problem]:
    """A problem to solve, from one half of the samples, and one to judge its solution by, from the other.

    Both are the problem of all samples where there are no halves.
    """
    halves = _halves(moments)
    if halves is None:
        whole = problem_of(weight, moments, group, centred=centred)
        return whole, whole
    seen, unseen = halves
    share = max((1 - _trust(seen)) / 2, _chance(weight, moments, group, centred))
    gram = np.array(shrunk(gram_of(seen, group, centred), share))
    # An input that is 0 in this half and not in the other would lose all its weights for nothing.
    diagonal = np.einsum("ii->i", gram)
    diagonal[:] = np.where(diagonal > 0, diagonal, np.diagonal(gram_of(moments, group, centred)))
    return (
        Problem(weight, gram, seen.get("mean")[group], seen.count, centred),
        Problem(weight, gram_of(unseen, group, centred), unseen.get("mean")[group], unseen.count, centred),
    )


def _chance(weight: F64, moments: Moments, group: int, centred: bool) -> float:
    """How far to shrink the Gram matrix of a half; 0 where there are no halves, or positions are plenty."""
    if moments.count >= _PLENTY * moments.k or (halves := _halves(moments)) is None:
        return 0.0
    return shrinkage(weight, *(gram_of(half, group, centred) for half in halves))


def _halves(moments: Moments) -> tuple[Moments, Moments] | None:
    """Moments of what is not in the half and of what is; None where one of them has too little to say."""
    if moments.half is None:
        return None
    less = min(moments.half.count, moments.count - moments.half.count)
    if less < _FEWEST or less < _SMALLEST_HALF * moments.count:
        return None
    return moments.without_half(), moments.half


def gram_of(moments: Moments, group: int, centred: bool) -> F64:
    """The Gram matrix of the samples as they are, `[k, k]`."""
    gram: F64 = moments.get("gram")[group]
    if not centred:
        return gram
    mean, energy = moments.get("mean")[group], np.diagonal(gram)
    gram = np.asarray(gram - np.outer(mean, mean))
    still = np.diagonal(gram) <= _ROUNDING * energy
    if still.any():  # what is left of an input that never changes is rounding, and may be negative
        gram[still] = 0
        gram[:, still] = 0
    return gram


def _trust(moments: Moments) -> float:
    """0 to 1: how much of what a repair would change may change, by how many positions it knows."""
    return min(1.0, moments.count / (_ENOUGH * moments.k))


def split(op: WeightedOp) -> tuple[F64, ...]:
    """The weight of each group, `[n / groups, k]`."""
    rows = np.asarray(op.rows(), np.float64)
    return tuple(np.split(rows, op.group))


def dense(job: Job) -> Result:
    """A weight that stays as dense as it is: it makes up for what was lost before it, if anything was."""
    whole = np.concatenate(job.original)
    rows = np.concatenate([problem.weight for problem in job.problems])
    if not job.repaired:
        return Result(whole, 0.0)
    if whole.all():
        return Result(rows, 0.0)
    solved = [refit(problem, before != 0) for problem, before in zip(job.problems, job.original, strict=True)]
    return Result(np.concatenate(solved), float(np.sqrt(relative_loss(job.problems, solved) or 0.0)))


def _job(site: int, op: WeightedOp, moments: Moments, centred: bool, repair: bool) -> Job:
    weights = split(op)
    problems = [
        problem_of(weight, moments, group, centred=centred, chance=repair) for group, weight in enumerate(weights)
    ]
    if repair:
        problems = [_repaired(problem, moments, group, centred) for group, problem in enumerate(problems)]
    return Job(site, op, tuple(problems), weights)


def _repaired(problem: Problem, moments: Moments, group: int, centred: bool) -> Problem:
    """The problem with W1 in place of W0."""
    change, mean = moments.get("cross")[group] - moments.get("gram")[group], problem.mean
    if centred:
        change += np.outer(mean, mean - moments.get("dense_mean")[group])
    right = change @ problem.weight.T
    if "extra" in moments:
        extra = moments.get("extra")[group]
        right += extra - np.outer(mean, moments.get("target_mean")[group]) if centred else extra
    if not right.any():
        return problem
    # The ridge does here what shrinkage does in the solvers: it was chosen on Gram matrices as they are.
    damped = replace(problem, gram=gram_of(moments, group, centred)).damped(RIDGE)
    moved = scipy.linalg.solve(damped, right * _trust(moments), assume_a="pos")
    return replace(problem, weight=problem.weight + moved.T)


def _shifted(op: WeightedOp, bias: Bias | None, rows: NDArray[Any], moments: Moments, repair: bool) -> F64 | None:
    """The bias that keeps the mean of the result, `[n]`."""
    if bias is None:
        return None
    new = np.split(np.asarray(rows, np.float64), op.group)
    now = moments.get("mean")
    before = moments.get("dense_mean") if repair else now
    shift = [w0 @ z - w @ x for w0, w, z, x in zip(split(op), new, before, now, strict=True)]
    change = np.concatenate(shift)
    if repair and "target_mean" in moments:
        change += np.concatenate(list(moments.get("target_mean")))
    values: F64 = np.asarray(bias.values, np.float64) + _trust(moments) * change
    return values


def _residuals(ops: Sequence[WeightedOp], biases: Sequence[Bias | None]) -> dict[int, str]:
    """For each site whose result is only added to a computed tensor of its shape, that tensor."""
    found: dict[int, str] = {}
    for site, (op, bias) in enumerate(zip(ops, biases, strict=True)):
        result = op.node.outputs[0] if bias is None else bias.node.outputs[0]
        if len(result.outputs) != 1 or result.outputs[0].op != "Add" or result.outputs[0].domain:
            continue
        others = [t for t in result.outputs[0].inputs if t is not result]
        if len(others) == 1 and isinstance(others[0], gs.Variable) and _same_shape(result, others[0]):
            found[site] = others[0].name
    return found


def _same_shape(one: gs.Variable, other: gs.Variable) -> bool:
    if one.shape is None or other.shape is None or None in one.shape:
        return False
    return list(one.shape) == list(other.shape)


def leaders(ops: Sequence[WeightedOp], waves: Sequence[int] = ()) -> list[int]:
    """For each site the first one that reads the same weight alike: they stay one weight, solved where it is met first.

    Args:
        waves: when each site is solved, where that is not the order of `ops`.
    """
    order = sorted(range(len(ops)), key=lambda site: waves[site] if waves else site)
    seen: dict[Hashable, int] = {}
    for site in order:
        seen.setdefault(_reading(ops[site]), site)
    return [seen[_reading(op)] for op in ops]


def _reading(op: WeightedOp) -> Hashable:
    """Equal for sites of one weight in one layout: MatMul and a transposed Gemm see each other's transposed."""
    return id(op.weight), op.transposed, op.group
