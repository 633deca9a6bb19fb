"""Zeros and values at once, by the alternating direction method of multipliers (ADMM).

Of the two copies W and Z of the weight, one is free and one is in the pattern; U (scaled) drives them together:

    Z = the nearest to W + U in the pattern
    U = U + W - Z
    W = W0 + rho (G + rho I)^-1 (Z - U - W0)       the minimum of |(W0 - W) G^1/2|^2 + rho |W - Z + U|^2

Everything is in units of the inputs: G is scaled to a diagonal of 1, W by its root, so that "nearest" means the least
change of the output were the inputs uncorrelated. One eigendecomposition of G serves every rho. Small rho lets the
zeros move, large rho settles them: it starts well below the smallest damped eigenvalues of usual Gram matrices and
grows while the zeros still change, slower when few do (ALPS: Meng et al., 2024, after Boza, 2024, who keeps rho fixed
and ramps the share of zeros up, which is worse on correlated inputs). `refit` then gives the values that the final
zeros allow. Since only the zeros are taken from the iteration, it runs in single precision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import DAMPING, F64, Mask, Problem, Solution, Zeros

_F32 = NDArray[np.float32]

_STEPS = 75
_RHO = 0.03
_PACE = 3
"""Steps with the same rho."""
_GROWTH = ((0.1, 1.2), (0.005, 1.1), (0.0, 1.05))
"""Share of the kept weights that a step replaces: above it, what rho is multiplied by."""


def admm(
    problem: Problem, zeros: Zeros, *, steps: int = _STEPS, damping: float = DAMPING, start: Mask | None = None
) -> Solution:
    """Weights with `zeros`, the least squares of their mask.

    Args:
        steps: at most; it ends sooner when the zeros no longer move.
        damping: of the Gram matrix.
        start: a mask in the pattern to start from; the answer is not worse than its `refit`. Where it is None,
            magnitude times the input's norm chooses one, and the answer is not worse than just applying it.

    Raises:
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    gram = problem.damped(damping)
    # Inputs that are always 0 have a made-up unit: their weights must not look important.
    units = np.where(problem.norms > 0, np.sqrt(np.diagonal(gram)), 0.0)
    first = zeros.choose(np.square(problem.weight * units)) if start is None else start
    mask = _mask(problem.weight * units, gram, zeros, steps, first)
    found = refit(problem, mask, damping)
    # Where inputs are uncorrelated, the first choice is the best one, and small rho still moves a few zeros.
    rival = np.where(first, problem.weight, 0.0) if start is None else refit(problem, first, damping)
    if _loss(problem, gram, rival) <= _loss(problem, gram, found):
        return Solution(refit(problem, first, damping), first)
    return Solution(found, mask)


def _mask(weight: F64, gram: F64, zeros: Zeros, steps: int, start: Mask) -> Mask:
    """Where the iteration puts the zeros; `weight` is in units of the inputs."""
    units = np.sqrt(np.diagonal(gram))
    values, vectors = np.linalg.eigh(gram / np.outer(units, units))
    spectrum, basis = values.astype(np.float32), vectors.astype(np.float32)
    whole = weight.astype(np.float32)
    free: _F32 = whole
    pull: _F32 = np.zeros_like(whole)
    mask = start
    rho = _RHO
    for step in range(steps):
        before = mask
        wanted = free + pull
        if step:
            mask = zeros.choose(np.square(wanted, dtype=np.float64))
        near: _F32 = np.where(mask, wanted, np.float32(0))
        pull = wanted - near
        if step % _PACE == _PACE - 1:
            moved = int(np.count_nonzero(mask & ~before)) / max(1, int(np.count_nonzero(mask)))
            if moved == 0:
                break
            # The textbook divides `pull` by as much, so that the multiplier stays. Letting it grow with rho loses 0.1
            # to 1 % less in the end (384 x 384 and 384 x 1536, 50 to 70 % zeros, 4x1 blocks, 2:4).
            rho *= next(factor for share, factor in _GROWTH if moved > share)
        shrink = np.float32(rho) / (spectrum + np.float32(rho))
        free = np.asarray(whole + ((near - pull - whole) @ basis * shrink) @ basis.T, np.float32)
    return mask


def _loss(problem: Problem, gram: F64, weight: F64) -> float:
    change = weight - problem.weight
    return float(np.einsum("ij,ij->", change @ gram, change))
