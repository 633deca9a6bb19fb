"""Layer after layer: what each site is asked for, and what becomes of biases."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration.moments import Moments
from spa_compiler.graph.bias import bias_of
from spa_compiler.graph.operators import WeightedOp, weighted_ops
from spa_compiler.graph.session import Feeds
from spa_compiler.passes import layerwise
from spa_compiler.passes.layerwise import Job, judged, problem_of, rewrite, split
from spa_compiler.solvers.shrinkage import shrinkage
from tests.networks import model_of
from tests.passes.layered import F64, grouped, only, patches, pictures, ridge, shaken, solving, values, whole, written
from tests.passes.tiny import HIDDEN, WIDTH, bits, calibration, correlated, feed_forward, samples

# ---------------------------------------------------------------- the closed form


def test_behind_a_perturbed_prefix_the_best_weight_is_least_squares() -> None:
    """No residual can differ here: the first block adds the model's input."""
    given, model, before = calibration(200), feed_forward(), feed_forward()
    seen: list[list[Job]] = []
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken), seen))
    job = seen[1][0]
    start = weighted_ops(before.graph)[1].rows().astype(np.float64)
    dense = values(before, ["r0", "b0"], given)
    now = values(written(model, outcomes), ["r0"], given)["r0"]
    np.testing.assert_allclose(job.original[0], start)
    np.testing.assert_allclose(job.problems[0].weight, ridge(now, dense["b0"], start, True), atol=2e-4)
    assert np.abs(job.problems[0].weight - start).max() > 0.05
    centred = now - now.mean(axis=0)
    np.testing.assert_allclose(job.problems[0].gram, centred.T @ centred / len(now), atol=1e-4)
    np.testing.assert_allclose(job.problems[0].mean, now.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(job.problems[0].variance, now.var(axis=0), atol=1e-4)
    assert job.problems[0].count == len(now) == 400


def test_a_residual_stream_is_made_up_for() -> None:
    """The second block's last site aims at its own result and what the stream has lost."""
    given, model, before = calibration(300), feed_forward(blocks=2), feed_forward(blocks=2)
    seen: list[list[Job]] = []
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0, 1, 2}, shaken), seen))
    dense, now = values(before, ["q1", "x0"], given), values(written(model, outcomes), ["r1", "x0"], given)
    start = weighted_ops(before.graph)[3].rows().astype(np.float64)
    lost = dense["x0"] - now["x0"]
    assert np.abs(lost).mean() > 0.01
    expected = ridge(now["r1"], dense["q1"] + lost, start, True)
    np.testing.assert_allclose(seen[3][0].problems[0].weight, expected, atol=3e-4)
    alone = ridge(now["r1"], dense["q1"], start, True)
    assert np.abs(expected - alone).max() > 0.01


def test_without_a_bias_nothing_is_centred() -> None:
    text = "g (float[batch, 12] x) => (float[batch, 12] y) { a = MatMul (x, u) r = Relu (a) y = MatMul (r, v) }"
    rng = np.random.default_rng(3)
    weights = {name: rng.standard_normal((12, 12)).astype(np.float32) for name in "uv"}
    given, model, before = calibration(200), model_of(text, **weights), model_of(text, **weights)
    seen: list[list[Job]] = []
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken), seen))
    assert all(outcome.values is None and outcome.bias is None for outcome in outcomes)
    dense, now = values(before, ["y"], given), values(written(model, outcomes), ["r"], given)["r"]
    expected = ridge(now, dense["y"], weights["v"].T.astype(np.float64), False)
    np.testing.assert_allclose(seen[1][0].problems[0].weight, expected, atol=5e-4)
    # But for a little of it that is taken for chance.
    np.testing.assert_allclose(seen[1][0].problems[0].gram, now.T @ now / len(now), rtol=1e-2)


def test_groups_of_a_convolution_are_problems_of_their_own() -> None:
    """Each reads its own channels; both together come near the result, bias and residual included."""
    before, model, given = grouped(), grouped(), pictures()
    seen: list[list[Job]] = []
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken), seen))
    job = seen[1][0]
    assert [problem.weight.shape for problem in job.problems] == [(3, 18), (3, 18)]
    after = written(model, outcomes)
    dense, now = values(before, ["b", "q"], given), values(after, ["q"], given)
    start = weighted_ops(before.graph)[1].rows().astype(np.float64)
    x = patches(after, given)
    target = dense["b"] + dense["q"] - now["q"]
    for group, problem in enumerate(job.problems):
        part = slice(3 * group, 3 * group + 3)
        expected = ridge(x[group], target[:, part], start[part], True)
        np.testing.assert_allclose(problem.weight, expected, atol=5e-4)
        assert np.abs(expected - start[part]).max() > 0.02


