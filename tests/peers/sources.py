"""The models that races use: three from the folder `shared` beside the repository, and the repository's own.

Large ones are built on first use and kept in the cache folder (`SPA_CACHE_DIR`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from spa_compiler.targets.machine import cache_dir
from tests.peers import llama
from tests.peers import with_zeros as pruner

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


def have_shared() -> bool:
    """Whether the folder with the benchmark models is there."""
    return (SHARED / "bench" / "graphs.py").exists()


needs_shared = pytest.mark.skipif(not have_shared(), reason="needs the benchmark models in ../shared")


def minilm() -> Path:
    """all-MiniLM-L6-v2 with its own weights; batch and length dynamic."""
    os.environ.setdefault("SPA_MODELS_DIR", str(_folder()))
    return Path(_module(SHARED / "models" / "fetch_models.py").path("minilm_l6_v2"))


def bert_base(layers: int = 12) -> Path:
    """BERT-base with random weights; batch and length dynamic."""
    name = "bert_base" if layers == 12 else f"bert_base_{layers}_layers"
    return _built(name, lambda graphs: graphs.bert_base(layers=layers))


def with_zeros(source: Path, sparsity: float, pattern: str) -> Path:
    """A model as it would come from a pruner: the zeros are in the file."""
    name = f"{source.stem}_{round(sparsity * 100)}_{pattern.replace(':', '_')}"
    return _kept(name, lambda path: pruner.with_zeros(source, path, sparsity, pattern))


def mobilenet_v2() -> Path:
    """MobileNetV2 with random weights, BatchNormalization folded."""
    return _built("mobilenet_v2", lambda graphs: graphs.mobilenet_v2())


def resnet50() -> Path:
    """ResNet-50 with random weights, BatchNormalization folded."""
    return _built("resnet50", lambda graphs: graphs.resnet50())


def resnet18() -> Path:
    """torchvision's ResNet-18 with random weights, BatchNormalization as exported."""
    return _of_the_zoo("resnet18")


def yolo_c2f() -> Path:
    """A detector like YOLOv8 nano (C2f, SPPF, PAN neck, DFL head), random weights, BatchNormalization folded."""
    return _of_the_zoo("yolo_c2f_bnfolded")


def llama_block() -> Path:
    """One block of the size of Llama 3.2 1B, with a cache of keys and values, random weights."""
    return _kept("llama_block", lambda path: onnx.save(llama.llama_block(), str(path)))


def digits() -> dict[str, dict[str, Any]]:
    """The repository's own models as their manifest has them, `file` made absolute; nothing if they are not there."""
    manifest = ROOT / "models" / "manifest.json"
    if not manifest.exists():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(manifest.read_text())["models"]
    return {name: entry | {"file": manifest.parent / entry["file"]} for name, entry in entries.items()}


def _folder() -> Path:
    folder = cache_dir() / "peers"
    folder.mkdir(exist_ok=True)
    return folder


def _built(name: str, build: Callable[[ModuleType], onnx.ModelProto]) -> Path:
    return _kept(name, lambda path: onnx.save(build(_module(SHARED / "bench" / "graphs.py")), str(path)))


def _of_the_zoo(name: str) -> Path:
    return _kept(name, lambda path: onnx.save(_module(SHARED / "graphs" / "zoo.py").load(name), str(path)))


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    target = _folder() / f"{name}.onnx"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.part")
        make(partial)
        partial.rename(target)
    return target


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shared_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
