"""What cuts removed, in the words of the source file: masking that there gives what the cut model computes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.analysis import analyze
from spa_compiler.analysis.mask import mask
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_model, run
from spa_compiler.passes import Context, from_flags
from spa_compiler.report.removed import InSource
from spa_compiler.report.report import PassChange, Removed
from tests.analysis import architectures
from tests.convnet import convnet

FEEDS = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}


def cut(source: Model, recipe: str, feeds: Feeds = FEEDS) -> tuple[Model, list[tuple[Removed, ...]]]:
    model = canonicalize(source, [feeds]).model
    told, in_source = [], InSource(source)
    for each in from_flags(recipe).build():
        analysis = analyze(model)
        context = Context(targets.parse("cpu"), np.random.default_rng(0), analysis, source, [feeds])
        told.append(in_source.tell(analysis, each.run(model, context)))
    return model, told


def masked(source: Model, told: list[tuple[Removed, ...]]) -> Model:
    gone: dict[tuple[str, int], set[int]] = {}
    for removed in (one for entry in told for one in entry):
        for slab in removed.activations:
            gone.setdefault((slab.name, slab.axis), set()).update(slab.indices)
    return mask(source, {key: sorted(indices) for key, indices in gone.items()})


@pytest.mark.parametrize(
    "recipe",
    [
        "prune-groups{macs=0.5}",
        "prune-groups{macs=0.7} prune-groups{params=0.5,criterion=random,round_to=1} prune-groups{channels=0.5}",
    ],
)
def test_masking_the_source_gives_the_cut_model(recipe: str) -> None:
    source = convnet()
    model, told = cut(source, recipe)
    assert not any(node.op == "BatchNormalization" for node in model.graph.nodes)  # the names are not the file's
    want = run(open_model(masked(source, told)), FEEDS)
    got = run(open_model(model), FEEDS)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


def test_weights_that_are_standardized_in_the_graph_are_not_masked_on_their_way() -> None:
    """The file computes its weights; folding did that with whole ones before the cut."""
    source = load(architectures.weight_standardized())
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, 6, 6)).astype(np.float32)}
    model, told = cut(source, "prune-groups{params=0.5,criterion=random,round_to=1}", feeds)
    want, got = run(open_model(masked(source, told)), feeds), run(open_model(model), feeds)
    np.testing.assert_allclose(got["y"], want["y"], rtol=1e-4, atol=1e-4)
    assert {slab.axis for slab in told[0][0].activations} == {1}
    assert any(slab.name == "w15" for slab in told[0][0].parameters)


def test_units_are_those_of_the_source_analysis() -> None:
    source = convnet()
    _, told = cut(source, "prune-groups{channels=0.5,scope=group} prune-groups{channels=0.5,scope=group}")
    units = {group.id: group.units for group in analyze(source).groups}
    seen: dict[int, set[int]] = {}
    for removed in (one for entry in told for one in entry):
        assert seen.setdefault(removed.group, set()).isdisjoint(removed.units)
        seen[removed.group] |= set(removed.units)
        slabs: dict[tuple[str, int], set[int]] = {}
        for unit in removed.units:
            for slab in units[removed.group][unit].parameters:
                slabs.setdefault((slab.name, slab.axis), set()).update(slab.indices)
        assert {(s.name, s.axis): set(s.indices) for s in removed.parameters} == slabs
    assert {group: len(own) for group, own in seen.items()} == {0: 24, 1: 48}
    assert {"gain", "mean"} <= {slab.name for slab in told[0][0].parameters}


def test_it_is_data() -> None:
    _, told = cut(convnet(), "prune-groups{macs=0.5}")
    change = PassChange(name="prune-groups", summary="", removed=told[0])
    assert msgspec.json.decode(msgspec.json.encode(change), type=PassChange) == change
