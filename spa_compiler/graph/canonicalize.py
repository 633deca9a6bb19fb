"""Exact rewrites to one way of saying things, guarded: what does not compute the same does not go in.

Constant nodes become initializers, onnxslim simplifies the skeleton (the graph without its large weights), constant
computation on weights is folded, BatchNormalization goes into the layer before it, and every node gets a name of its
own. Each step must leave the signature as it was and the model at most a tenth larger, and all of them together the
outputs on the feeds; a step that fails is left out and noted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spa_compiler.errors import EnvironmentFault
from spa_compiler.graph import names, shapes, slim
from spa_compiler.graph.batchnorm import fold_batchnorm, fold_scales
from spa_compiler.graph.fold import fold_sizes, fold_weights, lift_constants
from spa_compiler.graph.generators import unshare_generators
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import skeleton, weight_bytes
from spa_compiler.graph.session import Feeds, open_model, run

_LOG = logging.getLogger(__name__)
_GROWTH = 1.1
_SMALL_BYTES = 16384  # growth below this is nobody's business
_TOLERANCE = {np.dtype(np.float16): 2e-2, np.dtype(np.float32): 2e-4, np.dtype(np.float64): 1e-9}
"""Largest difference allowed, relative to the output's largest magnitude: rounding of reordered sums, not more."""

_NOISE_MARGIN = 4.0
"""A model that amplifies rounding may differ by this many times what ONNX Runtime's own optimizations do to it."""
_NOISE_LIMIT = 50.0
"""In units of the tolerance: where a model is noisier than this, no comparison shows that a rewrite is right."""


@dataclass(frozen=True)
class Canonical:
    """The rewritten model, and in words what was done or could not be done."""

    model: Model
    notes: tuple[str, ...]


@dataclass
class _Reference:
    """What the model as it came computes on the feeds."""

    model: Model
    outputs: list[Feeds]
    _noise: float | None = None

    def noise(self, feeds: Sequence[Feeds]) -> float:
        """How much the model's outputs differ between two of ONNX Runtime's optimization levels: its own rounding."""
        if self._noise is None:
            self._noise = _worst(self.model, feeds, self.outputs, "all")
        return self._noise


@dataclass(frozen=True)
class _Step:
    name: str
    rewrite: Callable[[Model], str | None]  # edits in place or replaces `.graph`; returns a note if it did anything


def canonicalize(model: Model, feeds: Sequence[Feeds]) -> Canonical:
    """The model in canonical form; the one given is not changed.

    Args:
        feeds: inputs on which the outputs must stay the same; without any, only structure is compared.

    Raises:
        EnvironmentFault: ONNX Runtime is missing.
    """
    notes: list[str] = []
    outputs = _outputs(model, feeds, notes)
    if outputs is None:
        result = model
    else:
        reference = _Reference(model, outputs)
        result, done = _apply(model, _STEPS)
        if _same(result, feeds, reference):
            notes += done
        else:
            result = _one_by_one(model, feeds, reference, notes)
    result = result.copy()
    names.make_unique(result)
    shapes.infer(result)
    return Canonical(result, tuple(notes))


def _apply(model: Model, steps: Sequence[_Step]) -> tuple[Model, list[str]]:
    """Applies the steps in turn; one that raises, or breaks signature or size, is left out with a note."""
    notes = []
    for step in steps:
        trial = model.copy()
        try:
            note = step.rewrite(trial)
            problem = _structural_problem(model, trial)
        except EnvironmentFault:
            raise
        except Exception as error:  # noqa: BLE001 - any failure of a rewrite means to go on without it
            _LOG.debug("%s failed", step.name, exc_info=True)
            note, problem = None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem:
            notes.append(f"{step.name} left out: {problem}")
            continue
        model = trial
        if note:
            notes.append(note)
    return model, notes


def _one_by_one(model: Model, feeds: Sequence[Feeds], reference: _Reference, notes: list[str]) -> Model:
    """Something changed the outputs: finds which step, and leaves that one out."""
    for step in _STEPS:
        trial, done = _apply(model, [step])
        if _same(trial, feeds, reference):
            model = trial
            notes += done
        else:
            notes.append(f"{step.name} left out: it changed the outputs")
    return model


def _slim(model: Model) -> str | None:
    before = len(model.graph.nodes)
    model.graph = slim.slim(model)
    return f"onnxslim: {before} -> {len(model.graph.nodes)} nodes" if len(model.graph.nodes) != before else None