def test_without_repair_each_comes_near_its_own_weight() -> None:
    given, model, before = calibration(200), feed_forward(blocks=2), feed_forward(blocks=2)
    seen: list[list[Job]] = []
    rewrite(model, weighted_ops(model.graph), given, solving(shaken, seen), repair=False)
    for (job,), op in zip(seen, weighted_ops(before.graph), strict=True):
        np.testing.assert_array_equal(job.problems[0].weight, op.rows())


def test_the_first_site_has_nothing_to_make_up_for() -> None:
    seen: list[list[Job]] = []
    model = feed_forward()
    rewrite(model, weighted_ops(model.graph), calibration(), solving(whole, seen))
    np.testing.assert_array_equal(seen[0][0].problems[0].weight, seen[0][0].original[0])


# ---------------------------------------------------------------- biases


def test_biases_keep_the_mean_of_every_result() -> None:
    """With what the residual stream has lost: it is the stream's mean that stays."""
    given, model, before = calibration(100), feed_forward(blocks=2), feed_forward(blocks=2)
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(shaken))
    names = ["p0", "q0", "s0", "p1", "q1", "s1", "b1"]
    dense, now = values(before, names, given), values(written(model, outcomes), names, given)
    for name in ("p0", "q0", "s0", "p1", "s1"):
        np.testing.assert_allclose(now[name].mean(axis=0), dense[name].mean(axis=0), atol=1e-4)
    for name in ("q1", "b1"):
        assert np.abs(now[name].mean(axis=0) - dense[name].mean(axis=0)).max() > 1e-3


def test_without_repair_biases_take_up_what_their_own_site_did() -> None:
    """mean(W0 x) = mean(W x) + the change of the bias, on what the site reads now."""
    given, model, before = calibration(100), feed_forward(), feed_forward()
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(shaken), repair=False)
    old = weighted_ops(before.graph)[1].rows().astype(np.float64)
    bias = before.graph.tensors()["v0"].values
    x = values(written(model, outcomes), ["r0"], given)["r0"].mean(axis=0)
    new = weighted_ops(model.graph)[1].rows().astype(np.float64)
    np.testing.assert_allclose(new @ x + outcomes[1].values, old @ x + bias, atol=1e-4)
    assert np.abs(outcomes[1].values - bias).max() > 0.01


@pytest.mark.parametrize("count, share", [(3, 3 / 24), (12, 0.5), (24, 1.0), (60, 1.0)])
def test_few_positions_move_biases_by_a_part(count: int, share: float) -> None:
    """Twice as many positions as inputs are trusted; what three of them say about a mean is mostly chance."""
    given, model, before = samples({"x": correlated(count, WIDTH, 0)}), feed_forward(), feed_forward()
    outcome = rewrite(model, weighted_ops(model.graph)[:1], given, solving(shaken))[0]
    x = correlated(count, WIDTH, 0).mean(axis=0, dtype=np.float64)
    shift = (weighted_ops(before.graph)[0].rows() - outcome.result.rows) @ x
    bias = before.graph.tensors()["u0"].values
    np.testing.assert_allclose(outcome.values - bias, share * shift, atol=1e-5)
    assert np.abs(shift).max() > 0.05


def test_biases_of_convolutions_keep_means_too() -> None:
    before, model, given = grouped(), grouped(), pictures()
    after = written(model, rewrite(model, weighted_ops(model.graph), given, solving(shaken)))
    dense, now = values(before, ["a", "y"], given), values(after, ["a", "y"], given)
    for name in ("a", "y"):
        np.testing.assert_allclose(now[name].mean(axis=0), dense[name].mean(axis=0), atol=2e-4)


def test_held_out_samples_are_not_fitted() -> None:
    def fitted(last: float) -> list[bytes]:
        feeds = [{"x": correlated(64, WIDTH, seed)} for seed in range(2)]
        model = feed_forward()
        given = samples(*feeds, {"x": np.full((8, WIDTH), last, np.float32)})
        return bits(written(model, rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken)))))

    assert fitted(1) == fitted(1000)


