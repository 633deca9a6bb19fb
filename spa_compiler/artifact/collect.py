"""From plans to the artifact: whose files become what."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx


def collect(winner: Path, portable: Path, folder: Path) -> None:
    """The files of the winner become model.onnx and kernels.so in `folder`, those of the dense plan portable.onnx.

    The two plans may be one; what is in their folders is gone afterwards.
    """
    for file in winner.iterdir():
        (shutil.copyfile if winner == portable else shutil.move)(file, folder / file.name)
    _rename(portable, folder)


def _rename(portable: Path, folder: Path) -> None:
    """Moves the portable model beside model.onnx. Its external data, if any, has the new name inside as well."""
    if not (portable / "model.onnx.data").exists():
        shutil.move(portable / "model.onnx", folder / "portable.onnx")
        return
    proto = onnx.load(str(portable / "model.onnx"), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "portable.onnx.data"
    onnx.save(proto, str(folder / "portable.onnx"))
    shutil.move(portable / "model.onnx.data", folder / "portable.onnx.data")
