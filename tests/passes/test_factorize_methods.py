"""Methods, budgets and goals of `factorize` on tiny calibrated models: what holds for all of them, and who is best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spa_compiler import patterns
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes import Context
from spa_compiler.passes.factorize import Factorize, FactorizeOptions
from tests.networks import model_of
from tests.passes.factorized import attention, convnet, factorize, images, low, outputs, sentences
from tests.passes.tiny import (
    HIDDEN,
    WIDTH,
    bits,
    calibration,
    context,
    correlated,
    feed_forward,
    rows,
    samples,
    sparsify,
)

LOW_RANK = ["whitened", "svd", "fwsvd", "tucker"]


def parameters(model: Model) -> int:
    """Of all weighted operators, zeros and tied ones not counted."""
    return sum(np.count_nonzero(op.rows()) for op in {id(op.weight): op for op in weighted_ops(model.graph)}.values())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("allocate", ["auto", "uniform", "error", "welore"])
@pytest.mark.parametrize("joint", [False, True])
def test_a_budget_of_parameters_is_met_to_a_rank(share: float, allocate: str, joint: bool) -> None:
    model = feed_forward(blocks=3)
    dense = parameters(model)
    change = factorize(model, context(calibration()), params=share, allocate=allocate, joint=joint, method="whitened")
    kept = parameters(model) / dense
    assert change.got == {"params": pytest.approx(kept)}
    # A step is a rank of one weight, or with equal shares of all; or the last tenth of one weight.
    step = 28 / 192 if allocate == "uniform" else 28 / dense
    assert share - max(step, 0.1 if share > 0.7 else 0) - 1e-9 <= kept <= share + 1e-9
    assert change.warnings == ()
    told = "error" if allocate == "auto" else allocate
    assert f"{kept:.1%} of their parameters kept (whitened, {told} shares" in change.summary


def test_a_budget_that_no_rank_meets_is_told() -> None:
    model = feed_forward()
    change = factorize(model, context(calibration()), params=0.1)
    assert [site.pattern for site in change.sites] == ["rank 1", "rank 1"]
    assert change.got["params"] == 28 / 192
    assert "asked to keep 10.0% of the parameters, kept 14.6%" in change.warnings[0]
    change = factorize(feed_forward(), context(calibration()), params=0.1, allocate="welore")
    assert [site.pattern for site in change.sites] == ["rank 1", "rank 1"]


@pytest.mark.parametrize("method", ["auto", "whitened", "tucker", "svd"])
@pytest.mark.parametrize("share", [0.35, 0.7])
def test_a_budget_of_macs_is_met(method: str, share: float) -> None:
    model = convnet("Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (g, W, b)", channels=8)
    given = Context(context().target, np.random.default_rng(0), calibration=samples(*images()), feeds=[images()[0]])
    change = factorize(model, given, macs=share, method=method)
    # The first convolution is not taken; the others are counted at 9 x 9 positions in front of the stride, 5 x 5 behind.
    kept = sum(
        op.n * op.k * 2 * (81 if op.name == "h_first" else 25) for op in weighted_ops(model.graph) if op.name != "f"
    )
    assert change.got == {"macs": pytest.approx(kept / (8 * 8 * 9 * 25 * 2))}
    assert share - 0.2 < change.got["macs"] <= share
    outputs(model, images()[0])


@pytest.mark.parametrize("method", [*LOW_RANK, "auto"])
@pytest.mark.parametrize("goal, value", [("energy", 0.9), ("energy", 0.6), ("error", 0.3), ("error", 0.6)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_goals_of_each_layer_are_met(goal: str, value: float, method: str, dtype: str) -> None:
    model = convnet("Conv <pads = [1, 1, 1, 1]> (g, W, b)", dtype=np.dtype(dtype).type)
    change = factorize(model, context(samples(*images(np.dtype(dtype)))), method=method, **{goal: value})
    error = value if goal == "error" else np.sqrt(1 - value)
    assert len(change.sites) + len(change.skipped) == 2
    for site in change.sites:
        assert 0 < site.error <= error
    if method in ("whitened", "auto"):
        assert change.sites
    assert change.asked == {}
    assert list(change.got) == ["params"]
    outputs(model, images(np.dtype(dtype))[0])


def test_the_error_is_that_of_the_output_and_no_cheaper_rank_would_do() -> None:
    """With a bias: what the output loses beyond its mean, which the bias makes up for."""
    feeds = [
        {"x": correlated(256 * WIDTH, WIDTH, seed)} for seed in range(3)
    ]  # so many that nothing is taken for chance
    given = samples(*feeds)
    x = np.concatenate([s.feed["x"] for s in given.feeds() if not s.held]).astype(np.float64)
    whole = x @ rows(feed_forward())[0].T
    model = feed_forward()
    change = factorize(model, context(given), error=0.4, targets=("a0",), method="whitened")
    (site,) = change.sites
    down, up, _ = rows(model)
    bias = np.asarray(model.graph.tensors()["u0"].values, np.float64) - feed_forward().graph.tensors()["u0"].values
    lost = x @ down.T @ up.T + bias - whole
    assert np.abs(lost.mean(axis=0)).max() < 1e-5
    spread = np.linalg.norm(whole - whole.mean(axis=0))
    assert site.error == pytest.approx(np.linalg.norm(lost) / spread, rel=1e-3)
    rank = int(site.pattern.removeprefix("rank "))
    best = np.linalg.svd(whole - whole.mean(axis=0), compute_uv=False)
    assert np.sqrt((best[rank:] ** 2).sum()) / spread == pytest.approx(site.error, rel=1e-3)
    assert np.sqrt((best[rank - 1 :] ** 2).sum()) / spread > 0.4


@pytest.mark.parametrize("params", [0.2, 0.4, 0.6, 0.8])
def test_whitened_is_never_worse_than_the_others_at_the_same_ranks(params: float) -> None:
    errors: dict[str, float] = {}
    for method in ("whitened", "svd", "fwsvd"):
        change = factorize(
            feed_forward(), context(calibration()), params=params, method=method, allocate="uniform", targets=("a0",)
        )
        (site,) = change.sites
        errors[method] = site.error
    assert errors["whitened"] < errors["svd"]
    assert errors["whitened"] < errors["fwsvd"]


def test_fisher_scores_say_which_inputs_count(tmp_path: Path) -> None:
    def taken(scores: NDArray[Any], **options: Any) -> Model:
        np.savez(tmp_path / "s.npz", A0=scores)
        model = feed_forward()
        factorize(model, context(), params=0.4, scores=str(tmp_path / "s.npz"), targets=("a0",), **options)
        return model

    plain = feed_forward()
    factorize(plain, context(), params=0.4, method="svd", targets=("a0",))
    assert all(
        np.allclose(one, other, atol=1e-6)
        for one, other in zip(rows(taken(np.ones((WIDTH, HIDDEN)))), rows(plain), strict=True)
    )
    first = np.repeat(np.arange(WIDTH) < 2, HIDDEN).reshape(WIDTH, HIDDEN)  # only two inputs count: they are kept
    down, up, _ = rows(taken(np.where(first, 1.0, 1e-9), method="fwsvd"))
    np.testing.assert_allclose((up @ down)[:, :2], rows(feed_forward())[0][:, :2], atol=1e-3)


def test_rank_0_beside_is_sparse_alone() -> None:
    common: dict[str, Any] = {"allocate": "uniform", "pattern": "fan-in"}  # where outputs do not compete for zeros
    for given in (calibration(), None):
        first, second = feed_forward(), feed_forward()
        change = factorize(first, context(given), params=0.5, method="sparse-low-rank", rank=0.0, **common)
        sparsify(second, context(given), sparsity=0.5, **common)
        assert [site.pattern for site in change.sites] == ["sparse", "sparse"]
        for one, other in zip(rows(first), rows(second), strict=True):
            np.testing.assert_array_equal(one == 0, other == 0)
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def spiky(rank: int, spikes: float, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.asarray(
        low(32, 32, max(rank, 1), seed) * (rank > 0)
        + 0.05 * rng.standard_normal((32, 32))
        + 8 * rng.standard_normal((32, 32)) * (rng.random((32, 32)) < spikes),
        np.float32,
    )


@pytest.mark.parametrize("rank, spikes", [(3, 0.08), (0, 0.2), (8, 0.0)])
@pytest.mark.parametrize("data", [False, True])
def test_sparse_and_low_rank_is_not_worse_than_either_alone(rank: int, spikes: float, data: bool) -> None:
    def error(method: str, **options: Any) -> float:
        text = 'agraph (float["b", 32] x) => (float["b", 32] y) { h = MatMul (x, W) y = LayerNormalization (h, one) }'
        model = model_of(text, W=spiky(rank, spikes), one=np.ones(32, np.float32))
        given = samples(*({"x": correlated(64, 32, seed)} for seed in range(3))) if data else None
        if method == "sparse":
            return sparsify(model, context(given), sparsity=0.5).sites[0].error
        return factorize(model, context(given), params=0.5, method=method, **options).sites[0].error

    both = error("sparse-low-rank")
    assert both <= error("sparse") * (1 + 1e-6)
    assert both <= error("whitened" if data else "svd") * (1 + 1e-6)
    if rank == 3:  # what has both parts wants both
        assert both < 0.8 * min(error("sparse"), error("whitened" if data else "svd"))


@pytest.mark.parametrize("data", [False, True])
def test_both_parts_are_fitted_to_each_other(data: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        text = 'agraph (float["b", 32] x) => (float["b", 32] y) { h = MatMul (x, W) y = LayerNormalization (h, one) }'
        model = model_of(text, W=spiky(3, 0.08), one=np.ones(32, np.float32))
        given = samples(*({"x": correlated(64, 32, seed)} for seed in range(3))) if data else None
        options = {"params": 0.4, "method": "sparse-low-rank", "rank": 0.4}
        return factorize(model, context(given), **options).sites[0].error

    fitted = error()
    monkeypatch.setattr("spa_compiler.passes.low_rank._POLISH", 0)
    assert fitted < 0.999 * error()


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:3x2", "2:4", "1:4", "fan-in", "channel"])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("rank", [None, 0.3, 0.9])
def test_the_sparse_part_follows_its_pattern(pattern: str, data: bool, rank: float | None) -> None:
    wanted = patterns.parse(pattern)
    if wanted.sparsity is not None:
        if rank is not None:
            return  # refused
        options: dict[str, Any] = {"params": 1 - wanted.sparsity + 0.2}
    else:
        options = {"params": 0.5, "rank": rank}
    model = feed_forward()
    change = factorize(
        model, context(calibration() if data else None), method="sparse-low-rank", pattern=pattern, **options
    )
    ops = {op.name: op for op in weighted_ops(model.graph)}
    for name in ("a0", "b0"):
        op = ops.get(f"{name}_sparse", ops.get(name))
        if op is not None and op.k in (WIDTH, HIDDEN):
            assert wanted.fits(op.rows())
    unit = max(wanted.rows * wanted.cols, HIDDEN if pattern in ("fan-in", "channel") else 1) * 2
    assert change.got["params"] <= options["params"] + unit / 384
    outputs(model, {"x": correlated(4, WIDTH, 0)})


@pytest.mark.parametrize("params", [0.05, 0.1, 0.16, 0.3])
@pytest.mark.parametrize("rank", [0.5, 0.99])
def test_a_part_that_would_take_more_than_there_is(params: float, rank: float) -> None:
    model = feed_forward()
    change = factorize(model, context(calibration()), params=params, method="sparse-low-rank", rank=rank)
    assert change.got["params"] <= params + 2 / 384
    outputs(model, {"x": correlated(4, WIDTH, 0)})


@pytest.mark.parametrize(
    "options",
    [
        {"params": 0.5},
        {"params": 0.5, "allocate": "welore"},
        {"error": 0.4},
        {"params": 0.5, "method": "svd", "allocate": "uniform"},
        {"params": 0.5, "method": "sparse-low-rank"},
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_the_bits_do_not_depend_on_workers(options: dict[str, Any], data: bool) -> None:
    results = []
    for workers in (1, 3, 1):
        model = feed_forward(blocks=2)
        factorize(model, context(calibration() if data else None, workers), **options)
        results.append(bits(model))
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("data", [False, True])
def test_joint_bits_and_convolutions_do_not_depend_on_workers(data: bool) -> None:
    joint, tucker = [], []
    for workers in (1, 3):
        model = attention()
        factorize(model, context(samples(*sentences()) if data else None, workers), params=0.5, joint=True)
        joint.append(bits(model))
        model = convnet("Conv (g, W, b)")
        factorize(model, context(samples(*images()) if data else None, workers), params=0.4, method="tucker")
        tucker.append(bits(model))
    assert joint[0] == joint[1]
    assert tucker[0] == tucker[1]


@pytest.mark.parametrize("method", [*LOW_RANK, "sparse-low-rank"])
def test_half_precision_stays_half_precision(method: str) -> None:
    errors = []
    for dtype in (np.float16, np.float32):
        model = convnet("Conv <pads = [1, 1, 1, 1]> (g, W, b)", dtype=dtype)
        change = factorize(model, context(samples(*images(dtype))), params=0.6, method=method)
        assert {op.weight.dtype for op in weighted_ops(model.graph)} == {np.dtype(dtype)}
        errors.append(change.sites[0].error)
        outputs(model, images(dtype)[0])
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("method", [*LOW_RANK, "sparse-low-rank"])
@pytest.mark.parametrize("data", [False, True])
def test_a_weight_of_zeros_is_no_problem(method: str, data: bool) -> None:
    if method in ("whitened", "fwsvd") and not data:
        return  # refused
    model = convnet("Conv (g, W, b)", weight=np.zeros((8, 6, 3, 3)))
    change = factorize(model, context(samples(*images()) if data else None), params=0.5, method=method)
    assert all(site.error == 0.0 for site in change.sites)
    outputs(model, images()[0])


def test_layers_that_stay_dense_make_up_for_those_before_them() -> None:
    def lost(after: Model) -> float:
        feed = {"x": correlated(500, WIDTH, 50)}
        (was,), (made,) = outputs(feed_forward(), feed), outputs(after, feed)
        return float(np.linalg.norm(made - was) / np.linalg.norm(was))

    alone, repaired = feed_forward(), feed_forward()
    factorize(alone, context(calibration(400)), params=0.5, multiple=3, targets=("a0",))
    change = factorize(repaired, context(calibration(400)), params=0.75, multiple=3)
    assert [(site.node, site.pattern) for site in change.sites] == [("a0", "rank 3"), ("b0", "dense")]
    assert change.sites[1].density_after == 1.0
    assert change.sites[1].error == 0.0
    assert "1 of 2 weights taken apart" in change.summary
    assert change.got == {"params": (84 + 192) / 384}
    assert lost(repaired) < 0.99 * lost(alone)


def test_a_tied_weight_that_stays_dense_is_made_up_for_and_stays_tied() -> None:
    """Rank 4 saves nothing of W, 8 x 8."""
    text = """agraph (float["b", 24] x) => (float["b", 8] y)
    { a = MatMul (x, A) r = Relu (a) b = MatMul (r, W) t = Tanh (b) c = MatMul (t, W) y = LayerNormalization (c, one) }"""
    given = {"A": low(24, 8, 8), "W": low(8, 8, 8, 1), "one": np.ones(8, np.float32)}
    model = model_of(text, **given)
    feeds = [{"x": correlated(100, 24, seed)} for seed in range(3)]
    change = factorize(model, context(samples(*feeds)), error=0.9, multiple=4)
    assert [site.pattern for site in change.sites] == ["rank 4", "dense", "dense"]
    *_, second, third = weighted_ops(model.graph)
    assert second.weight is third.weight
    assert not np.array_equal(second.rows(), given["W"].T)
    outputs(model, feeds[0])


def test_a_goal_that_no_rank_meets_leaves_every_bit() -> None:
    model = feed_forward(blocks=2)
    before = bits(model)
    change = factorize(model, context(calibration()), error=1e-4)
    assert change.sites == ()
    assert change.zeros_alone
    assert bits(model) == before


def test_more_of_the_budget_loses_less_on_other_data() -> None:
    feed = {"x": correlated(500, WIDTH, 50)}
    (before,) = outputs(feed_forward(blocks=2), feed)
    changes = []
    for params in (0.2, 0.4, 0.6, 0.8):
        model = feed_forward(blocks=2)
        factorize(model, context(calibration(400)), params=params)
        changes.append(np.linalg.norm(outputs(model, feed)[0] - before))
    assert changes == sorted(changes, reverse=True)
    plain = feed_forward(blocks=2)
    Factorize(FactorizeOptions(params=0.4, multiple=1, method="svd", allocate="uniform")).run(plain, context())
    assert changes[1] < np.linalg.norm(outputs(plain, feed)[0] - before)