# ---------------------------------------------------------------- which residuals count


@pytest.mark.parametrize(
    "end, made_up",
    [
        ("q = Add (b, c) y = Add (q, r)", True),
        ("q = Add (b, c) y = Add (r, q)", True),
        ("q = Add (b, c) z = Relu (q) y = Add (z, r)", False),
        ("q = Add (b, c) y1 = Add (q, r) y = Mul (y1, q)", False),
        ("q = Add (b, c) one = ReduceMean <keepdims = 1> (r, last) y = Add (q, one)", False),
        ("q = Add (b, c) y = Mul (q, r)", False),
    ],
    ids=["added", "added to", "behind an activation", "read twice", "broadcast", "multiplied"],
)
def test_only_a_plain_sum_is_made_up_for(end: str, made_up: bool) -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((12, 12)).astype(np.float32) for name in "uv"}
    model = model_of(
        f"g (float[batch, 12] x) => (float[batch, 12] y) {{ a = MatMul (x, u) r = Relu (a) b = MatMul (r, v) {end} }}",
        c=np.ones(12, np.float32),
        last=np.array([1]),
        **weights,
    )
    seen: list[list[Job]] = []
    given = calibration(200)
    outcomes = rewrite(model, weighted_ops(model.graph), given, solving(only({0}, shaken), seen))
    now = values(written(model, outcomes), ["r"], given)["r"]
    dense = np.maximum(values(model, ["x"], given)["x"] @ weights["u"], 0)
    start = weights["v"].T.astype(np.float64)
    target = dense @ start.T + (dense - now if made_up else 0)
    np.testing.assert_allclose(seen[1][0].problems[0].weight, ridge(now, target, start, True), atol=5e-4)


# ---------------------------------------------------------------- problems


def moments_of(x: F64) -> Moments:
    moments = Moments(1, x.shape[1])
    moments.add(x[None].astype(np.float32))
    return moments


@pytest.mark.parametrize("count, share", [(1, 0.5 * (1 - 1 / 16)), (8, 0.25), (12, 0.125), (16, 0.0), (40, 0.0)])
def test_few_positions_are_mixed_with_their_diagonal(count: int, share: float) -> None:
    x = np.random.default_rng(0).standard_normal((count, 8))
    gram = x.T @ x / count
    got = problem_of(np.zeros((2, 8)), moments_of(x))
    np.testing.assert_allclose(np.diagonal(got.gram), np.diagonal(gram), rtol=1e-5)
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(got.gram[off], gram[off] * (1 - share), atol=1e-5)
    assert got.count == count
    assert np.linalg.eigvalsh(got.damped()).min() > 0


