"""`prune-groups`: graphs before and after, budgets, masks, what is taken, and what is refused."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.analysis import analyze
from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import open_model, run
from spa_compiler.passes import Change, Context, budget, from_command_line, from_flags, prune_groups
from spa_compiler.passes.prune_groups import PruneGroups, PruneGroupsOptions
from tests.convnet import convnet
from tests.onnx_text import assert_becomes, assert_unchanged, model_from, text_of


def context(seed: int = 0, original: Model | None = None) -> Context:
    return Context(targets.parse("cpu:x86-64-v4"), np.random.default_rng(seed), original=original)


def prune(seed: int = 0, original: Model | None = None, **options: object) -> Callable[[Model], Change]:
    chosen = PruneGroupsOptions(**options)  # type: ignore[arg-type]
    return lambda model: PruneGroups(chosen).run(model, context(seed, original))


# h has units with squares 1, 100, 4, 81 in A, a and B together.
TWO_LAYERS = """agraph (float[2, 1] x) => (float[2, 1] y)
<float[1, 4] A = {1, 10, 2, 9}, float[4] a = {0, 0, 0, 0}, float[4, 1] B = {0, 0, 0, 0}, float[1] b = {5}>
{
    [one] h = Gemm (x, A, a)
    [act] r = Relu (h)
    [two] y = Gemm (r, B, b)
}"""

HALF = """agraph (float[2, 1] x) => (float[2, 1] y)
<float[1, 2] A = {10, 9}, float[2] a = {0, 0}, float[2, 1] B = {0, 0}, float[1] b = {5}>
{
    [one] h = Gemm (x, A, a)
    [act] r = Relu (h)
    [two] y = Gemm (r, B, b)
}"""


@pytest.mark.parametrize("option", ["channels", "macs"])
@pytest.mark.parametrize("criterion", ["auto", "l1", "l2"])
def test_the_least_units_go(option: str, criterion: str) -> None:
    assert_becomes(prune(criterion=criterion, **{option: 0.5}), TWO_LAYERS, HALF)


def test_all_that_is_asked_to_stay_stays() -> None:
    assert_unchanged(prune(macs=1.0), TWO_LAYERS)
    change = prune(macs=1.0)(model_from(TWO_LAYERS))
    assert change.removed == ()
    assert change.summary == "nothing removed"


def test_what_is_told() -> None:
    change = prune(params=0.6)(model_from(TWO_LAYERS))  # 13 parameters, of which 3 go with each unit
    assert change.summary == (
        "50.0% of the MACs and 53.8% of the parameters remain (asked: 60.0% of the parameters); "
        "2 units of 1 group removed (l2, scope global)"
    )
    assert change.asked == {"params": 0.6}
    assert change.got == {"macs": 0.5, "params": 7 / 13, "channels": 0.5}
    assert not change.exact
    assert change.warnings == ()
    (removal,) = change.removed
    assert removal.units == (0, 2)
    assert {(s.name, s.axis, tuple(s.indices)) for s in removal.parameters} == {
        ("A", 1, (0, 2)),
        ("a", 0, (0, 2)),
        ("B", 0, (0, 2)),
    }
    assert {(s.name, s.axis) for s in removal.activations} == {("h", 1), ("r", 1)}


def test_at_least_one_unit_stays_and_the_shortfall_is_told() -> None:
    model = model_from(TWO_LAYERS)
    change = prune(macs=0.01)(model)
    assert change.got["macs"] == 0.25
    assert change.warnings[0].startswith(
        "asked to keep 1.0% of the MACs, kept 25.0%: more is not possible with min_keep=0.1"
    )


def test_a_shortfall_names_the_pins_that_hold_the_rest() -> None:
    change = prune(params=0.1)(model_from(TWO_LAYERS.replace("[2, 1] y", "[2, 1] y, float[2, 4] h")))
    assert change.removed == ()
    assert "kept 100.0%" in change.warnings[0]
    assert "nothing in it can be removed" in change.warnings[0]
    assert "graph output, interface" in change.warnings[0]


def widths(model: Model) -> tuple[int, int]:
    tensors = model.graph.tensors()
    return tensors["w1"].shape[0], tensors["w2"].shape[0]


@pytest.mark.parametrize("asked", [0.9, 0.6, 0.3, 0.1])
@pytest.mark.parametrize("option", ["channels", "macs", "params"])
@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("steps", [1, 3])
def test_budgets_are_met_closely_and_never_exceeded(asked: float, option: str, scope: str, steps: int) -> None:
    model = convnet()
    options = {option: asked, "scope": scope, "steps": steps, "round_to": 1, "min_keep": 0.05}
    change = prune(**options)(model)
    assert change.warnings == ()
    assert asked - 0.04 <= change.got[option] <= asked + 1e-9
    run(open_model(model), {"x": np.zeros((2, 3, 8, 8), np.float32)})


def test_kept_counts_are_what_kernels_like() -> None:
    for asked in (0.8, 0.6, 0.4, 0.2):
        model = convnet()
        assert prune(macs=asked)(model).got["macs"] <= asked
        assert all(width % 16 == 0 for width in widths(model))
    for asked, step in ((0.1, 4), (0.01, 1)):  # with whole vectors 14 % remain at least
        model = convnet()
        assert prune(macs=asked, min_keep=0)(model).got["macs"] <= asked
        assert all(width % step == 0 for width in widths(model))


@pytest.mark.parametrize("asked, step", [(0.6, 16), (0.3, 16), (0.1, 8), (0.01, 1)])
def test_kept_counts_are_what_tensor_cores_like(asked: float, step: int) -> None:
    """Layers of 32 and 64 channels: 16 of them where the budget allows, and 64 of wider ones."""
    model = convnet()
    options = PruneGroupsOptions(macs=asked, min_keep=0)
    gpu = Context(targets.parse("cuda:sm_90"), np.random.default_rng(0))
    assert PruneGroups(options).run(model, gpu).got["macs"] <= asked
    assert all(width % step == 0 for width in widths(model))


def test_wide_layers_are_cut_to_whole_tiles_of_tensor_cores() -> None:
    allowed = budget._allowed(768, 1, *prune_groups._TILES[0])
    assert allowed.tolist() == list(range(64, 769, 64))


def test_round_to() -> None:
    model = convnet()
    prune(macs=0.5, round_to=5)(model)
    assert all(width % 5 == 0 or width in (32, 64) for width in widths(model))


def test_every_group_keeps_the_same_share_with_scope_group() -> None:
    model = convnet()
    prune(channels=0.5, scope="group")(model)
    assert widths(model) == (16, 32)


def test_min_keep_holds_for_every_axis() -> None:
    model = convnet()
    prune(macs=0.01, min_keep=0.5, round_to=1)(model)
    assert widths(model) == (16, 32)
    model = convnet()
    prune(macs=0.01, min_keep=3, round_to=1)(model)
    assert widths(model) == (3, 3)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"targets": ("conv1",)}, (4, 64)),
        ({"targets": ("w1",)}, (4, 64)),
        ({"targets": ("n*",)}, (4, 64)),
        ({"ignore": ("w1",)}, (32, 7)),
        ({"targets": ("channel",), "ignore": ("conv2",)}, (4, 64)),
        ({"granularity": ("channel",)}, (4, 7)),
        ({"targets": ("w2",)}, (4, 7)),
    ],
)
def test_what_is_taken(options: dict[str, tuple[str, ...]], left: tuple[int, int]) -> None:
    model = convnet()
    change = prune(macs=0.001, **options)(model)
    assert widths(model) == left
    if "ignore" in options:
        assert "ignore" in change.warnings[0]


def test_names_that_match_nothing() -> None:
    with pytest.raises(UsageError, match=r"'conv4' matches no tensor.* Did you mean conv"):
        prune(macs=0.5, targets=("conv4",))(convnet())
    with pytest.raises(UsageError, match="no group of 'head'"):
        prune(macs=0.5, granularity=("head",))(convnet())


def test_the_result_repeats_for_a_seed() -> None:
    for criterion in ("l2", "random"):
        texts = set()
        for _ in range(2):
            model = convnet()
            prune(seed=3, macs=0.5, criterion=criterion)(model)
            texts.add(text_of(model))
        assert len(texts) == 1
    one, other = convnet(), convnet()
    prune(seed=1, macs=0.5, criterion="random")(one)
    prune(seed=2, macs=0.5, criterion="random")(other)
    assert text_of(one) != text_of(other)


def test_groups_of_another_scale_are_as_important() -> None:
    plain, scaled = convnet(), convnet()
    for name in ("w2", "b2", "w3"):
        tensor = scaled.graph.tensors()[name]
        tensor.values = tensor.values * np.float32(1000 if name == "w3" else 1)
    for model in (plain, scaled):
        prune(channels=0.5, round_to=1)(model)
    assert abs(widths(plain)[0] - widths(scaled)[0]) <= 4


def test_nan_is_refused() -> None:
    model = convnet()
    values = model.graph.tensors()["w2"].values.copy()
    values[3, 1] = np.nan
    model.graph.tensors()["w2"].values = values
    with pytest.raises(ModelError, match="'w2' has a NaN"):
        prune(macs=0.5)(model)


def saved(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_masks_of_parameters(tmp_path: Path) -> None:
    keep = np.array([0, 1, 0, 1], bool)
    for masks in (
        {"A": keep[None, :], "a": keep, "B": keep[:, None]},
        {"A:1": keep},
        {"A:-1": keep.astype(np.float32), "B:0": keep.astype(np.int8)},
    ):
        assert_becomes(prune(masks=saved(tmp_path / "m.npz", **masks)), TWO_LAYERS, HALF)


def test_units_that_are_masked_in_part_stay(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.npz", **{"A:1": np.array([0, 1, 0, 1]), "B:0": np.array([0, 1, 1, 1])})
    model = model_from(TWO_LAYERS)
    change = prune(masks=path)(model)
    assert change.removed[0].units == (0,)
    assert change.asked == {}
    assert "1 units are masked in part only" in change.warnings[0]


def test_masks_leave_one(tmp_path: Path) -> None:
    change = prune(masks=saved(tmp_path / "m.npz", a=np.zeros(4)))(model_from(TWO_LAYERS))
    assert change.removed[0].units == (1, 2, 3)
    assert "1 masked units stay" in change.warnings[0]
    change = prune(masks=saved(tmp_path / "m.npz", a=np.ones(4)))(model_from(TWO_LAYERS))
    assert change.warnings == ("the masks keep everything",)


def test_masks_speak_of_the_model_as_it_was_loaded(tmp_path: Path) -> None:
    # BatchNormalization's parameters are in the file, but no longer in the model that is cut.
    original, folded = convnet(), convnet()
    graph = folded.graph
    relu = next(node for node in graph.nodes if node.op == "Relu")
    relu.inputs[0] = next(node for node in graph.nodes if node.op == "Conv").outputs[0]
    graph.cleanup()
    keep = np.arange(32) % 2
    change = prune(masks=saved(tmp_path / "m.npz", gain=keep), original=original)(folded)
    assert change.removed[0].units == tuple(range(0, 32, 2))
    assert widths(folded) == (16, 64)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"AA": np.ones(4)}, "no parameter 'AA'. Did you mean"),
        ({"AA:0": np.ones(4)}, "no parameter 'AA'"),
        ({"A": np.ones(4)}, r"'A' has shape \[4\], \[1, 4\] is expected"),
        ({"A:1": np.ones(3)}, r"'A:1' has shape \[3\]"),
        ({"A:2": np.ones(3)}, "'A' has 2 axes"),
        ({"a": np.full(4, 0.5)}, "other values than 0 and 1"),
        ({"a": np.array(["x"] * 4)}, "other values than 0 and 1"),
        ({"a": np.array([None] * 4)}, "cannot be read"),
    ],
)
def test_masks_that_do_not_fit(tmp_path: Path, masks: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune(masks=saved(tmp_path / "m.npz", **masks))(model_from(TWO_LAYERS))


def test_damaged_masks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez_compressed(path, A=np.random.default_rng(0).random((1, 4)) > 0.5)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for value in (0xFF, 0x28):  # an open bracket, for the header
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with contextlib.suppress(UsageError):
                prune(masks=str(path))(model_from(TWO_LAYERS))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A", b"text")
    with pytest.raises(UsageError, match="'A' is no array"):
        prune(masks=str(path))(model_from(TWO_LAYERS))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("A.npy", b"\x93NUMPY\x01\x00\x04\x00{ (\n")
    with pytest.raises(UsageError, match="the masks cannot be read"):
        prune(masks=str(path))(model_from(TWO_LAYERS))


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no zip")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(UsageError, match="the masks cannot be read"):
            prune(masks=str(tmp_path / name))(model_from(TWO_LAYERS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not said what should remain"),
        ({"macs": 0.5, "params": 0.5}, "macs and params contradict"),
        ({"macs": 0.5, "masks": "m.npz"}, "macs and masks contradict"),
        ({"macs": 0.0}, "macs"),
        ({"channels": 1.5}, "channels"),
        ({"macs": 0.5, "steps": 0}, "steps"),
    ],
)
def test_options_that_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneGroups(PruneGroupsOptions(**options))  # type: ignore[arg-type]


def test_on_the_command_line() -> None:
    (step,) = from_command_line(prune=0.3).passes
    assert step.name == "prune-groups"
    assert step.options == PruneGroupsOptions(macs=0.7)
    (step,) = from_flags("prune-groups{params=0.5,scope=group,targets=[a,b],granularity=head}").passes
    assert step.options == PruneGroupsOptions(params=0.5, scope="group", targets=("a", "b"), granularity=("head",))


def test_groups_are_those_of_the_analysis() -> None:
    model = convnet()
    groups = analyze(model).groups
    change = prune(channels=0.5)(model)
    assert {one.group for one in change.removed} <= {group.id for group in groups}


NORMED = """agraph (float[2, 1] x) => (float[2, 1] y)
<float[1, 4] A = {1, 10, 2, 9}, float[4] gain = {1, 1, 1, 1}, float[4] shift = {0, 0, 0, 0}, float[4, 1] B = {0, 0, 0, 0}>
{
    [one] h = MatMul (x, A)
    [norm] n = LayerNormalization (h, gain, shift)
    [two] y = MatMul (n, B)
}"""


def test_norms_count_what_was_removed_as_zeros() -> None:
    model = model_from(NORMED)
    change = prune(channels=0.5, round_to=1)(model)
    assert [node.op for node in model.graph.nodes] == ["MatMul", "Pad", "LayerNormalization", "Slice", "MatMul"]
    assert not change.unlike


def test_norms_of_what_is_left_alone_are_another_model() -> None:
    model = model_from(NORMED)
    change = prune(channels=0.5, round_to=1, statistics="kept")(model)
    assert [node.op for node in model.graph.nodes] == ["MatMul", "LayerNormalization", "MatMul"]
    assert "no masked model" in change.unlike


def test_masks_of_what_is_pinned_are_told(tmp_path: Path) -> None:
    text = """agraph (float[2, 3] x) => (float[2, 4] y)
<float[3, 4] A = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}>
{
    [one] y = MatMul (x, A)
}"""
    masks = saved(tmp_path / "m.npz", **{"A:1": np.array([0, 0, 1, 1])})
    change = prune(masks=masks)(model_from(text))
    assert change.removed == ()
    assert change.warnings == ("masked, but pinned: 2 indices of 'A' axis 1 (graph output: interface)",)
