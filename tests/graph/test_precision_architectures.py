"""Every classic family in 16 bits: it stays a valid model, ONNX Runtime runs it, and outputs move as little as rounding does."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.graph.half_kernels import Half
from spa_compiler.graph.load import load
from tests.analysis import architectures
from tests.graph.halved import halved

TOLERANCE: dict[str, float] = {"fp16": 5e-3, "bf16": 4e-2}


@pytest.mark.slow
@pytest.mark.parametrize("half", get_args(Half))
@pytest.mark.parametrize("name", list(architectures.ALL))
def test_classic_families(name: str, half: Half) -> None:
    given = architectures.ALL[name].build()
    model = load(given)
    sizes = {
        v.name: tuple(d if isinstance(d, int) else architectures.SIZES[str(d)] for d in v.shape)
        for v in model.signature.inputs
    }
    found = halved(given, half, example_feeds(model, sizes, np.random.default_rng(0)))
    assert found.rounded <= TOLERANCE[half]
    assert (found.direct or 0.0) <= TOLERANCE[half]
