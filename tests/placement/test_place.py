"""Whole models: every plan is raced, the fastest that loses at no shape wins, dense wins ties."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from spa_compiler.errors import ModelError
from spa_compiler.graph import shapes as graph_shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.session import open_session, run
from spa_compiler.kernels.rx1 import Blocks
from spa_compiler.placement import contests, timer
from spa_compiler.placement import place as placing
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.place import (
    EVERY,
    FACTORS,
    FEW_NODES_US,
    PORTABLE,
    REGIONS,
    SINGLE,
    SOURCE,
    STRONG,
    WHOLE,
    Placed,
    place,
)
from spa_compiler.placement.records import Records
from spa_compiler.targets import host, parse
from tests.networks import mlp, network, weight
from tests.placement.test_attention import encoder

WIDTH = 64


class Stopwatch:
    """Made-up times for sites and for whole models; counts how often it was asked.

    Unless `real`, libraries are empty files and sessions compute nothing.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, site: float, *races: Mapping[str, float], real: bool = False
    ) -> None:
        self.sites, self.races = 0, 0
        self._site, self._races = site, races
        self.time_sites = self._time_sites
        monkeypatch.setattr(
            timer, "interleave", lambda calls, *_: (self._time_models if PORTABLE in calls else self.time_sites)(calls)
        )
        for module in () if real else (contests, placing):
            monkeypatch.setattr(module, "link", lambda regions, mcpu, path: path.write_text(repr(regions)))
        if not real:
            monkeypatch.setattr(timer, "open_session", lambda *_, **__: self)

    def run(self, names: None, feeds: object) -> None:
        """A session that computes nothing."""

    def _time_sites(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        self.sites += 1
        return {n: _timing(100 if n == "dense" else 100 / self._site) for n in calls}

    def _time_models(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        race = self._races[self.races % len(self._races)]
        self.races += 1
        for call in calls.values():
            call()
        return {n: _timing(race.get(n, 100)) for n in calls}


def _timing(us: float) -> Timing:
    return Timing(us, us * 0.9, us * 1.1, 12)


def placed(
    folder: Path,
    density: float = 0.1,
    target: str = "cpu",
    tokens: tuple[int, ...] = (16,),
    replay: bool = False,
    proto: onnx.ModelProto | None = None,
    keep_source: bool = False,
    shapes: tuple[tuple[int, ...], ...] = (),
) -> Placed:
    source = folder / "source.onnx"
    onnx.save(proto or mlp(density, WIDTH), source)
    loaded = load(source)
    model = loaded.copy()
    graph_shapes.infer(model)
    measured, odd = shapes or ((1, tokens[0], WIDTH), (2, 3, WIDTH))
    feeds = [{"x": np.ones(measured, np.float32)}]
    feeds += [{"x": np.ones((1, t, WIDTH), np.float32)} for t in tokens[1:]]
    workspace = next(p for i in itertools.count() if not (p := folder / f"work{i}").exists())
    workspace.mkdir()
    book = Records(folder / "records.sqlite", {"cpu": "this one"})
    try:
        return place(
            model,
            source,
            feeds,
            parse(target),
            1,
            book,
            workspace,
            lambda *_: None,
            np.random.default_rng(0),
            odd=[{"x": np.ones(odd, np.float32)}],
            replay=replay,
            original=loaded if keep_source else None,
        )
    finally:
        book.close()


def folders(result: Placed) -> set[str]:
    return {p.name for p in result.plan.folder.parent.iterdir()}


def test_the_fastest_plan_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, 5.0, {SINGLE: 50, REGIONS: 25}, real=True)
    result = placed(tmp_path)
    assert result.plan.name == REGIONS
    assert result.gaining == list(result.plan.forms)
    assert result.reason.startswith("regions: 4.00x over ")
    assert len(result.plan.regions) == 1
    assert folders(result) == {"portable", "regions"}
    session = open_session(result.plan.file, library=result.plan.library)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)}
    want = run(open_session(tmp_path / "source.onnx"), feeds)["y"]
    np.testing.assert_allclose(run(session, feeds)["y"], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_single_sites_win_when_regions_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, 5.0, {SINGLE: 50, REGIONS: 60})
    result = placed(tmp_path)
    assert result.plan.name == SINGLE
    assert len(result.plan.regions) == 2
    assert folders(result) == {"portable", "single-sites"}


