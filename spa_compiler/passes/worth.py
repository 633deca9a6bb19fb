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

from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Progress, as_it_is
from spa_compiler.graph.model import Model
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


def worth_of_outputs(
    model: Model,
    ops: Sequence[WeightedOp],
    samples: Samples,
    *,
    threads: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Mapping[int, F64]:
    """For each site that others read channel by channel, the worth of its outputs, `[n]`, relative to their mean."""
    found = readers(ops)
    asked = sorted({*found, *(reader for several in found.values() for reader in several)})
    if not asked:
        return {}
    spread: dict[int, F64] = {}
    written: dict[int, F64] = {}
    for collected in as_it_is(model, [ops[site] for site in asked], samples, threads=threads, progress=progress):
        site = asked[collected.site]
        gram, weight = gram_of(collected.fit, 0, centred=True), split(ops[site])[0]
        spread[site] = np.maximum(np.diagonal(gram), 0)
        written[site] = np.einsum("ij,ij->i", weight @ gram, weight)
    worth: dict[int, F64] = {}
    for writer, several in found.items():
        value = np.zeros(ops[writer].n)
        for reader in several:
            energy = np.square(np.asarray(ops[reader].rows(), np.float64)).sum(axis=0) * spread[reader]
            value += energy.reshape(-1, ops[reader].kernel_size).sum(axis=1)
        own = written[writer]
        if own.mean() > 0 and value.mean() > 0:
            value = value / np.maximum(own, _FLOOR * own.mean())
            worth[writer] = np.maximum(value / value.mean(), _FLOOR)
    return worth
