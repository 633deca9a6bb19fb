"""`make demo`: compiles the digits transformer with a lossy recipe, then says what that cost and what it gave.

Runs `spa-compile` as a user would, loads the artifact in stock ONNX Runtime, counts right answers on the held-out
images before and after, and reads the measured ratios from report.json. Needs the package and onnxruntime, no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # newer ONNX Runtimes send some unless told otherwise
import onnxruntime as ort

MODELS = Path(__file__).resolve().parent
MODEL = "digits_transformer"
BATCH = 64  # images at once: the shape that the compiler measures and chooses kernels for


def command(manifest: dict[str, Any], output: Path) -> list[str]:
    """The `spa-compile` call, with the recipe that the manifest chose on the calibration images."""
    entry = manifest["models"][MODEL]
    shape = ",".join(map(str, [BATCH, *entry["input"]["shape"][1:]]))
    options = {
        "-o": str(output),
        "--passes": "sparsify{" + ",".join(f"{option}={value}" for option, value in entry["recipe"].items()) + "}",
        "--samples": _short(MODELS / manifest["data"]["calibration"]["file"]),
        "--shape": f"{entry['input']['name']}={shape}",
    }
    return ["spa-compile", _short(MODELS / entry["file"]), *(word for option in options.items() for word in option)]


def accuracy(model: Path, library: Path | None, data: Path, name: str) -> float:
    """Share of the images in `data` that `model` puts in the right class, in batches of `BATCH` and a shorter one."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library.resolve()))
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with np.load(data, allow_pickle=False) as arrays:
        images, labels = arrays[name], arrays["labels"]
    starts = range(0, len(images), BATCH)
    logits = np.concatenate([np.asarray(session.run(None, {name: images[i : i + BATCH]})[0]) for i in starts])
    return float((logits.argmax(axis=1) == labels).mean())


def main() -> int:
    """Compiles, measures, prints; the exit code is the compiler's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path(f"{MODEL}-spa"), help="folder to write")
    output: Path = parser.parse_args().output

    manifest = json.loads((MODELS / "manifest.json").read_text())
    words = command(manifest, output)
    print("$", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "spa_compiler.cli.compile", *words[1:]], check=False)
    if done.returncode:
        return done.returncode

    entry = manifest["models"][MODEL]
    evaluation = MODELS / manifest["data"]["evaluation"]["file"]
    before = accuracy(MODELS / entry["file"], None, evaluation, entry["input"]["name"])
    after = accuracy(output / "model.onnx", output / "kernels.so", evaluation, entry["input"]["name"])
    report = json.loads((output / "report.json").read_text())

    images = manifest["data"]["evaluation"]["images"]
    print(f"\nheld-out accuracy  {before:.2%} before, {after:.2%} after ({images} images)")
    for row in report["race"]:
        times = f"{row['median_ms']:8.2f} ms  (p10 {row['p10_ms']:.2f}, p90 {row['p90_ms']:.2f})"
        print(f"measured           {row['model'] or MODEL} in {row['runtime']} at {row['shape']}: {times}")
    for ratio in report["ratios"]:
        times = f"{ratio['ratio']:.2f}x as fast as {ratio['over']} at {ratio['shape']}"
        print(f"ratio              {ratio['model']} runs {times}")
    print(f"report             {_short(output / 'report.json')}")
    return 0


def _short(path: Path) -> str:
    """`path` as one would type it: relative to the current folder where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
