"""A model as it would come from a pruner: the same graph, with zeros in the weights of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spa_compiler import targets
from spa_compiler.graph.load import load
from spa_compiler.graph.save import save
from spa_compiler.passes import Context, from_flags


def with_zeros(source: Path, target: Path, sparsity: float, pattern: str) -> None:
    """Writes `source` with the smallest weights of each layer at zero; nothing else of the graph is touched.

    The layers are those that the pass `sparsify` takes by default: not the first convolution, not depthwise ones, not the
    classifier.
    """
    model = load(source)
    (zeros,) = from_flags(f"sparsify{{sparsity={sparsity},pattern={pattern}}}").build()
    zeros.run(model, Context(targets.parse("cpu"), np.random.default_rng(0)))
    save(model, target)
