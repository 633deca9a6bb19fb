"""Shapes that nobody asked for: where the dense model is faster, it runs. Times are made up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from spa_compiler.bench.compare import Entry
from spa_compiler.bench.profile import profile
from spa_compiler.graph.load import load
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.placement.guard import BOTH, DENSE, SPARSE, Guard, between, guard
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.place import Plan
from spa_compiler.placement.timer import Contender
from tests.networks import mlp, network

WIDTH = 16
ASKED = {"x": (1, 128, WIDTH)}


def timing(us: float) -> Timing:
    return Timing(us, us, us, 3)


class Race:
    """The sparse form takes `sparse` times as long as the dense one, by tokens; choosing costs `choosing` times more."""

    def __init__(self, sparse: Mapping[int, float], choosing: float = 1.0) -> None:
        self.sparse, self.choosing = sparse, choosing
        self.seen: list[tuple[int, tuple[str, ...]]] = []

    def __call__(
        self, contenders: Mapping[str, Contender], feeds: Feeds, seconds: float, rounds: int
    ) -> dict[str, Timing]:
        tokens = feeds["x"].size // WIDTH
        self.seen.append((tokens, tuple(contenders)))
        slow = 100 * self.sparse.get(tokens, 0.5)
        times = {DENSE: 100, SPARSE: slow, BOTH: self.choosing * min(slow, 100)}
        return {name: timing(times[name]) for name in contenders}

    def known(self, contenders: Mapping[str, Contender], feeds: Feeds) -> None:
        """There are no records."""

    def rest(self) -> None:
        """Nothing is kept."""


@pytest.fixture
def plans(tmp_path: Path) -> tuple[Plan, Plan]:
    """The "sparse" plan computes another thing than the dense one, so that it shows which of them runs."""
    return plan(tmp_path, "regions", mlp(1.0, WIDTH, seed=1)), plan(tmp_path, "portable", mlp(1.0, WIDTH, seed=2))


def plan(folder: Path, name: str, proto: onnx.ModelProto) -> Plan:
    made = Plan(name, folder / name, [])
    made.folder.mkdir()
    onnx.save(proto, made.file)
    return made


def guarded(plans: tuple[Plan, Plan], race: Race, work: Path, us: float = 1000.0, **options: int) -> Guard:
    feeds = [{"x": np.zeros(ASKED["x"], np.float32)}]
    return guard(*plans, load(plans[1].file), feeds, us, race, work, **options)


def runs_dense(found: Guard, plans: tuple[Plan, Plan], shape: tuple[int, ...]) -> bool:
    feeds = {"x": np.random.default_rng(0).standard_normal((*shape, WIDTH)).astype(np.float32)}
    sparse, dense, got = (run(open_session(p.file), feeds)["y"] for p in (*plans, found.plan))
    assert not np.allclose(sparse, dense)
    same = [bool(np.array_equal(got, want)) for want in (sparse, dense)]
    assert sum(same) == 1
    return same[1]


def test_where_it_wins_everywhere_nothing_is_done(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    race = Race({1: 0.99, 16: 1.02})
    found = guarded(plans, race, tmp_path)
    assert found.plan is plans[0]
    assert found.bounds is None
    assert found.others == []
    assert [tokens for tokens, _ in race.seen] == [1, 16, 512, 4096]
    assert found.reason.startswith("no slower")
    assert not (tmp_path / BOTH).exists()


@pytest.mark.parametrize(
    ("lost", "bounds", "dense"),
    [
        (
            {1: 1.5},
            (math.ceil(WIDTH * math.sqrt(16)), 0),
            {(1, 1): True, (1, 5): False, (1, 16): False, (8, 64): False},
        ),
        ({4096: 1.5}, (0, math.ceil(WIDTH * math.sqrt(512 * 4096))), {(1, 1): False, (8, 64): False, (32, 128): True}),
        ({1: 9, 16: 1.1, 4096: 2}, None, {(1, 16): True, (1, 128): False, (8, 64): False, (2, 2048): True}),
    ],
)
def test_where_it_loses_the_dense_form_runs(
    plans: tuple[Plan, Plan],
    tmp_path: Path,
    lost: dict[int, float],
    bounds: tuple[int, int] | None,
    dense: dict[tuple[int, int], bool],
) -> None:
    found = guarded(plans, Race(lost), tmp_path)
    assert found.plan.folder == tmp_path / BOTH
    assert found.plan.name == "regions"
    assert found.bounds is not None
    assert bounds is None or (found.bounds.below, found.bounds.above) == bounds
    assert {shape: runs_dense(found, plans, shape) for shape in dense} == dense
    assert {each.feeds["x"].size // WIDTH for each in found.raced if found.falls_back(each)} == set(lost)
    assert {found.bounds.holds(feeds["x"].shape) for feeds in found.others} == {True, False}
    assert "the dense form runs where x has " in found.reason


def test_one_that_is_close_is_no_loss(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    assert guarded(plans, Race({1: 1.03}), tmp_path).bounds is None
    assert guarded(plans, Race({1: 1.05}), tmp_path).bounds is not None


def test_a_loss_between_gains_stays_and_is_told(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    found = guarded(plans, Race({512: 2.0}), tmp_path)
    assert found.plan is plans[0]
    assert found.bounds is None
    assert "slower than the dense model at shapes that were not asked for" in found.reason
    assert [each.loses for each in found.raced] == [False, False, True, False]


def test_a_size_that_is_not_allowed(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    size = sum(each.file.stat().st_size for each in plans)
    found = guarded(plans, Race({1: 2.0}), tmp_path, max_size=size // 2)
    assert found.plan is plans[0]
    assert "more than --max-size allows" in found.reason
    assert not (tmp_path / BOTH).exists()
    assert guarded(plans, Race({1: 2.0}), tmp_path, max_size=2 * size).bounds is not None


@pytest.mark.parametrize(("choosing", "kept"), [(1.02, True), (1.1, False)])
def test_choosing_that_costs_more_than_it_gains(
    plans: tuple[Plan, Plan], tmp_path: Path, choosing: float, kept: bool
) -> None:
    race = Race({1: 2.0}, choosing)
    found = guarded(plans, race, tmp_path)
    assert (found.bounds is not None) == kept
    assert (128, (SPARSE, BOTH)) in race.seen
    assert ("costs more than it gains" in found.reason) == (not kept)


def test_a_model_without_open_dimensions_is_left_alone(tmp_path: Path) -> None:
    fixed = network("g (float[4,16] x) => (float[4,16] y) { y = Relu(x) }")
    both = plan(tmp_path, "regions", fixed), plan(tmp_path, "portable", fixed)
    race = Race({})
    found = guarded(both, race, tmp_path)
    assert (found.plan, found.reason, race.seen) == (both[0], "", [])


def test_what_would_take_too_long_is_left_out(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    race = Race({})
    found = guarded(plans, race, tmp_path, us=128e6 / 1000)  # a millisecond a token
    assert [tokens for tokens, _ in race.seen] == [1, 16, 512]
    ((shapes, reason),) = found.left_out
    assert shapes == {"x": (32, 128, WIDTH)}
    assert reason == "a run takes about 4.1 s"


def test_shapes_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    text = f"""g (float["b","s",{WIDTH}] x) => (float["b","s",{WIDTH}] y) {{ y = Add(x, p) }}"""
    table = network(text, p=np.ones((1, 1, WIDTH), np.float32), check=False)
    reshaped = network(
        f"""g (float["b","s",{WIDTH}] x) => (float["b",64,{WIDTH}] y) {{ y = Reshape(x, t) }}""",
        t=np.array([-1, 64, WIDTH], np.int64),
        check=False,
    )
    assert not guarded((plan(tmp_path, "a", table), plan(tmp_path, "b", table)), Race({}), tmp_path).left_out
    both = plan(tmp_path, "c", reshaped), plan(tmp_path, "d", reshaped)
    found = guarded(both, Race({}), tmp_path)
    assert [shapes["x"][:2] for shapes, _ in found.left_out] == [(1, 1), (1, 16)]
    assert all("does not run" in reason for _, reason in found.left_out)


@pytest.mark.parametrize(
    ("kept", "lost", "expected"),
    [
        ([100], [25, 400], (50, 200)),
        ([100, 200], [150], (0, 0)),
        ([100], [100], (0, 0)),
        ([100], [1, 99], (100, 0)),
        ([100], [101, 1000], (0, 101)),
    ],
)
def test_bounds_lie_between_what_was_raced(kept: list[int], lost: list[int], expected: tuple[int, int]) -> None:
    bounds = between("x", kept, lost)
    assert (bounds.below, bounds.above) == expected
    assert not any(bounds.holds((size,)) for size in kept)


def test_a_profile_looks_into_the_form_that_ran(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    found = guarded(plans, Race({1: 2.0}), tmp_path)
    entries = [Entry("dense", plans[1].file), Entry("both", found.plan.file)]
    result = profile(entries, machine="m", threads=1, runs=4, shapes=["x=1,1,16", "x=64,128,16"])
    for shape in result.shapes:
        names = {name for row in shape.rows for node in row.ours for name in node.originals}
        assert {"m0", "m1"} <= names
        assert sum(row.ours_ms for row in shape.rows) == pytest.approx(shape.ours.nodes_ms)
        rows = [row for row in shape.rows if any("m0" in node.originals for node in row.theirs)]
        assert all(row.ours for row in rows)
