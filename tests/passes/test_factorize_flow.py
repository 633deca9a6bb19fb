"""`factorize` within the whole flow: compressed, checked, saved, loaded and analyzed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import pytest
import yaml

import spa_compiler
from spa_compiler.compression import Compressed, compress
from spa_compiler.graph.load import load
from spa_compiler.graph.model import Model
from spa_compiler.graph.save import to_proto
from spa_compiler.graph.session import open_session, run
from spa_compiler.passes import recipe
from tests.passes.factorized import attention, convnet, images, sentences
from tests.passes.tiny import WIDTH, correlated, feed_forward

METHODS: list[dict[str, Any]] = [
    {"params": 0.6},
    {"params": 0.6, "joint": True, "method": "whitened"},
    {"macs": 0.6},
    {"error": 0.5},
    {"params": 0.6, "method": "svd", "allocate": "welore"},
    {"params": 0.6, "method": "sparse-low-rank"},
]


def samples_of(name: str, folder: Path) -> tuple[Model, str]:
    """A model and a file of samples for it."""
    model = {"feed forward": lambda: feed_forward(blocks=2), "attention": attention, "convolution": _convolution}[
        name
    ]()
    x = {
        "feed forward": lambda: correlated(120, WIDTH, 1),
        "attention": lambda: np.concatenate([feed["x"] for feed in sentences()]),
        "convolution": lambda: np.concatenate([feed["x"] for feed in images()] * 16),
    }[name]()
    np.savez(folder / "samples.npz", x=x)
    return model, str(folder / "samples.npz")


def _convolution() -> Model:
    return convnet("Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (g, W, b)")


def compressed(name: str, options: dict[str, Any], folder: Path, *more: dict[str, Any]) -> Compressed:
    model, data = samples_of(name, folder)
    steps = [{"name": "factorize", "multiple": 1} | options, *more]
    onnx.save(to_proto(model), folder / "m.onnx")
    return compress(
        folder / "m.onnx", recipe.from_yaml(yaml.safe_dump({"version": 1, "passes": steps})), calib=data, threads=1
    )


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("name", ["feed forward", "attention", "convolution"])
def test_compressed_checked_and_analyzed(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    made = compressed(name, options, tmp_path)
    proto = made.proto()
    onnx.checker.check_model(proto, full_check=True)
    (change,) = made.report.passes
    assert change.name == "factorize"
    assert change.sites
    assert made.report.output_change is not None
    # What was saved computes what the compressed model does, through a file, too.
    onnx.save(proto, tmp_path / "portable.onnx")
    again = to_proto(load(tmp_path / "portable.onnx"))
    feed = made.feeds[0]
    first, second = (run(open_session(p.SerializeToString()), feed) for p in (proto, again))
    np.testing.assert_array_equal(first["y"], second["y"])
    before = spa_compiler.analyze(tmp_path / "m.onnx")
    after = spa_compiler.analyze(tmp_path / "portable.onnx")
    assert len(after.groups) >= len(before.groups)  # thin dimensions are coupled channels, too


def test_zeros_may_come_after(tmp_path: Path) -> None:
    made = compressed("feed forward", {"params": 0.6}, tmp_path, {"name": "sparsify", "sparsity": 0.5})
    low_rank, sparse = made.report.passes
    apart = sum(site.pattern.startswith("rank") for site in low_rank.sites)
    assert len(sparse.sites) == 2 * apart + (4 - apart)
    onnx.checker.check_model(made.proto(), full_check=True)


def test_the_same_file_for_any_number_of_threads(tmp_path: Path) -> None:
    model, data = samples_of("attention", tmp_path)
    wanted = recipe.from_yaml("{version: 1, passes: [{name: factorize, params: 0.6, multiple: 1}]}")
    files = [compress(to_proto(model), wanted, calib=data, threads=threads).proto() for threads in (1, 3)]
    assert files[0].SerializeToString(deterministic=True) == files[1].SerializeToString(deterministic=True)
