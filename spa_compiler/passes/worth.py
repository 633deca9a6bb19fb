"""What an output of one weight is worth to the weights that read it.

    y -> act -> W      worth of y_j = sum_i W[i, j]^2 Var(act(y)_j) / Var(y_j)

An error of y_j relative to its spread arrives as the same relative error of what W makes of channel j, to first order.
So where outputs of one layer compete for zeros, the loss of each counts times this worth; what an output by itself
comes to does not change. Importance that is handed back from the next layer is NISP's (Yu et al., 2018).

On calibration hold-outs with SparseGPT: EfficientNet-Lite0 with 50 % zeros in 1x1 layers (four folds), the divergence
of the predicted classes falls from 0.470 to 0.433; MiniLM with 70 %, the outputs change by 0.458 instead of 0.464.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spa_compiler.calibration.moments import Moments
from spa_compiler.graph.operators import WeightedOp
from spa_compiler.passes.channelwise import sites_behind
from spa_compiler.passes.layerwise import gram_of, split
from spa_compiler.solvers.problem import F64

_FLOOR = 1e-6
"""Of a layer's mean: a spread below it is none, and no output is worth less than it."""


def readers(ops: Sequence[WeightedOp]) -> dict[int, list[int]]:
    """For each site those that read its outputs channel by channel and nothing else; sites that have none are absent.

    Grouped convolutions take no part.
    """
    places = {id(op.node): place for place, op in enumerate(ops)}
    found: dict[int, list[int]] = {}
    for reader, op in enumerate(ops):
        for writer in sorted(sites_behind(op.node.inputs[0], places)):
            if ops[writer].group == 1 and ops[writer].n * op.kernel_size == op.k:
                found.setdefault(writer, []).append(reader)
    return found


class Worth:
    """Gathers, from moments of the model as it is, what the outputs of sites are worth to the sites that read them."""

    def __init__(self, ops: Sequence[WeightedOp]) -> None:
        self._ops = ops
        self._found = readers(ops)
        self._needed = {*self._found, *(reader for several in self._found.values() for reader in several)}
        self._spread: dict[int, F64] = {}
        self._written: dict[int, F64] = {}

    @property
    def missing(self) -> list[int]:
        """Sites whose moments are needed, and were not seen yet."""
        return sorted(self._needed - self._spread.keys())

    def see(self, site: int, moments: Moments) -> None:
        """Takes what it needs of the moments of one site, if anything."""
        if site not in self._needed:
            return
        gram, weight = gram_of(moments, 0, centred=True), split(self._ops[site])[0]
        self._spread[site] = np.maximum(np.diagonal(gram), 0)
        self._written[site] = np.einsum("ij,ij->i", weight @ gram, weight)

    def of_outputs(self) -> Mapping[int, F64]:
        """For each site that others read channel by channel, what its outputs are worth, `[n]`, over their mean."""
        worth: dict[int, F64] = {}
        for writer, several in self._found.items():
            value = np.zeros(self._ops[writer].n)
            for reader in several:
                energy = np.square(np.asarray(self._ops[reader].rows(), np.float64)).sum(axis=0) * self._spread[reader]
                value += energy.reshape(-1, self._ops[reader].kernel_size).sum(axis=1)
            own = self._written[writer]
            if own.mean() > 0 and value.mean() > 0:
                value = value / np.maximum(own, _FLOOR * own.mean())
                worth[writer] = np.maximum(value / value.mean(), _FLOOR)
        return worth
