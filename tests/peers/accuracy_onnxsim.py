"""onnxsim's pruning in an interpreter that has it: one job in, one model out. Needs onnx and onnxsim alone.

    python tests/peers/accuracy_onnxsim.py job.json

The job names `model` (ONNX file), `calibration` (.npz, arrays named `<batch>/<input>`), `method` (a name of `METHODS`),
`options` (`sparsity`, or `n` and `m`: keep n of m), and `output`. What it says on its last line is JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

METHODS = {"sparsegpt": "apply_sparsegpt_pruning", "wanda": "apply_wanda_pruning"}


def batches(path: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """The feeds of an archive, in the order of their numbers."""
    found: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            number, _, name = key.partition("/")
            found.setdefault(int(number), {})[name] = archive[key]
    return [found[number] for number in sorted(found)]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Prunes, saves, and says how long the pruning itself took."""
    pruning: Any = importlib.import_module("onnxsim.pruning")
    model, calibration = onnx.load(job["model"]), batches(Path(job["calibration"]))
    begin = time.perf_counter()
    pruned = getattr(pruning, METHODS[job["method"]])(model, calibration_data=calibration, **job["options"])
    seconds = time.perf_counter() - begin
    onnx.save(pruned, job["output"])
    return {"seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
