"""Whole models race at once, or in heats beside a yardstick where they are too large for that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from spa_compiler.graph.session import Feeds
from spa_compiler.placement import race as racing
from spa_compiler.placement import timer
from spa_compiler.placement.measure import Timing
from spa_compiler.placement.race import Race, compete, share_out, worth
from spa_compiler.placement.records import Records
from spa_compiler.placement.timer import Contender, LocalTimer

FEEDS = [{"x": np.zeros((1, n), np.float32)} for n in (4, 9)]


class Clock(LocalTimer):
    """Every model takes as long as is said, at each shape; each heat finds the machine slower by a tenth."""

    def __init__(self, us: Mapping[str, tuple[float, float]]) -> None:
        super().__init__()
        self.us, self.heats = us, list[tuple[str, ...]]()

    def time(self, contenders: Mapping[str, Contender], feeds: Feeds, *_: object, **__: object) -> dict[str, Timing]:
        heat = tuple(contenders)
        if heat not in self.heats:
            self.heats.append(heat)
        slow, shape = 1.1 ** self.heats.index(heat), [f["x"].shape for f in FEEDS].index(feeds["x"].shape)
        times = {name: self.us[name][shape] * slow for name in contenders}
        return {name: Timing(us, us * 0.9, us * 1.1, 12) for name, us in times.items()}


def contenders(folder: Path, sizes: Mapping[str, int]) -> dict[str, Contender]:
    for name, size in sizes.items():
        (folder / name).write_bytes(name.encode().ljust(size))
    return {name: Contender(folder / name) for name in sizes}


def raced(clock: Clock, folder: Path, sizes: Mapping[str, int]) -> racing.Result:
    return compete(Race(clock, 1), contenders(folder, sizes), "source", "dense", FEEDS, 1.0, 3)


US = {"source": (100, 100), "dense": (90, 90), "a": (60, 70), "b": (40, 50), "c": (30, 99), "d": (80, 80)}
SIZES = {"source": 100, "dense": 100, "a": 40, "b": 50, "c": 50, "d": 40}


def test_small_models_race_at_once(tmp_path: Path) -> None:
    clock = Clock(US)
    found = raced(clock, tmp_path, SIZES)
    assert clock.heats == [tuple(SIZES)]
    assert (found.heats, found.finalists) == (1, ("a", "b", "c", "d"))
    assert [{n: t.median_us for n, t in row.items()} for row in found.table] == [
        {n: us[shape] for n, us in US.items()} for shape in range(2)
    ]


def test_large_models_race_in_heats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "TOGETHER", 0)  # room for 250
    clock = Clock(US)
    found = raced(clock, tmp_path, SIZES)
    assert clock.heats == [("dense", "a", "b", "c"), ("dense", "d"), ("source", "dense", "b")]
    assert (found.heats, found.finalists) == (3, ("b",))
    for shape, row in enumerate(found.table):
        assert list(row) == list(SIZES)
        for name, timing in row.items():  # as if all had run in the last heat
            want = US[name][shape] * 1.1**2
            assert (timing.median_us, timing.p10_us, timing.p90_us) == pytest.approx((want, want * 0.9, want * 1.1))


def test_the_next_one_runs_where_the_first_loses_to_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(racing, "TOGETHER", 0)
    us = {"source": (45, 60), "dense": (90, 90), "a": (40, 55), "b": (30, 70)}
    clock = Clock(us)
    found = raced(clock, tmp_path, {n: SIZES[n] for n in us})
    assert clock.heats == [("dense", "a", "b"), ("source", "dense", "b"), ("source", "dense", "a")]
    assert found.finalists == ("a",)


def test_where_nobody_beats_the_yardstick_source_and_yardstick_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "TOGETHER", 0)
    clock = Clock({"source": (100, 100), "dense": (90, 90), "a": (89, 89), "b": (99, 20)})
    found = raced(clock, tmp_path, {n: SIZES[n] for n in clock.us})
    assert clock.heats == [("dense", "a", "b"), ("source", "dense")]
    assert found.finalists == ()


def test_what_does_not_fit_is_alone() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1}
    assert share_out(list(sizes), sizes, 6) == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize(("gains", "expected"), [([1.5], True), ([1.02], False), ([3, 0.9], False), ([3, 0.98], True)])
def test_a_gain_is_one_in_the_mean_and_a_loss_nowhere(gains: list[float], expected: bool) -> None:
    assert worth(gains) == expected


def test_records_know_races_by_the_bytes_of_the_models(tmp_path: Path) -> None:
    book = Records(tmp_path / "records.sqlite", {"cpu": "x"})
    clock, models = Clock(US), contenders(tmp_path, {"source": 10, "dense": 10})
    race = Race(clock, 1, book)
    assert race.known(models, FEEDS[0]) is None
    first = race(models, FEEDS[0], 1.0, 3)
    assert race.known(models, FEEDS[0]) == first == Race(clock, 1, book).known(models, FEEDS[0])
    assert race.known(models, FEEDS[1]) is None
    (tmp_path / "dense").write_bytes(b"changed")
    assert race.known(models, FEEDS[0]) is None
    book.close()


def test_sessions_stay_open_while_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Session:
        def run(self, names: None, feeds: Feeds) -> None:
            """Computes nothing."""

    def open_session(model: Path | bytes, **_: object) -> Session:
        opened.append(model.name if isinstance(model, Path) else "bytes")
        return Session()

    monkeypatch.setattr(timer, "open_session", open_session)
    models, local = contenders(tmp_path, {"small": 10, "large": 20}), LocalTimer()
    with local.held():
        for feeds in FEEDS:
            local.time(models, feeds, 1, 0.0, 1)
        assert opened == ["large", "small"]
        local.time({"small": models["small"], "other": Contender(b"x")}, FEEDS[0], 1, 0.0, 1)
        assert opened == ["large", "small", "bytes"]
        (tmp_path / "small").write_bytes(b"another")
        os.utime(tmp_path / "small", ns=(0, 0))
        local.time({"small": models["small"]}, FEEDS[0], 1, 0.0, 1)
        assert opened == ["large", "small", "bytes", "small"]
        local.rest()
        local.time({"small": models["small"]}, FEEDS[0], 1, 0.0, 1)
        assert opened[3:] == ["small", "small"]
    local.time({"small": models["small"]}, FEEDS[0], 1, 0.0, 1)
    assert opened[-1] == "small"
    assert len(opened) == 6