def _lift(model: Model) -> str | None:
    lift_constants(model.graph)
    if any(node.op == "CastLike" for node in model.graph.nodes):
        shapes.infer(model)  # the type to cast to
    fold_sizes(model.graph)
    return None


def _unshare(model: Model) -> str | None:
    unshare_generators(model.graph)
    return None


def _fold(model: Model) -> str | None:
    count = fold_weights(model.graph)
    return f"{count} operators on weights computed ahead" if count else None


def _batchnorm(model: Model) -> str | None:
    count = fold_batchnorm(model.graph)
    return f"{count} BatchNormalization folded into the layers before them" if count else None


def _scales(model: Model) -> str | None:
    count = fold_scales(model.graph)
    return f"{count} Mul and Add by a constant per channel folded into the convolutions before them" if count else None


_STEPS = (
    _Step("lifting of constants", _lift),
    _Step("onnxslim", _slim),
    _Step("constant folding", _fold),
    _Step("BatchNormalization folding", _batchnorm),
    _Step("folding of scales", _scales),
    _Step("unsharing of constant tensors", _unshare),
)


def _structural_problem(before: Model, after: Model) -> str | None:
    """Why `after` may not stand in `before`'s place, or None."""
    for attribute in ("inputs", "outputs"):
        old = [tensor.name for tensor in getattr(before.graph, attribute)]
        new = [tensor.name for tensor in getattr(after.graph, attribute)]
        if old != new:
            return f"it changed the {attribute}"
    grown, was = _size(after), _size(before)
    if grown > was * _GROWTH + _SMALL_BYTES:
        return f"the model would grow from {was:,} to {grown:,} bytes"
    return None


def _size(model: Model) -> int:
    proto = skeleton(model)
    del proto.graph.value_info[:]
    return weight_bytes(model) + int(proto.ByteSize())


def _outputs(model: Model, feeds: Sequence[Feeds], notes: list[str]) -> list[Feeds] | None:
    """The model's outputs on the feeds; None where ONNX Runtime cannot run it, as with operators of other domains."""
    if not feeds:
        return []
    try:
        session = open_model(model, optimize="none", prepack=False)
        return [run(session, feed) for feed in feeds]
    except EnvironmentFault:
        raise
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common root
        notes.append(f"left as it came, as ONNX Runtime cannot run it here: {str(error).splitlines()[0]}")
        return None


def _same(model: Model, feeds: Sequence[Feeds], reference: _Reference) -> bool:
    """Whether the model's outputs are the reference's, up to rounding."""
    if not feeds:
        return True
    try:
        worst = _worst(model, feeds, reference.outputs, "none")
        return worst <= 1.0 or worst <= min(_NOISE_MARGIN * reference.noise(feeds), _NOISE_LIMIT)
    except EnvironmentFault:
        raise
    except Exception:  # noqa: BLE001 - a model that no longer runs is not the same
        _LOG.debug("the rewritten model does not run", exc_info=True)
        return False


def _worst(model: Model, feeds: Sequence[Feeds], wanted: Sequence[Feeds], optimize: str) -> float:
    session = open_model(model, optimize=optimize, prepack=False)
    return max(_difference(run(session, feed), outputs) for feed, outputs in zip(feeds, wanted, strict=True))


def _difference(got: Feeds, wanted: Feeds) -> float:
    """The largest difference of any output, in units of the tolerance; infinite where outputs cannot be compared."""
    if list(got) != list(wanted):
        return np.inf
    worst = 0.0
    for name, value in wanted.items():
        other = got[name]
        if not isinstance(value, np.ndarray):
            continue  # sequences and maps
        if other.shape != value.shape or other.dtype != value.dtype:
            return np.inf
        if value.dtype not in _TOLERANCE:
            worst = worst if np.array_equal(other, value) else np.inf
            continue
        finite = np.isfinite(value)
        if not np.array_equal(np.isfinite(other), finite):
            return np.inf
        scale = float(np.abs(value[finite]).max(initial=0.0))
        difference = np.abs(other[finite].astype(np.float64) - value[finite].astype(np.float64)).max(initial=0.0)
        worst = max(worst, float(difference) / (_TOLERANCE[value.dtype] * max(scale, 1e-6)))
    return worst
