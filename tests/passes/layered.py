"""Solvers that do what a test says, and what layer-wise solving should make of them, for tests of `layerwise`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.graph.session import open_model, run
from spa_compiler.passes.layerwise import RIDGE, Job, Outcome, Result
from spa_compiler.passes.outcomes import apply
from tests.networks import model_of
from tests.passes.tiny import samples

F64 = np.ndarray
Change = Callable[[Job], np.ndarray]


def solving(change: Change, seen: list[list[Job]] | None = None) -> Callable[[Sequence[Job]], list[Result]]:
    """A solver that gives each job the rows that `change` makes."""

    def solve(jobs: Sequence[Job]) -> list[Result]:
        if seen is not None:
            seen.append(list(jobs))
        return [Result(change(job), 0.25, form=job.site) for job in jobs]

    return solve


def whole(job: Job) -> F64:
    """No pattern: the best weight there is."""
    return np.concatenate([problem.weight for problem in job.problems])


def shaken(job: Job) -> F64:
    rng = np.random.default_rng(job.site)
    rows = np.concatenate(job.original)
    return rows + 0.4 * rows.std() * rng.standard_normal(rows.shape)


def only(places: set[int], change: Change) -> Change:
    """`change` for some sites, the best weight for the others."""
    return lambda job: change(job) if job.site in places else whole(job)


def written(model: Model, outcomes: Sequence[Outcome]) -> Model:
    ops = weighted_ops(model.graph)
    apply(ops, outcomes, ["unstructured"] * len(ops), "test")
    return model


def values(model: Model, names: Sequence[str], given: Samples) -> dict[str, F64]:
    """Tensors over the samples that are solved on, as rows of their last axis (their second one for images)."""
    session = open_model(model, outputs=[n for n in names if n not in model.graph.tensors() or n not in _ends(model)])
    found = [run(session, sample.feed) | sample.feed for sample in given.feeds() if not sample.held]
    return {
        name: np.concatenate([_rows(feed[name].astype(np.float64)) for feed in found]) for name in dict.fromkeys(names)
    }


def _ends(model: Model) -> set[str]:
    return {tensor.name for tensor in [*model.graph.inputs, *model.graph.outputs]}


def _rows(array: F64) -> F64:
    return (
        np.moveaxis(array, 1, -1).reshape(-1, array.shape[1]) if array.ndim == 4 else array.reshape(-1, array.shape[-1])
    )


def ridge(x: F64, target: F64, start: F64, centred: bool) -> F64:
    """argmin over W of |target - x W^T|^2 / N + lam |W - start|^2, by least squares on the stacked system."""
    if centred:
        x, target = x - x.mean(axis=0), target - target.mean(axis=0)
    count, k = x.shape
    lam = RIDGE * np.square(x).sum() / count / k
    left = np.concatenate([x / np.sqrt(count), np.sqrt(lam) * np.eye(k)])
    right = np.concatenate([target / np.sqrt(count), np.sqrt(lam) * start.T])
    return np.linalg.lstsq(left, right)[0].T


def grouped() -> Model:
    """A Conv, then one of two groups with a bias whose result joins another branch of the same shape."""
    rng = np.random.default_rng(4)
    shapes = {"u": (4, 3, 1, 1), "c": (4,), "v": (6, 2, 3, 3), "d": (6,), "s": (6, 4, 1, 1)}
    return model_of(
        """g (float[batch, 3, 6, 6] x) => (float[batch, 6, 6, 6] y) {
          a = Conv (x, u, c) r = Relu (a) b = Conv <group = 2, pads = [1, 1, 1, 1]> (r, v, d)
          t = ReduceSum <keepdims = 1> (r, one) q = Expand (t, shape) y = Add (b, q)
        }""",
        one=np.array([1]),
        shape=np.array([1, 6, 6, 6]),
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items() if name != "s"},
    )


def pictures(batch: int = 12) -> Samples:
    rng = np.random.default_rng(5)
    return samples(*({"x": rng.standard_normal((batch, 3, 6, 6)).astype(np.float32) + 0.3} for _ in range(3)))


def patches(model: Model, given: Samples) -> F64:
    """What each group of `b` reads, [2, positions, 18]."""
    session = open_model(model, outputs=["r"])
    images = np.concatenate([run(session, s.feed)["r"] for s in given.feeds() if not s.held]).astype(np.float64)
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = [
        [image[2 * group : 2 * group + 2, i : i + 3, j : j + 3].reshape(-1) for group in range(2)]
        for image in images
        for i in range(6)
        for j in range(6)
    ]
    return np.array(rows).transpose(1, 0, 2)
