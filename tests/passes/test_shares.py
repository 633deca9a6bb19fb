"""Shares of zeros: the budget is met, whoever divides it; what needs samples says so; what matters keeps more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from spa_compiler import patterns
from spa_compiler.calibration.probe import Probe
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import as_it_is
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes import shares
from spa_compiler.passes.layerwise import problem_of
from spa_compiler.passes.shares import NEEDS_DATA, Name, Request, allocate
from spa_compiler.patterns import Unstructured
from spa_compiler.solvers import allocation
from spa_compiler.solvers.problem import Zeros, relative_loss
from spa_compiler.solvers.sparsegpt import sparsegpt
from tests.networks import model_of
from tests.passes.tiny import WIDTH, bits, calibration, context, correlated, feed_forward, rows, samples, sparsify

NAMES: list[Name] = [name for name in get_args(Name) if name != "auto"]
MEASURED: list[Name] = [name for name in NAMES if name in NEEDS_DATA]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_GENERATIONS", 6)
    monkeypatch.setattr(shares, "_OFFSPRING", 6)


def request_of(
    model: Model,
    sparsity: float = 0.6,
    given: Samples | None = None,
    pattern: str = "unstructured",
    seed: int = 0,
    **options: object,
) -> Request:
    ops = weighted_ops(model.graph)
    each = [patterns.parse(pattern).on(int(np.prod(op.kernel or (1,)))) for op in ops]
    rng = np.random.default_rng(seed)
    return Request(model, ops, each, sparsity, options.pop("min_keep", 0.2), rng, given, **options)  # type: ignore[arg-type]


def uneven() -> Model:
    """Weights of unequal size and magnitude; the last one is 1000 times smaller."""
    rng = np.random.default_rng(2)
    given: Mapping[str, tuple[tuple[int, ...], float]] = {
        "u": ((WIDTH, 20), 1.0),
        "v": ((20, 8), 0.2),
        "w": ((8, 30), 3.0),
        "z": ((30, 6), 1e-3),
    }
    return model_of(
        f"g (float[batch, {WIDTH}] x) => (float[batch, 6] y) {{"
        " a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) d = Relu (c) e = MatMul (d, w) f = Relu (e)"
        " y = MatMul (f, z) }",
        **{n: (rng.standard_normal(shape) * size).astype(np.float32) for n, (shape, size) in given.items()},
    )


def convolutions() -> Model:
    rng = np.random.default_rng(3)
    shapes = {"u": (8, 3, 3, 3), "v": (8, 4, 3, 3), "w": (8, 5)}
    return model_of(
        """g (float[batch, 3, 6, 6] x) => (float[batch, 5] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, u) b = Relu (a) c = Conv <group = 2> (b, v) d = Relu (c)
          p = GlobalAveragePool (d) f = Flatten (p) y = Gemm (f, w)
        }""",
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )


def pictures() -> Samples:
    rng = np.random.default_rng(0)
    return samples(*({"x": rng.standard_normal((8, 3, 6, 6)).astype(np.float32)} for _ in range(3)))


MODELS: dict[str, tuple[Callable[[], Model], Callable[[], Samples]]] = {
    "blocks": (lambda: feed_forward(blocks=2), calibration),
    "uneven": (uneven, calibration),
    "convolutions": (convolutions, pictures),
}


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("case", list(MODELS))
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met(name: Name, case: str, sparsity: float) -> None:
    make, given = MODELS[case]
    request = request_of(make(), sparsity, given())
    share = allocate(name, request)
    sizes = np.array(request.sizes)
    total = float((sizes * share).sum())
    assert share.shape == (len(sizes),)
    assert np.isfinite(share).all()
    assert share.min() >= -1e-9
    if name == "evolution":  # among a few levels, as near as they come
        levels = sorted({min(0.98, max(0.02, sparsity + step)) for step in (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2)})
        assert np.abs(share[:, None] - np.array(levels)).min(axis=1).max() < 1e-9
        assert total == pytest.approx(sparsity * sizes.sum(), abs=0.1 * sizes.max())
        return
    assert share.max() <= request.most + (1 / sizes.min() if name == "global" else 1e-9)
    if name == "global":
        assert abs(total - sparsity * sizes.sum()) <= 1
    else:
        assert total == pytest.approx(sparsity * sizes.sum(), rel=1e-9)


def test_a_layer_that_all_hangs_on_gets_zeros_for_its_equal_half_alone() -> None:
    rng = np.random.default_rng(0)
    lines = " ".join(f"h{i} = MatMul (x, w{i})" for i in range(5))
    text = f"g (float[batch, {WIDTH}] x) => (float[batch, 8] y) {{ {lines} y = Sum (h0, h1, h2, h3, h4) }}"
    weights = {f"w{i}": rng.standard_normal((WIDTH, 8)) * (1 if i else 1000) for i in range(5)}
    model = model_of(text, **{name: values.astype(np.float32) for name, values in weights.items()})
    share = allocate("error", request_of(model, 0.5, calibration()))
    assert share[0] == pytest.approx((0 + 0.5) / 2)  # half way from an equal share to none
    assert share[1:].min() > 0.5


@pytest.mark.parametrize("pattern", ["block:4x1", "block:3x2", "fan-in", "channel"])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_in_units_of_a_pattern(name: Name, pattern: str) -> None:
    request = request_of(feed_forward(blocks=2), 0.5, calibration(), pattern)
    share, sizes = allocate(name, request), np.array(request.sizes)
    unit = max(p.sizes(op.n, op.k).max() for p, op in zip(request.patterns, request.ops, strict=True))
    assert abs(float((sizes * share).sum()) - 0.5 * sizes.sum()) <= (unit if name == "global" else 1e-6)
    assert share.min() >= 0
    assert share.max() < 1


@pytest.mark.parametrize("name", MEASURED)
def test_what_measures_the_model_needs_samples(name: Name) -> None:
    with pytest.raises(UsageError, match=rf"allocate={name} measures the model on samples.*--calib") as caught:
        allocate(name, request_of(feed_forward()))
    assert caught.value.where == "allocate"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NEEDS_DATA])
def test_what_looks_at_weights_alone_does_not(name: Name) -> None:
    without = allocate(name, request_of(uneven()))
    np.testing.assert_array_equal(without, allocate(name, request_of(uneven(), given=calibration())))


@pytest.mark.parametrize("name", NAMES)
def test_no_layers_no_shares(name: Name) -> None:
    model = feed_forward()
    request = Request(model, [], [], 0.5, 0.2, np.random.default_rng(0), calibration())
    assert allocate(name, request).shape == (0,)


# ---------------------------------------------------------------- who gets what


def sensitive(gain: float = 100.0) -> Model:
    """Two layers of one size and kind side by side; the outputs hear the first one `gain` times as loud."""
    rng = np.random.default_rng(1)
    given = {name: rng.standard_normal((WIDTH, 16)).astype(np.float32) for name in "uv"}
    return model_of(
        f"g (float[batch, {WIDTH}] x) => (float[batch, 16] y) {{"
        f" a = MatMul (x, u) l = Mul (a, {{{gain}}}) b = MatMul (x, v) y = Add (l, b) }}",
        **given,
    )


@pytest.mark.parametrize("name", MEASURED)
def test_a_layer_that_the_outputs_hear_keeps_more(name: Name) -> None:
    loud, quiet = allocate(name, request_of(sensitive(), given=calibration(100)))
    assert loud < quiet - 0.05
    other, same = allocate(name, request_of(sensitive(0.01), given=calibration(100)))
    assert other > same + 0.05


def test_error_is_half_way_between_least_error_and_equal_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "by_error", lambda *_, **__: np.array([0.3, 0.9]))
    np.testing.assert_allclose(allocate("error", request_of(sensitive(), given=calibration())), [0.45, 0.75])


def test_a_layer_whose_inputs_lie_on_a_line_gives_up_more() -> None:
    """Its error hardly grows with its zeros: what stays makes up for what goes."""
    x = correlated(200, WIDTH, 0)
    x[:, 6:] = x[:, :1]
    model = model_of(
        f"g (float[batch, {WIDTH}] x) => (float[batch, 32] y) {{ p, q = Split <axis = 1, num_outputs = 2> (x)"
        " a = MatMul (p, u) b = MatMul (q, v) y = Concat <axis = 1> (a, b) }",
        **{name: np.random.default_rng(5).standard_normal((6, 16)).astype(np.float32) for name in "uv"},
    )
    names: list[Name] = ["error", "proportional", "evolution"]
    for name in names:
        free, line = allocate(name, request_of(model, given=samples({"x": x}, {"x": x})))
        assert line > free + 0.05


def test_losses_are_those_on_samples_that_nobody_solved_on() -> None:
    """With as few as there are here, a solution looks much better on its own ones."""
    width = 48
    w = np.random.default_rng(5).standard_normal((width, 16)).astype(np.float32)
    model = model_of(f"g (float[batch, {width}] x) => (float[batch, 16] y) {{ y = MatMul (x, w) }}", w=w)
    rng = np.random.default_rng(6)
    feeds = [{"x": rng.standard_normal((60, width)).astype(np.float32)} for _ in range(5)]
    request = request_of(model, 0.5, given=samples(*feeds))
    measured = shares._measure(request)
    # Inputs are independent, so the best that anyone can do is to leave the smallest weights out.
    least = np.sort(np.square(w), axis=None)
    true = least[: len(least) // 2].sum() / least.sum()
    assert measured.losses[0, measured.levels.index(0.5)] > 0.97 * true
    (collected,) = as_it_is(model, request.ops, samples(*feeds), threads=1)
    problem = problem_of(w.T.astype(np.float64), collected.fit, chance=False)
    own = relative_loss([problem], [sparsegpt(problem, Zeros(Unstructured(), 0.5)).weight])
    assert own is not None
    assert own < 0.9 * true


@pytest.mark.parametrize(("name", "half"), [("error", True), ("proportional", True), ("ecoflap", False)])
def test_the_outputs_are_asked_on_the_half_that_judges(name: Name, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def probe(*given: object, **options: object) -> Probe:
        asked.append(bool(options["half"]))
        return Probe(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(shares, "Probe", probe)
    allocate(name, request_of(sensitive(), given=calibration()))
    assert asked == [half]


def test_where_the_half_is_padding_layers_go_by_their_errors() -> None:
    model = model_of(
        """g (float[batch, seq, 6] x, int64[batch, seq] attention_mask) => (float[batch, seq, 6] y) {
          a = MatMul (x, u) r = Relu (a) y = MatMul (r, v) unused = Cast <to = 1> (attention_mask)
        }""",
        u=np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32),
        v=np.random.default_rng(2).standard_normal((16, 6)).astype(np.float32),
    )
    feeds = [
        {"x": correlated(40, 6, seed).reshape(2, 20, 6), "attention_mask": np.full((2, 20), 1 - seed % 2, np.int64)}
        for seed in range(5)
    ]
    measured = shares._measure(request_of(model, 0.5, given=samples(*feeds)))
    assert (measured.at_target > 0).all()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_single_samples_are_no_reason_to_fail(count: int) -> None:
    """One or two positions for each layer: what they say of variances is rounding."""
    feeds = [{"x": correlated(1, WIDTH, seed)} for seed in range(count)]
    model = feed_forward(blocks=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change = sparsify(model, context(samples(*feeds)), sparsity=0.5, allocate="error")
    assert np.mean([site.density_after for site in change.sites]) == pytest.approx(0.5, abs=0.02)
    assert all(np.isfinite(row).all() for row in rows(model))


def test_global_follows_magnitudes_down_to_the_floor() -> None:
    request = request_of(uneven(), 0.6)
    _, small, large, tiny = allocate("global", request)
    assert large < small <= tiny
    assert tiny == pytest.approx(request.most, abs=1 / 180)
    held = request_of(uneven(), 0.6, min_keep=1.0)
    np.testing.assert_allclose(allocate("global", held), 0.6, atol=1 / 160)


def test_lamp_does_not_see_the_scale_of_a_layer() -> None:
    model, scaled = uneven(), uneven()
    for op in weighted_ops(scaled.graph):
        op.replace(op.rows() * 2.0 ** (op.n % 5))
    np.testing.assert_allclose(allocate("lamp", request_of(model)), allocate("lamp", request_of(scaled)), atol=1e-9)
    assert not np.allclose(allocate("global", request_of(model)), allocate("global", request_of(scaled)), atol=0.01)


def test_erk_keeps_thin_layers_dense() -> None:
    """density ~ (n + k) / (n k), kernels counted by their sides."""
    request = request_of(convolutions(), 0.5, min_keep=0.0)
    density = 1 - allocate("erk", request)
    assert density[2] > density[0] > density[1]
    wanted = [(8 + 3 + 3 + 3) / (8 * 3 * 9), (8 + 4 + 3 + 3) / (8 * 4 * 9)]
    assert density[0] / density[1] == pytest.approx(wanted[0] / wanted[1], rel=1e-6)


def test_uniform_is_uniform() -> None:
    np.testing.assert_allclose(allocate("uniform", request_of(uneven(), 0.37)), 0.37)


# ---------------------------------------------------------------- the same every time


@pytest.mark.parametrize("name", NAMES)
def test_the_same_every_time_whatever_the_threads(name: Name) -> None:
    results = []
    for threads in (1, 3, 1):
        model = feed_forward(blocks=2)
        before = bits(model)
        results.append(allocate(name, request_of(model, given=calibration(), threads=threads)).tobytes())
        assert bits(model) == before
    assert results[0] == results[1] == results[2]


def test_held_out_samples_have_no_say() -> None:
    for name in MEASURED:
        found = []
        for size in (1, 50):
            feeds = [{"x": correlated(64, WIDTH, seed)} for seed in range(2)]
            given = samples(*feeds, {"x": size * correlated(64, WIDTH, 9)})
            found.append(allocate(name, request_of(feed_forward(blocks=2), given=given)))
        np.testing.assert_array_equal(found[0], found[1])


def test_models_too_large_to_probe_go_by_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "PROTOBUF_LIMIT", 10)
    request = request_of(sensitive(), given=calibration(100))
    loud, quiet = allocate("error", request)
    assert (loud + quiet) / 2 == pytest.approx(0.6)
    assert abs(loud - quiet) < 0.1  # the layers are alike, and nobody has listened to the outputs


def test_progress_is_told() -> None:
    calls: list[tuple[str, int, int]] = []
    for name in MEASURED:
        calls.clear()
        request = request_of(feed_forward(), given=calibration(), progress=lambda *call: calls.append(call))
        allocate(name, request)
        assert calls
        assert all(0 <= done <= total for _, done, total in calls)


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in MEASURED:
        allocate(name, request_of(feed_forward(), given=calibration()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_two_layers_read_counts_once(name: Name) -> None:
    """Counted for each of them, it would get a share that only makes the budget with weights that are not there."""
    rng = np.random.default_rng(0)
    w, v = (scale * rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) for scale in (1, 0.1))
    model = model_of(
        f"g (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{ a = MatMul (x, w) r = Tanh (a)"
        " b = MatMul (r, w) s = Tanh (b) c = MatMul (s, v) t = Add (c, x) y = LayerNormalization (t, ones) }",
        w=w,
        v=v,
        ones=np.ones(WIDTH, np.float32),
    )
    change = sparsify(model, context(calibration()), sparsity=0.5, allocate=name, method="magnitude")
    tied, again, alone = (site.density_after for site in change.sites)
    assert tied == again
    assert tied + alone == pytest.approx(1, abs=0.01)
    assert f"50.0% zeros in 2 weights of {2 * WIDTH * WIDTH} elements" in change.summary
