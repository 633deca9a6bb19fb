"""Taking one weight apart, or several that read the same input: the ranks it may have, and the factors of each.

Weights that share a `down` are stacked, each divided by the root of its output energy, so that a loss counts relative
to its own output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from spa_compiler.calibration.moments import Geometry
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes import ranks
from spa_compiler.passes.chains import Beside, Form, product, rounded
from spa_compiler.passes.layerwise import Job, Result, dense, leaders
from spa_compiler.passes.methods import METHODS, Layer
from spa_compiler.passes.ranks import Rank
from spa_compiler.patterns import Pattern
from spa_compiler.solvers import svd
from spa_compiler.solvers.fwsvd import fwsvd
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import F64, Problem, Solution, Zeros
from spa_compiler.solvers.sparse_low_rank import sparse_low_rank
from spa_compiler.solvers.tucker import channels_of, tucker2

Method: TypeAlias = Literal["whitened", "svd", "fwsvd", "tucker", "sparse-low-rank"]

_PARTS = (0.1, 0.2, 0.3)
"""Shares of the parameters that the low-rank part beside a sparse weight may get, besides none and all."""

_POLISH = 3
"""Rounds in which both parts are fitted to each other, at most."""


@dataclass(frozen=True, eq=False)
class Site:
    """One weight and how it is taken apart.

    Attributes:
        method: `tucker` only for a k x k convolution.
        centred: whether a bias takes up the means.
        scores: Fisher information, `[n, k]`, of `fwsvd`.
    """

    op: WeightedOp
    method: Method
    centred: bool
    scores: F64 | None = None


def site_of(op: WeightedOp, method: Method, data: bool, centred: bool, scores: F64 | None) -> Site:
    """`tucker` is `whitened`, or without data `svd`, for what is no k x k convolution."""
    if method == "tucker" and not (len(op.kernel) == 2 and int(np.prod(op.kernel)) > 1):
        method = "whitened" if data else "svd"
    return Site(op, method, centred, scores)


def clusters(sites: Sequence[Site], joint: bool) -> list[tuple[int, ...]]:
    """Sites that are taken apart together, in the order of the first of each.

    Of sites that read one weight alike, only the first is in any.

    Args:
        joint: whether sites that read the same tensor in the same way are.
    """
    found: dict[object, list[int]] = {}
    for place, leader in enumerate(leaders([site.op for site in sites])):
        if leader == place:
            found.setdefault(_together(sites[place]) if joint else place, []).append(place)
    return [tuple(places) for places in found.values()]


def numbers(sites: Sequence[Site], together: Sequence[tuple[int, ...]]) -> list[int]:
    """The cluster of each site, by its place in `together`."""
    number_of = {site: number for number, cluster in enumerate(together) for site in cluster}
    return [number_of[leader] for leader in leaders([site.op for site in sites])]


def _together(site: Site) -> object:
    """Equal for sites that may share a `down`."""
    op = site.op
    # A tied weight is taken apart in the same way wherever it is; a computed bias may be there later than the input.
    alone = len(op.weight.outputs) > 1 or any(isinstance(tensor, gs.Variable) for tensor in op.node.inputs[2:])
    if site.method == "tucker" or alone:
        return id(op)
    return id(op.node.inputs[0]), Geometry.of(op), op.weight.dtype, site.centred


class Cut:
    """A cluster and its problems, decomposed."""

    def __init__(self, sites: Sequence[Site], problems: Sequence[Problem]) -> None:
        self.sites, self.problems = sites, problems
        self._tucker = sites[0].method == "tucker"
        if self._tucker:
            return
        whole = [problem.loss(np.zeros_like(problem.weight)) for problem in problems]
        alone = len(problems) == 1
        self._scales = [1.0 if alone or energy <= 0 else 1 / np.sqrt(energy) for energy in whole]
        parts = [problem.weight * scale for problem, scale in zip(problems, self._scales, strict=True)]
        stacked = problems[0] if alone else replace(problems[0], weight=np.concatenate(parts))
        if sites[0].method == "svd":
            self._found = svd.plain(stacked)
        elif sites[0].method == "fwsvd":
            scores = [site.scores for site in sites if site.scores is not None]
            self._found = fwsvd(stacked, np.concatenate(scores) if scores else None)
        else:
            self._found = svd.whitened(stacked)

    def layer(self, inside: float, outside: float, multiple: int) -> ranks.Layer:
        """The ranks there are. A parameter costs `inside` in front of a kernel, and `outside` elsewhere."""
        if self._tucker:
            gram = channels_of(self.problems[0].gram, self.sites[0].op.weight.shape[1])
            return ranks.kernel(self._kernel(), gram, inside, outside, multiple)
        shape = sum(site.op.n for site in self.sites), self.sites[0].op.k
        return ranks.linear(self._found.tails, shape, outside, multiple)

    def forms(self, rank: Rank) -> list[Form]:
        """The factors of one rank, as they will be stored."""
        dtype = self.sites[0].op.weight.dtype
        if self._tucker:
            inner, outer = rank
            return [rounded(tucker2(self._kernel(), (inner, outer), problem=self.problems[0]), dtype)]
        factors = rounded(self._found.truncate(rank[0]), np.dtype(np.float64))
        assert isinstance(factors, svd.Factors)
        parts = svd.split_rows(factors, [site.op.n for site in self.sites])
        down = parts[0].down.astype(dtype).astype(np.float64)
        return [
            svd.Factors((part.up / scale).astype(dtype).astype(np.float64), down)
            for part, scale in zip(parts, self._scales, strict=True)
        ]

    def _kernel(self) -> F64:
        return self.problems[0].weight.reshape([int(size) for size in self.sites[0].op.weight.shape])


def errors(problems: Sequence[Problem], forms: Sequence[Form]) -> list[float]:
    """Relative output error of each."""
    return [problem.error(product(form)) for problem, form in zip(problems, forms, strict=True)]


@dataclass(frozen=True)
class ByRank:
    """Solves jobs at the rank of each site, which is one for those that belong together; None stays dense."""

    sites: Sequence[Site]
    choices: Sequence[Rank | None]

    def solve(self, jobs: Sequence[Job]) -> list[Result]:
        """A `layerwise.Solve`."""
        rank = self.choices[jobs[0].site]
        if rank is None:
            return [dense(job) for job in jobs]
        problems = [job.problems[0] for job in jobs]
        forms = Cut([self.sites[job.site] for job in jobs], problems).forms(rank)
        return results(problems, forms)


@dataclass(frozen=True)
class ByLoss:
    """Solves jobs at the cheapest rank whose loss, relative to the output's energy, is small enough."""

    sites: Sequence[Site]
    loss: float
    multiple: int

    def solve(self, jobs: Sequence[Job]) -> list[Result]:
        """A `layerwise.Solve`."""
        problems = [job.problems[0] for job in jobs]
        cut = Cut([self.sites[job.site] for job in jobs], problems)
        layer = cut.layer(1.0, 1.0, self.multiple)
        first = layer.by_loss(self.loss)
        # What a loss is said to be is a bound for a Tucker form, and a mean where weights share a `down`.
        for rank in () if first is None else layer.options[layer.options.index(first) :]:
            forms = cut.forms(rank)
            if max(errors(problems, forms)) ** 2 <= self.loss:
                return results(problems, forms)
        return [dense(job) for job in jobs]


