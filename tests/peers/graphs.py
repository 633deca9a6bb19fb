"""Real graphs by name, with inputs: the zoo and the models of the folder `shared` beside the repository."""

from __future__ import annotations

import importlib.util
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from spa_compiler.calibration.examples import example_feeds
from spa_compiler.calibration.shapes import Shapes
from spa_compiler.graph.load import load
from spa_compiler.graph.session import Feeds
from tests.peers import sources

ZOO = sources.SHARED / "graphs" / "zoo.py"
MODELS = sources.SHARED / "models"

_TOKENS: Shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 12))
_SHAPES: dict[str, Shapes] = {
    "minilm_l6_v2": _TOKENS,
    "stories260k": {"input_ids": (2, 12)},
    "resnet20_cifar10": {"input": (1, 3, 32, 32)},
    "resnet56_cifar10": {"input": (1, 3, 32, 32)},
    "cct4_cifar10": {"input": (1, 3, 32, 32)},
    "mobilenetv2_imagenet": {"input": (1, 3, 224, 224)},
    "efficientnet_lite0_imagenet": {"input": (1, 3, 224, 224)},
    "imdn_x2": {"lr": (1, 3, 24, 20)},
}


@cache
def _zoo() -> Any:
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(ZOO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zoo_names() -> list[str]:
    """Every graph of the zoo; none where it is not there."""
    return list(_zoo().names()) if ZOO.exists() else []


needs_zoo = pytest.mark.skipif(not ZOO.exists(), reason="needs the graphs in ../shared")


def model_names() -> list[str]:
    """Every model of the folder; none where it is not there."""
    return list(_SHAPES) if MODELS.exists() else []


def zoo_graph(name: str, seed: int = 0) -> tuple[onnx.ModelProto, Feeds]:
    """A graph of the zoo with random weights, and inputs."""
    return _zoo().load(name, seed), dict(_zoo().inputs(name, seed))


def model(name: str, seed: int = 0) -> tuple[onnx.ModelProto, Feeds]:
    """A trained model, and inputs."""
    proto = onnx.load_from_string(_bytes(name))
    return proto, example_feeds(load(proto), _SHAPES[name], np.random.default_rng(seed))


def _bytes(name: str) -> bytes:
    built: dict[str, Callable[[], Path]] = {"minilm_l6_v2": sources.minilm}
    if name in built:
        return built[name]().read_bytes()
    packed = MODELS / f"{name}.onnx.xz"
    return lzma.decompress(packed.read_bytes()) if packed.exists() else (MODELS / f"{name}.onnx").read_bytes()
