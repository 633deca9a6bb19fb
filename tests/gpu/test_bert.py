"""What `make test-cuda` measures and how it reckons, on a CPU: small models, and times that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from spa_compiler.compiler import compile
from spa_compiler.graph.session import Feeds, open_session
from spa_compiler.passes.recipe import from_command_line
from spa_compiler.placement import gpu_choose
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.timer import Contender
from tests.gpu import bert
from tests.gpu.amdahl import EndToEnd, linear_chain, table
from tests.gpu.replay import replayed
from tests.networks import mlp, network, weight
from tests.placement.gpu_forms import Rows
from tests.placement.gpu_stand_in import StandIn

SMALL = {"layers": 2, "size": 32, "heads": 2, "inner": 64, "vocabulary": 40, "positions": 16}


# ---- arithmetic ----


def test_the_limit_is_amdahl_s() -> None:
    e = EndToEnd(dense_us=100, ours_us=50, dense_linear_us=80, our_linear_us=20)
    assert (e.share, e.linear_speed, e.speed) == (0.8, 4, 2)
    assert e.limit == pytest.approx(100 / (20 + 20))
    assert e.reached == pytest.approx(0.8)


@pytest.mark.parametrize(
    "times, limit",
    [((100, 100, 50, 50), 1), ((100, 100, 50, 100), 2 / 3), ((100, 1, 100, 1), 100), ((100, 50, 50, 1e-9), 2)],
)
def test_limits(times: tuple[float, ...], limit: float) -> None:
    """Nothing gained, something lost, all of the model linear, and linear layers that cost nothing."""
    assert EndToEnd(*times).limit == pytest.approx(limit)


@pytest.mark.parametrize("times", [(0, 1, 1, 1), (1, 1, 1, -1), (10, 5, 11, 5)])
def test_times_that_make_no_sense(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"positive|longer than the whole"):
        EndToEnd(*times)


def test_the_table_has_both() -> None:
    head, _, row = table([("BERT 1x128", EndToEnd(1000, 640, 500, 100))]).splitlines()
    assert row == "| BERT 1x128 | 1000 | 640 | 500 | 100 | 5.00x | 50% | 1.67x | 1.56x | 0.94 |"
    assert head.count("|") == row.count("|")


# ---- linear layers alone ----


def test_a_chain_computes_its_layers_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    text = """g (float[2,3,8] x) => (float[2,3,8] y) {
        q = MatMul(x, wq)  a = Add(bq, q)  k = MatMul(x, wk)  s = Mul(a, k)
        u = MatMul(s, wu)  b = Add(u, bu)  r = Relu(b)  d = MatMul(r, wd)  y = Add(d, s) }"""
    w = {"wq": weight(rng, 8, 8), "wk": weight(rng, 8, 8), "wu": weight(rng, 8, 12), "wd": weight(rng, 12, 8)}
    biases = {"bq": np.ones(8, np.float32), "bu": np.full(12, 2, np.float32)}
    chain = linear_chain(network(text, **w, **biases))
    onnx.checker.check_model(chain, full_check=True)
    assert [n.op_type for n in chain.graph.node] == ["MatMul", "Add", "MatMul", "MatMul", "Add", "MatMul"]
    x = rng.standard_normal((2, 3, 8), np.float32)
    want = (((x @ w["wq"] + 1) @ w["wk"]) @ w["wu"] + 2) @ w["wd"]
    (y,) = open_session(chain.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text, why",
    [
        ("{ y = Relu(x) }", "no linear layer"),
        ("{ h = MatMul(x, w)  g = Transpose(h)  y = MatMul(g, v) }", "has 5 features"),
        ("{ h = MatMul(x, w)  g = MatMul(x, w)  y = Add(h, g) }", ""),
    ],
)
def test_what_is_no_chain(text: str, why: str) -> None:
    w, v = np.ones((4, 3), np.float32), np.ones((5, 3), np.float32)
    model = network(f"g (float[5,4] x) => (float[a,b] y) {text}", check=False, w=w, v=v)
    with pytest.raises(ValueError, match=why or "nobody reads|features"):
        linear_chain(model)


# ---- BERT ----


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small one, as it is compiled where there is no GPU."""
    folder = tmp_path_factory.mktemp("bert") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_choose, "FORMS", (Rows(),))
        recipe = from_command_line(sparsity=0.8, pattern="unstructured")
        shape = ["input_ids=2,6", "attention_mask=2,6"]
        compile(bert.bert(**SMALL), folder, target="cuda:sm_90", precision="fp16", recipe=recipe, shapes=shape)
    return folder


