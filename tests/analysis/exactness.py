"""Cutting units and masking them compute the same: the harness for any model.

A failure names the model, the seed, the ratio and the groups that fail alone, and the first unit of each that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import onnx

from spa_compiler.analysis import Analysis, analyze
from spa_compiler.analysis.choose import random_units
from spa_compiler.analysis.cut import cut, removed_slabs
from spa_compiler.analysis.facts import Array
from spa_compiler.analysis.mask import mask
from spa_compiler.calibration.examples import example_feeds
from spa_compiler.graph import runtime_ops
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import skeleton
from spa_compiler.graph.session import Feeds, open_model, run

RATIOS = (0.1, 0.3, 0.6, 0.9)
FLOOR = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-9}
"""Differences below these are none, relative to the largest magnitude of the output."""

NOISE_MARGIN = 10.0
"""What a graph's outputs may differ by, in units of what ONNX Runtime's own optimizations do to them."""

MOST_SUSPECTS = 200
"""Groups that are tried alone after a failure."""

Removed: TypeAlias = Mapping[int, Sequence[int]]


def check_exact(
    model: onnx.ModelProto | Model | Subject,
    *,
    seeds: Sequence[int] = (0, 1),
    ratios: Sequence[float] = RATIOS,
    feeds: Feeds | None = None,
    every_group: bool = True,
    sizes: Mapping[str, int] | None = None,
    name: str = "",
) -> int:
    """Cuts random units out and compares with the masked model, for every seed and ratio; returns the number of groups.

    Args:
        feeds: inputs to compare on; by default drawn anew for each seed.
        every_group: of every group; otherwise of a random half of the groups.
        sizes: see `Subject`.
    """
    subject = model if isinstance(model, Subject) else Subject(model, name, sizes, feeds)
    for seed in seeds:
        values = subject.example(seed) if feeds is None else feeds
        for ratio in ratios:
            rng = np.random.default_rng([seed, round(1000 * ratio)])
            removed = random_units(subject.analysis, ratio, rng)
            if not every_group:
                removed = {group: units for group, units in removed.items() if rng.random() < 0.5}
            if any(group.size > 1 for group in subject.analysis.groups) and every_group and not removed:
                raise AssertionError(f"{subject.name}, seed {seed}, ratio {ratio}: nothing was chosen")
            if problem := subject.problem(removed, values):
                raise AssertionError(
                    f"{subject.name}, seed {seed}, ratio {ratio}: {problem}\n{subject.suspects(removed, values)}"
                )
    return len(subject.analysis.groups)


def check_each_unit(model: onnx.ModelProto | Model | Subject, *, feeds: Feeds | None = None, name: str = "") -> int:
    """Cuts the first, a middle and the last unit of every group, each alone: no unit may do without its weights or its
    activations. Returns the number of units that were cut.
    """
    subject = model if isinstance(model, Subject) else Subject(model, name, feeds=feeds)
    values = subject.example(0) if feeds is None else feeds
    count = 0
    for group in subject.analysis.groups:
        for unit in sorted({0, group.size // 2, group.size - 1}) if group.size > 1 else ():
            parameters, activations = removed_slabs(subject.analysis, {group.id: [unit]})
            assert parameters, f"{subject.name}: unit {unit} of {subject.described(group.id)} holds no parameters"
            assert activations, f"{subject.name}: unit {unit} of {subject.described(group.id)} holds no activations"
            if problem := subject.problem({group.id: [unit]}, values):
                raise AssertionError(f"{subject.name}: unit {unit} of {subject.described(group.id)}: {problem}")
            count += 1
    return count


class Subject:
    """A model under test, analyzed at the sizes it runs with.

    Args:
        sizes: what open dimensions are, by symbol; by default what the analysis chooses.
        feeds: inputs whose sizes it takes instead.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Model,
        name: str = "",
        sizes: Mapping[str, int] | None = None,
        feeds: Feeds | None = None,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(model)
        self.name = name or self.model.graph.name
        inputs = self.model.signature.inputs
        shapes: dict[str, tuple[int, ...]] | None = None
        if feeds is not None:
            shapes = {one.name: feeds[one.name].shape for one in inputs}
        elif sizes is not None:
            shapes = {one.name: tuple(d if isinstance(d, int) else sizes[str(d)] for d in one.shape) for one in inputs}
        self.analysis: Analysis = analyze(self.model, shapes)
        settled = self.analysis.facts.settled.shapes
        self._shapes = shapes or {one.name: tuple(size or 1 for size in settled[one.name]) for one in inputs}

    def example(self, seed: int) -> Feeds:
        """Random inputs."""
        return example_feeds(self.model, self._shapes, np.random.default_rng(seed))

    def problem(self, removed: Removed, feeds: Feeds) -> str | None:
        """What is wrong with the model without these units, or None."""
        _, activations = removed_slabs(self.analysis, removed)
        try:
            small = cut(self.model, self.analysis, removed)
            checked(small, self._sound)
            got = outputs(small, feeds)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip()}"
        masked = mask(self.model, activations, self._sizes_of(name for name, _ in activations))
        wanted = outputs(masked, feeds)
        far = [name for name, value in differences(got, wanted).items() if value > floor(wanted[name])]
        if not far:
            return None
        noise = self._noise([(self.model, None), (masked, wanted), (small, got)], feeds)
        for name, value in differences(got, wanted).items():
            # Noise without a bound allows nothing: else any difference would pass.
            bar = max(floor(wanted[name]), NOISE_MARGIN * noise[name] if np.isfinite(noise[name]) else 0.0)
            if name in far and not value <= bar:
                return f"output {name} differs by {value:.3g} of its largest magnitude, {bar:.3g} is allowed"
        return None

    @staticmethod
    def _noise(graphs: Sequence[tuple[Model, Feeds | None]], feeds: Feeds) -> dict[str, float]:
        """By output: the most that ONNX Runtime's optimizations change in the whole graph, the masked or the cut one."""
        found: dict[str, float] = {}
        for model, plain in graphs:
            plain = outputs(model, feeds) if plain is None else plain
            for name, value in differences(outputs(model, feeds, "all"), plain).items():
                found[name] = max(found.get(name, 0.0), value)
        return found

    def _sizes_of(self, names: Iterable[str]) -> dict[str, list[int | None]]:
        facts = self.analysis.facts
        return {name: [facts.algebra.size(axis) for axis in facts.axes[name]] for name in names}

    @cached_property
    def _sound(self) -> bool:
        """Whether onnx's full checker accepts the model as it came: what it refuses there is not the cut's fault."""
        try:
            checked(self.model, full=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            return False
        return True

    def suspects(self, removed: Removed, feeds: Feeds) -> str:
        """The groups that fail when they are cut alone, a line each."""
        return "\n".join(self._suspects(removed, feeds)) or "no group fails alone"

    def _suspects(self, removed: Removed, feeds: Feeds) -> Iterator[str]:
        for group, units in list(removed.items())[:MOST_SUSPECTS]:
            if not units or not (problem := self.problem({group: units}, feeds)):
                continue
            line = f"  alone fails {self.described(group)}: {problem}"
            for unit in units:
                if problem := self.problem({group: [unit]}, feeds):
                    line += f"\n    so does its unit {unit} alone: {problem}"
                    break
            yield line

    def described(self, number: int) -> str:
        """A group in words."""
        group = next(group for group in self.analysis.groups if group.id == number)
        places = [f"{member.tensor}[{member.axis}]" for member in group.members]
        more = f" and {len(places) - 12} more" if len(places) > 12 else ""
        return f"group {number} ({group.size} x {group.granularity}: {', '.join(places[:12])}{more})"


def checked(model: Model, full: bool) -> None:
    """onnx's checker; large weights stand as inputs, so that it is quick and works at any size."""
    proto = skeleton(model)
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.output}
    for value in [*proto.graph.input, *proto.graph.output]:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            known = inferred.get(value.name, value).type.tensor_type.shape
            value.type.tensor_type.shape.CopyFrom(known)  # the checker wants one, if only that of a scalar
    runtime_ops.hide(proto)
    onnx.checker.check_model(proto, full_check=full)


def outputs(model: Model, feeds: Feeds, optimize: str = "none") -> Feeds:
    """What ONNX Runtime computes."""
    return run(open_model(model, optimize=optimize), feeds)


def floor(value: object) -> float:
    """Below this the output does not differ."""
    return FLOOR.get(np.asarray(value).dtype.name, 0.0)


def differences(got: Feeds, wanted: Feeds) -> dict[str, float]:
    """By output: the largest difference, relative to the largest magnitude; infinite where they cannot be compared."""
    assert list(got) == list(wanted)
    return {name: _difference(np.asarray(got[name]), np.asarray(value)) for name, value in wanted.items()}


def _difference(got: Array, wanted: Array) -> float:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return np.inf
    if wanted.dtype.kind != "f":
        return 0.0 if np.array_equal(got, wanted) else np.inf
    finite = np.isfinite(wanted)
    if not np.array_equal(got[~finite], wanted[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return np.inf
    left, right = got[finite].astype(np.float64), wanted[finite].astype(np.float64)
    return float(np.abs(left - right).max(initial=0.0) / max(np.abs(right).max(initial=0.0), 1e-6))
