"""Every method of `sparsify` with every pattern, on a tiny calibrated model: the same rules hold for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spa_compiler import patterns
from spa_compiler.criteria import symbolic
from spa_compiler.errors import UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes.methods import METHODS, Layer
from spa_compiler.passes.sparsify import Sparsify, SparsifyOptions
from spa_compiler.solvers.obs import remove_channels
from spa_compiler.solvers.problem import Problem, Zeros
from tests.layer_problems import correlated
from tests.networks import model_of
from tests.passes.tiny import HIDDEN, WIDTH, bits, calibration, context, feed_forward, rows, sparsify

SHAPES = {"A0": (WIDTH, HIDDEN), "B0": (HIDDEN, WIDTH)}
PATTERNS = ["unstructured", "block:4x1", "block:3x2", "2:4", "1:3", "fan-in", "channel"]
EXCHANGING = ("dsnot", "swap")
"""Methods that refuse `block:3x2`."""
PAIRS = [
    (method, pattern)
    for method in METHODS
    for pattern in PATTERNS
    if method != "masks" and not (method in EXCHANGING and pattern == "block:3x2")
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scores.npz and masks.npz for `feed_forward()`."""
    folder = tmp_path_factory.mktemp("arrays")
    rng = np.random.default_rng(5)
    np.savez(folder / "scores.npz", **{name: rng.standard_normal(shape) for name, shape in SHAPES.items()})
    np.savez(folder / "masks.npz", **{name: rng.random(shape) < 0.5 for name, shape in SHAPES.items()})
    return folder


def options(method: str, files: Path) -> dict[str, object]:
    """What a method needs besides a pattern."""
    if method == "symbolic":
        return {"method": method, "expression": "abs(W)*X"}
    return {method: str(files / f"{method}.npz")} if method in ("scores", "masks") else {"method": method}


@pytest.mark.parametrize("method,pattern", PAIRS)
def test_zeros_follow_the_pattern_and_make_the_share(method: str, pattern: str, files: Path) -> None:
    wanted = patterns.parse(pattern)
    share = {} if wanted.sparsity is not None else {"sparsity": 0.5}
    model = feed_forward()
    before = rows(model)
    change = sparsify(
        model, context(calibration()), pattern=pattern, allocate="uniform", **share, **options(method, files)
    )
    assert [site.node for site in change.sites] == ["a0", "b0"]
    for site, old, new in zip(change.sites, before, rows(model), strict=True):
        assert np.isfinite(new).all()
        assert wanted.fits(new)
        n, k = new.shape
        if wanted.sparsity is not None:
            step = n * (k % wanted.cols)  # a short last group keeps what a whole one does
        else:
            step = min(wanted.rows, n) * wanted.cols if pattern != "fan-in" else n
        goal = wanted.sparsity if wanted.sparsity is not None else 0.5
        assert abs(np.count_nonzero(new == 0) - goal * new.size) <= step
        if not METHODS[method].moves:
            np.testing.assert_array_equal(new[new != 0], old[new != 0])
        assert site.pattern == pattern
        assert site.method == method
        assert site.density_after == np.count_nonzero(new) / new.size
        assert 0 < site.error < (3 if method == "spectrum" else 1)  # right on average, by noise
        assert site.seconds > 0


@pytest.mark.parametrize("method", EXCHANGING)
def test_blocks_that_cannot_be_exchanged_are_refused_before_any_work(method: str) -> None:
    with pytest.raises(UsageError, match=rf"method={method} cannot exchange zeros in the pattern block:3x2") as caught:
        Sparsify(SparsifyOptions(sparsity=0.5, method=method, pattern="block:3x2"))  # type: ignore[arg-type]
    assert caught.value.where == "pattern"


@pytest.mark.parametrize("method", list(METHODS))
def test_the_bits_do_not_depend_on_workers(method: str, files: Path) -> None:
    given = options(method, files)
    if method != "masks":
        given["sparsity"] = 0.5
    results = []
    for workers in (1, 2, 4, 1):
        model = feed_forward(blocks=1)
        sparsify(model, context(calibration(), workers), **given)
        results.append(bits(model))
    assert results[1:] == results[:1] * 3


