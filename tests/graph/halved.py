"""How far a model's outputs move when it gets 16-bit floats, computed in two ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from spa_compiler.graph import shapes
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.half_kernels import Half
from spa_compiler.graph.load import load
from spa_compiler.graph.precision import Converted, halves, widened
from spa_compiler.graph.rounding import fitted, in_types, outputs
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import Feeds, flatten, open_model, open_session, run


@dataclass(frozen=True)
class Halved:
    """Relative errors against float32, the largest of all outputs that are floats.

    Attributes:
        rounded: in float32, rounded behind every node as a GPU rounds.
        direct: as ONNX Runtime runs the file on a CPU, with its own kernels for float16, or Casts around nodes that have
            none; None for bfloat16, which it cannot run there.
    """

    converted: Converted
    rounded: float
    direct: float | None


def halved(given: onnx.ModelProto, half: Half, feeds: Feeds) -> Halved:
    """As a compilation converts it; the file passes onnx's checker."""
    source = load(given)
    wide = widened(source) if halves(source) else source
    feeds = in_types(wide, feeds)
    model = canonicalize(wide, [feeds]).model
    shapes.infer(model)
    want = dict(flatten(run(open_model(model, optimize="basic", prepack=False), feeds)))
    done = fitted(model, half, source, [feeds])
    file = to_proto(done.model)
    if all(v.type.tensor_type.HasField("shape") for v in given.graph.output):  # the checker wants it
        onnx.checker.check_model(file, full_check=True)
    assert [(v.name, v.type) for v in file.graph.input] == [(v.name, v.type) for v in to_proto(source).graph.input]
    direct = None
    if half == "fp16":
        # not "all": ONNX Runtime 1.31 crashes there over two LSTMs of float16 in a row
        session = open_session(file.SerializeToString(), optimize="extended")
        direct = distance(want, dict(flatten(run(session, in_types(done.model, feeds)))))
    return Halved(done, distance(want, outputs(done.model, [feeds])[0]), direct)


def distance(want: Feeds, got: Feeds) -> float:
    """The largest |got - want| over |want| of all float outputs, as norms; infinite where finite values became others."""
    assert want.keys() == got.keys()
    worst = 0.0
    for name, value in want.items():
        assert got[name].shape == value.shape
        if value.dtype.kind != "f":
            continue
        there = np.isfinite(value)
        a, b = value[there].astype(np.float64), got[name][there].astype(np.float64)
        if not np.isfinite(b).all():
            return float("inf")
        worst = max(worst, float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-9)))
    return worst
