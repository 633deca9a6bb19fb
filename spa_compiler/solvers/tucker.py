"""Tucker-2: a kh x kw convolution as 1x1 (C -> r_in), kh x kw (r_in -> r_out), 1x1 (r_out -> M).

    W[m, c, y, x] ~ sum_{o, i} last[m, o] core[o, i, y, x] first[i, c]

Without a problem, the norm is that of the weights, each input channel whitened: with E[x x^T] = S S^T over channels, W
is replaced by W x_C S^T, exact for a 1x1 kernel and an approximation for others. HOSVD starts from the leading singular
vectors of the two unfoldings; HOOI (De Lathauwer et al., 2000) then takes each factor's best with the other fixed, by
turns: the loss cannot rise. Kim et al., "Compression of deep convolutional neural networks for fast and low power
mobile applications", 2016.

With a problem (the Gram matrix of im2col columns), that is where it starts, and the loss is E |W0 x - W x|^2 itself. It
is again minimized by turns, and cannot rise:

    first fixed         z = first x at every kernel position. `last` and `core` together are the best map of rank r_out
                        from z: whitened SVD of W0 G Z^T (Z G Z^T)^+ in the norm of Z G Z^T, a closed form
    last, core fixed    linear least squares in `first`, by conjugate gradients: the system has r_in * C unknowns
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

from spa_compiler.solvers.problem import DAMPING, F64, Problem
from spa_compiler.solvers.svd import damped, whitened

SWEEPS = 5
_FLOOR = 1e-10
"""Of the largest eigenvalue of a Gram matrix; smaller ones are raised to it before it is inverted."""
_STEPS = 8
"""Conjugate gradients per turn of `first`; more belong to the next turn, when `core` has moved too."""
_STALL = 1e-4
"""Turns end when one lowers the loss by less than this much of it."""


@dataclass(frozen=True, eq=False)
class Tucker:
    """`first [r_in, C]`, `core [r_out, r_in, kh, kw]`, `last [M, r_out]`; stride, padding, dilation are the core's."""

    first: F64
    core: F64
    last: F64

    @property
    def ranks(self) -> tuple[int, int]:
        """r_in, r_out."""
        return self.first.shape[0], self.last.shape[1]

    @property
    def weight(self) -> F64:
        """The product, `[M, C, kh, kw]`."""
        return np.asarray(np.einsum("mo,oiyx,ic->mcyx", self.last, self.core, self.first, optimize=True))


def tucker2(
    weight: F64,
    ranks: tuple[int, int],
    channel_gram: F64 | None = None,
    problem: Problem | None = None,
    *,
    sweeps: int = SWEEPS,
    damping: float = DAMPING,
) -> Tucker:
    """The factors of a convolution weight (of one group) `[M, C, kh, kw]`.

    Args:
        ranks: r_in of 1 to C, r_out of 1 to M.
        channel_gram: E[x x^T] `[C, C]` of the input's channels; None: the identity, or what `problem` says.
        problem: the same weight as `[M, C * kh * kw]` with the Gram matrix of its im2col columns.
        sweeps: turns, at most. 0 leaves what HOSVD finds; with a problem, the best `core` and `last` after HOOI.
        damping: of the problem's Gram matrix, see `damped`; the loss that is minimized has it.

    Raises:
        ValueError: the ranks or the arguments do not fit the weight.
    """
    outputs, channels, *kernel = weight.shape
    if not (1 <= ranks[0] <= channels and 1 <= ranks[1] <= outputs):
        raise ValueError(f"ranks {ranks} of a weight {list(weight.shape)}")
    flat = weight.reshape(outputs, -1)
    if problem is not None and problem.weight.shape != flat.shape:
        raise ValueError(f"a problem of {list(problem.weight.shape)} for a weight {list(weight.shape)}")
    if channel_gram is None:
        channel_gram = np.eye(channels) if problem is None else channels_of(problem.gram, channels)
    root, inverse = _roots(channel_gram)
    turns = sweeps if problem is None else SWEEPS
    basis, last = _hooi(np.einsum("mcyx,cd->mdyx", weight, root, optimize=True), ranks, turns)
    first = basis.T @ inverse
    if problem is None:
        core = np.einsum("mo,mcyx,cd,di->oiyx", last, weight, root, basis, optimize=True)
        return _balanced(Tucker(first, core, last))
    goal = replace(problem, gram=damped(problem.gram, damping))
    return _balanced(_fitted(goal, first, ranks[1], (kernel[0], kernel[1]), sweeps))


