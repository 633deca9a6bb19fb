"""Sums of two sites on GPUs: which of both takes the Add, with the bias and the activation behind it.

A site takes it before anything is chosen (`gpu_sites.py`). Where that one stays dense and the other one becomes a node,
the other one takes it after all: else the Add and what follows would be launches by themselves.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from spa_compiler.kernels.cuda.form import Epilogue
from spa_compiler.placement.gpu_choose import GpuChoice, variants_of
from spa_compiler.placement.gpu_sites import Pair
from spa_compiler.placement.heads import Shapes
from spa_compiler.placement.regions import take_residual
from spa_compiler.runtime.gpu import kernel_layout
from spa_compiler.targets.cuda import Architecture


def handed_over(
    choices: Sequence[GpuChoice], archs: Sequence[Architecture], outputs: Sequence[gs.Variable], known: Shapes
) -> list[GpuChoice]:
    """The choices, with sums of dense sites taken by nodes whose results are added there.

    Args:
        outputs: tensors that must stay (`sites.held`).
        known: shapes of all tensors, for each measured shape.
    """
    dense = {id(c.site.residual) for c in choices if c.form is None and c.site.residual is not None}
    layers: dict[int, Pair] = {}  # as they are now, by what they were
    found = []
    for choice in choices:
        site, form = choice.site, choice.form
        if choice.arrays is not None and form is not None and id(site.output) in dense:
            whole = copy.copy(site)
            take_residual(whole, outputs, known, set())
            epilogue, layout = Epilogue(whole.act, whole.residual is not None), kernel_layout(form.layout)
            k = site.k if choice.pair is None else choice.pair.k
            variants = variants_of(form.form, choice.arrays, archs, form.dtype, layout, epilogue, (site.n, k))
            if whole.residual is not None and variants:
                own = dataclasses.replace(form, epilogue=epilogue, variants=variants)
                choice = dataclasses.replace(choice, site=whole, form=own)
                if choice.pair is not None:
                    layers[id(choice.pair)] = Pair(choice.pair.down, whole)
        found.append(choice)
    return [dataclasses.replace(c, pair=layers.get(id(c.pair), c.pair)) for c in found]