def test_bert_has_bert_s_layers() -> None:
    built = bert.bert(**SMALL)
    shapes = [tuple(t.dims) for t in built.graph.initializer if len(t.dims) == 2][2:]
    assert shapes == [(32, 32)] * 4 + [(32, 64), (64, 32)] + [(32, 32)] * 4 + [(32, 64), (64, 32)]
    given = bert.feeds(2, 6, 40)
    session = open_session(built.SerializeToString())
    (y,) = session.run(None, given)
    assert y.shape == (2, 6, 32)
    given["attention_mask"][:, 4:] = 0  # what is masked is not seen
    (masked,) = session.run(None, given)
    given["input_ids"][:, 4:] = 0
    np.testing.assert_allclose(session.run(None, given)[0][:, :4], masked[:, :4], atol=1e-5)
    assert np.abs(masked - y).max() > 1e-2


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_all_four_times_are_taken_in_turns(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, list[np.ndarray]] = {}

    def interleave(calls: Mapping[str, Callable[[], list]], seconds: float, rounds: int) -> dict[str, Timing]:  # type: ignore[type-arg]
        times = dict(zip(("portable", "portable linear", "model", "model linear"), (100, 80, 50, 20), strict=True))
        assert calls.keys() == times.keys()
        for name, call in calls.items():
            given[name] = [value.numpy() for value in call()]
        return {name: Timing(us, us, us, rounds) for name, us in times.items()}

    monkeypatch.setattr(bert, "interleave", interleave)
    found = bert.measure(artifact, bert.feeds(2, 6, 40), StandIn(), tmp_path)
    assert found == EndToEnd(100, 50, 80, 20)
    ours = [n for n in onnx.load(artifact / "model.onnx").graph.node if n.domain == "ai.spa"]
    chain = onnx.load(tmp_path / "model-linear.onnx")
    assert [n.name for n in chain.graph.node] == [n.name for n in ours]
    assert len(ours) == 12
    dense = onnx.load(tmp_path / "portable-linear.onnx")
    assert [n.op_type for n in dense.graph.node] == ["MatMul", "Add"] * 12
    assert {t.data_type for t in dense.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert [v.shape for v in given["portable"] + given["model"]] == [(2, 6, 32)] * 2
    assert [v.shape for v in given["portable linear"] + given["model linear"]] == [(2, 6, 32)] * 2
    assert np.ptp(numpy_helper.to_array(dense.graph.initializer[0])) > 0


# ---- replays ----


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_inputs_that_change_in_their_place(tmp_path: Path) -> None:
    onnx.save(mlp(1.0, 16), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    first, second = ({"x": rng.standard_normal((2, 3, 16), np.float32)} for _ in range(2))
    session = open_session(tmp_path / "m.onnx")

    def want(feed: Feeds) -> np.ndarray:
        (value,) = session.run(None, feed)
        return np.asarray(value)

    before, after, last = replayed(StandIn(), Contender(tmp_path / "m.onnx"), first, second)
    np.testing.assert_array_equal(before["y"], want(first))
    np.testing.assert_array_equal(after["y"], want(second))
    np.testing.assert_array_equal(last["y"], want(first))  # there is no graph here: it reads what is bound
