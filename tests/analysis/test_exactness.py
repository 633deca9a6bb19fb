"""Cutting units and masking them compute the same: in every net, for random units of every group at once."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest

from spa_compiler.analysis import analyze
from spa_compiler.graph.load import load
from spa_compiler.graph.session import Feeds, open_session, run
from tests.analysis import nets
from tests.analysis.cutting import cut, masked, removal, with_weights

RATIOS = (0.1, 0.3, 0.6, 0.9)
SEEDS = range(6)
TOLERANCE = 1e-5


def feeds_of(model: onnx.ModelProto, rng: np.random.Generator) -> Feeds:
    shapes = {v.name: [dim.dim_value or 2 for dim in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def outputs(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    onnx.checker.check_model(model, full_check=True)
    return list(run(open_session(model.SerializeToString(), optimize="none"), feeds).values())


def check(text: str, seed: int) -> int:
    """Removes a random share of every group; returns the number of groups."""
    rng = np.random.default_rng(seed)
    model = with_weights(text, seed)
    analysis = analyze(load(model))
    document = json.loads(analysis.to_json())
    ratio = RATIOS[seed % len(RATIOS)]
    chosen = {
        group["id"]: rng.permutation(group["size"])[: min(max(1, int(ratio * group["size"])), group["size"] - 1)]
        for group in document["groups"]
    }
    parameters, activations = removal(document, {key: value.tolist() for key, value in chosen.items()})
    ranks = {key: len(axes) for key, axes in analysis.facts.axes.items()}
    feeds = feeds_of(model, rng)
    small = outputs(cut(model, parameters, activations), feeds)
    reference = outputs(masked(model, activations, ranks), feeds)
    for got, expected in zip(small, reference, strict=True):
        assert got.shape == expected.shape
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.abs(got - expected).max() <= TOLERANCE * scale, f"seed {seed}, units {chosen} of\n{text}"
    return len(document["groups"])


@pytest.mark.parametrize("name", nets.ALL)
def test_cut_equals_masked(name: str) -> None:
    for seed in SEEDS:
        assert check(nets.ALL[name], seed), "there is something to remove in each net"


@pytest.mark.parametrize("block", range(8))
def test_cut_equals_masked_in_random_nets(block: int) -> None:
    seeds = range(10 * block, 10 * block + 10)
    groups = [check(nets.random_convolutional(seed), seed) for seed in seeds]
    assert min(groups) >= 1


@pytest.mark.parametrize("name", nets.ALL)
def test_every_single_unit_counts(name: str) -> None:
    """One unit at a time: its parameters hold what its activations are made of, so no unit may be without either."""
    model = with_weights(nets.ALL[name])
    analysis = analyze(load(model))
    ranks = {key: len(axes) for key, axes in analysis.facts.axes.items()}
    feeds = feeds_of(model, np.random.default_rng(1))
    document = json.loads(analysis.to_json())
    for group in document["groups"]:
        if group["size"] < 2:
            continue
        parameters, activations = removal(document, {group["id"]: [group["size"] // 2]})
        assert parameters
        assert activations
        small = outputs(cut(model, parameters, activations), feeds)
        reference = outputs(masked(model, activations, ranks), feeds)
        for got, expected in zip(small, reference, strict=True):
            np.testing.assert_allclose(got, expected, rtol=TOLERANCE, atol=TOLERANCE * max(1, np.abs(expected).max()))
