"""Several cuts in a row, told in indices of the first model."""

from __future__ import annotations

import numpy as np

from spa_compiler.analysis import analyze
from spa_compiler.passes.cutting import cut
from spa_compiler.passes.trail import Trail
from tests.convnet import convnet


def test_indices_are_those_of_the_first_model() -> None:
    model, trail = convnet(), Trail()
    seen = []
    for units in ([0, 2, 31], [0, 1, 28], [5]):
        analysis = analyze(model)
        seen.append(np.flatnonzero(trail.cut(analysis, {0: units})["w1", 0]).tolist())
        cut(model, analysis, {0: units})
    assert seen == [[0, 2, 31], [0, 1, 2, 3, 30, 31], [0, 1, 2, 3, 9, 30, 31]]


def test_what_changed_its_size_otherwise_is_not_told() -> None:
    model, trail = convnet(), Trail()
    trail.cut(analyze(model), {0: [0]})
    assert ("w1", 0) not in trail.cut(analyze(model), {0: [0]})  # as long as it was: not what the cut left
