"""Who gets how many zeros: one interface over the allocations of `solvers/allocation`.

What an allocation looks at is made here, once: the importance of weights, the error of each layer at a few levels of
sparsity, and how much the model's outputs make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import joblib
import numpy as np
from threadpoolctl import threadpool_limits

from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.probe import Probe
from spa_compiler.calibration.progress import Progress, no_progress
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Collected, Stream
from spa_compiler.criteria import magnitude
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.graph.save import PROTOBUF_LIMIT, weight_bytes
from spa_compiler.passes.layerwise import judged, split
from spa_compiler.patterns import Pattern
from spa_compiler.patterns.selection import keep_highest_with_floor
from spa_compiler.solvers import allocation
from spa_compiler.solvers.problem import F64, Zeros, relative_loss
from spa_compiler.solvers.sparsegpt import sparsegpt
from spa_compiler.targets import host

Name: TypeAlias = Literal["auto", "uniform", "global", "lamp", "erk", "error", "proportional", "ecoflap", "evolution"]

NEEDS_DATA = frozenset({"error", "proportional", "ecoflap", "evolution"})

_STEPS = (-0.48, -0.35, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
"""Levels around the sparsity that is asked for. Down to no zeros the error is taken to fall in a straight line from the
lowest one, so that should lie low: layers like EfficientNet-Lite0's fourth projection, which alone changes the outputs
more than all others together, end up there."""

_EVEN_STEPS = (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2)
"""Levels that layers can trade one for one."""

_LOWEST, _HIGHEST = 0.02, 0.98

_PROBED = 64
"""Samples that the model's outputs are compared on."""

_EPS = 1e-2
"""Of a weight's root mean square: how far ECoFLaP shakes it."""

_DRAWS = (0, 1)
_GENERATIONS, _OFFSPRING = 24, 12


@dataclass(frozen=True)
class Request:
    """Everything that an allocation may need. `patterns` are each layer's own (`Pattern.on`).

    `see` is shown the moments of each layer in the model as it is, where an allocation has them made.
    """

    model: Model
    ops: Sequence[WeightedOp]
    patterns: Sequence[Pattern]
    sparsity: float
    min_keep: float
    rng: np.random.Generator
    samples: Samples | None = None
    threads: int = 1
    progress: Progress = no_progress
    see: Callable[[int, Moments], None] = lambda layer, moments: None

    @property
    def sizes(self) -> list[int]:
        """Elements per layer."""
        return [op.n * op.k for op in self.ops]

    @property
    def most(self) -> float:
        """The largest share of zeros that `min_keep` leaves a layer."""
        return 1 - self.min_keep * (1 - self.sparsity)


def allocate(name: Name, request: Request) -> F64:
    """Share of zeros per layer, `[L]`, that together make `sparsity`.

    Raises:
        UsageError: the allocation needs samples, and there are none.
    """
    if name in NEEDS_DATA and request.samples is None:
        raise UsageError(
            f"allocate={name} measures the model on samples",
            where="allocate",
            fix="Give them with --calib, or take allocate=lamp, which looks at the weights alone",
        )
    if not request.ops:
        return np.zeros(0)
    return _ALLOCATIONS[name](request)


def _uniform(request: Request) -> F64:
    return allocation.uniform(request.sizes, request.sparsity)


def _global(request: Request) -> F64:
    """What one threshold on squared magnitudes leaves each layer, with a floor: Global MP.

    Scores are not scaled by layer: on MiniLM (STS-B, 60 % unstructured, 40 % in 4x1 blocks) the plain squares keep
    1.6 and 0.8 points more than squares over each layer's mean, and both keep more than equal shares. These are
    scores on the dev split by which the choice was made, of one model: no held-out evidence.
    """
    scores = [p.scores(magnitude(op.rows())) for op, p in zip(request.ops, request.patterns, strict=True)]
    sizes = [p.sizes(op.n, op.k) for op, p in zip(request.ops, request.patterns, strict=True)]
    floor = request.min_keep * (1 - request.sparsity)
    keeps = keep_highest_with_floor(scores, sizes, request.sparsity, floor)
    return np.array(
        [
            1 - float((np.broadcast_to(size, keep.shape)[keep]).sum()) / op.n / op.k
            for op, size, keep in zip(request.ops, sizes, keeps, strict=True)
        ]
    )


def _lamp(request: Request) -> F64:
    def importance(layer: int) -> F64:
        return request.patterns[layer].scores(magnitude(request.ops[layer].rows()))

    return allocation.lamp(importance, request.sizes, request.sparsity, max_sparsity=request.most)


