"""Real exports, every one of the zoo: loaded, canonicalized and written, they compute what they did.

The zoo lies beside the repository (`../shared/graphs`); without it these tests are skipped.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import default_shapes
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from tests.peers import graphs

pytestmark = [pytest.mark.peers, pytest.mark.slow]
TOLERANCE = {"float16": 2e-2, "float32": 1e-3}  # of the output's largest magnitude; random weights amplify rounding
CHAOTIC = {"starnet_s1"}  # with random weights, its layers multiply rounding until nothing of the result is left


@pytest.mark.parametrize("name", graphs.zoo_names())
def test_computes_the_same(name: str) -> None:
    source, feeds = graphs.zoo_graph(name)
    model = load(source)
    result = canonicalize(model, [feeds])
    assert name in CHAOTIC or not [note for note in result.notes if "left" in note]
    written = to_proto(result.model)
    constants = {tensor.name for tensor in source.graph.initializer}
    assert list(written.graph.input) == [value for value in source.graph.input if value.name not in constants]
    assert list(written.graph.output) == list(source.graph.output)
    onnx.checker.check_model(written)
    optimize = "none" if name in CHAOTIC else "all"
    wanted = run(open_session(source.SerializeToString(), optimize=optimize), feeds)
    got = run(open_session(written.SerializeToString(), optimize=optimize), feeds)
    assert list(got) == list(wanted)
    for output, value in wanted.items():
        assert got[output].shape == value.shape
        if value.dtype.kind == "f":
            difference = np.abs(got[output].astype(np.float64) - value.astype(np.float64)).max()
            assert difference <= TOLERANCE.get(value.dtype.name, 1e-6) * np.abs(value).max()
        else:
            assert np.array_equal(got[output], value)


@pytest.mark.parametrize("name", graphs.zoo_names())
def test_default_shapes_run(name: str) -> None:
    model = load(graphs.zoo_graph(name)[0])
    feeds = example_feeds(model, default_shapes(model), np.random.default_rng(0))
    run(open_session(to_proto(model).SerializeToString()), feeds)
