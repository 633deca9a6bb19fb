"""The methods of `sparsify`, by name: what each needs, and how it solves one layer.

A method that *moves* weights gives those that stay new values, and makes up for what was lost before it; the others
keep the values as they are. Every method takes every pattern unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from spa_compiler.criteria import chance, dass, magnitude, wanda
from spa_compiler.criteria.symbolic import Expression, Statistics
from spa_compiler.patterns import Channel, FanIn, Unstructured
from spa_compiler.solvers.admm import admm
from spa_compiler.solvers.dsnot import dsnot
from spa_compiler.solvers.envelope import envelope
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.obs import remove_channels
from spa_compiler.solvers.problem import F64, Mask, Problem, Solution, Zeros
from spa_compiler.solvers.regions import exchangeable
from spa_compiler.solvers.sparsegpt import sparsegpt
from spa_compiler.solvers.spectrum import spectrum
from spa_compiler.solvers.swap import swap


@dataclass(frozen=True)
class Layer:
    """What a method may look at besides the problem; arrays are of this group of a grouped convolution alone.

    Attributes:
        rng: of this layer alone, so that layers can be solved in any order.
        scores: importances from a file, `[n, k]`.
        mask: True where a weight stays, from a file, `[n, k]`.
        gated: root mean square of each output after it was multiplied with that of a sibling, `[n]`, where the layer
            is the gate or the up projection of a gated feed-forward block.
        expression: of the method `symbolic`.
    """

    rng: np.random.Generator
    scores: F64 | None = None
    mask: Mask | None = None
    gated: F64 | None = None
    expression: Expression | None = None


Solver = Callable[[Problem, Zeros, Layer], Solution]


@dataclass(frozen=True)
class Method:
    """One way to sparsify a layer: `data` says whether it needs calibration samples."""

    solve: Solver
    data: bool
    moves: bool


def _kept(problem: Problem, mask: Mask) -> Solution:
    return Solution(np.where(mask, problem.weight, 0.0), mask)


def _within_outputs(zeros: Zeros) -> Zeros:
    """Zeros that are chosen within each output: what Wanda compares."""
    return Zeros(FanIn(), zeros.sparsity) if isinstance(zeros.pattern, Unstructured) else zeros


def _magnitude(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return _kept(problem, zeros.choose(magnitude(problem.weight)))


def _random(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return _kept(problem, zeros.choose(chance(problem.weight.size, layer.rng).reshape(problem.weight.shape)))


def _wanda(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return _kept(problem, _within_outputs(zeros).choose(wanda(problem.weight, problem.norms)))


def _dass(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    if layer.gated is None:
        return _wanda(problem, zeros, layer)
    return _kept(problem, zeros.choose(dass(problem.weight, layer.gated)))


def _symbolic(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    assert layer.expression is not None  # the pass has parsed it
    outputs = np.sqrt(np.maximum(np.einsum("ij,ij->i", problem.weight @ problem.gram, problem.weight), 0))
    statistics = Statistics(problem.weight, problem.norms, problem.mean, problem.variance, outputs, layer.scores)
    return _kept(problem, zeros.choose(layer.expression.evaluate(statistics)))


def _scores(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    assert layer.scores is not None  # the pass has read them
    return _kept(problem, zeros.choose(layer.scores - min(0.0, float(layer.scores.min()))))


def _masks(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    assert layer.mask is not None
    return _kept(problem, layer.mask)


def _masks_refitted(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    assert layer.mask is not None
    return Solution(refit(problem, layer.mask), layer.mask)


def _sparsegpt(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return sparsegpt(problem, zeros)


def _admm(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return admm(problem, zeros)


def _dsnot(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    start = _within_outputs(zeros)
    return _kept(problem, dsnot(problem, start.choose(wanda(problem.weight, problem.norms)), start))


def _swap(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return swap(problem, sparsegpt(problem, zeros).mask, zeros)


def _envelope(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return envelope(problem, zeros)


def _spectrum(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    return spectrum(problem, zeros, layer.rng)


def _auto(problem: Problem, zeros: Zeros, layer: Layer) -> Solution:
    """The least loss that the solvers reach together."""
    if isinstance(zeros.pattern, Channel):
        return remove_channels(problem, zeros)
    start = sparsegpt(problem, zeros)
    found = admm(problem, zeros, start=start.mask)
    if exchangeable(zeros.pattern):
        return swap(problem, found.mask, zeros)
    return found


METHODS: Mapping[str, Method] = {
    "auto": Method(_auto, data=True, moves=True),
    "magnitude": Method(_magnitude, data=False, moves=False),
    "random": Method(_random, data=False, moves=False),
    "wanda": Method(_wanda, data=True, moves=False),
    "dass": Method(_dass, data=True, moves=False),
    "symbolic": Method(_symbolic, data=True, moves=False),
    "dsnot": Method(_dsnot, data=True, moves=False),
    "sparsegpt": Method(_sparsegpt, data=True, moves=True),
    "admm": Method(_admm, data=True, moves=True),
    "swap": Method(_swap, data=True, moves=True),
    "envelope": Method(_envelope, data=True, moves=True),
    "spectrum": Method(_spectrum, data=False, moves=True),
    "scores": Method(_scores, data=False, moves=False),
    "masks": Method(_masks, data=False, moves=False),
}

REFITTED = Method(_masks_refitted, data=True, moves=True)
"""`masks` where there are samples: the zeros are given, the best values for the rest are not."""
