"""Waves: who comes after whom, and segments that together compute what the whole model does."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from spa_compiler.calibration.waves import Overrides, Waves
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import Feeds, open_model, open_session, run
from tests.networks import model_of


def matrices(*names: str, width: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((width, width)).astype(np.float32) / 2 for name in names}


def attention() -> Model:
    """Three sites side by side, one behind them, two more behind a residual connection."""
    return model_of(
        """g (float[N, 4] x) => (float[N, 4] y) {
          e = Tanh (x)
          q = MatMul (e, wq) k = MatMul (e, wk) v = MatMul (e, wv)
          qk = Mul (q, k) s = Sigmoid (qk) a = Mul (s, v) o = MatMul (a, wo) r = Add (o, e)
          f = MatMul (r, w1) h = Relu (f) g0 = MatMul (h, w2) t = Add (g0, r) y = Relu (t)
        }""",
        **matrices("wq", "wk", "wv", "wo", "w1", "w2"),
    )


def named(model: Model) -> dict[str, int]:
    """Site of each weighted operator, by its result."""
    return {op.node.outputs[0].name: site for site, op in enumerate(weighted_ops(model.graph))}


def waves_of(model: Model, only: tuple[str, ...] = (), watched: Mapping[str, str] | None = None) -> Waves:
    ops = weighted_ops(model.graph)
    ops = [op for op in ops if not only or op.node.outputs[0].name in only]
    site = {op.node.outputs[0].name: number for number, op in enumerate(ops)}
    return Waves(model, ops, {site[name]: tensor for name, tensor in (watched or {}).items()})


def feed(model: Model, seed: int = 0) -> Feeds:
    shape = [int(d) if str(d).isdigit() else 3 for d in model.graph.inputs[0].shape]
    return {model.graph.inputs[0].name: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def through(waves: Waves, given: Feeds, overrides: Overrides) -> Feeds:
    """Everything that the segments compute, one after the other; each gets what it takes, and nothing else."""
    held = dict(given)
    for wave, segment in enumerate(waves.segments):
        takes = {name: held[name] for name in segment.takes}
        if not waves.computed(wave):
            continue
        session = open_session(waves.build(wave, takes, overrides))
        assert {value.name for value in session.get_inputs()} == set(segment.takes)
        made = run(session, takes)
        assert tuple(made) == waves.computed(wave)
        held.update(made)
    return held


def test_a_wave_is_the_longest_way_over_sites() -> None:
    waves = waves_of(attention())
    assert waves.waves == (0, 0, 0, 1, 2, 3)
    assert [segment.reads for segment in waves.segments] == [("e",), ("a",), ("r",), ("h",)]
    assert waves.segments[0].takes == ("x",)
    assert set(waves.segments[1].takes) == {"e"}  # q, k and v are computed behind it
    assert set(waves.segments[0].gives) == {"e"}


def test_only_sites_count() -> None:
    waves = waves_of(attention(), only=("v", "g0"))
    assert waves.waves == (0, 1)
    assert [segment.reads for segment in waves.segments] == [("e",), ("h",)]


def test_what_only_outputs_need_is_in_no_segment() -> None:
    model = attention()
    waves = waves_of(model)
    inside = {number for segment in waves.segments for number in segment.nodes}
    outside = {node.outputs[0].name for number, node in enumerate(model.graph.nodes) if number not in inside}
    assert outside == {"g0", "t", "y"}
    assert sum(len(segment.nodes) for segment in waves.segments) == len(inside)


def test_nothing_is_handed_on_to_the_outputs() -> None:
    model = model_of(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) y = Add (c, a) }",
        **matrices("u", "v"),
    )
    assert [segment.gives for segment in waves_of(model).segments] == [(), ()]


@pytest.mark.parametrize("only", [(), ("q", "f"), ("o",), ("v", "g0")], ids=str)
def test_segments_compute_what_the_model_does(only: tuple[str, ...]) -> None:
    model = attention()
    waves, given = waves_of(model, only), feed(model)
    reads = [name for segment in waves.segments for name in segment.reads]
    expected = run(open_model(model, outputs=reads), given)
    got = through(waves, given, {})
    for name in reads:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_overrides_take_the_place_of_a_constant_for_one_node_alone() -> None:
    """Two nodes share a weight and two others a bias; the model itself stays as it is."""
    text = """g (float[N, 4] x) => (float[N, 4] y) {
      a = MatMul (x, w) b = Add (a, c) d = MatMul (b, w2) e = Add (d, c2) f = MatMul (e, w) y = Relu (f)
    }"""
    plain = matrices("w") | {"c": np.ones(4, np.float32)}
    apart = model_of(text, w2=plain["w"], c2=plain["c"], **plain)
    other = matrices("new", seed=1)["new"]
    shared = model_of(text.replace("w2", "w").replace("c2", "c"), **plain)
    waves, given = waves_of(shared), feed(shared)
    number = {node.outputs[0].name: place for place, node in enumerate(shared.graph.nodes)}
    got = through(waves, given, {(number["d"], 1): other, (number["e"], 1): np.full(4, 7, np.float32)})
    for tensor, values in (("w2", other), ("c2", np.full(4, 7, np.float32))):
        apart.graph.tensors()[tensor].values = values
    expected = run(open_model(apart, outputs=["b", "e"]), given)
    np.testing.assert_allclose(got["b"], expected["b"], rtol=1e-5)
    np.testing.assert_allclose(got["e"], expected["e"], rtol=1e-5)
    np.testing.assert_array_equal(shared.graph.tensors()["w"].values, plain["w"])


def test_what_is_watched_is_handed_out_with_its_site() -> None:
    model = attention()
    waves, given = waves_of(model, watched={"o": "e", "g0": "r"}), feed(model)
    site = named(model)
    assert waves.watched == {site["o"]: "e", site["g0"]: "r"}
    assert set(waves.segments[1].reads) == {"a", "e"}
    assert set(waves.segments[3].reads) == {"h", "r"}
    assert "r" in waves.segments[3].takes
    got = through(waves, given, {})
    np.testing.assert_allclose(got["r"], run(open_model(model, outputs=["r"]), given)["r"], rtol=1e-5)


def test_what_is_watched_waits_for_its_site() -> None:
    """Nothing else reads `q` behind the first segment that computes it."""
    model = attention()
    waves, given = waves_of(model, watched={"g0": "q"}), feed(model)
    assert "q" in waves.segments[1].gives
    assert "q" not in waves_of(model).segments[1].gives
    np.testing.assert_allclose(through(waves, given, {})["q"], run(open_model(model, outputs=["q"]), given)["q"], 1e-5)


def test_what_is_not_computed_by_then_is_not_watched() -> None:
    assert waves_of(attention(), watched={"q": "r", "k": "nowhere", "v": "x"}).watched == {2: "x"}


def test_what_comes_before_every_site_is_common() -> None:
    waves = waves_of(attention())
    assert [name for name in ("x", "e", "q", "a", "r", "y") if waves.is_common(name)] == ["x", "e"]


def test_the_last_use_is_the_last_segment_that_takes_a_tensor() -> None:
    assert waves_of(attention()).last_use() == {"x": 0, "e": 2, "a": 2, "r": 3}
    # the second projection's result is not used by a segment; watching it makes it be handed on
    assert waves_of(attention(), watched={"g0": "e"}).last_use()["e"] == 3


def test_a_site_that_reads_a_constant() -> None:
    model = model_of(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (held, w) b = Add (a, x) y = MatMul (b, v) }",
        **matrices("held", "w", "v"),
    )
    ops = [op for op in weighted_ops(model.graph) if op.node.inputs[1].name in ("w", "v")]
    waves = Waves(model, ops)
    assert waves.waves == (0, 1)
    got = through(waves, {"x": np.ones((4, 4), np.float32)}, {})
    np.testing.assert_array_equal(got["held"], model.graph.tensors()["held"].values)


def test_no_sites_no_segments() -> None:
    waves = Waves(attention(), [])
    assert (waves.waves, waves.segments, waves.last_use()) == ((), (), {})


BRANCHES = """g (float[N, 4] x, bool p) => (float[N, 4] y) {
  a = MatMul (x, u)
  b = If (p) <then_branch = one () => (float[N, 4] c) { c = Relu (a) },
              else_branch = two () => (float[N, 4] d) { d = MatMul (x, held) }>
  y = MatMul (b, v)
}"""


@pytest.mark.parametrize("choice", [True, False])
def test_what_branches_capture_is_taken_along(choice: bool) -> None:
    model = model_of(BRANCHES, **matrices("u", "v", "held"))
    ops = [op for op in weighted_ops(model.graph) if op.node.outputs[0].name in ("a", "y")]
    waves = Waves(model, ops)
    assert waves.waves == (0, 1)
    assert set(waves.segments[1].takes) == {"x", "p"}
    given = feed(model) | {"p": np.array(choice)}
    expected = run(open_model(model, outputs=["b"]), given)["b"]
    np.testing.assert_allclose(through(waves, given, {})["b"], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype: type) -> None:
    kind = np.dtype(dtype).name
    if kind == "float64":
        kind = "double"
    model = model_of(
        f"g ({kind}[N, 4] x) => ({kind}[N, 4] y) {{ a = MatMul (x, u) b = Relu (a) y = MatMul (b, v) }}",
        **{name: array.astype(dtype) for name, array in matrices("u", "v").items()},
    )
    given = {name: array.astype(dtype) for name, array in feed(model).items()}
    got = through(waves_of(model), given, {})["b"]
    assert got.dtype == dtype
    np.testing.assert_allclose(got, run(open_model(model, outputs=["b"]), given)["b"], rtol=1e-2, atol=1e-3)
