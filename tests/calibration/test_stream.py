"""The moments of every site, against ONNX Runtime on the whole model and products written out by hand."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.calibration import stream as module
from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream
from spa_compiler.errors import ModelError, UsageError
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import WeightedOp, weighted_ops
from spa_compiler.graph.session import Feeds, open_model, run
from tests.networks import model_of

F64 = np.ndarray


# ---------------------------------------------------------------- models and what they read


def arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) / np.sqrt(prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokens() -> Model:
    """Sites side by side, a site behind a residual stream that differs, and a Gemm on merged axes."""
    return model_of(
        """g (float[batch, seq, 6] x, int64[batch, seq] attention_mask) => (float[rows, 3] y) {
          q = MatMul (x, wq) k = MatMul (x, wk) t = Tanh (q) m = Mul (t, k) o = MatMul (m, wo) r = Add (o, x)
          f = MatMul (r, w1) c = Add (f, b1) h = Relu (c) d = MatMul (h, w2) s = Add (r, d)
          flat = Reshape (s, merged) y = Gemm <transB = 1> (flat, wg, bg) unused = Cast <to = 1> (attention_mask)
        }""",
        merged=np.array([-1, 6]),
        **arrays({"wq": (6, 5), "wk": (6, 5), "wo": (5, 6), "w1": (6, 8), "b1": (8,), "w2": (8, 6)}),
        **arrays({"wg": (3, 6), "bg": (3,)}, seed=1),
    )


def images() -> Model:
    """Convolutions with padding, strides, dilations and groups, a residual between them, and a Gemm."""
    return model_of(
        """g (float[batch, 3, 9, 8] x) => (float[batch, 5] y) {
          a = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, wa, ba) r = Relu (a)
          b = Conv <group = 2, pads = [1, 0, 1, 2], dilations = [1, 2]> (r, wb)
          c = Conv (r, wc) s = Add (b, c) e = Conv <group = 4, pads = [1, 1, 1, 1]> (s, we) t = Add (e, s) u = Relu (t)
          p = GlobalAveragePool (u) f = Flatten (p) y = Gemm (f, wy)
        }""",
        **arrays({"wa": (4, 3, 3, 3), "ba": (4,), "wb": (8, 2, 3, 2), "wc": (8, 4, 1, 1), "we": (8, 2, 3, 3)}),
        **arrays({"wy": (8, 5)}, seed=1),
    )


def token_feeds(count: int, padded: bool = False, seed: int = 0) -> list[Feeds]:
    """Feeds of unequal size; the first is by far the largest, so that it is done last when several run at a time."""
    rng = np.random.default_rng(seed)
    feeds = []
    for number in range(count):
        shape = (40, 30) if number == 0 else (2, 3 + number % 4)
        mask = np.ones(shape, np.int64)
        if padded:
            mask[:, : number % 3] = 0
            mask[0, -1] = 0
        feeds.append({"x": rng.standard_normal((*shape, 6)).astype(np.float32), "attention_mask": mask})
    return feeds


def image_feeds(count: int, seed: int = 0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((2 + n, 3, 9, 8)).astype(np.float32)} for n in range(count)]


def samples(feeds: list[Feeds]) -> Samples:
    return Samples(lambda: iter(feeds), len(feeds))


CASES: dict[str, tuple[Callable[[], Model], Callable[[int], list[Feeds]]]] = {
    "tokens": (tokens, token_feeds),
    "images": (images, image_feeds),
}
RESIDUALS = {"tokens": {"d": "r"}, "images": {"e": "s"}}
"""Sites, by their results, and what these are added to."""


def im2col(op: WeightedOp, x: F64) -> F64:
    """[groups, positions, k], one output position after the other."""
    if op.kind != "Conv":
        return x.reshape(1, -1, x.shape[-1])
    attrs = op.node.attrs
    top, left, bottom, right = attrs.get("pads", [0, 0, 0, 0])
    (down, along), (dy, dx) = attrs.get("strides", [1, 1]), attrs.get("dilations", [1, 1])
    height, width = op.kernel
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    per = x.shape[1] // op.group
    rows: list[list[F64]] = [[] for _ in range(op.group)]
    for image in x:
        for i in range(0, x.shape[2] - (height - 1) * dy, down):
            for j in range(0, x.shape[3] - (width - 1) * dx, along):
                patch = image[:, i : i + (height - 1) * dy + 1 : dy, j : j + (width - 1) * dx + 1 : dx]
                for group in range(op.group):
                    rows[group].append(patch[group * per : (group + 1) * per].reshape(-1))
    return np.array(rows)


def results(op: WeightedOp, y: F64) -> F64:
    """What is shaped like the result of an operator, as [groups, positions, n / groups]."""
    flat = y.reshape(-1, op.n) if op.kind != "Conv" else y.transpose(0, 2, 3, 1).reshape(-1, op.n)
    return flat.reshape(len(flat), op.group, -1).transpose(1, 0, 2)


def tensors(model: Model, names: list[str], feeds: list[Feeds]) -> list[Feeds]:
    """The values of tensors for each feed."""
    inputs = {tensor.name for tensor in model.graph.inputs}
    session = open_model(model, outputs=[name for name in dict.fromkeys(names) if name not in inputs], optimize="none")
    return [{name: array.astype(np.float64) for name, array in (run(session, feed) | feed).items()} for feed in feeds]


def read_by(op: WeightedOp) -> str:
    return str(op.node.inputs[0].name)


def rewritten(model: Model) -> tuple[Model, list[F64], list[tuple[str, F64] | None]]:
    """A copy with every weight, and every bias that a Gemm, Conv or Add holds, shaken; and what it was shaken to."""
    copy, rng = model.copy(), np.random.default_rng(9)
    weights: list[F64] = []
    biases: list[tuple[str, F64] | None] = []
    for op in weighted_ops(copy.graph):
        rows = op.rows() + 0.3 * rng.standard_normal((op.n, op.k)).astype(np.float32)
        op.replace(rows)
        weights.append(rows)
        name = next((n for n in ("b1", "bg", "ba") if n in _near(op)), None)
        if name is None:
            biases.append(None)
            continue
        held = copy.graph.tensors()[name]
        held.values = held.values + rng.standard_normal(held.values.shape).astype(np.float32)
        biases.append((name, held.values))
    return copy, weights, biases


def _near(op: WeightedOp) -> set[str]:
    """What it reads, and what those that read its result do."""
    return {str(t.name) for node in (op.node, *op.node.outputs[0].outputs) for t in node.inputs}


def place_of(model: Model, name: str) -> tuple[int, int]:
    """Number of the node that reads a constant, and as which input."""
    return next(
        (number, place)
        for number, node in enumerate(model.graph.nodes)
        for place, tensor in enumerate(node.inputs)
        if tensor.name == name
    )


def expected(
    op: WeightedOp,
    now: list[Feeds],
    before: list[Feeds],
    target: str | None = None,
    keep: list[F64 | None] | None = None,
) -> dict[str, F64]:
    """All moments of one site. `keep` marks the positions that count."""
    keep = keep or [None] * len(now)

    def of(make: str, feeds: list[Feeds]) -> F64:
        parts = [im2col(op, f[read_by(op)]) if make == "x" else results(op, f[str(target)]) for f in feeds]
        return np.concatenate([p if k is None else p[:, k] for p, k in zip(parts, keep, strict=True)], axis=1)

    x, z = of("x", now), of("x", before)
    turned, count = x.transpose(0, 2, 1), x.shape[1]
    found = {
        "count": np.array(count),
        "mean": x.mean(axis=1),
        "gram": turned @ x / count,
        "dense_mean": z.mean(axis=1),
        "cross": turned @ z / count,
    }
    if target is not None:
        lost = of("t", before) - of("t", now)
        found |= {"target_mean": lost.mean(axis=1), "extra": turned @ lost / count}
    return found


def assert_moments(got: Moments, wanted: dict[str, F64]) -> None:
    assert got.count == wanted.pop("count")
    for name, value in wanted.items():
        assert got.get(name).shape == value.shape
        np.testing.assert_allclose(got.get(name), value, rtol=2e-4, atol=2e-5, err_msg=name)


def all_moments(stream: Stream) -> dict[int, Moments]:
    return {collected.site: collected.fit for wave in stream for collected in wave}


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("threads", [1, 3])
def test_moments_of_the_model_as_it_is(case: str, threads: int) -> None:
    make, feeds_of = CASES[case]
    model, feeds = make(), feeds_of(5)
    ops = weighted_ops(model.graph)
    got = all_moments(Stream(model, ops, samples(feeds), sequential=False, threads=threads))
    assert sorted(got) == list(range(len(ops)))
    known = tensors(model, [read_by(op) for op in ops], feeds[:-1])  # the last of five is held out
    for site, op in enumerate(ops):
        wanted = expected(op, known, known)
        del wanted["dense_mean"], wanted["cross"]
        assert_moments(got[site], wanted)
        assert "cross" not in got[site]


@pytest.mark.parametrize("case", list(CASES))
def test_later_sites_see_the_rewritten_prefix_paired_with_what_was_before(case: str) -> None:
    make, feeds_of = CASES[case]
    model, feeds = make(), feeds_of(5)
    ops = weighted_ops(model.graph)
    names = {op.node.outputs[0].name: site for site, op in enumerate(ops)}
    targets = {names[name]: target for name, target in RESIDUALS[case].items()}
    changed, weights, biases = rewritten(model)
    stream = Stream(model, ops, samples(feeds), targets=targets, threads=2)
    got: dict[int, Moments] = {}
    for wave in stream:
        for collected in wave:
            got[collected.site] = collected.fit
            bias = biases[collected.site]
            stream.replace(
                collected.site, weights[collected.site], None if bias is None else (place_of(model, bias[0]), bias[1])
            )
    wanted = [read_by(op) for op in ops] + list(targets.values())
    now, before = (tensors(each, wanted, feeds[:-1]) for each in (changed, model))
    differ = 0
    for site, op in enumerate(ops):
        assert_moments(got[site], expected(op, now, before, targets.get(site)))
        assert ("extra" in got[site]) == (site in targets)
        differ += not np.allclose(got[site].get("gram"), got[site].get("cross"), rtol=0.05)
    assert differ == len(ops) - sum(wave == 0 for wave in stream.waves.waves)


def test_nothing_is_replaced_in_the_model() -> None:
    model = tokens()
    ops = weighted_ops(model.graph)
    before = [op.rows().copy() for op in ops]
    stream = Stream(model, ops, samples(token_feeds(2)))
    for wave in stream:
        for collected in wave:
            stream.replace(collected.site, np.zeros((ops[collected.site].n, ops[collected.site].k)))
    for op, rows in zip(ops, before, strict=True):
        np.testing.assert_array_equal(op.rows(), rows)


def test_without_a_rewrite_both_runs_agree() -> None:
    model = tokens()
    got = all_moments(Stream(model, weighted_ops(model.graph), samples(token_feeds(3)), targets={4: "r"}))
    for moments in got.values():
        np.testing.assert_allclose(moments.get("cross"), moments.get("gram"), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got[4].get("extra"), 0)


def test_a_target_that_cannot_differ_is_left_out() -> None:
    """The stream of the first residual connection is the model's input."""
    model = tokens()
    ops = weighted_ops(model.graph)
    (site,) = [site for site, op in enumerate(ops) if op.node.outputs[0].name == "o"]
    stream = Stream(model, ops, samples(token_feeds(3)), targets={site: "x"})
    got: dict[int, Moments] = {}
    for wave in stream:
        for collected in wave:
            got[collected.site] = collected.fit
            stream.replace(collected.site, ops[collected.site].rows() * 0.5)
    assert "extra" not in got[site]