def convolutions() -> onnx.ModelProto:
    """Two pointwise convolutions of different sizes, another operator in between."""
    rng = np.random.default_rng(0)
    w, v = (np.ascontiguousarray(weight(rng, k, n, 0.1).T.reshape(n, k, 1, 1)) for k, n in ((16, 40), (40, 24)))
    text = 'g (float["b",16,8,8] x) => (float["b",24,8,8] y) { a = Conv(x, w) t = Tanh(a) y = Conv(t, v) }'
    return network(text, w=w, v=v)


@pytest.mark.parametrize(("gains", "expected"), [((1.3, 4.0), ["y"]), ((4.0, 4.0), None), ((1.3, 1.3), None)])
def test_the_strongest_convolutions_alone_are_a_plan(
    gains: tuple[float, ...], expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {SINGLE: 110, REGIONS: 110, STRONG: 50})
    turns = iter(gains)

    def time_sites(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        gain = next(turns)
        return {n: _timing(100 if n == "dense" else 100 / gain) for n in calls}

    watch.time_sites = time_sites
    result = placed(tmp_path, proto=convolutions(), shapes=((1, 16, 8, 8), (3, 16, 8, 8)))
    if expected is None:  # all are strong, or none: nothing that the other plans do not have
        assert result.plan.name == PORTABLE
        assert STRONG not in result.race[0]
        return
    assert result.plan.name == STRONG
    nodes = onnx.load(result.plan.file).graph.node
    assert [n.name for n in nodes if n.domain == "ai.spa"] == [f"ai.spa/{name}" for name in expected]
    assert [n.op_type for n in nodes if n.domain == ""] == ["Conv", "Tanh"]


def low_rank() -> onnx.ModelProto:
    """Two low-rank layers, the second beside a sparse weight."""
    rng = np.random.default_rng(0)
    shapes = {"d": (WIDTH, 8), "u": (8, WIDTH), "e": (WIDTH, 8), "v": (8, WIDTH)}
    text = f"""g (float["b","s",{WIDTH}] x) => (float["b","s",{WIDTH}] y) {{
      z = MatMul(x, d) a = MatMul(z, u) h = Relu(a)
      t = MatMul(h, e) c = MatMul(t, v) s = MatMul(h, w) y = Add(s, c) }}"""
    return network(text, **{n: weight(rng, *s) for n, s in shapes.items()}, w=weight(rng, WIDTH, WIDTH, 0.2))


@pytest.mark.parametrize(
    ("site", "winner", "nodes", "forms"),
    [
        (5.0, SINGLE, 2, {"z": "low rank", "a": "low rank", "s": "sparse + low rank"}),
        (5.0, REGIONS, 1, {"z": "low rank", "a": "low rank", "s": "sparse + low rank"}),
        (0.9, FACTORS, 1, {"z": "low rank", "a": "low rank", "s": "sparse + low rank"}),
        (0.9, PORTABLE, 0, {"z": "dense", "a": "dense", "s": "dense"}),
    ],
)
def test_low_rank_layers_by_themselves_and_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: float, winner: str, nodes: int, forms: dict[str, str]
) -> None:
    Stopwatch(monkeypatch, site, {winner: 50}, real=True)
    result = placed(tmp_path, proto=low_rank())
    assert result.plan.name == winner
    assert (FACTORS in result.race[0]) == (site < 1)
    assert len(result.plan.regions) == nodes
    assert {c.site.name: c.kind for c in result.choices if c.site.name in forms} == forms
    assert set(result.plan.forms) == ({"z", "a", "t", "c", "s"} if nodes else set()) == set(result.plan.nodes)
    made = {n.name for n in onnx.load(result.plan.file).graph.node if n.domain == "ai.spa"}
    assert set(result.plan.nodes.values()) == made
    session = open_session(result.plan.file, library=result.plan.library)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, WIDTH)).astype(np.float32)}
    want = run(open_session(tmp_path / "source.onnx"), feeds)["y"]
    np.testing.assert_allclose(run(session, feeds)["y"], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_a_low_rank_layer_that_is_far_behind_is_not_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, 0.5, {})
    result = placed(tmp_path, proto=low_rank())
    assert set(result.race[0]) == {SOURCE, PORTABLE}
    assert all("dense is faster or as fast" in c.reason for c in result.choices)


def in_between(apart: bool) -> onnx.ModelProto:
    """A sparse, a dense and a scarcely sparse layer; `apart`: each by itself, with other tokens on its sides."""
    rng = np.random.default_rng(0)
    h, g = ("Transpose<perm=[0,2,1]>(a)", "Transpose<perm=[0,2,1]>(b)") if apart else ("Relu(a)", "Relu(b)")
    text = f"""g (float["b",{WIDTH},{WIDTH}] x) => (float["b",{WIDTH},{WIDTH}] y) {{
      a = MatMul(x, w) h = {h} b = MatMul(h, v) g = {g} y = MatMul(g, u) }}"""
    sparse, dense, scarce = weight(rng, WIDTH, WIDTH, 0.1), weight(rng, WIDTH, WIDTH), weight(rng, WIDTH, WIDTH, 0.6, 1)
    return network(text, w=sparse, v=dense, u=scarce)


