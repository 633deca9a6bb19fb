"""One compression by this package in a process of its own, so that its time and memory are its own.

    python tests/peers/accuracy_ours.py job.json

The job names `model`, `calibration` (DATA as `--calib` takes it, or null), `recipe` (what `from_yaml` reads), `seed` and
`output`. What it says on its last line is JSON. Nothing is timed against ONNX Runtime and no kernels are built.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # as a script, Python looks beside this file alone
    sys.path.insert(0, str(ROOT))

import spa_compiler  # noqa: E402
from spa_compiler.errors import SpaError  # noqa: E402
from spa_compiler.graph.load import load  # noqa: E402
from spa_compiler.graph.operators import weighted_ops  # noqa: E402
from spa_compiler.graph.save import save  # noqa: E402
from spa_compiler.passes.recipe import from_yaml  # noqa: E402


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Compresses, saves, and says what the report says."""
    begin = time.perf_counter()
    try:
        recipe = from_yaml(json.dumps(job["recipe"]))
        made = spa_compiler.compress(job["model"], recipe, calib=job["calibration"], seed=job["seed"])
    except SpaError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - begin
    save(made.model, Path(job["output"]))
    sizes = {op.weight.name: op.n * op.k for op in weighted_ops(load(job["model"]).graph)}
    return {"seconds": seconds} | facts(made.report, sizes, data=job["calibration"] is not None)


def facts(report: Any, sizes: Mapping[str, int], *, data: bool) -> dict[str, float | None]:
    """What a row takes from a report: how much remains, and how far the outputs of layers and of the model are off.

    Args:
        sizes: elements of the source's weights, by name.
        data: whether there were samples; errors are of weights without, and left out.
    """
    # What was refitted without zeros was not to be compressed.
    sites = [site for change in report.passes for site in change.sites if site.method != "refit"]
    shares = [change.got["params"] for change in report.passes if "params" in change.got]
    known = [(sizes[site.weight], site.density_after) for site in sites if site.weight in sizes]
    whole = sum(size for size, _ in known)
    kept = shares[-1] if shares else sum(size * density for size, density in known) / whole if whole else None
    return {
        "kept": kept,
        "site_error": sum(site.error for site in sites) / len(sites) if data and sites else None,
        "holdout": report.output_change,
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