def test_sites_that_read_alike_share_their_moments() -> None:
    model = tokens()
    got = all_moments(Stream(model, weighted_ops(model.graph), samples(token_feeds(2))))
    assert got[0] is got[1]
    assert got[1] is not got[2]


def test_a_second_pass_starts_afresh() -> None:
    model = tokens()
    ops = weighted_ops(model.graph)
    stream = Stream(model, ops, samples(token_feeds(3)))
    first = all_moments(stream)
    for site, moments in all_moments(stream).items():
        np.testing.assert_array_equal(moments.get("gram"), first[site].get("gram"))


# ---------------------------------------------------------------- what counts


def test_held_out_feeds_take_no_part() -> None:
    model, feeds = tokens(), token_feeds(17)
    for number in (7, 15):
        feeds[number]["x"] += 1000
    ops = weighted_ops(model.graph)
    got = all_moments(Stream(model, ops, samples(feeds), sequential=False))
    used = [feed for number, feed in enumerate(feeds) if number not in (7, 15)]
    known = tensors(model, [read_by(op) for op in ops], used)
    for site, op in enumerate(ops):
        assert got[site].count == sum(feed["attention_mask"].size for feed in used)
        np.testing.assert_allclose(got[site].get("mean"), expected(op, known, known)["mean"], rtol=1e-4, atol=1e-5)


