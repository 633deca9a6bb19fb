"""What is counted to stay is what really stays, in the model that is cut."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from spa_compiler.analysis import analyze
from spa_compiler.analysis.analyze import Analysis
from spa_compiler.analysis.choose import random_units
from spa_compiler.analysis.count import Counter, dead, kept
from spa_compiler.analysis.cut import cut
from spa_compiler.graph.load import load
from tests.analysis import nets
from tests.analysis.told import analysis_of, weighted

RATIOS = (0.1, 0.5, 0.9)
MOVEMENTS = range(6)
TRANSFORMERS = range(4)


def models() -> dict[str, onnx.ModelProto]:
    found = {name: weighted(text) for name, text in nets.ALL.items()}
    found |= {f"movement {seed}": nets.random_movement(seed) for seed in MOVEMENTS}
    return found | {f"transformer {seed}": nets.random_transformer(seed) for seed in TRANSFORMERS}


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
def test_params_are_those_of_the_cut_model(name: str) -> None:
    model = load(MODELS[name])
    analysis = analyze(model)
    counter = Counter(analysis)
    for ratio in RATIOS:
        removed = random_units(analysis, ratio, np.random.default_rng(3))
        tensors = cut(model, analysis, removed).graph.tensors()
        sizes = [math.prod(tensors[parameter].shape) for parameter in analysis.parameters if parameter in tensors]
        assert counter.kept(removed)[0] == sum(sizes)


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_the_cut_model(name: str) -> None:
    model = load(MODELS[name])
    analysis = analyze(model)
    for ratio in RATIOS:
        removed = random_units(analysis, ratio, np.random.default_rng(4))
        smaller = cut(model, analysis, removed)
        again = analyze(smaller, {value.name: shape(analysis, value.name) for value in model.signature.inputs})
        assert kept(analysis, removed)[1] == kept(again, {})[1]


def shape(analysis: Analysis, name: str) -> list[int]:
    return [analysis.facts.algebra.size(axis) or 1 for axis in analysis.facts.axes[name]]


def test_nothing_removed() -> None:
    analysis = analysis_of(nets.MLP)
    params, macs = kept(analysis, {})
    assert params == analysis.params == 6 * 10 + 10 + 10 * 7 + 7 + 7 + 7 * 3 + 3
    assert macs == 6 * 10 + 10 * 7 + 7 * 3


def test_two_groups_share_their_crossing() -> None:
    analysis = analysis_of(nets.MLP)
    assert [group.size for group in analysis.groups] == [10, 7]
    params, macs = kept(analysis, {0: [0, 1], 1: [3]})
    assert params == 6 * 8 + 8 + 8 * 6 + 6 + 6 + 6 * 3 + 3
    assert macs == 6 * 8 + 8 * 6 + 6 * 3


def test_a_whole_group_is_what_the_group_says() -> None:
    """But for the element that stays, the numbers of a group are those of removing it."""
    analysis = analysis_of(nets.GATED)
    (group,) = analysis.groups
    params, macs = kept(analysis, {0: range(group.size)})
    assert analysis.params - params == group.params
    assert (kept(analysis, {})[1] or 0) - (macs or 0) == group.macs


def test_dead_labels() -> None:
    analysis = analysis_of(nets.MLP)
    gone = dead(analysis, {1: [2]})
    assert gone.size == analysis.numbering.free.size + 1
    assert np.flatnonzero(gone).tolist() == [analysis.groups[1].labels[2]]
    assert not dead(analysis, {}).any()
