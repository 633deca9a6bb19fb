"""Depthwise convolutions between sparse layers: no zeros, but new values where the method gives such."""

from __future__ import annotations

import numpy as np
import pytest

from spa_compiler.calibration.estimate import output_change
from spa_compiler.calibration.samples import Samples
from spa_compiler.graph.model import Model
from spa_compiler.graph.operators import weighted_ops
from spa_compiler.passes import Change
from tests.networks import model_of
from tests.passes.tiny import context, samples, sparsify

WIDTH = 6


def separable(zeros: bool = False) -> Model:
    """1x1 convolution, depthwise 3x3 convolution, 1x1 convolution, a norm; the first convolution is left alone."""
    rng = np.random.default_rng(0)
    depthwise = rng.standard_normal((WIDTH, 1, 3, 3)).astype(np.float32)
    if zeros:
        depthwise[:, :, 0] = 0
    text = f"""agraph (float[batch, 3, 8, 8] x) => (float[batch, {WIDTH}, 8, 8] y) {{
        a = Conv (x, First)
        b = Conv (a, Wide, bias)
        c = Relu (b)
        d = Conv <group = {WIDTH}, pads = [1, 1, 1, 1]> (c, Deep, bias)
        e = Conv (d, Back, bias)
        y = InstanceNormalization (e, ones, bias)
    }}"""
    return model_of(
        text,
        First=rng.standard_normal((WIDTH, 3, 1, 1)).astype(np.float32),
        Wide=rng.standard_normal((WIDTH, WIDTH, 1, 1)).astype(np.float32),
        Deep=depthwise,
        Back=rng.standard_normal((WIDTH, WIDTH, 1, 1)).astype(np.float32),
        bias=rng.standard_normal(WIDTH).astype(np.float32),
        ones=np.ones(WIDTH, np.float32),
    )


def images(batch: int = 16) -> Samples:
    return samples(
        *({"x": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8)).astype(np.float32)} for seed in range(3))
    )


def deep(model: Model) -> np.ndarray:
    return next(op for op in weighted_ops(model.graph) if op.name == "d").rows().copy()


def run(model: Model, **options: object) -> Change:
    return sparsify(model, context(images()), sparsity=0.5, allocate="uniform", **options)


def test_it_makes_up_for_what_was_lost_before() -> None:
    changes = []
    for ignore in (("e",), ("d", "e")):  # what comes after would make up for it, too
        model = separable()
        change = run(model, method="sparsegpt", ignore=ignore)
        left = "d" in ignore
        assert np.array_equal(deep(model), deep(separable())) == left
        told = [(site.pattern, site.method, site.density_after) for site in change.sites if site.node == "d"]
        assert told == ([] if left else [("dense", "refit", 1.0)])
        assert ("d" in [site.node for site in change.skipped]) == left
        assert "50.0% zeros in 1 weights" in change.summary
        found = output_change(separable(), model, images())
        assert found is not None
        changes.append(found)
    assert changes[0] < 0.95 * changes[1]


def test_its_zeros_stay() -> None:
    model = separable(zeros=True)
    run(model, method="sparsegpt")
    before, after = deep(separable(zeros=True)), deep(model)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(before == 0, after == 0)


@pytest.mark.parametrize("method", ["wanda", "magnitude", "random"])
def test_methods_that_keep_values_keep_its_values(method: str) -> None:
    model = separable()
    change = run(model, method=method)
    np.testing.assert_array_equal(deep(model), deep(separable()))
    assert "d" in [site.node for site in change.skipped]


def test_nothing_is_refitted_where_nothing_was_lost() -> None:
    model = separable()
    change = run(model, method="sparsegpt", targets=("e",))  # behind it
    np.testing.assert_array_equal(deep(model), deep(separable()))
    assert [site.node for site in change.sites] == ["e"]
