"""What 16 bits do to the outputs of a model, and a conversion that they survive. No GPU is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from spa_compiler.errors import ModelError
from spa_compiler.graph.difference import difference
from spa_compiler.graph.half_kernels import Half
from spa_compiler.graph.half_plan import LARGEST, element_of
from spa_compiler.graph.model import Model
from spa_compiler.graph.precision import NUMPY, Converted, convert, widened
from spa_compiler.graph.session import Feeds, flatten, open_model, run

_CHUNK = 64  # tensors that are looked at in one run


def fitted(model: Model, half: Half | None, source: Model, feeds: Sequence[Feeds]) -> Converted:
    """`model` in 16 bits, with outputs that are finite wherever those of float32 are.

    Nodes whose results are beyond float16 on these feeds stay float32, with all that reads them.

    Args:
        model: float32.
        half: None: float32 stays.
        source: whose inputs and outputs the result has.
        feeds: of `model`.

    Raises:
        ModelError: outputs become infinite or NaN all the same.
    """
    done = convert(model, half, source)
    if half is None:
        return done
    want = outputs(model, feeds)
    got = outputs(done.model, feeds)
    if half == "fp16" and not _finite_alike(want, got) and (beyond := overflowing(model, feeds)):
        done = convert(model, half, source, keep=_with_readers(model, set(beyond)))
        got = outputs(done.model, feeds)
        most = max(beyond, key=lambda name: beyond[name])
        told = f"{half}: {most} reaches {beyond[most]:.2g}, beyond float16; "
        told += f"{len(beyond)} such nodes stay float32, and what reads them"
        done = dataclasses.replace(done, notes=(*done.notes, told))
    if not _finite_alike(want, got):
        raise ModelError(
            f"in {half} outputs become infinite or NaN",
            where=source.source.name,
            fix="Convert to bfloat16, which has the range of float32: --precision bf16" if half == "fp16" else None,
        )
    worst = max((_change(a, b) for was, now in zip(want, got, strict=True) for a, b in _pairs(was, now)), default=0.0)
    told = f"{half}: outputs change by {worst:.1e} of the largest one against float32"
    return dataclasses.replace(done, notes=(*done.notes, told))


def overflowing(model: Model, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Nodes of a float32 model with results that float16 cannot hold on these feeds: name -> largest magnitude."""
    made = {
        t.name: node.name
        for node in model.graph.nodes
        for t in node.outputs
        if isinstance(t, gs.Variable) and element_of(t) == TensorProto.FLOAT and t.name
    }
    found: dict[str, float] = {}
    names = list(made)
    for start in range(0, len(names), _CHUNK):
        part = names[start : start + _CHUNK]
        session = open_model(model, optimize="none", outputs=part, prepack=False)
        for feed in feeds:
            values = run(session, feed)
            for name in part:
                finite = np.abs(values[name][np.isfinite(values[name])])
                if finite.size and (top := float(finite.max())) > LARGEST:
                    found[made[name]] = max(top, found.get(made[name], 0.0))
    return found


def outputs(model: Model, feeds: Sequence[Feeds]) -> list[Feeds]:
    """What a model computes on the feeds, 16-bit floats given out as float32 and rounded as a GPU rounds them."""
    twin = widened(model, rounding=True)
    session = open_model(twin, optimize="basic", prepack=False)
    return [dict(flatten(run(session, in_types(twin, feed)))) for feed in feeds]


def in_types(model: Model, feeds: Feeds) -> Feeds:
    """Floats of the feeds in the types of the model's inputs."""
    floats = {np.dtype(np.float32), *NUMPY.values()}
    types = {v.name: v.dtype for v in model.signature.inputs if v.dtype in floats}
    return {n: v.astype(types[n]) if n in types and v.dtype in floats else v for n, v in feeds.items()}


def _with_readers(model: Model, names: set[str]) -> set[str]:
    nodes = [node for node in model.graph.nodes if node.name in names]
    return names | {user.name for node in nodes for t in node.outputs for user in t.outputs}


def _pairs(was: Feeds, now: Feeds) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(was[name], now[name]) for name in was if was[name].dtype.kind == "f"]


def _finite_alike(want: Sequence[Feeds], got: Sequence[Feeds]) -> bool:
    """Whether outputs are finite where they were."""
    return all(
        not np.any(np.isfinite(a) & ~np.isfinite(b))
        for was, now in zip(want, got, strict=True)
        for a, b in _pairs(was, now)
    )


def _change(was: np.ndarray, now: np.ndarray) -> float:
    both = np.isfinite(was) & np.isfinite(now)
    return difference(was[both], now[both]) or 0.0