def test_chance_is_the_seeds() -> None:
    def drawn(seed: int) -> list[bytes]:
        model = feed_forward()
        sparsify(model, context(seed=seed), sparsity=0.5, method="random")
        return bits(model)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_chance_is_another_in_each_layer() -> None:
    model = feed_forward(blocks=2)
    first = weighted_ops(model.graph)
    first[2].replace(first[0].rows())
    sparsify(model, context(), sparsity=0.5, method="random")
    a, _, b, _ = rows(model)
    assert not np.array_equal(a == 0, b == 0)


@pytest.mark.parametrize("method", ["sparsegpt", "admm", "swap", "auto"])
def test_solvers_beat_the_criteria_on_the_layer(method: str) -> None:
    """One layer alone, so that each has the same problem: what moves weights loses less than what only chooses."""
    errors = {}
    for name in ("random", "magnitude", "wanda", method):
        change = sparsify(
            feed_forward(), context(calibration(200)), sparsity=0.6, method=name, allocate="uniform", targets=("a0",)
        )
        errors[name] = change.sites[0].error
    assert errors[method] < 0.9 * min(errors["wanda"], errors["magnitude"])
    assert errors["wanda"] < errors["random"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.data and name != "auto"])
def test_methods_that_need_samples_say_so(method: str) -> None:
    expression = {"expression": "abs(W)"} if method == "symbolic" else {}
    model = feed_forward()
    before = bits(model)
    with pytest.raises(UsageError, match=rf"the method {method} works from calibration samples.*--calib") as caught:
        sparsify(model, context(), sparsity=0.5, method=method, **expression)
    assert caught.value.where == "method"
    assert bits(model) == before


def test_auto_without_samples_is_magnitude() -> None:
    first, second = feed_forward(), feed_forward()
    change = sparsify(first, context(), sparsity=0.5)
    sparsify(second, context(), sparsity=0.5, method="magnitude")
    assert bits(first) == bits(second)
    assert {site.method for site in change.sites} == {"magnitude"}
    assert "magnitude, uniform shares" in change.summary


def test_masks_are_refitted_where_there_are_samples(files: Path) -> None:
    """The zeros are those of the file either way; with samples the rest makes up for them."""
    kept, refitted = feed_forward(), feed_forward()
    masks = np.load(files / "masks.npz")
    without = sparsify(kept, context(), masks=str(files / "masks.npz"))
    sparsify(refitted, context(calibration(200)), masks=str(files / "masks.npz"))
    for name, plain, new, old in zip(SHAPES, rows(kept), rows(refitted), rows(feed_forward()), strict=True):
        np.testing.assert_array_equal(plain, np.where(masks[name].T, old, 0))
        np.testing.assert_array_equal(new[~masks[name].T], 0)
        assert not np.array_equal(new, plain)
    assert [site.density_after for site in without.sites] == [masks[name].mean() for name in SHAPES]


def test_scores_decide_alone_and_may_be_negative(tmp_path: Path) -> None:
    score = {name: -np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in SHAPES.items()}
    np.savez(tmp_path / "s.npz", **score)
    model = feed_forward()
    sparsify(model, context(), sparsity=0.5, scores=str(tmp_path / "s.npz"))
    for name, new in zip(SHAPES, rows(model), strict=True):
        np.testing.assert_array_equal(new.T != 0, score[name] > -score[name].size / 2)  # the larger half stays


@pytest.mark.parametrize("expression, same", [("abs(W)*X", "wanda"), ("sq(W)", "magnitude")])
def test_expressions_of_known_criteria(expression: str, same: str) -> None:
    first, second = feed_forward(), feed_forward()
    sparsify(first, context(calibration()), sparsity=0.5, method="symbolic", expression=expression, pattern="fan-in")
    sparsify(second, context(calibration()), sparsity=0.5, method=same, pattern="fan-in")
    assert bits(first) == bits(second)