def time_sites(gains: Mapping[int, float]) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, Timing]]:
    """Gains by the turn in which a class of sites is timed."""
    turns = iter(range(len(gains)))

    def interleave(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        turn = next(turns)
        return {n: _timing(100 if n == "dense" else 100 / (gains[turn] * (1 if "4x1" in n else 0.5))) for n in calls}

    return interleave


@pytest.mark.parametrize(("slow", "last"), [(2.0, ("sparse", Blocks(1))), (0.9, ("dense", None))])
def test_layers_between_kernels_become_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, last: tuple[str, Blocks | None]
) -> None:
    """With the kernel that was timed, unless it is so slow that all of the weight as 4 x 1 blocks must be better."""
    watch = Stopwatch(monkeypatch, 5.0, {EVERY: 50}, real=True)
    watch.time_sites = time_sites({0: 5.0, 1: slow})
    result = placed(tmp_path, proto=in_between(False), shapes=((1, WIDTH, WIDTH), (2, WIDTH, WIDTH)))
    assert result.plan.name == EVERY
    assert result.plan.forms == {"a": Blocks(4), "b": Blocks(4), "y": last[1] or Blocks(4)}
    assert result.gaining == ["a"]
    assert len(result.plan.regions) == 1
    choices = {c.site.name: c for c in result.choices}
    assert {n: (c.kind, c.form) for n, c in choices.items()} == {
        "a": ("sparse", Blocks(4)),
        "b": ("dense", None),
        "y": last,
    }
    assert choices["b"].reason == "it has no zeros; between its neighbours in one region the model gains"
    assert choices["y"].reason.startswith("dense is faster or as fast: unstructured reaches")
    assert {c.would_help for c in result.choices} == {""}
    session = open_session(result.plan.file, library=result.plan.library)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, WIDTH, WIDTH)).astype(np.float32)}
    want = run(open_session(tmp_path / "source.onnx"), feeds)["y"]
    np.testing.assert_allclose(run(session, feeds)["y"], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


def test_layers_between_kernels_stay_dense_where_that_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {REGIONS: 50, EVERY: 60})
    watch.time_sites = time_sites({0: 5.0, 1: 0.9})
    result = placed(tmp_path, proto=in_between(False), shapes=((1, WIDTH, WIDTH), (2, WIDTH, WIDTH)))
    assert result.plan.name == REGIONS
    assert {c.site.name: (c.kind, c.form) for c in result.choices} == {
        "a": ("sparse", Blocks(4)),
        "b": ("dense", None),
        "y": ("dense", None),
    }
    assert folders(result) == {"portable", "regions"}


@pytest.mark.parametrize(("apart", "first"), [(True, 5.0), (False, 0.9)])
def test_layers_that_stand_between_nothing_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool, first: float
) -> None:
    """No neighbour shares a region with them, or no neighbour is a kernel."""
    watch = Stopwatch(monkeypatch, 5.0, {})
    watch.time_sites = time_sites({0: first, 1: 0.9})
    result = placed(tmp_path, proto=in_between(apart), shapes=((1, WIDTH, WIDTH), (2, WIDTH, WIDTH)))
    assert EVERY not in result.race[0]


@pytest.mark.parametrize(("dense", "raced"), [(FEW_NODES_US / 2, True), (FEW_NODES_US * 2, False)])
def test_layers_as_small_as_nodes_may_gain_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: float, raced: bool
) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {EVERY: 50})
    watch.time_sites = lambda calls: {n: _timing(dense if n == "dense" else dense * 1.2) for n in calls}
    result = placed(tmp_path)
    assert (EVERY in result.race[0]) == raced
    assert result.plan.name == (EVERY if raced else PORTABLE)
    assert len(result.plan.regions) == raced
    assert result.gaining == []


@pytest.mark.parametrize("time", [98, 100, 150])
def test_dense_wins_ties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: float) -> None:
    Stopwatch(monkeypatch, 5.0, {SINGLE: time, REGIONS: time})
    result = placed(tmp_path)
    assert result.plan.name == PORTABLE
    assert result.plan.regions == []
    assert "no sparse plan was faster" in result.reason
    assert folders(result) == {"portable"}


