"""The proof of a cut: it passes what is right, and stops a run that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spa_compiler import compiler, targets
from spa_compiler.analysis import analyze
from spa_compiler.artifact import cuts
from spa_compiler.calibration.examples import example_feeds
from spa_compiler.errors import VerificationError
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import save, to_proto
from spa_compiler.passes import Change, Context, from_flags, prune_groups
from tests.analysis import architectures
from tests.convnet import convnet

FEEDS = {"x": np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)}


def pruned(recipe: str = "prune-groups{macs=0.5}") -> tuple[Model, Model, Change]:
    before = convnet()
    after = before.copy()
    context = Context(targets.parse("cpu"), np.random.default_rng(0), feeds=[FEEDS])
    return before, after, from_flags(recipe).build()[0].run(after, context)


def spoil(model: Model) -> None:
    weight = model.graph.tensors()["w2"]
    weight.values = weight.values * np.float32(1.01)


def test_a_cut_is_what_is_left_of_the_model() -> None:
    before, after, change = pruned()
    assert cuts.check(before, after, analyze(before), change, [FEEDS]).startswith("prune-groups: verified")


def test_behind_an_operator_that_inference_does_not_know() -> None:
    before = load(architectures.modern_norms())
    inputs = {one.name: tuple(d if isinstance(d, int) else 8 for d in one.shape) for one in before.signature.inputs}
    feeds = [example_feeds(before, inputs, np.random.default_rng(1))]
    after, analysis = before.copy(), analyze(before)
    context = Context(targets.parse("cpu"), np.random.default_rng(0), feeds=feeds)
    change = from_flags("prune-groups{params=0.6,criterion=random,round_to=1}").build()[0].run(after, context)
    masked = {slab.name for removal in change.removed for slab in removal.activations}
    assert masked - {name for name, t in before.graph.tensors().items() if t.shape is not None}
    assert cuts.check(before, after, analysis, change, feeds).startswith("prune-groups: verified")


def test_a_wrong_cut_is_an_error_that_names_the_pass() -> None:
    before, after, change = pruned()
    spoil(after)
    with pytest.raises(VerificationError, match="pass prune-groups: output 'y' of the cut model is wrong") as caught:
        cuts.check(before, after, analyze(before), change, [FEEDS])
    assert caught.value.exit_code == 4


def test_a_cut_model_that_does_not_run_is_an_error() -> None:
    before, after, change = pruned()
    weight = after.graph.tensors()["w2"]
    weight.values = weight.values[:, :-1]
    with pytest.raises(VerificationError, match="the cut model does not run"):
        cuts.check(before, after, analyze(before), change, [FEEDS])


def test_a_model_that_did_not_run_before_is_not_blamed() -> None:
    before, after, change = pruned()
    wrong = {"x": np.zeros((2, 4, 8, 8), np.float32)}
    assert "prune-groups is not verified" in cuts.check(before, after, analyze(before), change, [wrong])


def test_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.onnx"
    save(convnet(), file)
    recipe = from_flags("remove-dead-channels prune-groups{macs=0.7} prune-groups{params=0.5}")
    result = compiler.compile(file, tmp_path / "out", recipe=recipe, shapes=["x=2,3,8,8"], dry_run=True)
    dead, first, second = result.report.passes
    assert dead.removed == ()
    assert first.asked == {"macs": 0.7}
    assert first.got["macs"] <= 0.7
    assert first.removed
    assert second.removed
    right = prune_groups.cut

    def wrong(model: Model, *arguments: object) -> object:
        told = right(model, *arguments)  # type: ignore[arg-type]
        weights = [t for t in model.graph.tensors().values() if t.name.startswith("w2")]
        weights[0].values = weights[0].values * np.float32(1.01)
        return told

    monkeypatch.setattr(prune_groups, "cut", wrong)
    with pytest.raises(VerificationError, match="of the cut model is wrong"):
        compiler.compile(to_proto(convnet()), tmp_path / "out", recipe=from_flags("prune-groups{macs=0.7}"))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.failed-report.json").exists()
