"""The engines' scripts with a stand-in for each package: what they ask of it. Races with the real ones are `make bench`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spa_compiler.bench import worker
from spa_compiler.bench.engines import ENGINES

FEEDS = {"x": np.ones((2, 3), np.float32), "i": np.ones((2, 5), np.int64)}

DEEPSPARSE = """
import os, pathlib
__version__ = "1.8.0"
class Engine:
    def __init__(self, model, batch_size, num_cores, input_shapes):
        assert os.environ["NM_DISABLE_ANALYTICS"] == "1"
        self.told = [batch_size, num_cores, *map(len, input_shapes)]
        pathlib.Path(model).write_text("overwritten")
    def run(self, values, val_inp):
        import numpy as np
        assert not val_inp
        print("a banner on stdout")
        return [np.array(self.told), values[0] * 2]
"""

OPENVINO = """
import numpy as np
__version__ = "2026.1.0-123-release"
class Core:
    def read_model(self, path): return self
    def reshape(self, shapes): self.shapes = shapes
    def compile_model(self, model, device, config):
        self.outputs = ["b", "a"]
        self.config = config
        assert self.shapes == {"x": [2, 3], "i": [2, 5]}
        return self
    def create_infer_request(self): return self
    def infer(self, feeds, share_inputs, share_outputs):
        hint = self.config["INFERENCE_PRECISION_HINT"]
        return {"a": np.array([self.config["INFERENCE_NUM_THREADS"]]), "b": np.array([float(hint[-2:])])}
"""


def start(tmp_path: Path, name: str, package: str, calls: str = "2\n") -> tuple[list[Any], Path]:
    """What the worker answers for an engine whose package is `package`, and where it left its outputs."""
    (tmp_path / f"{ENGINES[name].loader}.py").write_text(package)
    (tmp_path / "model.onnx").write_text("a model")
    np.savez(tmp_path / "feeds.npz", **dict[str, Any](FEEDS))
    job = {"loader": ENGINES[name].loader, "config": ENGINES[name].config, "threads": 3}
    job |= {part: str(tmp_path / file) for part, file in FILES.items()}
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, worker.__file__, json.dumps(job)]
    done = subprocess.run(command, input=calls, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], tmp_path / "outputs.npz"


FILES = {"model": "model.onnx", "feeds": "feeds.npz", "outputs": "outputs.npz"}


def test_deepsparse_gets_a_copy_and_tells_nobody(tmp_path: Path) -> None:
    (ready, times), outputs = start(tmp_path, "deepsparse", DEEPSPARSE)
    assert ready == {"version": "1.8.0"}
    assert len(times) == 2
    assert (tmp_path / "model.onnx").read_text() == "a model"
    kept = np.load(outputs)
    assert kept["0"].tolist() == [2, 3, 2, 2]
    np.testing.assert_array_equal(kept["1"], FEEDS["x"] * 2)


@pytest.mark.parametrize("name, bits", [("openvino", 32), ("openvino-bf16", 16), ("openvino-int8", 32)])
def test_openvino_at_each_precision(tmp_path: Path, name: str, bits: int) -> None:
    (ready, _), outputs = start(tmp_path, name, OPENVINO)
    assert ready == {"version": "2026.1.0"}
    kept = np.load(outputs)
    assert [kept[place].tolist() for place in ("0", "1")] == [[bits], [3]], "in the order of the model's outputs"


def test_a_package_that_is_not_there_is_said(tmp_path: Path) -> None:
    (answer,), outputs = start(tmp_path, "deepsparse", "raise ImportError('numpy is too new')")
    assert answer == {"error": "ImportError: numpy is too new"}
    assert not outputs.exists()


def test_only_numbers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "outputs.npz"
    worker.keep(str(path), [np.array(["text"]), [1, 2], np.array([True]), np.array([None]), np.float32([1.5])])
    with np.load(path, allow_pickle=False) as kept:
        assert {place: kept[place].tolist() for place in kept.files} == {"2": [True], "4": [1.5]}
