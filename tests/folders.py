"""What lies in folders."""

from __future__ import annotations

from pathlib import Path

ARTIFACT = {"model.onnx", "kernels.so", "portable.onnx", "manifest.json", "report.json", "recipe.yaml"}
"""The files of an artifact that has kernels."""


def names(folder: Path) -> set[str]:
    """Of files and folders in it."""
    return {path.name for path in folder.iterdir()}
