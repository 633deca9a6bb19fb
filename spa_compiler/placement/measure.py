"""Times of alternatives, taken in turns in one process, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

CLOSE = 0.03  # two medians nearer than this are measured again
LEAST_ROUNDS = 7
_WARM_UP = 2
_FIRST_LOOK = 3  # rounds after which the first calls may stop
_FAR_BEHIND = 1.25
_MOST_ROUNDS = 400


@dataclass(frozen=True)
class Timing:
    """Microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    runs: int


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget_s: float,
    least_rounds: int = LEAST_ROUNDS,
    stays: Collection[str] | None = None,
) -> dict[str, Timing]:
    """Runs every call in turns, round after round, until the budget is spent and `least_rounds` are done.

    When the best two are within 3 % after that, as much again is measured, once. The order rotates, so that no call
    always finds the caches as the same other one left them.

    Args:
        stays: calls that are made to the end. Of all others those that are far behind stop early: after 3, 6, 12, ...
            rounds, where the fastest of them is slower by a quarter than the fastest call's median. None: all stay.
    """
    names = list(calls)
    for name in names:
        for _ in range(_WARM_UP):
            calls[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    left = _rounds(calls, names, samples, budget_s, least_rounds, stays)
    best = sorted(float(np.median(s)) for s in samples.values())
    if len(best) > 1 and best[1] < best[0] * (1 + CLOSE):
        _rounds(calls, left, samples, budget_s, least_rounds, stays)
    return {name: _summary(values) for name, values in samples.items()}


def _rounds(
    calls: Mapping[str, Callable[[], object]],
    names: list[str],
    samples: dict[str, list[float]],
    budget_s: float,
    least: int,
    stays: Collection[str] | None,
) -> list[str]:
    """Adds to the samples; returns the calls that did not stop early."""
    end, turn, halving = time.perf_counter() + budget_s, 0, _FIRST_LOOK
    while turn < least or (time.perf_counter() < end and turn < _MOST_ROUNDS):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            calls[name]()
            samples[name].append((time.perf_counter() - begin) * 1e6)
        turn += 1
        if stays is not None and turn == halving:
            halving *= 2
            best = min(float(np.median(samples[name])) for name in names)
            names = [name for name in names if name in stays or min(samples[name]) < best * _FAR_BEHIND]
    return names


def _summary(values: list[float]) -> Timing:
    low, median, high = (float(v) for v in np.percentile(values, (10, 50, 90)))
    return Timing(median, low, high, len(values))
