"""The committed example: what its manifest says is what its files are and do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

MODELS = Path(__file__).resolve().parents[2] / "models"
MANIFEST: dict[str, Any] = json.loads((MODELS / "manifest.json").read_text())
LIMIT = 10_000_000  # bytes of everything that is committed in the folder
PARTS = ("calibration", "evaluation")
NAMES = sorted(MANIFEST["models"])
LARGEST_LOSS = 0.02  # of accuracy that the recipe may cost on images that did not choose it


def session(data: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def arrays(part: str) -> dict[str, np.ndarray]:
    with np.load(MODELS / MANIFEST["data"][part]["file"], allow_pickle=False) as stored:
        return dict(stored)


def accuracy(model: ort.InferenceSession) -> float:
    evaluation = arrays("evaluation")
    logits = model.run(None, {"image": evaluation["image"]})[0]
    return float((logits.argmax(axis=1) == evaluation["labels"]).mean())


@pytest.mark.parametrize(
    "entry", [*MANIFEST["models"].values(), *(MANIFEST["data"][part] for part in PARTS)], ids=lambda e: str(e["file"])
)
def test_hashes_match(entry: dict[str, Any]) -> None:
    assert hashlib.sha256((MODELS / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_what_the_manifest_says(name: str) -> None:
    entry = MANIFEST["models"][name]
    one_image = 1 / MANIFEST["data"]["evaluation"]["images"]  # another CPU may round one image the other way
    assert accuracy(session(str(MODELS / entry["file"]))) == pytest.approx(entry["accuracy"], abs=1.01 * one_image)
    assert entry["accuracy"] >= 0.98


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_dynamic_batch(name: str) -> None:
    entry = MANIFEST["models"][name]
    model = session(str(MODELS / entry["file"]))
    (image,), (logits,) = model.get_inputs(), model.get_outputs()
    assert (image.name, list(image.shape)) == (entry["input"]["name"], entry["input"]["shape"])
    images = arrays("evaluation")[image.name]
    whole = model.run(None, {image.name: images[:7]})[0]
    assert whole.shape == (7, entry["classes"])
    assert logits.shape[0] == image.shape[0]
    single = np.concatenate([model.run(None, {image.name: images[i : i + 1]})[0] for i in range(7)])
    np.testing.assert_allclose(whole, single, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_costs_little(name: str) -> None:
    """The recipe that the calibration images chose holds on images that had no say; the demo's model has one."""
    entry = MANIFEST["models"][name]
    if entry["recipe"] is None:
        assert name != "digits_transformer"
        return
    chosen = next(row for row in entry["one_shot_pruning"] if entry["recipe"].items() <= row.items())
    assert entry["accuracy"] - chosen["evaluation"] <= LARGEST_LOSS


def test_demo_recipe_is_worth_it() -> None:
    assert MANIFEST["models"]["digits_transformer"]["recipe"]["sparsity"] >= 0.7


def test_convnet_keeps_its_batch_norms() -> None:
    model = onnx.load(MODELS / MANIFEST["models"]["digits_convnet"]["file"])
    operators = [node.op_type for node in model.graph.node]
    pointwise = [t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[2:] == [1, 1]]
    assert operators.count("BatchNormalization") == operators.count("Conv")
    assert sum(int(np.prod(t.dims)) for t in pointwise) > 300_000


def test_small_and_disjoint() -> None:
    files = [file for file in MODELS.iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < LIMIT
    images = {part: arrays(part)["image"] for part in PARTS}
    for part, stored in images.items():
        assert stored.dtype == np.float32
        assert len(stored) == MANIFEST["data"][part]["images"]
    seen = {image.tobytes() for image in images["calibration"]}
    assert not any(image.tobytes() in seen for image in images["evaluation"])