def halves_of(x: F64) -> Moments:
    """Moments of two feeds, the second one kept as the half."""
    moments = Moments(1, x.shape[1])
    moments.merge(moments_of(x[: len(x) // 2]))
    moments.merge(moments_of(x[len(x) // 2 :]), into_half=True)
    return moments


def shares_of(got: F64, plain: F64) -> F64:
    """By how much each element off the diagonal was drawn to 0; the diagonal must have stayed."""
    np.testing.assert_allclose(np.diagonal(got), np.diagonal(plain), rtol=1e-5)
    off = ~np.eye(len(plain), dtype=bool)
    return np.asarray(1 - got[off] / plain[off])


X = np.random.default_rng(0).standard_normal((40, 8))
WEIGHT = np.random.default_rng(1).standard_normal((4, 8))


def test_what_two_halves_do_not_agree_on_is_taken_for_chance() -> None:
    share = shrinkage(WEIGHT, *(half.T @ half / 20 for half in (X[:20], X[20:])))
    assert 0.1 < share < 1
    got = problem_of(WEIGHT, halves_of(X)).gram
    np.testing.assert_allclose(shares_of(got, X.T @ X / 40), share / (2 - share), atol=1e-3)
    np.testing.assert_allclose(problem_of(WEIGHT, halves_of(X), chance=False).gram, X.T @ X / 40, atol=1e-5)


def test_halves_that_agree_are_left_but_for_the_share_of_few_positions() -> None:
    twice = np.concatenate([X[:20], X[:20]])
    np.testing.assert_allclose(problem_of(WEIGHT, halves_of(twice)).gram, twice.T @ twice / 40, atol=1e-5)
    wide = np.random.default_rng(2).standard_normal((10, 16))
    twice = np.concatenate([wide, wide])
    got = problem_of(np.ones((4, 16)), halves_of(twice)).gram
    assert shares_of(got, twice.T @ twice / 20).min() > (1 - 20 / 32) / 2 - 1e-3


def test_with_many_positions_nobody_asks() -> None:
    many = np.random.default_rng(2).standard_normal((512 * 8, 8))
    np.testing.assert_array_equal(problem_of(WEIGHT, halves_of(many)).gram, halves_of(many).get("gram")[0])


@pytest.mark.parametrize(("count", "cut"), [(40, 0), (40, 9), (40, 33), (14, 7)])
def test_a_half_with_too_little_to_say_is_not_asked(count: int, cut: int) -> None:
    """Nothing, less than a quarter on either side, too few positions."""
    x = X[:count, :4]
    moments = Moments(1, 4)
    moments.merge(moments_of(x[:cut]))
    moments.merge(moments_of(x[cut:]), into_half=True)
    np.testing.assert_allclose(problem_of(WEIGHT[:, :4], moments).gram, x.T @ x / count, atol=1e-5)
    whole, same = judged(WEIGHT[:, :4], moments, 0, centred=False)
    assert whole is same


def test_a_solution_is_judged_on_the_other_half() -> None:
    x = X + 1
    share = shrinkage(WEIGHT, *(np.cov(half.T, bias=True) for half in (x[:20], x[20:])))
    seen, unseen = judged(WEIGHT, halves_of(x), 0, centred=True)
    np.testing.assert_allclose(unseen.gram, np.cov(x[20:].T, bias=True), atol=1e-5)
    np.testing.assert_allclose(shares_of(seen.gram, np.cov(x[:20].T, bias=True)), share, atol=1e-3)
    assert (seen.count, unseen.count) == (20, 20)
    np.testing.assert_allclose(seen.mean, x[:20].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(unseen.mean, x[20:].mean(axis=0), atol=1e-5)
    whole, same = judged(WEIGHT, moments_of(x), 0, centred=True)
    assert whole is same
    np.testing.assert_array_equal(whole.gram, problem_of(WEIGHT, moments_of(x), centred=True).gram)


def test_an_input_that_only_one_half_knows_keeps_its_size_in_the_other() -> None:
    x = X.copy()
    x[:20, 3] = 0
    seen, _ = judged(WEIGHT, halves_of(x), 0, centred=True)
    assert seen.gram[3, 3] == pytest.approx(np.var(x[:, 3]), rel=1e-4)


def test_what_never_changes_has_no_variance_of_rounding() -> None:
    x = np.concatenate([X[:1] * 1000 + 1 / 3] * 7)
    gram = problem_of(WEIGHT, moments_of(x), centred=True).gram
    np.testing.assert_array_equal(gram, np.zeros((8, 8)))


def test_a_problem_may_be_centred() -> None:
    x = np.random.default_rng(0).standard_normal((50, 4)) + 3
    got = problem_of(np.zeros((1, 4)), moments_of(x), centred=True)
    np.testing.assert_allclose(got.gram, np.cov(x.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(got.mean, x.mean(axis=0), atol=1e-5)


def test_weights_are_split_by_group() -> None:
    op: WeightedOp = weighted_ops(grouped().graph)[1]
    first, second = split(op)
    assert first.dtype == np.float64
    np.testing.assert_array_equal(np.concatenate([first, second]), op.rows())
    assert first.shape == (3, 18)


def test_tiny_is_what_these_tests_take_it_for() -> None:
    feed: Feeds = {"x": correlated(5, WIDTH, 0)}
    shapes = {name: array.shape for name, array in values(feed_forward(), ["r0", "q0"], samples(feed)).items()}
    assert shapes == {"r0": (5, HIDDEN), "q0": (5, WIDTH)}


@pytest.mark.parametrize("size", ["batch", None])
def test_only_tensors_of_one_known_shape_are_added_up(size: str | None) -> None:
    model = feed_forward()
    ops = weighted_ops(model.graph)
    biases = [bias_of(op, model.graph) for op in ops]
    tensors = model.graph.tensors()
    for name in ("q0", "x"):
        tensors[name].shape = [size, WIDTH]
    assert layerwise._residuals(ops, biases) == ({1: "x"} if size else {})