def test_a_plan_that_loses_at_one_shape_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    races = {SINGLE: 80, REGIONS: 110}, {SINGLE: 80, REGIONS: 10}
    Stopwatch(monkeypatch, 5.0, *races)
    result = placed(tmp_path, tokens=(1, 64))
    assert result.plan.name == SINGLE
    assert [t[REGIONS].median_us for t in result.race] == [110, 10]


def test_sites_that_do_not_gain_stay_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch, 0.9, {})
    result = placed(tmp_path)
    assert watch.sites > 0
    assert result.plan.name == PORTABLE
    assert result.reason == "no site gains from a sparse kernel"
    assert set(result.race[0]) == {SOURCE, PORTABLE}


def test_a_model_without_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {})
    result = placed(tmp_path, density=1.0)
    assert (watch.sites, watch.races) == (0, 1)
    assert result.plan.name == PORTABLE
    assert {c.form for c in result.choices} == {None}


def test_the_model_as_given_when_rewriting_made_it_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, 5.0, {SOURCE: 80, PORTABLE: 100})
    result = placed(tmp_path, density=1.0, keep_source=True)
    assert result.plan.name == SOURCE
    assert "as it was given" in result.reason
    Stopwatch(monkeypatch, 5.0, {SOURCE: 99, PORTABLE: 100})
    assert placed(tmp_path, density=1.0, keep_source=True).plan.name == PORTABLE
    Stopwatch(monkeypatch, 5.0, {SOURCE: 80, PORTABLE: 100})
    assert placed(tmp_path, density=1.0).plan.name == PORTABLE  # after passes the source is no equal


def test_a_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {SINGLE: 50, REGIONS: 25})
    first = placed(tmp_path, replay=True)
    asked = watch.sites, watch.races
    again = placed(tmp_path, replay=True)
    assert (watch.sites, watch.races) == asked
    assert again.race == first.race
    for name in ("model.onnx", "kernels.so"):
        assert (again.plan.folder / name).read_bytes() == (first.plan.folder / name).read_bytes()


def test_without_replay_only_the_race_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(monkeypatch, 5.0, {SINGLE: 50, REGIONS: 25})
    placed(tmp_path)
    sites = watch.sites
    placed(tmp_path)
    assert (watch.sites, watch.races) == (sites, 2)


@pytest.mark.parametrize("target, level", [("cpu:x86-64-v4", "x86-64-v4"), ("cpu:aarch64", "aarch64")])
def test_for_what_this_machine_does_not_run_forms_are_calculated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, level: str
) -> None:
    import dataclasses

    from spa_compiler.targets import target as targets

    older = dataclasses.replace(host(), level="x86-64-v2")
    monkeypatch.setattr(targets, "host", lambda: older)
    watch = Stopwatch(monkeypatch, 5.0, {})
    result = placed(tmp_path, target=target)
    words = f"not measured, this machine does not run {level}"
    assert (watch.sites, watch.races, result.race) == (0, 0, [])
    assert (result.plan.name, result.reason) == (REGIONS, f"{REGIONS}, {words}")
    assert {c.form for c in result.choices} == {Blocks(4)}
    assert all(words in c.reason for c in result.choices)
    assert result.gaining == [c.site.name for c in result.choices]
    assert result.plan.library
    assert len(result.plan.regions) == 1
    dense = placed(tmp_path, target=target, density=1.0)
    assert (dense.plan.name, dense.reason) == (PORTABLE, f"{PORTABLE}, {words}")
    assert dense.plan.library, "it holds no kernel, but loads where the model runs"


def test_attention_cores_come_along_where_forms_are_calculated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stopwatch(monkeypatch, 5.0, {})
    result = placed(tmp_path, target="cpu:aarch64", proto=encoder(mask="none"), shapes=((1, 16, 24), (3, 5, 24)))
    assert result.plan.name == WHOLE
    assert [len(region.attentions) for region in result.plan.regions] == [1]
    assert len(result.plan.forms) == 4


def test_an_older_machine_has_kernels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from spa_compiler.targets import target as targets

    older = dataclasses.replace(host(), level="x86-64-v2")
    monkeypatch.setattr(targets, "host", lambda: older)
    watch = Stopwatch(monkeypatch, 5.0, {REGIONS: 20})
    assert placed(tmp_path, target="cpu").plan.name == REGIONS
    assert watch.races == 1


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    proto = mlp(1.0, WIDTH)
    values = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values[0, 0] = np.nan
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, proto.graph.initializer[0].name))
    with pytest.raises(ModelError, match="holds NaN or Inf"):
        placed(tmp_path, proto=proto)
