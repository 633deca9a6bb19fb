"""The calibration data of the real models as `--calib tests/peers/accuracy_calibration.py:minilm` reads it.

Each function is one pass over what `evaluate.calibration` of the folder `shared` yields; no metric uses those samples.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHARED = Path(__file__).resolve().parents[3] / "shared"


def evaluate() -> Any:
    """The module `evaluate` of the folder `shared`, whose neighbours it imports by their plain names."""
    if str(_SHARED) not in sys.path:
        sys.path.append(str(_SHARED))
    return importlib.import_module("evaluate")


def minilm() -> Iterator[dict[str, Any]]:
    """Sentences of STS-B's train split, padded."""
    yield from evaluate().calibration("minilm")


def resnet56() -> Iterator[dict[str, Any]]:
    """Images of CIFAR-10's train split."""
    yield from evaluate().calibration("resnet56_cifar10")


def cct() -> Iterator[dict[str, Any]]:
    """The same images."""
    yield from evaluate().calibration("cct4_cifar10")


def efficientnet_lite0() -> Iterator[dict[str, Any]]:
    """200 ImageNet images of classes that the metric leaves out."""
    yield from evaluate().calibration("efficientnet_lite0_imagenet")


def stories260k() -> Iterator[dict[str, Any]]:
    """Stories of TinyStories' train split."""
    yield from evaluate().calibration("stories260k")
