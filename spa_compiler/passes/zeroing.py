"""One layer of `sparsify` at a time: its method, its zeros, and what a file says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from spa_compiler.criteria import symbolic
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.layerwise import Job, Result, dense
from spa_compiler.passes.methods import Layer, Method
from spa_compiler.solvers.problem import F64, Problem, Zeros


@dataclass(frozen=True)
class Zeroing:
    """What solving any of the sites needs.

    Attributes:
        worth: of the outputs of a site, `[n]`: what an error of each counts where they compete for zeros.
    """

    ops: Sequence[WeightedOp]
    zeros: Sequence[Zeros]
    method: Method
    seed: int
    scores: Mapping[int, F64]
    masks: Mapping[int, NDArray[np.bool_]]
    gated: Mapping[int, F64]
    expression: symbolic.Expression | None
    worth: Mapping[int, F64] = field(default_factory=dict)

    def solve(self, jobs: Sequence[Job]) -> list[Result]:
        """A `layerwise.Solve`; sites beyond these get no zeros."""
        return [self._one(job) if job.site < len(self.ops) else dense(job) for job in jobs]

    def _one(self, job: Job) -> Result:
        return Result.of(job, self._solved(job.site, job.problems))

    def _solved(self, site: int, problems: Sequence[Problem]) -> list[F64]:
        """The new weight of each group."""
        if site in self.worth:
            scale = np.sqrt(self.worth[site])[:, None]
            (alone,) = problems  # no grouped convolution has any
            scaled = replace(alone, weight=alone.weight * scale)
            return [self.method.solve(scaled, self.zeros[site], self._layer(site, 0)).weight / scale]
        return [
            self.method.solve(problem, self.zeros[site], self._layer(site, group)).weight
            for group, problem in enumerate(problems)
        ]

    def _layer(self, site: int, group: int) -> Layer:
        op = self.ops[site]
        height = op.n // op.group
        part = slice(group * height, (group + 1) * height)
        scores, mask, gated = self.scores.get(site), self.masks.get(site), self.gated.get(site)
        return Layer(
            np.random.default_rng((self.seed, site, group)),
            None if scores is None else scores[part],
            None if mask is None else mask[part],
            None if gated is None else gated[part],
            self.expression,
        )