def test_padding_takes_no_part() -> None:
    """Neither where positions are an axis of their own, nor where it is merged with the batch."""
    model, feeds = tokens(), token_feeds(5, padded=True)
    for feed in feeds:
        feed["x"][feed["attention_mask"] == 0] = 1000
    ops = weighted_ops(model.graph)
    got = all_moments(Stream(model, ops, samples(feeds), threads=2))
    keep: list[F64 | None] = [feed["attention_mask"].reshape(-1) == 1 for feed in feeds[:-1]]
    known = tensors(model, [read_by(op) for op in ops], feeds[:-1])
    for site, op in enumerate(ops):
        assert_moments(got[site], expected(op, known, known, keep=keep))


def test_many_positions_are_drawn_from_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each feed gives its share; `gram` and `cross` are of the same positions."""
    monkeypatch.setattr(module, "MOST_ROWS", 40)
    monkeypatch.setattr(module, "ROWS_PER_COLUMN", 2)
    model, feeds = tokens(), token_feeds(5, padded=True)
    for feed in feeds:
        feed["x"][feed["attention_mask"] == 0] = np.nan
    ops = weighted_ops(model.graph)
    per_feed = [int(feed["attention_mask"].sum()) for feed in feeds[:-1]]

    def moments(seed: int) -> dict[int, Moments]:
        return all_moments(Stream(model, ops, samples(feeds), seed=seed))

    first, again, other = moments(1), moments(1), moments(2)
    for site in range(len(ops)):
        assert first[site].count == sum(min(10, have) for have in per_feed)
        np.testing.assert_array_equal(first[site].get("gram"), again[site].get("gram"))
        np.testing.assert_allclose(first[site].get("gram"), first[site].get("cross"), rtol=1e-6)
        assert np.isfinite(first[site].get("gram")).all()
        assert not np.allclose(first[site].get("gram"), other[site].get("gram"))


def test_a_quota_that_all_fit_into_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 positions for each column count where that is more."""
    monkeypatch.setattr(module, "MOST_ROWS", 1)
    model, feeds = tokens(), token_feeds(3)
    feeds[0] = token_feeds(2)[1]
    ops = weighted_ops(model.graph)
    for moments in all_moments(Stream(model, ops, samples(feeds))).values():
        assert moments.count == sum(feed["attention_mask"].size for feed in feeds[:-1])


