from __future__ import annotations

import itertools
from collections import Counter

import pytest

from spa_compiler.placement import measure
from spa_compiler.placement.measure import interleave


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float | list[float]):  # type: ignore[no-untyped-def]
        lengths = itertools.cycle(seconds if isinstance(seconds, list) else [seconds])

        def run() -> None:
            self.order.append(name)
            self.now += next(lengths)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_medians_in_microseconds(clock: Clock) -> None:
    timings = interleave({"a": clock.call("a", 0.001), "b": clock.call("b", [0.002, 0.004])}, budget_s=0.1)
    assert timings["a"].median_us == pytest.approx(1000)
    assert timings["b"].p10_us == pytest.approx(2000)
    assert timings["b"].p90_us == pytest.approx(4000)
    assert timings["a"].p10_us <= timings["a"].median_us <= timings["a"].p90_us


def test_everybody_has_as_many_turns(clock: Clock) -> None:
    calls = {name: clock.call(name, length) for name, length in (("a", 0.001), ("b", 0.01), ("c", 0.02))}
    timings = interleave(calls, budget_s=1.0)
    assert {t.runs for t in timings.values()} == {33}
    assert set(Counter(clock.order).values()) == {33 + 2}


def test_the_order_rotates(clock: Clock) -> None:
    interleave({"a": clock.call("a", 0.1), "b": clock.call("b", 0.2), "c": clock.call("c", 0.3)}, 0.0, least_rounds=3)
    assert "".join(clock.order[6:]) == "abcbcacab"


def test_slow_calls_get_their_least_rounds(clock: Clock) -> None:
    timings = interleave({"a": clock.call("a", 10.0), "b": clock.call("b", 20.0)}, budget_s=0.1, least_rounds=5)
    assert {t.runs for t in timings.values()} == {5}


def test_what_is_close_is_measured_again_once(clock: Clock) -> None:
    timings = interleave({"a": clock.call("a", 1.0), "b": clock.call("b", 1.02)}, budget_s=0.0, least_rounds=7)
    assert {t.runs for t in timings.values()} == {14}


def test_only_the_best_two_count_as_close(clock: Clock) -> None:
    calls = {"a": clock.call("a", 1.0), "b": clock.call("b", 2.0), "c": clock.call("c", 2.01)}
    assert {t.runs for t in interleave(calls, budget_s=0.0).values()} == {7}


def test_very_fast_calls_end_too(clock: Clock) -> None:
    timings = interleave({"a": clock.call("a", 1e-9), "b": clock.call("b", 1.0e-6)}, budget_s=3600)
    assert timings["a"].runs <= 400


def test_one_call_alone(clock: Clock) -> None:
    assert interleave({"a": clock.call("a", 1.0)}, budget_s=0.0)["a"].runs == 7


def test_what_is_far_behind_stops_early(clock: Clock) -> None:
    """After three rounds, then after six, ...; but for what is to stay."""
    lengths = {"best": 0.001, "near": 0.00124, "far": 0.00126, "dense": 0.01}
    calls = {name: clock.call(name, length) for name, length in lengths.items()}
    timings = interleave(calls, budget_s=0.5, stays=["dense"])
    assert timings["far"].runs == 3
    assert timings["far"].median_us == pytest.approx(1260)
    assert len({timings[name].runs for name in ("best", "near", "dense")}) == 1
    assert timings["best"].runs > 30


def test_a_call_that_was_fast_once_stays(clock: Clock) -> None:
    calls = {"best": clock.call("best", 0.001), "noisy": clock.call("noisy", [0.004, 0.004, 0.0012, 0.004, 0.004])}
    assert interleave(calls, budget_s=0.5, stays=[])["noisy"].runs > 30


def test_close_calls_alone_are_measured_again(clock: Clock) -> None:
    calls = {name: clock.call(name, length) for name, length in (("a", 0.1), ("b", 0.1), ("far", 1.0))}
    timings = interleave(calls, budget_s=0.0, least_rounds=7, stays=[])
    assert {name: t.runs for name, t in timings.items()} == {"a": 14, "b": 14, "far": 3}


def test_all_stay_unless_asked(clock: Clock) -> None:
    calls = {"best": clock.call("best", 0.001), "far": clock.call("far", 0.01)}
    assert len({t.runs for t in interleave(calls, budget_s=0.5).values()}) == 1
