"""Models cut to half of their multiply-accumulates, in plain ONNX Runtime: no kernel of ours. Needs a quiet machine.

Ratios as in `test_bars.py`. Every test prints its number: `pytest -s -m peers tests/peers/test_pruned_bars.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spa_compiler import targets
from spa_compiler.bench import compare, engines
from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import parse_shapes
from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from spa_compiler.graph.save import save
from spa_compiler.passes import Context, from_command_line
from tests.peers import sources

pytestmark = [pytest.mark.peers, sources.needs_shared]

RUNS = 60
BAR = 1.6
TOKENS = tuple(f"{name}=1,128" for name in ("input_ids", "attention_mask", "token_type_ids"))


MODELS: dict[str, tuple[Callable[[], Path], tuple[str, ...]]] = {
    "resnet18": (sources.resnet18, ("image=1,3,224,224",)),
    "mobilenet_v2": (sources.mobilenet_v2, ("input=1,3,224,224",)),
    "minilm": (sources.minilm, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_macs(name: str, tmp_path: Path) -> None:
    build, shapes = MODELS[name]
    source = build()
    loaded = load(source)
    sizes = parse_shapes(shapes, loaded)[0]
    feeds = [example_feeds(loaded, sizes, np.random.default_rng(0))]
    model = canonicalize(loaded, feeds).model
    (cut,) = from_command_line(prune=0.5).build()
    change = cut.run(model, Context(targets.parse("cpu"), np.random.default_rng(0), feeds=tuple(feeds)))
    pruned = save(model, tmp_path / "pruned.onnx")[0]
    models = compare.entries([source, pruned])
    raced = compare.compare(models, engines.parse("onnxruntime"), machine="", threads=1, runs=RUNS, shapes=shapes)
    medians = {row.model: row.median_ms for row in raced.rows}
    ratio = medians[source.name] / medians[pruned.name]
    print(f"\n{name}: {medians[source.name]:.2f} / {medians[pruned.name]:.2f} ms = {ratio:.2f}x, {change.got}")
    assert change.got["macs"] <= 0.5
    assert ratio >= BAR
