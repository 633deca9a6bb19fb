"""Tiny models with calibration samples, so that a calibrated pass takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spa_compiler import targets
from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import Feeds
from spa_compiler.passes import Change, Context
from spa_compiler.passes.sparsify import Sparsify, SparsifyOptions
from tests.networks import model_of

WIDTH, HIDDEN = 12, 16


def samples(*feeds: Feeds) -> Samples:
    """Feeds as they are; the last one is held out where there are several."""
    return Samples(lambda: iter(feeds), len(feeds), sum(len(next(iter(feed.values()))) for feed in feeds))


def correlated(count: int, width: int, seed: int) -> NDArray[np.float32]:
    """Rows whose entries hang together, of unequal size and with a mean."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width)) * np.arange(1, width + 1) ** -0.5
    return np.asarray(rng.standard_normal((count, width)) @ mixing.T + 0.5, np.float32)


def context(calibration: Samples | None = None, workers: int = 1, seed: int = 0) -> Context:
    return Context(
        targets.parse("cpu:x86-64-v4"), np.random.default_rng(seed), calibration=calibration, workers=workers
    )


def feed_forward(seed: int = 0, blocks: int = 1) -> Model:
    """Residual feed-forward blocks with biases: an up projection `a`, a down projection `b`, a norm."""
    rng = np.random.default_rng(seed)
    lines, weights, source = [], {}, "x"
    for i in range(blocks):
        end = "y" if i == blocks - 1 else f"x{i}"
        lines.append(
            f"a{i} = MatMul (x{i - 1}, A{i}) p{i} = Add (a{i}, u{i}) r{i} = Relu (p{i}) b{i} = MatMul (r{i}, B{i})"
            f" q{i} = Add (b{i}, v{i}) s{i} = Add (q{i}, x{i - 1}) {end} = LayerNormalization (s{i}, ones)".replace(
                "x-1", source
            )
        )
        weights[f"A{i}"] = rng.standard_normal((WIDTH, HIDDEN)).astype(np.float32) * 0.4
        weights[f"B{i}"] = rng.standard_normal((HIDDEN, WIDTH)).astype(np.float32) * 0.4
        weights[f"u{i}"] = rng.standard_normal(HIDDEN).astype(np.float32)
        weights[f"v{i}"] = rng.standard_normal(WIDTH).astype(np.float32)
    text = f"agraph (float[batch, {WIDTH}] x) => (float[batch, {WIDTH}] y) {{ {' '.join(lines)} }}"
    return model_of(text, ones=np.ones(WIDTH, np.float32), **weights)


def calibration(batch: int = 64, feeds: int = 3) -> Samples:
    """For `feed_forward`."""
    return samples(*({"x": correlated(batch, WIDTH, seed)} for seed in range(feeds)))


def sparsify(model: Model, given: Context, **options: object) -> Change:
    return Sparsify(SparsifyOptions(**options)).run(model, given)  # type: ignore[arg-type]


def rows(model: Model) -> list[NDArray[np.float64]]:
    """Every weight of the model, `[n, k]`."""
    return [np.array(op.rows(), np.float64) for op in weighted_ops(model.graph)]


def bits(model: Model) -> list[bytes]:
    """Every constant of the model."""
    return [tensor.values.tobytes() for tensor in _constants(model)]


def _constants(model: Model) -> Sequence[object]:
    from spa_compiler.graph.model import constants

    return sorted(constants(model.graph), key=lambda tensor: str(tensor.name))
