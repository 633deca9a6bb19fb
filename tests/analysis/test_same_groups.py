"""The groups of a model do not hang on how its file is written."""

from __future__ import annotations

import pytest

from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from tests.analysis.architectures import ALL
from tests.analysis.sites import sites_of

WITH_BATCHNORM = ["bottleneck", "densenet", "mobilenet_v2", "resnet", "resnext", "unet"]


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_before_and_after_canonicalization(name: str) -> None:
    model = load(ALL[name].build())
    folded = canonicalize(model, []).model
    assert {node.op for node in model.graph.nodes} > {node.op for node in folded.graph.nodes}
    assert sites_of(model) == sites_of(folded)