def channels_of(gram: F64, channels: int) -> F64:
    """The Gram matrix of the channels `[C, C]` from that of im2col columns: the mean over kernel positions."""
    positions = gram.shape[0] // channels
    blocks = gram.reshape(channels, positions, channels, positions)
    return np.asarray(np.einsum("cpdp->cd", blocks) / positions)


def energies(weight: F64, channel_gram: F64 | None = None) -> tuple[F64, F64]:
    """What each rank loses alone: r_in `[C + 1]` and r_out `[M + 1]`, in the channel-whitened norm.

    HOSVD at (r_in, r_out) loses the sum of the two at most, so they serve to choose ranks.
    """
    if channel_gram is not None:
        weight = np.einsum("mcyx,cd->mdyx", weight, _roots(channel_gram)[0], optimize=True)
    tails = []
    for axis in (1, 0):
        values = np.maximum(scipy.linalg.eigvalsh(_along(weight, axis)), 0.0)  # ascending
        tails.append(np.append(np.cumsum(values)[::-1], 0.0))
    return tails[0], tails[1]


def _roots(gram: F64) -> tuple[F64, F64]:
    """S and S^-1 with G = S S^T, S symmetric. What is singular in G is raised to a floor, so that S S^-1 = 1."""
    values, vectors = scipy.linalg.eigh(gram)
    top = float(values[-1])
    roots = np.sqrt(np.maximum(values, _FLOOR * top)) if top > 0 else np.ones_like(values)
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


def _along(tensor: F64, axis: int) -> F64:
    """A A^T of the unfolding along an axis."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return np.asarray(unfolded @ unfolded.T)


def _leading(matrix: F64, count: int) -> F64:
    """Eigenvectors of the largest eigenvalues, as columns."""
    size = matrix.shape[0]
    return np.asarray(scipy.linalg.eigh(matrix, subset_by_index=[size - count, size - 1])[1][:, ::-1])


def _hooi(tensor: F64, ranks: tuple[int, int], sweeps: int) -> tuple[F64, F64]:
    """Orthonormal bases of the input `[C, r_in]` and of the output `[M, r_out]` of `tensor [M, C, kh, kw]`."""
    inside, outside = _leading(_along(tensor, 1), ranks[0]), _leading(_along(tensor, 0), ranks[1])
    kept = 0.0  # the energy of the core; what is lost is the rest
    for _ in range(sweeps):
        outside = _leading(_along(np.einsum("mcyx,ci->miyx", tensor, inside, optimize=True), 0), ranks[1])
        projected = np.einsum("mcyx,mo->ocyx", tensor, outside, optimize=True)
        inside = _leading(_along(projected, 1), ranks[0])
        before, kept = kept, float(np.square(np.einsum("ocyx,ci->oiyx", projected, inside, optimize=True)).sum())
        if kept - before <= _STALL * kept:
            break
    return inside, outside


def _fitted(problem: Problem, first: F64, rank: int, kernel: tuple[int, int], sweeps: int) -> Tucker:
    """From `first` on, by turns, in the norm of the problem's Gram matrix."""
    best = _rest(problem, first, rank, kernel)
    loss = problem.loss(best.weight.reshape(problem.weight.shape))
    for _ in range(sweeps):
        trial = _rest(problem, _better_first(problem, best), rank, kernel)
        after = problem.loss(trial.weight.reshape(problem.weight.shape))
        if not after < loss:  # at the optimum, up to rounding
            break
        stalled = loss - after <= _STALL * loss
        best, loss = trial, after
        if stalled:
            break
    return best


