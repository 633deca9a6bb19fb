"""The moments of every site, against ONNX Runtime on the whole model and products written out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration import stream as module
from spa_compiler.calibration.moments import Moments
from spa_compiler.calibration.stream import Stream
from spa_compiler.errors import ModelError
from spa_compiler.graph.operators import weighted_ops
from tests.calibration.streamed import (
    CASES,
    F64,
    RESIDUALS,
    all_moments,
    arrays,
    assert_moments,
    expected,
    place_of,
    read_by,
    rewritten,
    samples,
    tensors,
    token_feeds,
    tokens,
)
from tests.networks import model_of

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


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_half_is_every_second_feed(threads: int, sequential: bool) -> None:
    make, feeds_of = CASES["tokens"]
    model, feeds = make(), feeds_of(5)
    ops = weighted_ops(model.graph)
    got = all_moments(Stream(model, ops, samples(feeds), sequential=sequential, threads=threads))
    known = tensors(model, [read_by(op) for op in ops], [feeds[1], feeds[3]])
    for site, op in enumerate(ops):
        half = got[site].half
        assert half is not None
        wanted = expected(op, known, known)
        assert_moments(half, {name: wanted[name] for name in ("count", "mean", "gram")})
        assert "cross" not in half


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


def test_a_second_pass_knows_nothing_of_one_that_stopped_early() -> None:
    model = tokens()
    ops = weighted_ops(model.graph)
    stream = Stream(model, ops, samples(token_feeds(3)))
    first = iter(stream)
    for collected in next(first):
        stream.replace(collected.site, ops[collected.site].rows() * 0.5)
    assert next(first)
    first.close()  # type: ignore[attr-defined]
    for moments in all_moments(stream).values():
        np.testing.assert_allclose(moments.get("cross"), moments.get("gram"), rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("sequential", [True, False])
def test_a_feed_that_is_all_padding_counts_for_nothing(sequential: bool) -> None:
    model, feeds = tokens(), token_feeds(4)
    feeds[1]["attention_mask"][:] = 0
    ops = weighted_ops(model.graph)
    targets = {4: "r"} if sequential else {}
    known = tensors(model, [read_by(op) for op in ops], [feeds[0], feeds[2]])
    for site, got in all_moments(Stream(model, ops, samples(feeds), sequential, targets)).items():
        wanted = expected(ops[site], known, known)
        assert got.count == wanted["count"]
        np.testing.assert_allclose(got.get("gram"), wanted["gram"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=str)
def test_what_is_not_finite_is_refused_where_it_is_read_first(value: float) -> None:
    """1e30 has no square in float32."""
    model, feeds = tokens(), token_feeds(3)
    held = model.graph.tensors()["b1"]
    held.values = np.full_like(held.values, value)
    waves = iter(Stream(model, weighted_ops(model.graph), samples(feeds)))
    assert [collected.site for _ in range(3) for collected in next(waves)] == [0, 1, 2, 3]
    with pytest.raises(ModelError, match=r"node 'd': it reads NaN or infinities .*`ignore`"):
        next(waves)


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


def test_each_feed_draws_positions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two feeds that are alike would say no more than one."""
    model, feed = tokens(), token_feeds(1)[0]
    ops = weighted_ops(model.graph)
    monkeypatch.setattr(module, "ROWS_PER_COLUMN", 1)
    grams = []
    for count in (1, 2):
        monkeypatch.setattr(module, "MOST_ROWS", 20 * count)
        got = all_moments(Stream(model, ops, samples([feed] * (count + 1))))[0]
        assert got.count == 20 * count
        grams.append(got.get("gram"))
    assert not np.allclose(*grams)


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
