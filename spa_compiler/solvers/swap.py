"""Better places for the zeros: exchanges of a kept and a removed unit, judged by the loss after the best refit.

Per group of R outputs that share a support S (one output; the R rows of a block), the least damped loss on S is

    f(S) = min over w, 0 outside of S, of (w0 - w) G (w0 - w)^T        w = its minimizer, g = (w0 - w) G its residual

Sweeping the pivots S turns [G | G w0] into a table of all that an exchange needs (A = (G_SS)^-1):

    T_SS = -A       T_Sq = A G_Sq       T_qq = G_qq - G_qS A G_Sq        z_S = w_S       z_q = g_q

    f(S - p + q) - f(S) = sum_r z_p^2 / A_pp - sum_r (z_q + T_pq z_p / A_pp)^2 / (T_qq + T_pq^2 / A_pp)

This is exact: p leaves, q enters and all other weights are refitted, for all R outputs at once. The whole table has
k^2 entries per group, so each round takes a part of it: the kept units that cost least to remove (exact: z_p^2 / A_pp)
and the removed ones that promise most (z_q^2 / G_qq). Within the part, the best exchange is made and the table swept
on, until none helps; A follows by updates of low rank, and the next round starts from new candidates. The loss falls
with every exchange. Running out of candidates ends the search, not optimality: an exchange outside may be left.

The search of CHITA (Benbaki et al., "Fast as CHITA: Neural Network Pruning with Combinatorial Optimization", 2023) is
of this kind, over the Fisher matrix of per-sample gradients, which an ONNX graph does not have; here the quadratic is
the layer's own output error, and the refit, which CHITA does at the end, is part of every comparison.

Counts stay as they are: in each output (unstructured, fan-in), in each row of blocks (R x 1), in each group of inputs
(N:M). Per group of outputs, the start costs O(|S|^3) and a round O(|S|^2) times the candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dpotrf, dpotri

from spa_compiler.errors import UsageError
from spa_compiler.solvers.least_squares import refit
from spa_compiler.solvers.problem import DAMPING, F64, Mask, Problem, Solution, Zeros
from spa_compiler.solvers.regions import exchangeable

ROUNDS = 6
WIDTH = 32
"""Candidates for removal, and as many for entry, per group of outputs and round."""

_BYTES = 1 << 26
"""Of the inverses that are held together, or one if that is larger: their groups of outputs are worked on at once."""

_BATCH = 256
"""Groups at once at most."""

_GAIN = 1e-9
"""Of what the removal costs: the least that an exchange has to win, above what rounding makes of nothing."""

Index = NDArray[np.intp]


def swap(
    problem: Problem,
    mask: Mask,
    zeros: Zeros,
    rounds: int = ROUNDS,
    width: int = WIDTH,
    damping: float = DAMPING,
) -> Solution:
    """The refitted weights on a support that is no worse than `mask`; it has as many zeros, in the same pattern.

    Args:
        problem: the layer.
        mask: `[n, k]`, follows the pattern.
        zeros: its pattern; the share of zeros is that of `mask`.
        rounds: at most. A group of outputs in which a round changes nothing is done.
        width: candidates on each side.
        damping: of the loss that is lowered.

    Raises:
        UsageError: the pattern's units are more than one input wide.
        numpy.linalg.LinAlgError: `damping` is 0 and the Gram matrix is singular.
    """
    pattern = zeros.pattern
    grouped = pattern.sparsity is not None
    k = len(problem.gram)
    if not exchangeable(pattern):
        raise UsageError(
            f"zeros in the pattern {pattern.name} cannot be exchanged",
            fix="Those of unstructured, fan-in, N:M, block:Rx1 and a linear layer's channels can be",
        )
    gram = problem.damped(damping)
    # Weights of inputs that are always 0 have no say: without this, `damped` would give them one.
    weight = np.where(np.diagonal(problem.gram) > 0, problem.weight, 0.0)
    mask = np.array(mask)
    height = pattern.rows
    groups = np.arange(k) // pattern.cols if grouped else np.zeros(k, np.intp)
    kept = np.count_nonzero(mask[::height], axis=1)
    firsts = np.flatnonzero((kept > 0) & (kept < k)) * height
    count = max(1, min(_BATCH, _BYTES // (8 * int(kept.max(initial=1)) ** 2)))
    for start in range(0, len(firsts), count):
        some = [_Outputs(gram, weight[at : at + height], mask[at]) for at in firsts[start : start + count]]
        _search(gram, some, groups, rounds, width)
        for at, outputs in zip(firsts[start : start + count], some, strict=True):
            mask[at : at + height] = outputs.mask
    return Solution(refit(problem, mask, damping), mask)


def _search(gram: F64, some: list[_Outputs], groups: Index, rounds: int, size: int) -> None:
    """All rounds on these groups of outputs."""
    for _ in range(rounds):
        _fit(gram, some)
        tables = _Tables([outputs.candidates(groups, size) for outputs in some], some, groups)
        tables.exchange()
        moves = tables.moves()
        for outputs, (leave, enter) in zip(some, moves, strict=True):
            if len(leave):
                outputs.replace(leave, enter)
        some = [outputs for outputs, (leave, _) in zip(some, moves, strict=True) if len(leave)]
        if not some:
            return


def _fit(gram: F64, some: list[_Outputs]) -> None:
    """Weights and residuals from the inverses: one step of iterative refinement, exact up to rounding."""
    for last in (False, True):
        wrong = np.concatenate([outputs.weight - outputs.fitted for outputs in some])
        residuals = wrong @ gram
        at = 0
        for outputs in some:
            outputs.residual = residuals[at : at + len(outputs.weight)]
            at += len(outputs.weight)
            if not last:
                outputs.fitted[:, outputs.support] += outputs.residual[:, outputs.support] @ outputs.inverse


class _Outputs:
    """A group of outputs that share a support.

    Args:
        gram: damped `[k, k]`.
        weight: W0 of these outputs, `[r, k]`.
        mask: `[k]`, neither all True nor all False.

    Attributes:
        mask: of the support, `[k]`.
        support: its inputs; in any order, which is that of `inverse`.
        inverse: A `[|S|, |S|]`.
        fitted: w `[r, k]`.
        residual: g `[r, k]`.
    """

    def __init__(self, gram: F64, weight: F64, mask: NDArray[np.bool_]) -> None:
        self.weight, self.mask = weight, mask.copy()
        self.support = np.flatnonzero(mask)
        self.fitted = np.where(mask, weight, 0.0)
        self.residual = np.zeros_like(weight)
        self._gram = gram
        # A transposed C array is Fortran's, which LAPACK overwrites in place instead of copying it.
        part = gram.take(self.support, 0).take(self.support, 1).T
        factor, info = dpotrf(part, lower=True, clean=False, overwrite_a=True)
        if info:
            raise np.linalg.LinAlgError("the Gram matrix is singular: it needs damping")
        inverse, _ = dpotri(factor, lower=True, overwrite_c=True)
        lower = np.tril(inverse)
        self.inverse = lower + np.tril(lower, -1).T

    def candidates(self, groups: Index, size: int) -> tuple[Index, Index]:
        """Up to `size` kept inputs that cost little to remove, and up to `size` removed ones that promise much.

        Where inputs are in groups that keep their counts, whole groups: those with the best pair of the two.
        """
        cost = np.full(len(self.mask), np.inf)
        cost[self.support] = np.square(self.fitted[:, self.support]).sum(axis=0) / np.diagonal(self.inverse)
        promise = np.square(self.residual).sum(axis=0) / np.diagonal(self._gram)
        promise[self.mask] = -np.inf
        if groups[-1] == 0:
            leave = np.argsort(cost, kind="stable")[: min(size, len(self.support))]
            enter = np.argsort(-promise, kind="stable")[: min(size, len(cost) - len(self.support))]
            return np.sort(leave), np.sort(enter)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        least, most = np.minimum.reduceat(cost, starts), np.maximum.reduceat(promise, starts)
        ends = np.append(starts[1:], len(groups))
        order = np.argsort(least - most, kind="stable")[: max(1, 2 * size // int((ends - starts).max()))]
        inside = np.concatenate([np.arange(starts[group], ends[group]) for group in np.sort(order)])
        return inside[self.mask[inside]], inside[~self.mask[inside]]

    def table(self, inside: Index, outside: Index) -> tuple[F64, F64]:
        """T `[m, m]` and z `[m, r]` of the kept inputs `inside` and then the removed ones `outside`."""
        a = len(inside)
        slots = self._slots(inside)
        reach = self._gram[np.ix_(self.support, outside)]
        moved = self.inverse @ reach
        table = np.empty((a + len(outside), a + len(outside)))
        table[:a, :a] = -self.inverse[np.ix_(slots, slots)]
        table[:a, a:] = moved[slots]
        table[a:, :a] = moved[slots].T
        table[a:, a:] = self._gram[np.ix_(outside, outside)] - reach.T @ moved
        return table, np.concatenate([self.fitted[:, inside].T, self.residual[:, outside].T])

    def replace(self, leave: Index, enter: Index) -> None:
        """Exchanges as many inputs, in the support and in its inverse; `fitted` is approximate then."""
        slots = self._slots(leave)
        across = self.inverse[slots]
        self.inverse -= across.T @ np.linalg.solve(across[:, slots], across)
        self.inverse[slots] = 0.0
        self.inverse[:, slots] = 0.0
        reach = self._gram[np.ix_(self.support, enter)]
        moved = self.inverse @ reach
        new = np.linalg.inv(self._gram[np.ix_(enter, enter)] - reach.T @ moved)
        step = moved @ new
        self.inverse += step @ moved.T
        self.inverse[:, slots] = -step
        self.inverse[slots] = -step.T
        self.inverse[np.ix_(slots, slots)] = new
        self.support[slots] = enter
        self.mask[leave], self.mask[enter] = False, True
        self.fitted[:, leave] = 0.0

    def _slots(self, inputs: Index) -> Index:
        """Where `inputs` are in the support."""
        slots = np.empty(len(self.mask), np.intp)
        slots[self.support] = np.arange(len(self.support))
        return np.asarray(slots[inputs])


class _Tables:
    """Parts of the tables of several groups of outputs, kept inputs first; fewer candidates than places leave zeros.

    Args:
        candidates: kept and removed inputs for each.
        some: the groups of outputs.
        groups: an exchange stays within one, `[k]`.
    """

    def __init__(self, candidates: list[tuple[Index, Index]], some: list[_Outputs], groups: Index) -> None:
        count = len(some)
        kept = max(len(inside) for inside, _ in candidates)
        size = kept + max(len(outside) for _, outside in candidates)
        self._kept = kept
        self._tables = np.zeros((count, size, size))
        self._sides = np.zeros((count, size, max(len(outputs.weight) for outputs in some)))
        self._places = np.full((count, size), -1, np.intp)
        for at, ((inside, outside), outputs) in enumerate(zip(candidates, some, strict=True)):
            used = np.concatenate([np.arange(len(inside)), kept + np.arange(len(outside))])
            table, side = outputs.table(inside, outside)
            self._tables[at, used[:, None], used] = table
            self._sides[at, used, : side.shape[1]] = side
            self._places[at, used] = np.concatenate([inside, outside])
        self._start = self._places.copy()
        # An exchange stays within its group, so the group of a position does not change.
        group = np.where(self._places < 0, -1, groups[self._places])
        self._barred = group[:, :kept, None] != group[:, None, kept:]
        self._barred |= (group < 0)[:, :kept, None]

    def exchange(self) -> None:
        """The best exchange of each table, again and again until none of its exchanges helps."""
        active = np.arange(len(self._tables))
        a = self._kept
        for _ in range(self._tables.shape[1]):
            table, side = self._tables[active], self._sides[active]
            gains, cost = _gains(table, side, a)
            gains[self._barred[active]] = np.inf
            flat = gains.reshape(len(active), -1)
            best = flat.argmin(axis=1)
            leave, enter = np.divmod(best, table.shape[1] - a)
            each = np.arange(len(active))
            helps = flat[each, best] < -_GAIN * cost[each, leave]
            if not helps.any():
                return
            active, leave, enter = active[helps], leave[helps], a + enter[helps]
            table, side = table[helps], side[helps]
            _sweep(table, side, leave, -1)
            _sweep(table, side, enter, 1)
            each = np.arange(len(active))
            for array in (table, side, table.transpose(0, 2, 1)):
                array[each, leave], array[each, enter] = array[each, enter], array[each, leave]
            self._tables[active], self._sides[active] = table, side
            places = self._places
            places[active, leave], places[active, enter] = places[active, enter], places[active, leave]

    def moves(self) -> list[tuple[Index, Index]]:
        """Inputs that left and inputs that entered, for each group of outputs; those that came back are in neither."""
        moves = []
        for before, after in zip(self._start[:, : self._kept], self._places[:, : self._kept], strict=True):
            moves.append((np.setdiff1d(before, after), np.setdiff1d(after, before)))
        return moves


def _gains(table: F64, side: F64, kept: int) -> tuple[F64, F64]:
    """What each exchange does to the loss, `[b, p, q]`: p leaves, q enters; and what each removal costs, `[b, p]`."""
    diagonal = np.einsum("bii->bi", table)
    # A_pp and T_qq are positive; where a table has no such candidate, 1 stands for them.
    own = np.where(diagonal[:, :kept] < 0, -diagonal[:, :kept], 1.0)
    new = np.where(diagonal[:, kept:] > 0, diagonal[:, kept:], 1.0)
    energy = np.square(side).sum(axis=2)
    cost = energy[:, :kept] / own
    step = table[:, :kept, kept:] / own[:, :, None]
    top = side[:, :kept] @ side[:, kept:].transpose(0, 2, 1)
    top += step * (energy[:, :kept, None] / 2)
    top *= 2 * step
    top += energy[:, None, kept:]
    step *= table[:, :kept, kept:]
    step += new[:, None, :]
    top /= step
    return np.subtract(cost[:, :, None], top, out=top), cost


def _sweep(table: F64, side: F64, pivot: Index, sign: int) -> None:
    """Sweeps one pivot of each table in (`sign` 1) or out (-1), in place."""
    each = np.arange(len(table))
    row = table[each, pivot]
    value = row[each, pivot][:, None]
    own = side[each, pivot]
    table -= row[:, :, None] * (row / value)[:, None, :]
    side -= row[:, :, None] * (own / value)[:, None, :]
    row = sign * row / value
    row[each, pivot] = -1 / value[:, 0]
    table[each, pivot] = row
    table[each, :, pivot] = row
    side[each, pivot] = sign * own / value