@pytest.mark.parametrize("centred", [False, True])
def test_an_expression_reads_the_variance(centred: bool) -> None:
    mean, variance = np.array([5.0, 0.0, 1.0, 0.0]), np.array([4.0, 1.0, 3.0, 2.0])
    gram = np.diag(variance) if centred else np.diag(variance) + np.outer(mean, mean)
    problem = Problem(np.ones((1, 4)), gram, mean, 99, centred)
    layer = Layer(np.random.default_rng(0), expression=symbolic.parse("A*V"))
    solution = METHODS["symbolic"].solve(problem, Zeros(patterns.parse("unstructured"), 0.5), layer)
    np.testing.assert_array_equal(solution.mask, [[True, False, True, False]])


def test_an_expression_over_given_scores(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{name: np.ones(shape) for name, shape in SHAPES.items()})
    first, second = feed_forward(), feed_forward()
    given = {"method": "symbolic", "scores": str(tmp_path / "g.npz")}
    sparsify(first, context(calibration()), sparsity=0.5, expression="sq(W)*G", **given)
    sparsify(second, context(calibration()), sparsity=0.5, method="magnitude")
    assert bits(first) == bits(second)
    with pytest.raises(UsageError, match=r"reads G, given scores, and there are none.*scores="):
        sparsify(feed_forward(), context(calibration()), sparsity=0.5, method="symbolic", expression="sq(W)*G")


def grouped() -> Model:
    """A first convolution, one of two groups, a norm."""
    rng = np.random.default_rng(0)
    return model_of(
        """g (float[batch, 3, 6, 6] x) => (float[batch, 6, 4, 4] y) {
          a = Conv (x, u) h = Conv <group = 2> (a, v) y = InstanceNormalization (h, one, zero)
        }""",
        u=rng.standard_normal((4, 3, 1, 1)).astype(np.float32),
        v=rng.standard_normal((6, 2, 3, 3)).astype(np.float32),
        one=np.ones(6, np.float32),
        zero=np.zeros(6, np.float32),
    )


@pytest.mark.parametrize("what", ["scores", "masks"])
def test_each_group_of_a_convolution_goes_by_its_own_part_of_a_file(what: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    keep = np.concatenate([rng.permutation(54) < 27, rng.permutation(54) < 27]).reshape(6, 2, 3, 3)
    np.savez(tmp_path / "f.npz", v=keep if what == "masks" else np.where(keep, 2.0, 1.0) * rng.uniform(1, 1.5))
    model = grouped()
    share = {"sparsity": 0.5} if what == "scores" else {}
    sparsify(model, context(), **{what: str(tmp_path / "f.npz")}, **share)
    np.testing.assert_array_equal(rows(model)[1] != 0, keep.reshape(6, 18))


def test_chance_is_another_in_each_group() -> None:
    model = grouped()
    sparsify(model, context(), sparsity=0.5, method="random")
    first, second = np.split(rows(model)[1] == 0, 2)
    assert not np.array_equal(first, second)


def test_channels_of_a_convolution_go_with_their_whole_kernel() -> None:
    model = grouped()
    sparsify(model, context(), sparsity=0.5, pattern="channel", method="magnitude")
    zeros = (rows(model)[1] == 0).reshape(2, 3, 2, 9)
    assert zeros.all(axis=(1, 3)).sum(axis=1).tolist() == [1, 1]
    assert zeros.mean() == 0.5


@pytest.mark.parametrize("method", ["wanda", "dsnot"])
def test_what_compares_within_outputs_takes_as_much_of_each(method: str) -> None:
    model = feed_forward()
    sparsify(model, context(calibration()), sparsity=0.5, method=method, allocate="uniform")
    for weight in rows(model):
        assert set(np.count_nonzero(weight == 0, axis=1)) == {weight.shape[1] // 2}


def test_auto_takes_channels_out_by_the_solver_for_channels() -> None:
    problem, zeros = correlated(12, 36, 0), Zeros(patterns.parse("channel").on(3), 0.5)
    found = METHODS["auto"].solve(problem, zeros, Layer(np.random.default_rng(0))).weight
    np.testing.assert_array_equal(found, remove_channels(problem, zeros).weight)
    others = [METHODS[name].solve(problem, zeros, Layer(np.random.default_rng(0))) for name in ("sparsegpt", "admm")]
    assert problem.loss(found) < min(problem.loss(other.weight) for other in others)
