"""Shapes that nobody asked for: the winner is raced there too, and where the dense model is faster, that one runs.

An artifact is chosen by its times at the shapes that were asked for. At one token, or at thousands, the dense operators
may be the faster ones. Then the file holds both models, and the size of an input decides at every call.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.others import other_shapes, telling
from spa_compiler.graph.either import Bounds, write_either
from spa_compiler.graph.model import Model
from spa_compiler.graph.session import Feeds, open_session, run
from spa_compiler.placement.measure import CLOSE, Timing
from spa_compiler.placement.race import Race
from spa_compiler.placement.timer import Contender

if TYPE_CHECKING:
    from spa_compiler.placement.place import Plan

DENSE, SPARSE, BOTH = "portable", "sparse", "both"
_RACE_S = 0.5  # at one shape
_ROUNDS = 3
_LONGEST_S = 1.0  # of one run: ten of them are what a shape costs at least


@dataclass(frozen=True)
class Raced:
    """The winner and the dense model at one shape."""

    feeds: Feeds
    timings: dict[str, Timing]  # DENSE, SPARSE

    @property
    def loses(self) -> bool:
        return self.timings[DENSE].median_us < self.timings[SPARSE].median_us * (1 - CLOSE)


@dataclass(frozen=True)
class Guard:
    """What came of it.

    Attributes:
        plan: with both forms where that is needed and possible, else as it was.
        bounds: where the dense one of both forms runs; None: there is one form.
        raced: at each shape that the model runs at in reasonable time.
        left_out: shapes that it was not raced at, and why.
        reason: in words; empty: there was nothing to race.
    """

    plan: Plan
    bounds: Bounds | None = None
    raced: list[Raced] = field(default_factory=list)
    left_out: list[tuple[dict[str, tuple[int, ...]], str]] = field(default_factory=list)
    reason: str = ""

    @property
    def others(self) -> list[Feeds]:
        """At shapes on both sides of the bounds, the smallest first: what a proof of both forms has to run."""
        if self.bounds is None:
            return []
        sides = {self.falls_back(each): each.feeds for each in reversed(self.raced)}
        return list(sides.values())

    def falls_back(self, raced: Raced) -> bool:
        """Whether the dense form runs at a shape."""
        return self.bounds is not None and self.bounds.holds(raced.feeds[self.bounds.input].shape)


def guard(
    plan: Plan,
    dense: Plan,
    model: Model,
    feeds: Sequence[Feeds],
    dense_us: float,
    race: Race,
    workspace: Path,
    max_size: int | None = None,
) -> Guard:
    """Races a plan at shapes that were not asked for, and gives it the dense form as well where it loses.

    Args:
        plan: the winner, with kernels.
        dense: the plan in standard operators.
        model: the one that both were made of.
        feeds: at the shapes that were asked for.
        dense_us: of `dense` at the first of them, in microseconds: what tells how long others will take.
        workspace: where the folder of a plan with both forms goes.
        max_size: the most bytes that model.onnx and kernels.so may take.
    """
    value = telling(model)
    asked = [{name: array.shape for name, array in feed.items()} for feed in feeds]
    wanted = other_shapes(model, asked)
    if value is None or not wanted:
        return Guard(plan)
    contenders = {DENSE: Contender(dense.file, dense.library), SPARSE: Contender(plan.file, plan.library)}
    runs: list[Feeds] = []
    left_out = []
    session = None
    each_us = dense_us / math.prod(asked[0][value.name])
    rng = np.random.default_rng(0)
    for shapes in wanted:
        seconds = each_us * math.prod(shapes[value.name]) / 1e6
        if seconds > _LONGEST_S:
            left_out.append((shapes, f"a run takes about {seconds:.1f} s"))
            continue
        drawn = example_feeds(model, shapes, rng)
        if race.known(contenders, drawn) is None:
            if session is None:
                race.rest()
                session = open_session(dense.file, prepack=False)
            try:
                run(session, drawn)
            except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
                left_out.append((shapes, f"the model does not run: {str(error).splitlines()[0]}"))
                continue
        runs.append(drawn)
    session = None  # before others are opened
    raced = [Raced(drawn, race(contenders, drawn, _RACE_S, _ROUNDS)) for drawn in runs]
    found = Guard(plan, None, raced, left_out, "")
    if not any(each.loses for each in raced):
        return replace(found, reason="no slower than the dense model at other shapes, as far as they were raced")
    kept = [math.prod(shapes[value.name]) for shapes in asked]
    kept += [each.feeds[value.name].size for each in raced if not each.loses]
    bounds = between(value.name, kept, [each.feeds[value.name].size for each in raced if each.loses])
    return _with_both(found, bounds, dense, feeds, race, workspace, max_size)


def between(name: str, kept: Sequence[int], lost: Sequence[int]) -> Bounds:
    """Bounds half way, in factors, between sizes at which the sparse form stays and those beyond at which it loses.

    Where it loses at a size between two at which it wins, it stays.
    """
    low = max((size for size in lost if size < min(kept)), default=0)
    high = min((size for size in lost if size > max(kept)), default=0)
    below = math.ceil(math.sqrt(low * min(kept))) if low else 0
    return Bounds(name, below, math.ceil(math.sqrt(high * max(kept))) if high else 0)


def _with_both(
    found: Guard, bounds: Bounds, dense: Plan, feeds: Sequence[Feeds], race: Race, workspace: Path, max_size: int | None
) -> Guard:
    """Both forms in one file, if that helps where one loses, and costs nothing where it was asked to be fast."""
    plan = found.plan
    slower = "slower than the dense model at shapes that were not asked for"
    if not bounds.below and not bounds.above:
        return replace(found, reason=f"{slower}, and faster at some with as many tokens, so it stays as it is")
    if plan.file.with_name("model.onnx.data").exists() or dense.file.with_name("model.onnx.data").exists():
        return replace(found, reason=f"{slower}; both forms are more than one file holds")
    folder = workspace / BOTH
    folder.mkdir()
    made = replace(plan, folder=folder)
    if reason := write_either(plan.file, dense.file, bounds, made.file):
        folder.rmdir()
        return replace(found, reason=f"{slower}; there is no file with both forms, because {reason}")
    if plan.library is not None:
        shutil.copyfile(plan.library, folder / plan.library.name)
    result = replace(found, plan=made, bounds=bounds)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if max_size is not None and size > max_size:
        reason = f"{slower}; with both forms the artifact would take {size:,} bytes, more than --max-size allows"
    elif not _pays(result, feeds, race, plan):
        reason = f"{slower}; choosing between two forms at run time costs more than it gains"
    else:
        where = [f"below {bounds.below}"] * bool(bounds.below) + [f"from {bounds.above} on"] * bool(bounds.above)
        reason = (
            f"the dense form runs where {bounds.input} has {' or '.join(where)} elements: it is the faster one there"
        )
        return replace(result, reason=reason)
    shutil.rmtree(folder)
    return replace(found, reason=reason)


def _pays(result: Guard, feeds: Sequence[Feeds], race: Race, plan: Plan) -> bool:
    """As fast as before where it was asked to be fast, and faster than before where it falls back."""
    contenders = {
        SPARSE: Contender(plan.file, plan.library),
        BOTH: Contender(result.plan.file, result.plan.library),
    }
    for feed in feeds:
        times = race(contenders, feed, _RACE_S, _ROUNDS)
        if times[BOTH].median_us > times[SPARSE].median_us * (1 + CLOSE):
            return False
    for each in result.raced:
        if result.falls_back(each):
            times = race(contenders, each.feeds, _RACE_S, _ROUNDS)
            if times[BOTH].median_us >= times[SPARSE].median_us:
                return False
    return True