@dataclass(frozen=True)
class SparseLowRank:
    """Solves jobs as a sparse weight with a low-rank one beside it.

    Attributes:
        densities: share of the parameters of each site that may stay.
        patterns: of the sparse part, each site's own (`Pattern.on`).
        part: share of what stays that the low-rank part gets; None: what loses least, be it all.
    """

    sites: Sequence[Site]
    densities: F64
    patterns: Sequence[Pattern]
    part: float | None
    multiple: int
    data: bool

    def solve(self, jobs: Sequence[Job]) -> list[Result]:
        """A `layerwise.Solve`."""
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Result:
        problem, pattern = job.problems[0], self.patterns[job.site]
        parameters = float(self.densities[job.site]) * problem.weight.size
        tried = [
            self._split(problem, rank, _zeros_beside(problem, rank, pattern, parameters))
            for rank in self._ranks(problem, pattern, parameters)
        ]
        forms: list[Form] = [self._pair(problem, split) for split in self._finalists(problem, tried)]
        whole = int(parameters / sum(problem.weight.shape)) // self.multiple * self.multiple
        if self.part is None and pattern.sparsity is None and whole:
            forms.append(svd.whitened(problem).truncate(whole))
        stored = [rounded(form, self.sites[job.site].op.weight.dtype) for form in forms]
        return results([problem], [min(stored, key=lambda form: problem.loss(product(form)))])[0]

    def _split(self, problem: Problem, rank: int, zeros: Zeros) -> _Split:
        """A low-rank part, and which weights beside it are sparse, chosen cheaply."""
        if rank == 0:
            return _Split(zeros, None)
        # A better solver has the last word on the sparse part, so refitting this one would be lost.
        return _Split(zeros, sparse_low_rank(problem, rank, zeros, refits=0))

    def _finalists(self, problem: Problem, tried: Sequence[_Split]) -> Sequence[_Split]:
        """Of several ranks, none at all and the one that a cheap solver loses least with."""
        if len(tried) < 3:
            return tried
        solver = METHODS["sparsegpt" if self.data else "magnitude"].solve

        def loss(split: _Split) -> float:
            rest = split.rest(problem)
            return rest.loss(solver(rest, split.zeros, Layer(np.random.default_rng(0))).weight)

        return [tried[0], min(tried[1:], key=loss)]

    def _ranks(self, problem: Problem, pattern: Pattern, parameters: float) -> list[int]:
        """The ranks to try, ascending."""
        each = sum(problem.weight.shape) * self.multiple
        if pattern.sparsity is not None:
            room = parameters - (1 - pattern.sparsity) * problem.weight.size
            return [max(0, int(room / each)) * self.multiple]
        parts = (0.0, *_PARTS) if self.part is None else (self.part,)
        # Something is left for the sparse part.
        most = min(min(problem.weight.shape) // self.multiple, math.ceil(parameters / each) - 1)
        return sorted({min(round(part * parameters / each), most) * self.multiple for part in parts})

    def _pair(self, problem: Problem, split: _Split) -> Beside:
        """Both parts, the sparse one by the best solver there is, fitted to each other."""
        solver = METHODS["auto" if self.data else "magnitude"].solve
        layer = Layer(np.random.default_rng(0))
        if split.parts is None:
            return Beside(solver(problem, split.zeros, layer).weight, None)
        low, rough = split.parts
        rest = split.rest(problem)
        sparse = solver(rest, split.zeros, layer)
        if rest.loss(rough.weight) < rest.loss(sparse.weight):
            sparse = rough
        loss = rest.loss(sparse.weight)
        for _ in range(_POLISH):
            factors = svd.whitened(replace(problem, weight=problem.weight - sparse.weight)).truncate(low.rank)
            rest = replace(problem, weight=problem.weight - factors.weight)
            fitted = replace(sparse, weight=refit(rest, sparse.mask))
            after = rest.loss(fitted.weight)
            if not after < loss:
                break
            loss, low, sparse = after, factors, fitted
        return Beside(sparse.weight, low)


@dataclass(frozen=True, eq=False)
class _Split:
    """The zeros of the sparse part, and both parts, the sparse one chosen cheaply; none where the rank is 0."""

    zeros: Zeros
    parts: tuple[svd.Factors, Solution] | None

    def rest(self, problem: Problem) -> Problem:
        """What is left to the sparse part."""
        return problem if self.parts is None else replace(problem, weight=problem.weight - self.parts[0].weight)


def _zeros_beside(problem: Problem, rank: int, pattern: Pattern, parameters: float) -> Zeros:
    """What a low-rank part leaves of the parameters to the sparse one."""
    left = parameters - rank * sum(problem.weight.shape)
    return Zeros(pattern, 1 - left / problem.weight.size if pattern.sparsity is None else pattern.sparsity)


def results(problems: Sequence[Problem], forms: Sequence[Form]) -> list[Result]:
    """One result for each form."""
    return [Result(product(form), error, form) for form, error in zip(forms, errors(problems, forms), strict=True)]