def _rest(problem: Problem, first: F64, rank: int, kernel: tuple[int, int]) -> Tucker:
    """The best `core` and `last` given `first`."""
    inside = first.shape[0]
    outputs = problem.weight.shape[0]
    positions = kernel[0] * kernel[1]
    half = _narrow(problem.gram, first, positions)  # G Z^T
    small = _narrow(half.T, first, positions)  # Z G Z^T
    small = (small + small.T) / 2
    values, vectors = scipy.linalg.eigh(small)
    inverse = np.where(values > _FLOOR * values[-1], 1 / np.where(values > 0, values, 1.0), 0.0)
    full = (problem.weight @ half @ vectors * inverse) @ vectors.T
    factors = whitened(Problem(full, small, np.zeros(inside * positions), problem.count)).truncate(
        min(rank, inside * positions)
    )
    core, last = np.zeros((rank, inside, *kernel)), np.zeros((outputs, rank))
    core[: factors.rank], last[:, : factors.rank] = factors.down.reshape(-1, inside, *kernel), factors.up
    return Tucker(first, core, last)


def _narrow(matrix: F64, first: F64, positions: int) -> F64:
    """`matrix [rows, C * positions]` times Z^T: each kernel position's channels become r_in."""
    blocks = matrix.reshape(matrix.shape[0], first.shape[1], positions)
    return np.asarray(np.einsum("ncp,ic->nip", blocks, first, optimize=True)).reshape(matrix.shape[0], -1)


def _better_first(problem: Problem, tucker: Tucker) -> F64:
    """`first` after some steps of conjugate gradients on the loss, `core` and `last` fixed."""
    outside, inside = tucker.core.shape[:2]
    channels = tucker.first.shape[1]
    basis, mixed = np.linalg.qr(tucker.last)  # an orthonormal `last` leaves the loss of the projected outputs
    core = (mixed @ tucker.core.reshape(outside, -1)).reshape(mixed.shape[0], inside, -1)
    target = basis.T @ problem.weight

    def outputs(first: F64) -> F64:
        return np.asarray(np.einsum("oip,ic->ocp", core, first, optimize=True)).reshape(target.shape)

    def gradient(weight: F64) -> F64:
        blocks = (weight @ problem.gram).reshape(mixed.shape[0], channels, -1)
        return np.asarray(np.einsum("oip,ocp->ic", core, blocks, optimize=True))

    first = tucker.first
    residual = gradient(target - outputs(first))
    step, energy = residual, float(np.square(residual).sum())
    for _ in range(_STEPS):
        ahead = gradient(outputs(step))
        curvature = float(np.einsum("ij,ij->", step, ahead))
        if curvature <= 0:
            break
        first = first + energy / curvature * step
        residual = residual - energy / curvature * ahead
        before, energy = energy, float(np.square(residual).sum())
        step = residual + energy / before * step
    return first


def _balanced(tucker: Tucker) -> Tucker:
    """The same product, with factors of like size on both sides of each inner channel."""
    inner = np.sqrt(_lengths(tucker.first, 0) / _lengths(tucker.core, 1))
    core = tucker.core * inner[:, None, None]
    outer = np.sqrt(_lengths(tucker.last, 1) / _lengths(core, 0))
    return replace(
        tucker, first=tucker.first / inner[:, None], core=core * outer[:, None, None, None], last=tucker.last / outer
    )


def _lengths(factor: F64, axis: int) -> F64:
    """The norm of each slice along an axis; 1 where it is 0."""
    lengths = np.sqrt(np.square(factor).sum(axis=tuple(other for other in range(factor.ndim) if other != axis)))
    return np.where(lengths > 0, lengths, 1.0)