def _erk(request: Request) -> F64:
    shapes = [(op.n, op.k // op.kernel_size, *op.kernel) for op in request.ops]
    return allocation.erk(shapes, request.sparsity, max_sparsity=request.most)


@dataclass(frozen=True)
class _Measured:
    """Each layer's loss at each level, in relative squared change of the model's outputs where that was probed."""

    levels: list[float]
    losses: F64
    at_target: F64


def _measure(
    request: Request, keep: Callable[[int, int, F64], None] | None = None, steps: Sequence[float] = _STEPS
) -> _Measured:
    """Solves every layer by itself at every level, from the moments of the model as it is.

    It is solved on one half of the samples and judged on the other: layers with many inputs and few positions look much
    better on what they were solved on than they are, and would get too many zeros.

    Args:
        keep: called with (layer, number of the level, weights), for a database.
    """
    assert request.samples is not None
    levels = sorted({round(min(_HIGHEST, max(_LOWEST, request.sparsity + step)), 4) for step in steps})
    target = min(range(len(levels)), key=lambda i: abs(levels[i] - request.sparsity))
    errors = np.zeros((len(request.ops), len(levels)))
    solved: dict[int, F64] = {}

    def work(collected: Collected) -> tuple[int, list[float], list[F64]]:
        op, pattern = request.ops[collected.site], request.patterns[collected.site]
        pairs = [judged(w, collected.fit, g, centred=True) for g, w in enumerate(split(op))]
        judges = [judge for _, judge in pairs]
        losses, weights = [], []
        for level in levels:
            parts = [sparsegpt(problem, Zeros(pattern, level)).weight for problem, _ in pairs]
            losses.append(relative_loss(judges, parts) or 0.0)
            weights.append(np.concatenate(parts).astype(op.weight.dtype))
        return collected.site, losses, weights

    stream = Stream(request.model, request.ops, request.samples, sequential=False, threads=host().cores_physical)
    done = 0
    for wave in stream:
        for collected in wave:
            request.see(collected.site, collected.fit)
        with threadpool_limits(1, "blas"):
            for site, losses, weights in joblib.Parallel(n_jobs=request.threads, prefer="threads")(
                joblib.delayed(work)(collected) for collected in wave
            ):
                errors[site] = losses
                solved[site] = weights[target]
                if keep is not None:
                    for level, weight in enumerate(weights):
                        keep(site, level, weight)
        done += len(wave)
        request.progress("measuring how layers take zeros", done, len(request.ops))
    probed = _probe(request, solved)
    if probed is None or not probed.any():  # the latter where all that was asked is padding
        return _Measured(levels, errors, errors[:, target])
    at = errors[:, target]
    scale = np.divide(probed, at, out=np.zeros_like(at), where=at > 0)
    return _Measured(levels, errors * scale[:, None], probed)


def _probe(request: Request, solved: Mapping[int, F64]) -> F64 | None:
    """What the outputs make of each layer alone being sparse; None where the model is too large to hold in a session
    whose weights are inputs.
    """
    if weight_bytes(request.model) > PROTOBUF_LIMIT:
        return None
    probe = _make_probe(request, half=True)
    changes = np.zeros(len(request.ops))
    for site in range(len(request.ops)):
        changes[site] = probe.change({site: solved[site]})
        request.progress("measuring what the outputs make of it", site + 1, len(request.ops))
    return changes


def _make_probe(request: Request, *, half: bool) -> Probe:
    assert request.samples is not None
    return Probe(request.model, request.ops, request.samples, most=_PROBED, threads=host().cores_physical, half=half)


def _error(request: Request) -> F64:
    """Half way between equal shares and those of least summed error.

    The errors are of layers that are sparse alone. Solved one after the other, later layers make up for earlier ones,
    so differences between layers count for less than they measure. MiniLM's calibration hold-out, 70 % zeros: the
    outputs change by 0.457 with equal shares, 0.485 with least summed error, and 0.450 half way. EfficientNet-Lite0,
    50 %, four folds: the classes diverge by 0.414 with least summed error, 0.343 three quarters of the way, and 0.372
    half way.
    """
    measured = _measure(request)
    least = allocation.by_error(
        measured.levels, measured.losses, request.sizes, request.sparsity, max_sparsity=request.most
    )
    return (least + _uniform(request)) / 2


def _proportional(request: Request) -> F64:
    measured = _measure(request)
    return allocation.proportional(
        measured.at_target, request.sizes, request.sparsity, power=0.5, max_sparsity=request.most
    )


def _ecoflap(request: Request) -> F64:
    probe = _make_probe(request, half=False)

    def loss(layer: int, direction: int, seed: int) -> float:
        rows = np.asarray(request.ops[layer].rows(), np.float64)
        step = _EPS * float(np.sqrt(np.square(rows).mean()))
        shaken = rows + direction * step * np.random.default_rng((seed, layer)).standard_normal(rows.shape)
        request.progress("shaking layers", layer, len(request.ops))
        # There are no labels: the loss is the distance from what the outputs were. It is least where nothing moves,
        # and so its slope to one side counts, not the difference of both.
        return direction * float(np.sqrt(probe.change({layer: shaken})))

    return allocation.ecoflap(loss, request.sizes, request.sparsity, seeds=_DRAWS, eps=_EPS, max_sparsity=request.most)


def _evolution(request: Request) -> F64:
    database: dict[tuple[int, int], F64] = {}
    measured = _measure(request, lambda site, level, weight: database.__setitem__((site, level), weight), _EVEN_STEPS)
    shares = allocation.by_error(
        measured.levels, measured.losses, request.sizes, request.sparsity, max_sparsity=request.most
    )
    start = allocation.to_levels(shares, request.sizes, measured.levels)
    probe = _make_probe(request, half=True)

    def fitness(choice: tuple[int, ...], feeds: int) -> float:
        return probe.change({site: database[site, level] for site, level in enumerate(choice)}, feeds)

    best = allocation.evolve(
        fitness,
        request.sizes,
        measured.levels,
        request.sparsity,
        request.rng,
        start=start,
        generations=_GENERATIONS,
        offspring=_OFFSPRING,
        samples=(max(1, probe.feeds // 4), probe.feeds),
        progress=lambda done, total, _: request.progress("breeding shares", done, total),
    )
    return np.array([measured.levels[level] for level in best])


_ALLOCATIONS: Mapping[str, Callable[[Request], F64]] = {
    "uniform": _uniform,
    "global": _global,
    "lamp": _lamp,
    "erk": _erk,
    "error": _error,
    "proportional": _proportional,
    "ecoflap": _ecoflap,
    "evolution": _evolution,
}