@pytest.mark.parametrize("case", list(CASES))
def test_large_inputs_are_taken_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, feeds_of = CASES[case]
    model, feeds = make(), feeds_of(3)
    ops = weighted_ops(model.graph)
    site = next(s for s, op in enumerate(ops) if op.node.outputs[0].name in RESIDUALS[case])
    targets = {site: RESIDUALS[case][ops[site].node.outputs[0].name]}
    whole = all_moments(Stream(model, ops, samples(feeds), targets=targets))
    monkeypatch.setattr(module, "_PART", 100)
    parts = all_moments(Stream(model, ops, samples(feeds), targets=targets))
    for place in range(len(ops)):
        assert parts[place].count == whole[place].count
        for name in ("gram", "mean", "cross", "dense_mean"):
            np.testing.assert_allclose(parts[place].get(name), whole[place].get(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", list(CASES))
def test_the_bits_do_not_depend_on_threads(case: str) -> None:
    make, feeds_of = CASES[case]
    model, feeds = make(), feeds_of(9)
    for number, feed in enumerate(feeds):  # of such different sizes that the order of additions shows in the bits
        feed["x"] *= np.float32(10.0 ** (number % 4 * 3 - 6))
    ops = weighted_ops(model.graph)
    _, weights, _ = rewritten(model)

    def moments(threads: int) -> dict[int, Moments]:
        stream, got = Stream(model, ops, samples(feeds), threads=threads), {}
        for wave in stream:
            for collected in wave:
                got[collected.site] = collected.fit
                stream.replace(collected.site, weights[collected.site])
        return got

    first = moments(1)
    for threads in (2, 3):
        for site, got in moments(threads).items():
            for name in ("mean", "gram", "cross", "dense_mean"):
                assert got.get(name).tobytes() == first[site].get(name).tobytes()


def test_half_precision() -> None:
    model = model_of(
        "g (float16[N, 4] x) => (float16[N, 4] y) { a = MatMul (x, u) b = Relu (a) y = MatMul (b, u) }",
        u=arrays({"u": (4, 4)})["u"].astype(np.float16),
    )
    feeds = [{"x": (300 * feed["x"][..., :4].reshape(-1, 4)).astype(np.float16)} for feed in token_feeds(3)]
    got = all_moments(Stream(model, weighted_ops(model.graph), samples(feeds)))
    x = np.concatenate([feed["x"] for feed in feeds[:-1]]).astype(np.float64)
    np.testing.assert_allclose(got[0].get("gram")[0], x.T @ x / len(x), rtol=1e-4, atol=1)  # beyond 65504
    assert np.isfinite(got[1].get("gram")).all()


# ---------------------------------------------------------------- disk and memory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_waits_on_disk_is_dropped_in_time_and_removed_in_the_end(temporary: Path) -> None:
    model, feeds = tokens(), token_feeds(5)
    stream = Stream(model, weighted_ops(model.graph), samples(feeds))
    waiting = [len(list(temporary.rglob("*.npy"))) for _ in stream]
    # Four feeds are not held out, both runs keep theirs. In front of each wave: x; x and m; x, m and r; r and h twice.
    assert waiting == [4, 4 + 8, 4 + 8 + 8, 8 + 8, 8 + 8]
    assert not list(temporary.iterdir())


def test_nothing_is_left_after_an_error_of_the_caller(temporary: Path) -> None:
    model = tokens()

    def work() -> None:
        for wave in Stream(model, weighted_ops(model.graph), samples(token_feeds(3))):
            assert list(temporary.iterdir())
            if wave[0].site == 2:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    gc.collect()
    assert not list(temporary.iterdir())


def test_nothing_is_left_when_the_caller_stops_early(temporary: Path) -> None:
    model = tokens()
    stream = iter(Stream(model, weighted_ops(model.graph), samples(token_feeds(3))))
    next(stream)
    assert list(temporary.iterdir())
    stream.close()  # type: ignore[attr-defined]
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_left_when_the_samples_end_early(temporary: Path, threads: int) -> None:
    model, feeds = tokens(), token_feeds(3)
    fewer = Samples(lambda: iter(feeds[:2]), 3)
    with pytest.raises(UsageError, match="there were 3 feeds of samples at first, and 2"):
        all_moments(Stream(model, weighted_ops(model.graph), fewer, threads=threads))
    assert not list(temporary.iterdir())


def test_what_cannot_wait_is_refused(temporary: Path) -> None:
    model = model_of(
        """g (float[N, 4] x) => (float[N, 4] y) {
          two = SplitToSequence <axis = 1> (x, half) a = MatMul (x, u) first = SequenceAt (two, zero)
          all = Concat <axis = 1> (first, first) s = Add (a, all) y = MatMul (s, v)
        }""",
        half=np.array([2, 2]),
        zero=np.array(0),
        **arrays({"u": (4, 4), "v": (4, 4)}),
    )
    ops = weighted_ops(model.graph)
    feeds = [{"x": np.ones((2, 4), np.float32)}]
    # `first` itself is computed before the first site: only where it is read behind it must a sequence wait
    got = all_moments(Stream(model, ops, samples(feeds)))
    assert got[1].count == 2
    late = model_of(
        """g (float[N, 4] x) => (float[N, 4] y) {
          two = SplitToSequence <axis = 1> (x, half) a = MatMul (x, u) n = ReduceMax <keepdims = 0> (a)
          i = Cast <to = 7> (n) z = Sub (i, i) first = SequenceAt (two, z) all = Concat <axis = 1> (first, first)
          y = MatMul (all, v)
        }""",
        half=np.array([2, 2]),
        **arrays({"u": (4, 4), "v": (4, 4)}),
    )
    with pytest.raises(ModelError, match="'two' is a list that has to wait between two layers"):
        all_moments(Stream(late, weighted_ops(late.graph), samples(feeds)))
    assert not list(temporary.iterdir())


def test_progress_counts_waves() -> None:
    model, calls = tokens(), []
    all_moments(
        Stream(model, weighted_ops(model.graph), samples(token_feeds(2)), progress=lambda *call: calls.append(call))
    )
    waves = max(Stream(model, weighted_ops(model.graph), samples([])).waves.waves) + 1
    assert calls == [("calibrating", done, waves) for done in range(waves + 1)]


def test_no_more_feeds_are_in_memory_than_threads() -> None:
    """The source is asked for the next feed only when an earlier one is done."""
    model, large = tokens(), token_feeds(1)[0]
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def read() -> Iterator[Feeds]:
        for _ in range(30):
            alive.append(sum(reference() is not None for reference in made))
            array = large["x"].copy()
            made.append(weakref.ref(array))
            yield large | {"x": array}
            del array

    next(iter(Stream(model, weighted_ops(model.graph), Samples(read, 30), threads=2)))
    assert len(alive) == 30
    assert max(alive) <= 4


SCRIPT = """
import resource, sys
import numpy as np
from spa_compiler.calibration.samples import Samples
from spa_compiler.calibration.stream import Stream
from spa_compiler.graph.operators import weighted_ops
from tests.networks import model_of

rng = np.random.default_rng(0)
shape = {"u": (4, 256), "v": (256, 256), "w": (256, 4)}
model = model_of(
    "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) d = Relu (c)"
    " s = Add (b, d) y = MatMul (s, w) }",
    **{name: rng.standard_normal(size).astype(np.float32) for name, size in shape.items()},
)
count = int(sys.argv[1])

def read():
    for number in range(count):
        yield {"x": np.random.default_rng(number).standard_normal((20, 4)).astype(np.float32)}

ops = weighted_ops(model.graph)
stream = Stream(model, ops, Samples(read, count), threads=2)
positions = 0
for wave in stream:
    for collected in wave:
        positions = collected.fit.count
        stream.replace(collected.site, ops[collected.site].rows() * 0.5)
print(positions, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_ten_thousand_samples_take_no_more_memory_than_a_hundred() -> None:
    """What the sites of 10,000 samples read is 10 MB for each tensor and run, 50 MB in all."""

    def peak(feeds: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(feeds)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
        positions, kilobytes = map(int, done.stdout.split())
        assert positions == 20 * (feeds - max(1, feeds // 8))
        return kilobytes

    assert peak(500) - peak(5) < 8_000
